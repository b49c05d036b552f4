"""ExpertStore: the records of routed experts on disk, read several at a time straight into slots.

A record is one aligned run of a pack's file, so one read fetches an expert. Where the page cache can't hold the
pack anyway, reads pass it by (O_DIRECT). A record's checksum is compared when it is read for the first time.
Knows files and offsets; decides nothing about what is kept.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qwenrun.errors import ModelError
from qwenrun.quant.packfile.reader import ExpertFile

# Measured on a virtual disk of 0.9 to 1.3 GB/s: eight reads of 5 MB in flight are the fastest, one has 70 % of that.
READERS = 8


class ExpertStore:
    """Expert files of a pack, by layer. `read` returns at once; its Future is done when the bytes are there.

    bytes_read, read_seconds: what was read so far, and the time during which at least one read was under way.
    """

    def __init__(self, files: dict[str, ExpertFile], direct: bool, readers: int = READERS) -> None:
        self._files = files
        self.direct = False
        self._fds: dict[str, int] = {}
        self._trusted = {prefix: bytearray(file.count) for prefix, file in files.items()}
        try:
            for prefix, file in files.items():
                self._fds[prefix], used = _open(file.path, direct)
                self.direct = self.direct or used
        except OSError as error:
            self.close()
            raise _unreadable(error.filename, error.strerror or str(error)) from error
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="expert-read")
        self._lock = threading.Lock()
        self._busy = 0
        self._since = 0.0
        self.bytes_read = 0
        self.read_seconds = 0.0

    def read(self, prefix: str, expert: int, out: memoryview) -> Future[None]:
        """Read a record into `out` (its exact size; page-aligned). The Future raises ModelError for a file that
        is shorter than it was, can't be read, or holds other bytes than were written."""
        return self._pool.submit(self._read, prefix, expert, out)

    def _read(self, prefix: str, expert: int, out: memoryview) -> None:
        file = self._files[prefix]
        begun = time.perf_counter()
        with self._lock:
            if not self._busy:
                self._since = begun
            self._busy += 1
        done = 0
        try:
            while done < len(out):
                count = os.preadv(self._fds[prefix], [out[done:]], expert * len(out) + done)
                if count == 0:
                    raise _unreadable(
                        file.path, f"it ends inside expert {expert}, at {expert * len(out) + done:,} bytes"
                    )
                done += count
        except OSError as error:
            raise _unreadable(file.path, error.strerror or str(error)) from error
        finally:
            with self._lock:
                self._busy -= 1
                self.bytes_read += done
                if not self._busy:
                    self.read_seconds += time.perf_counter() - self._since
        if file.crc32 and not self._trusted[prefix][expert]:
            if zlib.crc32(out) != file.crc32[expert]:
                raise ModelError(
                    f"{file.path}: expert {expert} is not what was written: its checksum does not match",
                    f"qwenrun verify {file.path.parent}, then make or copy the pack again",
                )
            self._trusted[prefix][expert] = 1

    def close(self) -> None:
        """Wait for reads under way, and close the files."""
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=True, cancel_futures=True)
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0)
    if direct and flag:
        with suppress(OSError):  # memory file systems have no O_DIRECT
            return os.open(path, os.O_RDONLY | flag), True
    return os.open(path, os.O_RDONLY), False


def _unreadable(path: object, why: str) -> ModelError:
    return ModelError(f"{path} can't be read any more: {why}", "check the disk, then qwenrun verify PACK")
