"""The real keyboard and screen of the chat: prompt_toolkit reads, rich renders markdown as it comes.

Where a line can't be written over (TERM=dumb), or colour is not wanted (NO_COLOR), text is shown as it is.
Knows no model and no command.
"""

from __future__ import annotations

import os
import re
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrun.engine.events import Token
from qwenrun.ui import console
from qwenrun.ui.progress import Progress

if TYPE_CHECKING:
    from qwenrun.ui.repl import Reader, View

PROMPT, MORE = ">>> ", "... "
REDRAW_EVERY = 0.08
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)$")


# -- reading --------------------------------------------------------------------------------------------------


def history_path() -> Path:
    """$XDG_STATE_HOME/qwenrun/history, by default in ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "qwenrun" / "history"


def _history() -> Any:
    """The history file, readable by its owner alone; in memory if there is no place for it."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        console.note(f"note: no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))


class PlainReader:
    """Reads lines from a terminal that can do nothing else."""

    def read(self) -> str:
        print()
        text = input(PROMPT)
        while is_open(text):
            text += f"\n{input(MORE)}"
        return text


def open_reader() -> Reader:
    """Reads from the terminal: Enter sends, Alt-Enter begins a new line, and so does Enter inside \"\"\"."""
    if not console.can_move(sys.stdout):
        return PlainReader()
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation=lambda *_: MORE,
        enable_suspend=True,
    )

    class Terminal:
        def read(self) -> str:
            print()
            return session.prompt(PROMPT)

    return Terminal()


def is_open(text: str) -> bool:
    """True if `text` begins with three quotes and does not end with three others."""
    bare = text.strip()
    return bare.startswith('"""') and not (len(bare) >= 6 and bare.endswith('"""'))


# -- showing --------------------------------------------------------------------------------------------------


def make_view() -> View:
    """Markdown where the terminal can, plain text where it can't."""
    return MarkdownView() if console.has_colour(sys.stdout) else PlainView()


class PlainView:
    """Text as it comes."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._kind = ""
        self._column = 0
        self._keyboard: list[Any] | None = None

    def show(self, text: str) -> None:
        print(console.dim(console.printable(text), sys.stdout), flush=True)

    def fail(self, message: str, hint: str) -> None:
        console.fail(message, hint)

    def begin(self) -> None:
        """Keys pressed from here on are kept for the next question, and not shown amid the answer."""
        try:
            self._keyboard = termios.tcgetattr(sys.stdin)
            silent = [*self._keyboard]
            silent[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        except (termios.error, OSError, ValueError):  # no terminal, or no descriptor at all
            self._keyboard = None

    def reading(self, done: int, total: int) -> None:
        self._progress = self._progress or Progress("reading", unit="tokens", min_seconds=0.5)
        self._progress(done, total)

    def token(self, token: Token) -> None:
        self._stop_progress()
        if not token.text:
            return
        text = console.printable(token.text)
        if self._kind not in ("", token.kind):
            self._change(token.kind)
        self._kind = token.kind
        self._write(text, token.kind)

    def end(self) -> None:
        self._stop_progress()
        self._finish()
        self._kind = ""
        if self._keyboard is not None:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._keyboard)
            self._keyboard = None

    def _stop_progress(self) -> None:
        if self._progress:
            self._progress.clear()
            self._progress = None

    def _write(self, text: str, kind: str) -> None:
        sys.stdout.write(console.dim(text, sys.stdout) if kind == "reasoning" else text)
        sys.stdout.flush()
        self._column = 0 if text.endswith("\n") else 1

    def _change(self, kind: str) -> None:
        self._newline()
        sys.stdout.write("\n")

    def _finish(self) -> None:
        self._newline()

    def _newline(self) -> None:
        if self._column:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._column = 0


class MarkdownView(PlainView):
    """The answer as markdown, reasoning dimmed.

    A block (paragraph, list, code) that is complete is printed once and for all; only the block that is still
    growing is drawn anew, so that nothing above it ever moves.
    """

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._pending = ""
        self._live: Any = None
        self._drawn = 0.0
        self._blocks = 0

    def _write(self, text: str, kind: str) -> None:
        if kind == "reasoning":
            super()._write(text, kind)
            return
        complete, self._pending = split_blocks(self._pending + text)
        for block in complete:
            self._print(block)
        now = time.monotonic()
        if now - self._drawn >= REDRAW_EVERY:
            self._drawn = now
            self._draw()

    def _finish(self) -> None:
        if self._pending.strip():
            self._print(self._pending)
        self._erase()
        self._pending, self._blocks = "", 0
        super()._finish()

    def _print(self, block: str) -> None:
        self._erase()
        if self._blocks:
            self._console.print()
        self._console.print(rendered(block))
        self._blocks += 1

    def _draw(self) -> None:
        from rich.live import Live

        if not self._pending.strip():
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._live.update(_Tail(self._pending, gap=bool(self._blocks)), refresh=True)

    def _erase(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def split_blocks(text: str) -> tuple[list[str], str]:
    """(complete markdown blocks, the rest). A block ends at a blank line that is not inside a code fence, once
    the next line shows that it is not a continuation (which is indented)."""
    blocks: list[str] = []
    start = position = 0
    fence, blank = "", False
    for line in _LINE.findall(text):
        if not fence and blank and line.strip() and not line[0].isspace() and text[start:position].strip():
            blocks.append(text[start:position].strip("\n"))
            start = position
        found = _FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found:
            fence = found[1]
        blank = not line.strip() and line.endswith("\n")
        position += len(line)
    return blocks, text[start:]


def rendered(block: str) -> Any:
    """A block of markdown as rich shows it: code in the terminal's own colours, the address of a link visible."""
    from rich.markdown import Markdown

    return Markdown(block, code_theme="ansi_dark", hyperlinks=False)


class _Tail:
    """The last lines of a block that grows, as many as the screen has."""

    def __init__(self, block: str, gap: bool) -> None:
        self._block, self._gap = block, gap

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.segment import Segment

        lines = console.render_lines(rendered(self._block), options, pad=False)
        if self._gap:
            lines = [[Segment("")], *lines]
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()
