"""Writes a pack: into a hidden folder beside it, every byte at a place known beforehand, renamed at the end.

Sizes follow from the manifest alone, so tensors may arrive in any order and nothing is written twice. Until
the rename there is no pack. A journal beside the files says which pieces are safe: whoever begins the same pack again
goes on from there, after a kill, a power cut or a full disk. Knows nothing of quantization.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenrun.kernels.spec import DTYPE_BYTES
from qwenrun.kernels.weight import Weight
from qwenrun.quant.errors import QuantError, StorageError
from qwenrun.quant.packfile.journal import Journal
from qwenrun.quant.packfile.layout import (
    DENSE,
    MANIFEST,
    SIDE_FILES,
    ExpertLayout,
    Manifest,
    TensorEntry,
    expert_file,
    expert_layout,
    expert_pairs,
)
from qwenrun.quant.packfile.safetensors import build_header

_HASH_BLOCK = 4 << 20
_OURS = re.compile(r"experts-(mtp-)?\d+\.bin")


def work_folder(out: Path) -> Path:
    """Where the pack `out` is made: `pack/` its files, `journal`, and whatever a source keeps there."""
    return out.with_name(f".{out.name}.partial")


def lock_folder(folder: Path) -> int:
    """A descriptor that holds the folder's lock as long as it is open. BlockingIOError if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # some network file systems lock no folders
    return descriptor


def check_target(out: Path, force: bool) -> None:
    """Raise StorageError if `out` exists, unless `force`, and then if it is anything but a pack."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise StorageError(f"{out} exists already", hint="choose another name, or add --force")
    if out.is_symlink() or not out.is_dir():
        raise StorageError(f"{out} is not a folder, so --force will not replace it")
    held = sorted(path.name for path in out.iterdir())
    if held and MANIFEST not in held:
        raise StorageError(f"{out} exists and is not a pack, so --force will not replace it")
    foreign = [n for n in held if n not in (MANIFEST, DENSE, *SIDE_FILES) and not _OURS.fullmatch(n)]
    if foreign:
        raise StorageError(
            f"{out} holds {', '.join(foreign[:3])}, no part of a pack, so --force will not replace it",
            hint=f"move it out of {out}, or choose another name",
        )


class PackWriter:
    """A pack under construction. Use as a context manager; `finish` makes it a pack.

    Left by an error, what was written stays for the next run of the same `making`, but for errors of the checkpoint
    itself, after which nothing stays. pieces: what the journal knew on entering, by piece.
    """

    def __init__(
        self, out: Path, entries: Mapping[str, TensorEntry], force: bool = False, making: str = "", room: int = 0
    ) -> None:
        """making: everything the bytes of the pack follow from; "" if a stopped run is not to be gone on with.
        room: bytes that are needed beside the pack's while it is made.

        Raises StorageError if `out` exists, unless `force`, and then if it is anything but a pack.
        total_bytes: the size of the files of weights. Entering raises StorageError if the disk is too small, or another
        process is making this pack.
        """
        self.out = out
        self._entries = entries
        check_target(out, force)
        self._dense = self._plan_dense()
        self._experts = self._plan_experts()
        self._header, self._starts = build_header(self._dense)
        self._sizes = {DENSE: len(self._header) + sum(size for _, _, size in self._dense.values())}
        for prefix, (layout, count) in self._experts.items():
            self._sizes[expert_file(prefix)] = layout.record_size * count
        self.total_bytes = sum(self._sizes.values())
        self.work = work_folder(out)
        self.folder = self.work / "pack"
        self._making, self._room = making, room
        self.pieces: dict[str, Any] = {}
        self._goes_on = False
        self._journal: Journal | None = None
        self._files: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._lock = -1

    def _plan_dense(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        planned = {}
        for name, entry in self._entries.items():
            if entry.info.is_experts:
                continue
            if entry.assignment.spec is None:
                size = prod(entry.info.shape) * DTYPE_BYTES[entry.info.dtype]
                planned[name] = (entry.info.dtype, entry.info.shape, size)
            else:
                rows, cols = entry.info.shape
                for part in entry.spec.parts(rows, cols, entry.info.tensor_scales):
                    planned[f"{name}.{part.name}"] = (part.dtype, part.shape, part.nbytes)
        # The widest first, so that every tensor begins at a multiple of its own width and can be mapped.
        return dict(sorted(planned.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]))

    def _plan_experts(self) -> dict[str, tuple[ExpertLayout, int]]:
        pairs = expert_pairs((entry.info, entry.assignment) for entry in self._entries.values())
        return {prefix: (expert_layout(pair), next(iter(pair)).shape[0]) for prefix, pair in pairs.items()}

    def __enter__(self) -> PackWriter:
        try:
            with _storage_errors(self.out):
                self.work.mkdir(parents=True, exist_ok=True)
                try:
                    self._lock = lock_folder(self.work)
                except BlockingIOError as error:
                    raise StorageError(
                        f"another process is making {self.out}", hint="wait for it, or stop it"
                    ) from error
                self._goes_on = bool(self._making) and Journal.is_of(self.work / "journal", self._making)
                if not self._goes_on:
                    # Of another checkpoint, recipe or version: nothing of it can be used.
                    (self.work / "journal").unlink(missing_ok=True)
                    shutil.rmtree(self.folder, ignore_errors=True)
                self._check_space()
                self.folder.mkdir(exist_ok=True)
                for name, size in self._sizes.items():
                    self._open(name, size)
                self._write(DENSE, 0, self._header)
                self._journal = Journal(self.work / "journal", self._making)
                self.pieces = dict(self._journal.pieces)
                for folder in (self.folder, self.work, self.work.parent):
                    sync(folder)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, error: object = None, _: object = None) -> None:
        keep = kind is not None and bool(self._making)
        keep = keep and not (isinstance(error, QuantError) and not isinstance(error, StorageError))
        if self._journal:
            if keep:
                # A last time, so that as little as possible is done twice; if the disk is full, not even that.
                with contextlib.suppress(OSError):
                    self._journal.commit(self._sync)
            self._goes_on = bool(self._journal.pieces)
            self._journal.close()
            self._journal = None
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._lock >= 0:
            # What was fetched is worth keeping too.
            if not (keep and (self._goes_on or set(os.listdir(self.work)) - {"pack", "journal"})):
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.work).free
        held = [path for path in self.work.rglob("*") if path.is_file() and not path.is_symlink()]
        there = sum(path.stat().st_blocks * 512 for path in held)
        needed = self.total_bytes + self._room - there
        if needed > free:
            raise StorageError(
                f"the pack needs {needed:,} bytes{' more' if there else ''}, and {free:,} are free where {self.out}"
                " would be",
                hint="free some space, or choose another disk with -o",
            )

    def _open(self, name: str, size: int) -> None:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._files[name] = descriptor
        os.ftruncate(descriptor, size)

    def wrote(self, piece: str, known: object) -> None:
        """Every byte of a piece was given to this writer. known: what `pieces` is to hold of it after a restart.

        Called by one thread. Now and then this syncs the files and writes the journal. Raises StorageError.
        """
        assert self._journal
        self._journal.add(piece, known)
        if self._making and self._journal.is_due():
            self.commit()

    def commit(self) -> None:
        """Make every piece so far safe against a kill or a power cut. Raises StorageError."""
        assert self._journal
        with _storage_errors(self.out):
            self._journal.commit(self._sync)

    def _sync(self) -> None:
        while self._dirty:
            os.fdatasync(self._files[self._dirty.pop()])

    def _write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        done = 0
        while done < len(view):
            done += os.pwrite(self._files[name], view[done:], offset + done)
        # Afterwards, or a sync between the two would take it for clean.
        self._dirty.add(name)

    def put_rows(self, name: str, start: int, values: Weight | Tensor) -> None:
        """Rows `start`.. of a dense tensor: a Weight if it is encoded, else the tensor as it is kept."""
        with _storage_errors(self.out):
            if isinstance(values, Weight):
                for part, tensor in values.parts.items():
                    at = self._starts[f"{name}.{part}"]
                    row = 0 if part == "tensor_scale" else start // values.spec.group * _row_bytes(tensor)
                    self._write(DENSE, at + row, tensor_bytes(tensor))
            else:
                self._write(DENSE, self._starts[name] + start * _row_bytes(values), tensor_bytes(values))

    def put_expert(self, name: str, expert: int, weight: Weight) -> None:
        """One expert's matrix of a fused tensor `...experts.gate_up_proj` or `...down_proj`."""
        prefix, kind = name.rpartition(".")[::2]
        layout, _ = self._experts[prefix]
        with _storage_errors(self.out):
            for piece in layout.slices:
                if piece.kind == kind:
                    at = expert * layout.record_size + piece.offset
                    self._write(expert_file(prefix), at, tensor_bytes(weight.parts[piece.part]))

    def finish(
        self,
        manifest: Callable[[dict[str, tuple[int, str]]], Manifest],
        side_files: Mapping[str, Path],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Add the side files, hash every file, write the manifest, and put the pack in its place."""
        with _storage_errors(self.out):
            for name, path in side_files.items():
                shutil.copyfile(path, self.folder / name)
            self._sync()
            self.commit()
            for stray in set(os.listdir(self.folder)) - {*self._sizes, *side_files}:
                (self.folder / stray).unlink()
            files, records = {}, {}
            sizes = {expert_file(prefix): layout.record_size for prefix, (layout, _) in self._experts.items()}
            for name in sorted({*self._sizes, *side_files}):
                path = self.folder / name
                digest, sums = file_digests(path, sizes.get(name), progress)
                files[name] = (path.stat().st_size, digest)
                if name in sizes:
                    records[name] = sums
            content = replace(manifest(files), records=records)
            document = json.dumps(content.to_json(), indent=1, ensure_ascii=True) + "\n"
            with (self.folder / MANIFEST).open("w", encoding="ascii") as file:
                file.write(document)
                file.flush()
                os.fsync(file.fileno())
            sync(self.folder)
            if self.out.exists():
                # Renamed away first: a folder can't be replaced in one step, but at no time is it half a pack.
                old = self.work / "replaced"
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
                os.rename(self.folder, self.out)
            else:
                os.rename(self.folder, self.out)
            sync(self.out.parent)


class _storage_errors:
    """Turns a full disk and its like into StorageError."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space, and the same command goes on where it stopped" if full else ""
            raise StorageError(f"{self.out} can't be written: {error.strerror or error}", hint) from error


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file; progress(bytes) is called for every piece."""
    return file_digests(path, None, progress)[0]


def file_digests(
    path: Path, record: int | None, progress: Callable[[int], None] | None = None
) -> tuple[str, tuple[int, ...]]:
    """sha256 of a file, and the CRC-32 of each of its records of `record` bytes (none: no sums), in one reading."""
    digest, sums = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(record or _HASH_BLOCK):
            digest.update(block)
            if record:
                sums.append(zlib.crc32(block))
            if progress:
                progress(len(block))
    return digest.hexdigest(), tuple(sums)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _row_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size() if tensor.dim() else tensor.element_size()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
