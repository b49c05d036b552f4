"""The chat at a terminal: reads a line, shows an answer, and obeys a few commands that begin with a slash.

`Repl` knows neither keyboard nor screen: a reader gives it texts and a view shows them, so it can be tested
without a terminal. `screen` has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from qwenrun.engine.events import Done, Stats, Token
from qwenrun.errors import QwenrunError
from qwenrun.ui.chat import ChatOptions, describe, ending, parameters
from qwenrun.ui.models import model_name

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine

HELP = """\
/help             this list
/system [TEXT]    show or set the system prompt; /system "" removes it
/think on|off     reason before the answer, or not
/reset            forget the conversation
/stats            tokens and speed of the last answer, and how full the context is
/bye              leave (or Ctrl-D)

Ctrl-C stops an answer. Several lines: Alt-Enter, or begin and end with \"\"\".
A space before the slash sends a text that begins with one."""


class Reader(Protocol):
    """Where texts come from. `read` raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    def read(self) -> str: ...


class View(Protocol):
    """Where things are shown."""

    def show(self, text: str) -> None:
        """A message of the program."""

    def fail(self, message: str, hint: str) -> None:
        """An error that does not end the chat."""

    def begin(self) -> None:
        """A question was sent."""

    def reading(self, done: int, total: int) -> None:
        """Progress of the prompt."""

    def token(self, token: Token) -> None:
        """More of the answer, or of the reasoning."""

    def end(self) -> None:
        """The answer is over, whole or not."""


def repl(engine: Engine, options: ChatOptions) -> None:
    """Talk until the person leaves."""
    from qwenrun.ui.screen import make_view, open_reader

    view = make_view()
    view.show(f"{model_name(engine.config, engine.path)}, context {options.ctx:,} tokens. /help lists the commands.")
    Repl(engine, options, open_reader(), view).run()


class Repl:
    """One conversation. `messages` is what the model is shown with the next question."""

    def __init__(self, engine: Engine, options: ChatOptions, reader: Reader, view: View) -> None:
        self.messages: list[dict[str, str]] = []
        self._engine, self._options = engine, options
        self._reader, self._view = reader, view
        self._session = engine.session()
        self._system = options.system
        self._think = options.think
        self._stats: Stats | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: view.show(HELP),
            "system": self._set_system,
            "think": self._set_think,
            "reset": self._reset,
            "stats": self._show_stats,
        }

    def run(self) -> None:
        """Until /bye or the end of input."""
        while True:
            try:
                text = self._reader.read()
            except KeyboardInterrupt:
                self._view.show("Ctrl-D or /bye leaves")
                continue
            except EOFError:
                return
            if not text.strip():
                continue
            word, _, rest = text.partition(" ")
            # A path is not a command: a command is one word of letters.
            if word.startswith("/") and word[1:].isalpha() and "\n" not in text.rstrip():
                if word == "/bye":
                    return
                self._command(word[1:], rest.strip())
            else:
                self.ask(unquoted(text))

    def _command(self, name: str, rest: str) -> None:
        if name in self._commands:
            self._commands[name](rest)
        else:
            self._view.show(f"there is no /{name}: /help lists the commands, a space before it sends it as text")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = unquoted(text).strip('"') or None
        self._view.show(f"system prompt: {self._system}" if self._system else "no system prompt")

    def _set_think(self, text: str) -> None:
        if text not in ("", "on", "off"):
            self._view.show("/think on, or /think off")
            return
        if text:
            self._think = text == "on"
        on = self._engine.thinking_default if self._think is None else self._think
        self._view.show(f"thinking is {'on' if on else 'off'}")

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self._session.reset()
        self._stats = None
        self._view.show("forgotten")

    def _show_stats(self, _: str) -> None:
        held = f"context {self._session.position:,} of {self._options.ctx:,} tokens"
        self._view.show(f"{describe(self._stats)}\n{held}" if self._stats else held)

    def ask(self, question: str) -> None:
        """Have one question answered; what came of it becomes part of the conversation.

        An answer that is stopped stays as far as it got. A question without any answer is taken back, so that
        the conversation remains one of questions and answers.
        """
        self.messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            done = self._answer(answer)
        except KeyboardInterrupt:
            self._view.show("stopped" if "".join(answer).strip() else "stopped; the question was taken back")
        except QwenrunError as error:
            self._view.fail(error.message, error.hint)
        else:
            self._stats = done.stats
            answer = [done.text]
            for line in (ending(done, self._options), self._wanted_stats()):
                if line:
                    self._view.show(line)
        if text := "".join(answer).strip():
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def _answer(self, answer: list[str]) -> Done:
        """Show the events of one answer; its text is collected in `answer` as far as it comes."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        events: Any = self._session.chat(
            [*system, *self.messages],
            think=self._think,
            params=parameters(self._engine, self._options, self._think),
            max_tokens=self._options.max_tokens,
            progress=self._view.reading,
        )
        try:
            self._view.begin()
            with closing(events):
                for event in events:
                    if isinstance(event, Done):
                        return event
                    if event.kind == "answer":
                        answer.append(event.text)
                    self._view.token(event)
        finally:
            self._view.end()
        raise RuntimeError("a generation ended without saying so")

    def _wanted_stats(self) -> str:
        return describe(self._stats) if self._options.stats and self._stats else ""


def unquoted(text: str) -> str:
    '''Without the """ that mark where a text of several lines begins and ends.'''
    bare = text.strip()
    if len(bare) >= 6 and bare.startswith('"""') and bare.endswith('"""'):
        return bare[3:-3].strip("\n")
    return text
