"""A checkpoint on the hub, read while it is downloaded: files of weights come one by one, checked, and go when used.

What a conversion needs to plan (config, index, the headers of all files of weights) is fetched first and is small. A
file of weights is asked for when its turn comes, the next one while it is worked on; nothing is read of a file before
its hash is the hub's. Knows no recipe and no pack.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrun.errors import ModelError, QwenrunError, UsageError
from qwenrun.hub import remote
from qwenrun.hub.cache import SHA256
from qwenrun.hub.remote import File, Listing

if TYPE_CHECKING:
    from qwenrun.quant.packfile.checkpoint import Checkpoint

# Files of weights on the disk at a time, but for tensors that lie in more of them.
FILES = 2


class HubSupply:
    """Files of weights of one commit, in `folder`, at most two at a time. What `Checkpoint` calls a Supply."""

    def __init__(self, listing: Listing, folder: Path, headers: dict[str, Any], lock: int) -> None:
        self.folder, self._lock = folder, lock
        self._listing, self._headers = listing, headers
        self._files = {file.name: file for file in listing.files}
        sizes = sorted((file.size for name, file in self._files.items() if name in headers), reverse=True)
        self.room = sum(sizes[:FILES])
        self._changed = threading.Condition()
        self._there: set[str] = set()
        self._urgent: set[str] = set()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def identity(self, name: str) -> list[object]:
        """Name and hash, whatever the commit: a new text in the repository does not make other weights."""
        return [name, self._files[name].digest]

    def known(self, name: str) -> tuple[str, int] | None:
        """sha256 and bytes of a file of weights; others are small, and hashed where they are used."""
        file = self._files.get(name)
        return (file.digest, file.size) if file and name in self._headers else None

    def origin(self) -> dict[str, object]:
        return {"repo": self._listing.repo, "revision": self._listing.commit}

    def begin(self, order: Sequence[str]) -> None:
        """Start to fetch; files of `folder` that are not asked for are removed."""
        for name in set(self._headers) - set(order):
            self._remove(name)
        self._thread = threading.Thread(target=self._fetch_all, args=(list(order),), name="fetch", daemon=True)
        self._thread.start()

    def is_ready(self, names: Sequence[str]) -> bool:
        """Raises what stopped the download."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._urgent.update(names)
            self._changed.notify_all()
            return self._there.issuperset(names)

    def wait(self) -> None:
        with self._changed:
            self._changed.wait(0.5)

    def release(self, name: str) -> None:
        with self._changed:
            self._there.discard(name)
            self._remove(name)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching; what came so far stays for another time."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove(self, name: str) -> None:
        for path in (self.folder / name, self.folder / self._files[name].digest):
            path.unlink(missing_ok=True)

    def _fetch_all(self, order: list[str]) -> None:
        try:
            for name in order:
                with self._changed:
                    while not (len(self._there) < FILES or name in self._urgent or self._stop.is_set()):
                        self._changed.wait()
                if self._stop.is_set():
                    return
                self._bring(self._files[name])
                with self._changed:
                    self._there.add(name)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _bring(self, file: File) -> None:
        from qwenrun.quant.packfile.safetensors import read_header

        _place(self._listing, file, self.folder, self._stop)
        # The conversion was planned by a header that came on its own.
        if read_header(self.folder / file.name) != self._headers[file.name]:
            raise ModelError(
                f"{file.name} of {self._listing.repo} is not what its first bytes said it was", "the same command again"
            )


def _place(listing: Listing, file: File, folder: Path, stop: threading.Event) -> None:
    """A file, its hash checked, under its name in `folder`; its bytes under their hash beside it."""
    try:
        blob, link = folder / file.digest, folder / file.name
        if not blob.is_file():
            remote.fetch(listing, file, folder, lambda size, name: None, stop)
        if not link.is_symlink() or os.readlink(link) != file.digest:
            link.unlink(missing_ok=True)
            link.symlink_to(file.digest)
    except OSError as error:
        raise QwenrunError(
            f"{folder} can't be written: {error.strerror or error}",
            "free some space, and the same command goes on where it stopped",
        ) from error


def open_remote(repo: str, revision: str, folder: Path) -> Checkpoint:
    """The checkpoint of `repo` at `revision`; its files come into `folder` when they are needed.

    Raises ModelError, QwenrunError (no network, a full disk), CheckpointError (what came is no checkpoint).
    """
    from qwenrun.quant.packfile.writer import lock_folder

    listing = remote.describe(repo, revision)
    shards = [file for file in listing.files if file.name.endswith(".safetensors")]
    small = [file for file in listing.files if file not in shards]
    for file in shards:
        if len(file.digest) != SHA256:
            raise ModelError(f"{repo}: the hub does not say what the sha256 of {file.name} is")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        # Left by a run for another commit.
        for path in folder.iterdir():
            if path.name.removesuffix(remote.PARTIAL) not in {f.digest for f in listing.files}:
                path.unlink()
    except BlockingIOError as error:
        raise UsageError(f"another process is fetching into {folder}", "wait for it, or stop it") from error
    except OSError as error:
        raise QwenrunError(
            f"{folder} can't be written: {error.strerror or error}", "choose another place with -o"
        ) from error
    try:
        return _planned(listing, shards, small, folder, lock)
    except BaseException:
        os.close(lock)
        raise


def _planned(listing: Listing, shards: list[File], small: list[File], folder: Path, lock: int) -> Checkpoint:
    """The checkpoint, as soon as all that is small is there."""
    from qwenrun.quant.packfile.checkpoint import INDEX, SINGLE, Checkpoint

    repo = listing.repo
    with ThreadPoolExecutor(remote.WORKERS, thread_name_prefix="fetch") as pool:
        placed = [pool.submit(_place, listing, file, folder, threading.Event()) for file in small]
        headers = dict(zip((file.name for file in shards), pool.map(partial(_header, listing), shards)))
        for one in placed:
            one.result()
    if not (folder / INDEX).is_file() and SINGLE not in headers:
        raise ModelError(f"{repo} has neither {INDEX} nor {SINGLE}", "choose a repository with the model's weights")

    def header(shard: str) -> Any:
        if shard not in headers:
            raise ModelError(f"{repo} has no file {shard}, which its index names", f"qwenrun pull {repo}")
        return headers[shard]

    return Checkpoint.open(folder, header, HubSupply(listing, folder, headers, lock))


def _header(listing: Listing, file: File) -> Any:
    """The tensors of a file of weights, by its first bytes."""
    from qwenrun.quant.packfile.safetensors import MAX_HEADER, parse_header

    length = int.from_bytes(_first(listing, file, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, file.size - 8):
        raise ModelError(f"{file.name} of {listing.repo} is no safetensors: a header of {length:,} bytes")
    return parse_header(_first(listing, file, 8 + length)[8:], file.size, f"{listing.repo}/{file.name}")


def _first(listing: Listing, file: File, size: int) -> bytes:
    out = io.BytesIO()
    remote.fill(listing, File(file.name, size, file.digest), out, lambda size, name: None, threading.Event(), True)
    return out.getvalue()
