"""Progress of long work, on stderr: a bar on a terminal, a plain line now and then anywhere else.

Standard library alone. Knows only (done, total) and what they count.
"""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

from qwenrun.ui.console import can_move, dim, note, printable, seconds, size

BAR_EVERY = 0.1
# Plain lines come ever more seldom, so that the log of an hour is not a thousand lines.
FIRST_LINE, LONGEST_GAP = 5.0, 60.0
BAR_WIDTH = 24


class Progress:
    """Call it with (done, total[, what]); leave its `with` block to wipe the bar.

    label: what is being done. unit: "B" for bytes, else a word for what is counted. quiet: say nothing.
    min_seconds: work done sooner is not mentioned at all.
    """

    def __init__(self, label: str, unit: str = "B", quiet: bool = False, min_seconds: float = 0.0) -> None:
        self._label, self._unit = label, unit
        self._bar = can_move(sys.stderr)
        self._on = not quiet
        self._gap = BAR_EVERY if self._bar else FIRST_LINE
        self._next = time.monotonic() + max(min_seconds, 0.0 if self._bar else FIRST_LINE)
        self._begun: tuple[float, int] | None = None
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        # Rates count from the first call: what came before it (imports, opening files) is not this work.
        self._begun = self._begun or (now, done)
        if not self._on or now < self._next:
            return
        if not self._bar:
            self._gap = min(self._gap * 1.5, LONGEST_GAP)
        self._next = now + self._gap
        line = self._line(done, total, what, now)
        if self._bar:
            width = max(shutil.get_terminal_size().columns - 1, 20)
            sys.stderr.write(f"\r\x1b[2K{line[:width]}")
            sys.stderr.flush()
            self._shown = True
        else:
            note(line)

    def clear(self) -> None:
        """Wipe the bar, so that what is printed next stands alone."""
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False

    def _line(self, done: int, total: int, what: str, now: float) -> str:
        since, already = self._begun or (now, done)
        elapsed = now - since
        share = min(done / total, 1.0) if total else 0.0
        rate = (done - already) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._count(done)} of {self._count(total)}"]
        if elapsed >= 1 and rate > 0:
            parts.append(f"{size(rate)}/s" if self._unit == "B" else f"{rate:,.{1 if rate < 100 else 0}f}/s")
            if done < total:
                parts.append(f"{seconds((total - done) / rate)} left")
        if what:
            parts.append(printable(what))
        text = f"{share:4.0%} " + ", ".join(parts)
        if not self._bar:
            return f"{self._label}: {text.strip()}"
        filled = round(share * BAR_WIDTH)
        return f"{self._label} [{'=' * filled}{' ' * (BAR_WIDTH - filled)}] {text}"

    def _count(self, number: int) -> str:
        return size(number) if self._unit == "B" else f"{number:,} {self._unit}"


class Status:
    """A dim line on a terminal's stderr while something happens that can't be counted; nothing elsewhere."""

    def __init__(self, text: str, quiet: bool = False) -> None:
        self._text = printable(text)[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._on = not quiet and can_move(sys.stderr)

    def __enter__(self) -> Status:
        if self._on:
            sys.stderr.write(dim(self._text, sys.stderr))
            sys.stderr.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
