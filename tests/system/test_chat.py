"""The chat at a real terminal (a pty): what a person types, and what comes back."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Run, Terminal

PROMPT = r">>> $"
QUESTION = "What does exit code 4 mean?"
# Nearly any token, one after the other: an answer that does not end soon.
ENDLESS = ("--temperature", "100", "--seed", "5")


def squeezed(text: str) -> str:
    """Without the breaks that the width of a terminal makes."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def expected(qwenrun: Run, demo_pack: Path) -> dict[str, Any]:
    return json.loads(qwenrun("chat", "-m", demo_pack, "-p", QUESTION, "--temperature", "0", "--json").stdout)


def test_a_conversation(
    terminal: Callable[..., Terminal], demo_pack: Path, expected: dict[str, Any], home: Path
) -> None:
    chat = terminal("chat", "-m", demo_pack, "--temperature", "0", "--stats")
    assert "demo.pack, context 4,096 tokens" in chat.expect(PROMPT)

    chat.type(f"{QUESTION}\r")
    shown = chat.expect(r"tok/s, [\d.]+ s\n(.|\n)*>>> $")
    assert squeezed(expected["answer"]) in squeezed(shown)

    chat.type("/help\r")
    assert "/system" in chat.expect(r"/bye(.|\n)*>>> $")

    chat.type("/think on\r")
    chat.expect(r"thinking is on(.|\n)*>>> $")

    chat.type("\x03")
    chat.expect(r"Ctrl-D or /bye leaves(.|\n)*>>> $")

    chat.type("/nonsense\r")
    chat.expect(r"there is no /nonsense(.|\n)*>>> $")

    # Alt-Enter and three quotes: nothing is sent before the text is whole.
    chat.type('"""first line\r')
    chat.expect(r"first line\n")
    chat.type('and a last"""\r')
    chat.expect(r"tok/s, [\d.]+ s\n(.|\n)*>>> $")
    chat.type("one\x1b\rtwo\r")
    chat.expect(r"tok/s, [\d.]+ s\n(.|\n)*>>> $")

    chat.type("/stats\r")
    chat.expect(r"context [\d,]+ of 4,096 tokens(.|\n)*>>> $")
    chat.type("/bye\r")
    assert chat.finish() == 0

    history = home / ".local" / "state" / "qwenrun" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert QUESTION in history.read_text()
    assert "and a last" in history.read_text()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal], demo_pack: Path) -> None:
    chat = terminal("chat", "-m", demo_pack, *ENDLESS)
    chat.expect(PROMPT)
    chat.type("Tell me a story\r")
    chat.expect(r"Tell me a story\s+\S")
    chat.type("\x03")
    chat.expect(r"stopped(.|\n)*>>> $")

    # The session is as good as before: the next answer comes, and can be stopped too.
    chat.type("Another\r")
    chat.expect(r"Another\s+\S")
    chat.type("\x03")
    chat.expect(r"stopped(.|\n)*>>> $")

    chat.type("/reset\r")
    chat.expect(r"forgotten(.|\n)*>>> $")
    chat.type("\x04")
    assert chat.finish() == 0
    assert "Traceback" not in chat.output


def test_too_long_a_question_does_not_end_the_chat(terminal: Callable[..., Terminal], demo_pack: Path) -> None:
    chat = terminal("chat", "-m", demo_pack, "--ctx", "64", "--temperature", "0", TERM="dumb")
    chat.expect(PROMPT)
    chat.type("one two three four five " * 20 + "\r")
    chat.expect(r"error: [\d,]+ tokens do not fit(.|\n)*hint: (.|\n)*>>> $")
    chat.type("/bye\r")
    assert chat.finish() == 0


def test_one_answer_on_a_terminal(terminal: Callable[..., Terminal], demo_pack: Path, expected: dict[str, Any]) -> None:
    chat = terminal("chat", "-m", demo_pack, "-p", QUESTION, "--temperature", "0", "--think")
    assert chat.finish(60) == 0
    # The reasoning is there, dimmed, and before the answer.
    assert "\x1b[2m" in chat.output
    plain = terminal("chat", "-m", demo_pack, "-p", QUESTION, "--temperature", "0", NO_COLOR="1", TERM="dumb")
    assert plain.finish(60) == 0
    assert "\x1b" not in plain.output
    assert squeezed(plain.output) == squeezed(expected["answer"])


def test_without_a_terminal_for_the_answer_there_is_no_prompt(
    terminal: Callable[..., Terminal], demo_pack: Path
) -> None:
    chat = terminal("chat", "-m", demo_pack, "--json")
    assert chat.finish() == 2
    assert "--json answers one prompt" in chat.output
