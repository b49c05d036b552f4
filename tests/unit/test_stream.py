"""Reasoning told from answer at every possible cut of the stream."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.text.stream import ThinkSplitter, ToolCall, parse_tool_calls
from qwenrun.text.template import render, to_text

# (begins inside a think block, text, reasoning, answer)
CASES = [
    (True, "I add.\n\n2+2\n</think>\n\nFour.\nDone", "I add.\n\n2+2", "Four.\nDone"),
    (True, "\n</think>\n\nFour", "", "Four"),
    (True, "no end yet, a < b and </thin", "no end yet, a < b and </thin", ""),
    (True, "", "", ""),
    (False, "Four </think> is text here", "", "Four </think> is text here"),
    (False, "<think>\nhm\n</think>\n\nFour", "hm", "Four"),
    (False, "\n\n<th is no tag", "", "<th is no tag"),
    (False, "a <think> in the middle", "", "a <think> in the middle"),
    (False, "ends with space \n", "", "ends with space \n"),
    (False, "\n\n<thi", "", "<thi"),
    (True, "a\n</think>\n\nb </think> c", "a", "b </think> c"),
]


def split(thinking: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ThinkSplitter(thinking)
    out = [pair for piece in pieces for pair in splitter.push(piece)] + splitter.flush()
    return tuple("".join(t for kind, t in out if kind == wanted) for wanted in ("reasoning", "answer"))  # type: ignore[return-value]


@pytest.mark.parametrize(("thinking", "text", "reasoning", "answer"), CASES)
def test_every_cut(thinking: bool, text: str, reasoning: str, answer: str) -> None:
    expected = (reasoning, answer)
    assert split(thinking, [text]) == expected
    assert split(thinking, list(text)) == expected
    for cut in range(len(text)):
        assert split(thinking, [text[:cut], text[cut:]]) == expected
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for _ in range(50):
        cuts = sorted(chance.sample(range(len(text) + 1), min(3, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert split(thinking, pieces) == expected, f"seed {seed}"


# (begins inside a think block, text with control tokens in [brackets], reasoning, answer)
TOKEN_CASES = [
    (
        True,
        "hm, </think> ends it\n[</think>]\n\nFour </think> <think>",
        "hm, </think> ends it",
        "Four </think> <think>",
    ),
    (True, "[<think>]\nhm\n[</think>]\n\nFour", "hm", "Four"),
    (False, "<think>\nquoted\n</think>\n\nFour", "", "<think>\nquoted\n</think>\n\nFour"),
    (False, "[<think>]\nhm\n[</think>]\n\nFour", "hm", "Four"),
    (False, "Four[</think>] and five", "", "Four and five"),
    (True, "a \n[<think>]\nb[</think>]c", "a \n\nb", "c"),
    (False, "One[<think>]\nhm[</think>]\n\nTwo", "hm", "OneTwo"),
    (True, "hm[</think>]\n\n[<tool_call>]\nx\n[</tool_call>]", "hm", "<tool_call>\nx\n</tool_call>"),
    (True, "cut [<tool_call>] \n\n", "cut <tool_call>", ""),
    (True, "[�</think>]Four", "�", "Four"),
]


@pytest.mark.parametrize(("thinking", "text", "reasoning", "answer"), TOKEN_CASES)
@pytest.mark.parametrize("width", [1, 2, 5, 100])
def test_tags_are_tokens(thinking: bool, text: str, reasoning: str, answer: str, width: int) -> None:
    """Where control tokens are known, a spelled tag is text like any other."""
    splitter = ThinkSplitter(thinking)
    out = []
    for number, piece in enumerate(text.replace("]", "[").split("[")):
        cuts = [piece] if number % 2 else [piece[i : i + width] for i in range(0, len(piece), width)]
        for cut in cuts:
            out += splitter.push(cut, control=bool(number % 2))
    out += splitter.flush()
    assert "".join(t for kind, t in out if kind == "reasoning") == reasoning
    assert "".join(t for kind, t in out if kind == "answer") == answer


def test_a_quoted_tag_is_not_held_back() -> None:
    splitter = ThinkSplitter(True)
    assert splitter.push("see </thi", control=False) == [("reasoning", "see </thi")]
    assert splitter.push("nk> \n", control=False) == [("reasoning", "nk>")]
    assert splitter.push("more", control=False) == [("reasoning", " \nmore")]


def test_text_is_not_held_back_for_long() -> None:
    splitter = ThinkSplitter(False)
    assert splitter.push("Hello") == [("answer", "Hello")]
    assert splitter.push(" world </") == [("answer", " world </")]


def test_tool_calls() -> None:
    text = (
        "Let me look.\n\n<tool_call>\n<function=get>\n<parameter=city>\nKöln\n</parameter>\n<parameter=note>\n"
        "two\nlines\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=ping>\n</function>\n</tool_call>"
    )
    content, calls = parse_tool_calls(text)
    assert content == "Let me look."
    assert calls == [ToolCall("get", {"city": "Köln", "note": "two\nlines"}), ToolCall("ping", {})]
    assert parse_tool_calls("just text <tool_call> cut off") == ("just text <tool_call> cut off", [])


words = st.text("ab \n{}=é", max_size=8)
arguments = st.dictionaries(st.text("abc_", min_size=1, max_size=4), words, max_size=3)


@given(words, st.lists(st.tuples(st.text("fg.", min_size=1, max_size=4), arguments), max_size=3))
@settings(max_examples=200, deadline=None)
def test_calls_come_back_from_the_template(content: str, calls: list[tuple[str, dict[str, str]]]) -> None:
    """What the chat template writes for an assistant's calls is read back as those calls."""
    said = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": name, "arguments": values}} for name, values in calls],
    }
    text = to_text(render([{"role": "user", "content": "q"}, said], add_generation_prompt=False))
    answer = text.rpartition("</think>\n\n")[2].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(answer) == (content.strip(), [ToolCall(name, values) for name, values in calls])


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>\n<function=a>\n", "<tool_call><function=a", "<tool_call>  ", "</function> ", "<parameter=a>\n"],
)
def test_hostile_answers_take_linear_time(unit: str) -> None:
    whole = "<tool_call><function=f><parameter=p>" + unit * 20_000 + "</function></tool_call>"
    begun = time.process_time()
    parse_tool_calls(unit * 20_000)
    parse_tool_calls(whole)
    assert time.process_time() - begun < 2  # a quadratic search takes minutes
