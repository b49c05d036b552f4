"""Reasoning told from answer at every possible cut of the stream."""

from __future__ import annotations

import random

import pytest

from qwenrun.text.stream import ThinkSplitter, ToolCall, parse_tool_calls

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
