"""The terminal side without a terminal: words, tables, progress, markdown blocks, and the chat's conversation."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrun import cli
from qwenrun.engine.events import Done, Event, Stats, Token
from qwenrun.engine.sampler import SamplingParams
from qwenrun.errors import DoesNotFitError, ModelError, UsageError
from qwenrun.ui import console, quantize, screen
from qwenrun.ui.chat import ChatOptions, answer, describe, question_from
from qwenrun.ui.models import find_model, plan_model
from qwenrun.ui.progress import Progress
from qwenrun.ui.repl import Repl, unquoted
from qwenrun.ui.tables import fields, table

ROOT = Path(__file__).resolve().parents[2]


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Tty:
    """A capable terminal. A test makes it stdout itself: pytest puts its own there after the fixtures."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Tty()


# -- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (3 * 2**40, "3,072.0 GiB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert console.size(nbytes) == text


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("4k", 4096), ("4K", 4096), ("1.5k", 1536), ("1m", 1 << 20), ("262_144", 262144)]
)
def test_token_counts(text: str, count: int) -> None:
    assert console.parse_tokens(text) == count


@given(st.integers(1, 1 << 30))
def test_token_counts_are_read_as_they_are_written(count: int) -> None:
    assert console.parse_tokens(console.tokens(count).replace(",", "")) == count


@pytest.mark.parametrize("text", ["", "0", "-4", "k", "4kk", "4 000", "1e3", "four", "nan", "9" * 40])
def test_what_is_no_token_count(text: str) -> None:
    with pytest.raises(UsageError) as error:
        console.parse_tokens(text)
    assert "--ctx" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 << 30), ("24g", 24 << 30), ("24GB", 24 * 10**9), ("512", 512), ("1.5 MiB", 3 << 19), ("7b", 7)],
)
def test_memory_sizes(text: str, nbytes: int) -> None:
    assert console.parse_size(text, "--budget") == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1g", "GiB", "1x", "1gg", "inf"])
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        console.parse_size(text, "--budget")


def test_control_characters_do_not_reach_a_terminal() -> None:
    hostile = "a\x1b]0;owned\x07\x1b[2Jb\x9b31mc\rd\x7f\te\n"
    shown = console.printable(hostile)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.endswith("\te\n")
    assert "owned" in shown


@given(st.text())
def test_printable_text_stays_as_it_is(text: str) -> None:
    if text.isprintable():
        assert console.printable(text) == text


def test_documents_are_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.document("test", 3, {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": (1, "ü\n")}})
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    assert json.loads(out) == {"schema": "qwenrun.test/3", "a": None, "b": [None, 1.5], "c": {"d": [1, "ü\n"]}}


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, tty: Tty) -> None:
    assert console.dim("x", tty) == "\x1b[2mx\x1b[0m"
    assert console.dim("x", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.dim("x", tty) == "x"
    assert console.can_move(tty)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.dim("x", tty) == "x"
    assert not console.can_move(tty)


# -- tables and progress --------------------------------------------------------------------------------------


def test_tables_are_aligned() -> None:
    text = table(("name", "size", "<note"), [("a", "1", "first"), (), ("日本", "1,000", "")])
    assert text.splitlines() == [
        "name   size  note",
        "----  -----  -----",
        "a         1  first",
        "----  -----  -----",
        "日本  1,000",
    ]


def test_tables_hold_no_escape_of_a_hostile_name() -> None:
    assert "\x1b" not in table(("name",), [("evil\x1b[2J\nname",)])
    assert len(table(("name",), [("evil\nname",)]).splitlines()) == 3


def test_fields_without_a_value_are_left_out() -> None:
    assert fields([("a", "1"), ("long", ""), ("bb", "2")]) == "a   1\nbb  2"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of our own: `clock.now` seconds."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr("qwenrun.ui.progress.time.monotonic", lambda: time.now)
    return time


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tty: Tty, clock: SimpleNamespace) -> None:
    monkeypatch.setattr(sys, "stderr", tty)
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("work") as progress:
        for done in range(11):
            progress(done << 20, 10 << 20, "tensor")
            clock.now += 0.5
    drawn = tty.getvalue()
    assert "\n" not in drawn
    assert "100% 10.0 MiB of 10.0 MiB, 2.0 MiB/s" in drawn
    assert " 50% 5.0 MiB of 10.0 MiB, 2.0 MiB/s, 2.5 s left, tensor" in drawn
    assert drawn.endswith("\r\x1b[2K")


def test_plain_lines_elsewhere_and_ever_fewer(capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    with Progress("work", unit="questions") as progress:
        for done in range(3600):
            progress(done, 3600)
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert 60 <= len(lines) <= 70
    assert lines[0] == "work: 0% 5 questions of 3,600 questions, 1.0/s, 59:55 left"
    assert all(line.isprintable() for line in lines)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work") as progress:
        progress(1, 1)
    with Progress("work", quiet=True) as progress:
        progress(1, 1)
    assert capsys.readouterr().err == ""


# -- markdown -------------------------------------------------------------------------------------------------

ANSWER = """\
# Title

A paragraph
of two lines.

- one

  still one
- two

```python
def f():

    return "```"
```

| a | b |
|---|---|
| 1 | 2 |

The end."""

BLOCKS = [
    "# Title",
    "A paragraph\nof two lines.",
    "- one\n\n  still one\n- two",
    '```python\ndef f():\n\n    return "```"\n```',
    "| a | b |\n|---|---|\n| 1 | 2 |",
]


def test_blocks_of_markdown() -> None:
    assert screen.split_blocks(ANSWER) == (BLOCKS, "The end.")


@given(st.lists(st.integers(1, 9)))
def test_blocks_do_not_depend_on_how_the_text_comes(sizes: list[int]) -> None:
    done: list[str] = []
    pending, rest = "", ANSWER
    for size in [*sizes, len(ANSWER)]:
        complete, pending = screen.split_blocks(pending + rest[:size])
        done, rest = done + complete, rest[size:]
    assert (done, pending) == (BLOCKS, "The end.")


@given(st.text(alphabet="a`~ -\n", max_size=60))
def test_no_text_is_lost_in_blocks(text: str) -> None:
    blocks, rest = screen.split_blocks(text)
    assert "".join("".join([*blocks, rest]).split()) == "".join(text.split())


def on_screen(output: str) -> list[str]:
    """What a terminal would show: newline, carriage return, cursor up and erase are obeyed."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", output, re.DOTALL):
        arguments, command, char = match.groups()
        if char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
        elif command == "A":
            row = max(row - int(arguments or 1), 0)
        elif command == "K":
            lines[row] = "" if arguments == "2" else lines[row][:column]
        else:
            assert command in "mhl", f"the terminal of this test does not know {match[0]!r}"
    return [line.rstrip() for line in lines]


def test_an_answer_is_rendered_once_however_it_comes(monkeypatch: pytest.MonkeyPatch, tty: Tty) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setattr(screen, "REDRAW_EVERY", 0.0)
    monkeypatch.setattr(sys, "stdout", tty)
    view = screen.make_view()
    assert isinstance(view, screen.MarkdownView)
    for char in ANSWER:
        view.token(Token(0, char, "answer"))
    view.end()
    shown = on_screen(tty.getvalue())
    text = "\n".join(shown)
    for word in ("Title", "A paragraph of two lines.", "still one", 'return "```"', "The end."):
        assert text.count(word) == 1, text
    assert "# Title" not in text
    assert "```python" not in text
    assert shown[-1] == ""
    assert [i for i, line in enumerate(shown) if "The end." in line] == [len(shown) - 2]


def test_reasoning_is_dim_and_apart(monkeypatch: pytest.MonkeyPatch, tty: Tty) -> None:
    monkeypatch.setattr(sys, "stdout", tty)
    view = screen.make_view()
    for token in (Token(1, "why", "reasoning"), Token(2, "\x1b[2J", "reasoning"), Token(3, "because", "answer")):
        view.token(token)
    view.end()
    assert tty.getvalue().startswith("\x1b[2mwhy\x1b[0m\x1b[2m␛[2J\x1b[0m\n\n")
    assert on_screen(tty.getvalue()) == ["why␛[2J", "", "because", ""]


def test_plain_text_where_colour_is_not_wanted(monkeypatch: pytest.MonkeyPatch, tty: Tty) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", tty)
    view = screen.make_view()
    assert not isinstance(view, screen.MarkdownView)
    view.token(Token(1, "**why**", "reasoning"))
    view.token(Token(2, "# because", "answer"))
    view.end()
    assert tty.getvalue() == "**why**\n\n# because\n"


# -- one answer -----------------------------------------------------------------------------------------------


class FakeSession:
    """Gives the events it was told to, and remembers what it was asked."""

    def __init__(self, script: list[list[Event | BaseException]]) -> None:
        self.script, self.asked, self.position, self.resets = script, [], 7, 0  # type: ignore[var-annotated]

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[Event]:
        self.asked.append(([dict(message) for message in messages], options))
        for event in self.script.pop(0):
            if isinstance(event, BaseException):
                raise event
            yield event

    def reset(self) -> None:
        self.resets += 1


class FakeEngine:
    """As much of an Engine as the chat sees."""

    def __init__(self, *script: list[Event | BaseException]) -> None:
        self.fake = FakeSession(list(script))
        self.config = SimpleNamespace(name="fake")
        self.path, self.is_pack, self.thinking_default = Path("/fake"), True, True

    def session(self) -> FakeSession:
        return self.fake

    def sampling(self, think: bool | None = None) -> SamplingParams:
        return SamplingParams(temperature=0.5 if think is False else 0.25, top_k=3)


def said(*texts: str, reasoning: str = "", reason: Any = "stop") -> list[Event | BaseException]:
    events: list[Event | BaseException] = [Token(0, reasoning, "reasoning")] if reasoning else []
    events += [Token(1, text, "answer") for text in texts]
    return [*events, Done(reason, "".join(texts), reasoning, (1,) * len(texts), Stats(9, 4, len(texts), 2, 0.5, 0.25))]


def ask(engine: FakeEngine, question: str = "why?", **options: Any) -> None:
    answer(engine, question, ChatOptions(**options))  # type: ignore[arg-type]


def test_stdout_is_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    ask(FakeEngine(said("be", "cause", reasoning="hm")))
    out, err = capsys.readouterr()
    assert out == "because\n"
    assert err == ""


@pytest.mark.parametrize(("text", "out"), [("a\n", "a\n"), ("a\n\n", "a\n\n"), ("", "\n"), ("\x1b[1m", "\x1b[1m\n")])
def test_the_answer_ends_with_one_newline(text: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask(FakeEngine(said(text)))
    assert capsys.readouterr().out == out


def test_a_terminal_gets_no_control_character_of_the_answer(monkeypatch: pytest.MonkeyPatch, tty: Tty) -> None:
    monkeypatch.setattr(sys, "stdout", tty)
    ask(FakeEngine(said("a\x1b[2J")))
    assert tty.getvalue() == "a␛[2J\n"


def test_options_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(said("x"))
    ask(engine, system="be short", think=False, max_tokens=5, sampling={"seed": 3, "temperature": 0.0})
    messages, options = engine.fake.asked[0]
    assert messages == [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}]
    assert options["think"] is False
    assert options["max_tokens"] == 5
    assert options["params"] == SamplingParams(temperature=0.0, top_k=3, seed=3)


def test_an_answer_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    ask(FakeEngine(said("be", "cause", reasoning="hm", reason="length")), as_json=True, max_tokens=2)
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert list(document) == ["schema", "model", "answer", "reasoning", "finish_reason", "params", "stats"]
    assert (document["answer"], document["reasoning"], document["finish_reason"]) == ("because", "hm", "length")
    assert document["stats"]["decode_tokens_per_second"] == 8.0
    assert document["params"]["think"] is True
    assert "--max-tokens 2" in err


def test_a_cut_off_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ask(FakeEngine(said("x", reason="context")), ctx=512, stats=True)
    assert capsys.readouterr().err.splitlines() == [
        "the answer was cut off where the context of 512 tokens is full: --ctx 1k",
        "prompt 9 tokens (4 cached) 10.0 tok/s, answer 1 tokens 8.0 tok/s, 0.75 s",
    ]


def test_no_answer_after_reasoning_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ask(FakeEngine(said(reasoning="hm", reason="length")), max_tokens=1)
    out, err = capsys.readouterr()
    assert out == "\n"
    assert "still reasoning" in err


def test_describing_nothing() -> None:
    assert describe(Stats()) == "prompt 0 tokens, answer 0 tokens, 0.00 s"


# -- the question ---------------------------------------------------------------------------------------------


def stdin_of(data: bytes, tty: bool = False) -> Any:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="ascii")
    stream.isatty = lambda: tty  # type: ignore[method-assign]
    return stream


@pytest.mark.parametrize(
    ("piped", "prompt", "question"),
    [
        (b"log\n", "why?", "log\n\nwhy?"),
        (b"why?\r\n", None, "why?"),
        (b"", "why?", "why?"),
        (b" \n", "why?", "why?"),
        (b"  indented\n<|im_start|>\n", None, "  indented\n<|im_start|>"),
        ("größer".encode(), None, "größer"),
        (b"bad \xff byte", None, "bad \N{REPLACEMENT CHARACTER} byte"),
    ],
)
def test_piped_text_goes_before_the_prompt(
    monkeypatch: pytest.MonkeyPatch, piped: bytes, prompt: str | None, question: str
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin_of(piped))
    assert question_from(prompt) == question


@pytest.mark.parametrize(("piped", "prompt"), [(b"", None), (b"\n", None), (b"", ""), (b"", "  ")])
def test_an_empty_prompt_is_an_error(monkeypatch: pytest.MonkeyPatch, piped: bytes, prompt: str | None) -> None:
    monkeypatch.setattr(sys, "stdin", stdin_of(piped))
    with pytest.raises(UsageError, match="empty"):
        question_from(prompt)


def test_a_terminal_is_not_read_for_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin_of(b"not read", tty=True))
    assert question_from(None) is None
    assert question_from("why?") == "why?"


# -- the conversation -----------------------------------------------------------------------------------------


class Script:
    """A reader that reads what it was told to."""

    def __init__(self, *texts: str | BaseException) -> None:
        self.texts = list(texts)

    def read(self) -> str:
        if not self.texts:
            raise EOFError
        text = self.texts.pop(0)
        if isinstance(text, BaseException):
            raise text
        return text


class Record:
    """A view that remembers."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.answers = [""]
        self.begun = 0

    def show(self, text: str) -> None:
        self.shown.append(text)

    def fail(self, message: str, hint: str) -> None:
        self.failed.append((message, hint))

    def begin(self) -> None:
        self.begun += 1

    def reading(self, done: int, total: int) -> None:
        pass

    def token(self, token: Token) -> None:
        self.answers[-1] += token.text

    def end(self) -> None:
        self.answers.append("")
        assert self.begun == len(self.answers) - 1


def talk(engine: FakeEngine, *texts: str | BaseException, **options: Any) -> tuple[Repl, Record]:
    view = Record()
    repl = Repl(engine, ChatOptions(**options), Script(*texts), view)  # type: ignore[arg-type]
    repl.run()
    return repl, view


USER = {"role": "user"}
ASSISTANT = {"role": "assistant"}


def test_a_conversation_is_remembered() -> None:
    engine = FakeEngine(said("Hi.", reasoning="greet"), said("Ada."))
    _, view = talk(engine, "I am Ada", "who am I?")
    assert view.answers == ["greetHi.", "Ada.", ""]
    assert engine.fake.asked[1][0] == [
        USER | {"content": "I am Ada"},
        ASSISTANT | {"content": "Hi."},
        USER | {"content": "who am I?"},
    ]


def test_reset_forgets() -> None:
    engine = FakeEngine(said("a"), said("b"))
    talk(engine, "one", "/reset", "two")
    assert engine.fake.asked[1][0] == [USER | {"content": "two"}]
    assert engine.fake.resets == 1


def test_system_and_think() -> None:
    engine = FakeEngine(said("a"), said("b"), said("c"))
    _, view = talk(
        engine, "/system be short", "one", "/think off", '/system ""', "two", "/think on", "three", "/think", "/think x"
    )
    roles = [[message["role"] for message in messages] for messages, _ in engine.fake.asked]
    assert roles == [["system", "user"], ["user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"]]
    assert [options["think"] for _, options in engine.fake.asked] == [None, False, True]
    # Sampling without thinking is another than with it.
    assert [options["params"].temperature for _, options in engine.fake.asked] == [0.25, 0.5, 0.25]
    assert view.shown == [
        "system prompt: be short",
        "thinking is off",
        "no system prompt",
        "thinking is on",
        "thinking is on",
        "/think on, or /think off",
    ]


def test_a_stopped_answer_stays_as_far_as_it_got() -> None:
    engine = FakeEngine([Token(1, "half an", "answer"), KeyboardInterrupt()], said("yes"))
    _, view = talk(engine, "one", "two")
    assert view.shown == ["stopped"]
    assert view.answers == ["half an", "yes", ""]
    assert engine.fake.asked[1][0][1] == ASSISTANT | {"content": "half an"}


@pytest.mark.parametrize("before", [[], [Token(1, "hm", "reasoning")], [Token(1, " ", "answer")]])
def test_a_question_without_an_answer_is_taken_back(before: list[Event | BaseException]) -> None:
    engine = FakeEngine([*before, KeyboardInterrupt()], said("yes"))
    _, view = talk(engine, "one", "two")
    assert view.shown == ["stopped; the question was taken back"]
    assert engine.fake.asked[1][0] == [USER | {"content": "two"}]


def test_an_error_does_not_end_the_chat() -> None:
    engine = FakeEngine([UsageError("too long", "--ctx 8k")], said("yes"))
    repl, view = talk(engine, "one", "two")
    assert view.failed == [("too long", "--ctx 8k")]
    assert repl.messages == [USER | {"content": "two"}, ASSISTANT | {"content": "yes"}]


def test_slashes_that_are_not_commands() -> None:
    engine = FakeEngine(said("a"), said("b"), said("c"))
    _, view = talk(engine, "/etc/passwd is what?", " /help", "/first line\nsecond line", "/nope", "  ")
    questions = [messages[-1]["content"] for messages, _ in engine.fake.asked]
    assert questions == ["/etc/passwd is what?", " /help", "/first line\nsecond line"]
    assert len(view.shown) == 1
    assert "/nope" in view.shown[0]


def test_bye_and_the_end_of_input_leave() -> None:
    engine = FakeEngine(said("a"))
    talk(engine, "/bye", "never asked")
    _, view = talk(engine, KeyboardInterrupt())
    assert engine.fake.asked == []
    assert view.shown == ["Ctrl-D or /bye leaves"]


def test_stats_on_request_and_always() -> None:
    _, view = talk(FakeEngine(said("a", "b")), "/stats", "one", "/stats", stats=True)
    line = "prompt 9 tokens (4 cached) 10.0 tok/s, answer 2 tokens 8.0 tok/s, 0.75 s"
    assert view.shown == ["context 7 of 4,096 tokens", line, f"{line}\ncontext 7 of 4,096 tokens"]


def test_help_names_every_command() -> None:
    repl, view = talk(FakeEngine(), "/help")
    for name in [*repl._commands, "bye"]:
        assert f"/{name}" in view.shown[0]


@pytest.mark.parametrize(
    ("text", "bare"),
    [('"""a\nb"""', "a\nb"), ('"""\na\n"""', "a"), ('"a"', '"a"'), ('""" a', '""" a'), ('"""""', '"""""'), ("a", "a")],
)
def test_three_quotes_are_marks_and_others_are_text(text: str, bare: str) -> None:
    assert unquoted(text) == bare


@pytest.mark.parametrize(
    ("text", "is_open"), [('"""a', True), ('"""', True), ('"""a"""', False), ("a", False), ('a"""', False)]
)
def test_enter_inside_three_quotes_begins_a_line(text: str, is_open: bool) -> None:
    assert screen.is_open(text) is is_open


def test_history_lies_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert screen.history_path() == tmp_path / "qwenrun" / "history"
    screen._history()
    assert screen.history_path().stat().st_mode & 0o777 == 0o600
    assert screen.history_path().parent.stat().st_mode & 0o777 == 0o700
    screen.history_path().chmod(0o644)
    screen._history()
    assert screen.history_path().stat().st_mode & 0o777 == 0o600


def test_no_history_through_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "qwenrun").mkdir()
    (tmp_path / "victim").write_text("mine")
    screen.history_path().symlink_to(tmp_path / "victim")
    screen._history()
    assert (tmp_path / "victim").read_text() == "mine"


# -- reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.language_model.layers.17.mlp.gate.weight", "mlp.gate"),
        ("model.language_model.layers.3.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp.self_attn.q_proj"),
        ("model.visual.blocks.5.attn.qkv.weight", "visual.attn.qkv"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_kinds_of_tensors(name: str, kind: str) -> None:
    assert quantize.kind(name) == kind


def row(name: str, part: str, form: str, sqnr: float | None, shape: tuple[int, ...] = (64, 32)) -> SimpleNamespace:
    nbytes = {"int4": 1024, "bf16": 4096}[form]
    nmse = None if sqnr is None else 10 ** (-sqnr / 10)
    said = {"sqnr_db": sqnr, "nmse": nmse, "peak_to_rms": None if sqnr is None else 4.0 + sqnr}
    return SimpleNamespace(name=name, part=part, format=form, shape=shape, bytes=nbytes, **said)


def test_a_report_of_many_layers_stays_short() -> None:
    rows = []
    for i in range(48):
        layer = f"model.language_model.layers.{i}."
        rows.append(row(f"{layer}mlp.experts.down_proj", "routed", "int4", 10.0 + i))
        rows.append(row(f"{layer}input_layernorm.weight", "norm", "bf16", None))
        rows.append(row(f"{layer}post_attention_layernorm.weight", "norm", "bf16", None))
    text = quantize.render(SimpleNamespace(rows=rows))
    lines = text.splitlines()
    assert len(lines) < 30
    experts = next(line for line in lines if line.startswith("mlp.experts.down_proj"))
    assert experts.split()[1:] == ["int4", "48", "48.0", "KiB", "4.000", "33.5", "10.0"]
    assert next(line for line in lines if line.startswith("norm (exact)")).split()[-5:] == [
        "bf16",
        "96",
        "384.0",
        "KiB",
        "16.000",
    ]
    worst = lines[lines.index("worst:") + 3 :][:5]
    assert [line.split()[2] for line in worst] == ["10.0", "11.0", "12.0", "13.0", "14.0"]
    outliers = lines[lines.index("outliers:") + 3 :][:5]
    assert [line.split()[2] for line in outliers] == ["61.0", "60.0", "59.0", "58.0", "57.0"]


def test_many_warnings_are_cut_short() -> None:
    assert quantize.summarised(["a", "b"]) == ["a", "b"]
    assert quantize.summarised([str(i) for i in range(9)])[-1].startswith("and 4 more")


# -- models ---------------------------------------------------------------------------------------------------


def test_a_missing_model_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        find_model(str(tmp_path / "nothing"))
    assert "qwenrun chat" in error.value.hint
    with pytest.raises(ModelError) as error:
        find_model("Qwen/Qwen3.5-122B-A10B")
    assert "qwenrun pull Qwen/Qwen3.5-122B-A10B" in error.value.hint
    with pytest.raises(ModelError, match="neither a pack"):
        find_model(str(tmp_path))


def test_a_plan_that_does_not_fit_is_refused(
    checkpoint_maker: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_maker(tmp_path / "tiny")
    assert plan_model(folder, ctx=256, kv="bf16", ram=1 << 30, vram=None) == 1 << 30
    assert re.match(r"RAM [\d.]+ MiB: weights .*, KV@256 .*, runtime 320.0 MiB", capsys.readouterr().err)
    with pytest.raises(DoesNotFitError, match=r"MiB more than the 300 MiB there are"):
        plan_model(folder, ctx=256, kv="bf16", ram=300 << 20, vram=None)
    monkeypatch.setattr("qwenrun.plan.device.free_memory", lambda: 300 << 20)
    with pytest.raises(DoesNotFitError, match=r"more than the 276 MiB there are"):
        plan_model(folder, ctx=256, kv="bf16", ram=None, vram=None)
    monkeypatch.setattr("qwenrun.plan.device.free_memory", lambda: None)
    assert plan_model(folder, ctx=256, kv="bf16", ram=None, vram=None, quiet=True) is None


# -- the way out ----------------------------------------------------------------------------------------------


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qwenrun", *arguments])
    return cli.main()


def raising(error: BaseException) -> Any:
    def vram(*_: Any, **__: Any) -> None:
        raise error

    return vram


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (ZeroDivisionError("by zero"), 1, "error: internal: ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
        (MemoryError(), 4, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 4, "error: out of memory"),
        (ModelError("no model\x1b[2J\n  12 bytes", "get one"), 3, "error: no model␛[2J"),
        (SystemExit(7), 7, ""),
    ],
)
def test_every_error_becomes_words_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, first: str
) -> None:
    monkeypatch.delenv("QWENRUN_DEBUG", raising=False)
    monkeypatch.setattr("qwenrun.ui.vram.vram", raising(error))
    assert run_main(monkeypatch, "vram") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(first)
    assert "Traceback" not in err
    if isinstance(error, ModelError):
        assert err.splitlines()[1:] == ["  12 bytes", "hint: get one"]
    if isinstance(error, ZeroDivisionError):
        assert "QWENRUN_DEBUG=1" in err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QWENRUN_DEBUG", "1")
    monkeypatch.setattr("qwenrun.ui.vram.vram", raising(ZeroDivisionError("by zero")))
    assert run_main(monkeypatch, "vram") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: internal: ZeroDivisionError: by zero"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["chat", "--temprature", "1"], "--temperature"),
        (["vram", "--kv", "int3"], "--kv 'int3' is none of bf16, int8, f32"),
        (["chat", "-p", "x", "--temperature", "-1"], "-1 is not at least 0"),
        (["chat", "-p", "x", "--temperature", "nan"], "nan is not at least 0"),
        (["chat", "-p", "x", "--top-p", "1.5"], "1.5 is not at least 0 and at most 1"),
        (["chat", "-p", "x", "--top-k", "many"], "'many' is not a whole number"),
        (["chat", "-p", "x", "--seed", "9" * 30], "--seed"),
        (["bench", "--runs", "0"], "0 is not at least 1"),
        (["quantize", "somewhere"], "--out"),
        (["vram", "--ctx", "4k,"], "--ctx ''"),
        (["vram", "no-such-model"], "no-such-model"),
    ],
)
def test_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin_of(b"", tty=True))
    assert run_main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert "\nhint: " in err


def test_every_command_has_help_with_its_example_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    names = list(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    kept = ["pull", "ls", "du", "rm", "verify", "show", "export"]
    assert names == ["quantize", "observe", "chat", "vram", "bench", "eval", *kept, "doctor", "selftest"]
    for arguments in ([], ["--help"], *([name, "-h"] for name in names)):
        assert run_main(monkeypatch, *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Examples:"
        assert lines[1].startswith(
            f"  qwenrun {arguments[0] if len(arguments) and arguments[0] in names else ''}".rstrip()
        )
        assert max(len(line) for line in lines) <= 80


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    page = ROOT / "docs" / "cli.md"
    assert page.read_text() == cli.cli_markdown(), "make docs"


def test_the_page_names_every_option() -> None:
    import typer

    page = cli.cli_markdown()
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        section = page.partition(f"## qwenrun {name}\n")[2].partition("\n## ")[0]
        for param in command.params:
            for spelling in [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else []:
                assert spelling in section, f"{name} {spelling}"


def test_unchanged_defaults_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ChatOptions] = []
    monkeypatch.setattr("qwenrun.ui.chat.chat", seen.append)
    assert run_main(monkeypatch, "chat", "-p", "x") == 0
    assert run_main(monkeypatch, "chat", "-p", "x", "--temperature", "0", "--top-k", "0", "--no-think") == 0
    assert seen[0].sampling == {}
    assert seen[0].think is None
    assert seen[1] == replace(seen[0], sampling={"temperature": 0.0, "top_k": 0}, think=False)
