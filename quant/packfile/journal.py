"""The journal of a pack under construction: which pieces are on the disk for good, so that a killed run goes on.

A text file, one JSON array a line. The first line names what is made; every other one is a piece and what is known of
it, with a CRC-32 of both. A line is written after the bytes it speaks of were synced, so whatever it says survives a
power cut; a line that was torn or changed is cut off, with all behind it. Knows nothing of what a piece is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# At most so much work, in seconds, is lost to a kill.
COMMIT_SECONDS = 2.0


class Journal:
    """pieces: {key: what was noted of it}, those that are safe. Close it."""

    def __init__(self, path: Path, making: str) -> None:
        """Go on with the journal at `path` if it is one of `making`, else begin it anew. Raises OSError."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.pieces: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._last = time.monotonic()
        whole = self._read(making)
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if not whole:
            self._append([["making", making]])

    @classmethod
    def is_of(cls, path: Path, making: str) -> bool:
        """Whether there is a journal of `making` at `path`."""
        try:
            with path.open("rb") as file:
                return _parsed(file.readline()) == ("making", making)
        except OSError:
            return False

    def _read(self, making: str) -> int:
        """Take over what is written; how many bytes of it are whole lines."""
        with open(self._descriptor, "rb", closefd=False) as file:
            first = file.readline()
            if _parsed(first) != ("making", making):
                return 0
            whole = len(first)
            while (line := file.readline()) and (entry := _parsed(line)) is not None:
                self.pieces[entry[0]] = entry[1]
                whole += len(line)
            return whole

    def add(self, key: str, known: Any) -> None:
        """A piece is written, though perhaps not yet synced. known: anything that JSON holds."""
        self._new[key] = known

    def is_due(self) -> bool:
        """Whether it is time to commit."""
        return bool(self._new) and time.monotonic() - self._last >= COMMIT_SECONDS

    def commit(self, sync: Callable[[], None]) -> None:
        """Make what was added safe: `sync` brings the pieces' bytes to the disk. Raises OSError."""
        if self._new:
            sync()
            self._append([[key, known] for key, known in self._new.items()])
            self.pieces |= self._new
            self._new = {}
        self._last = time.monotonic()

    def _append(self, entries: list[list[Any]]) -> None:
        text = memoryview("".join(json.dumps([*entry, _sum(entry)]) + "\n" for entry in entries).encode())
        while text:
            text = text[os.write(self._descriptor, text) :]
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file; what was added and not committed is forgotten."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _parsed(line: bytes) -> tuple[str, Any] | None:
    """(key, what is known) of a whole line, else None."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, list) or len(entry) != 3 or entry[2] != _sum(entry[:2]):
        return None
    return (entry[0], entry[1]) if isinstance(entry[0], str) else None


def _sum(entry: list[Any]) -> int:
    """CRC-32 of a line's entry: one that was changed on the disk must not pass for another piece."""
    return zlib.crc32(json.dumps(entry).encode())
