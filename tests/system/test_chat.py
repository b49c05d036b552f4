"""The chat at a real terminal (a pty): what a person types, and what comes back."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Terminal

TIMEOUT = 120
# After anything else, a prompt and nothing behind it. The terminal moves the cursor where a space would be.
PROMPT = r".*>>>\s*$"
# The program has taken a text, and the answer has begun.
BEGUN = "\N{RETURN SYMBOL}" + r"\s*\S"
STATS = r"tok/s, [\d.]+ s\n"
# Nearly any token, one after the other: an answer that does not end soon.
ENDLESS = ("--temperature", "100", "--seed", "5")


def squeezed(text: str) -> str:
    """Without the breaks that the width of a terminal makes."""
    return " ".join(text.split())


def test_a_conversation(
    terminal: Callable[..., Terminal], demo_pack: Path, question: str, answer: dict[str, Any], home: Path
) -> None:
    chat = terminal("chat", "-m", demo_pack, "--temperature", "0", "--stats")
    assert "demo.pack, context 4,096 tokens" in chat.expect(PROMPT)

    chat.type("/think on\r")
    chat.expect("thinking is on" + PROMPT)

    chat.type(f"{question}\r")
    shown = squeezed(chat.expect(STATS + PROMPT))
    assert squeezed(answer["answer"]) in shown
    assert shown.index(squeezed(answer["reasoning"])) < shown.index(squeezed(answer["answer"]))

    chat.type("/help\r")
    assert "/system" in chat.expect(r"/bye" + PROMPT)

    chat.type("\x03")
    chat.expect(r"Ctrl-D or /bye leaves" + PROMPT)

    chat.type("/nonsense\r")
    chat.expect(r"there is no /nonsense" + PROMPT)

    # Alt-Enter and three quotes: nothing is sent before the text is whole.
    chat.type('"""first line\r')
    chat.expect(r"first line\n")
    chat.type('and a last"""\r')
    chat.expect(STATS + PROMPT)
    chat.type("one\x1b\rtwo\r")
    chat.expect(STATS + PROMPT)

    # What is typed amid an answer is not shown there: it waits for the next prompt.
    chat.type(f"{question}\r")
    chat.expect(BEGUN)
    chat.type("/think\r")
    shown = chat.expect(r"thinking is on" + PROMPT)
    assert shown.index(">>>") < shown.index("/think")

    chat.type("/stats\r")
    chat.expect(r"context [\d,]+ of 4,096 tokens" + PROMPT)
    chat.type("/bye\r")
    assert chat.finish() == 0

    history = home / ".local" / "state" / "qwenrun" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert question in history.read_text()
    assert "and a last" in history.read_text()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal], demo_pack: Path) -> None:
    chat = terminal("chat", "-m", demo_pack, *ENDLESS)
    chat.expect(PROMPT)
    chat.type("Tell me a story\r")
    chat.expect(BEGUN)
    chat.type("\x03")
    chat.expect(r"stopped" + PROMPT)

    # The session is as good as before: the next answer comes, and can be stopped too.
    chat.type("Another\r")
    chat.expect(BEGUN)
    chat.type("\x03")
    chat.expect(r"stopped" + PROMPT)

    chat.type("/reset\r")
    chat.expect(r"forgotten" + PROMPT)
    chat.type("\x04")
    assert chat.finish() == 0
    assert "Traceback" not in chat.output


def test_a_plain_terminal_and_too_long_a_question(terminal: Callable[..., Terminal], demo_pack: Path) -> None:
    chat = terminal("chat", "-m", demo_pack, "--ctx", "64", "--temperature", "0", "--no-think", TERM="dumb")
    chat.expect(PROMPT)
    chat.type("one two three four five " * 20 + "\r")
    chat.expect(r"error: [\d,]+ tokens do not fit.*hint: " + PROMPT)
    chat.type("Count from 1 to 4\r")
    chat.expect(r"to 4\s+\S" + PROMPT)
    chat.type("/bye\r")
    assert chat.finish() == 0
    assert "\x1b" not in chat.output


def test_one_answer_on_a_terminal(
    terminal: Callable[..., Terminal], demo_pack: Path, question: str, answer: dict[str, Any]
) -> None:
    chat = terminal("chat", "-m", demo_pack, "-p", question, "--temperature", "0", "--think")
    assert chat.finish(TIMEOUT) == 0
    # The reasoning is there, dimmed, and before the answer.
    reasoning, _, shown = chat.output.rpartition("\x1b[0m")
    assert "\x1b[2m" in reasoning
    assert squeezed(shown) == squeezed(answer["answer"])


def test_without_a_prompt_json_has_nothing_to_answer(terminal: Callable[..., Terminal], demo_pack: Path) -> None:
    chat = terminal("chat", "-m", demo_pack, "--json")
    assert chat.finish(TIMEOUT) == 2
    assert "--json answers one prompt" in chat.output
