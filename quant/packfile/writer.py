"""Writes a pack: into a temporary folder beside it, every byte at a place known beforehand, renamed at the end.

Sizes follow from the manifest alone, so tensors may arrive in any order and nothing is written twice. Until
the rename there is no pack; on an error nothing is left. Knows nothing of quantization.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
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
from qwenrun.quant.errors import StorageError
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


class PackWriter:
    """A pack under construction. Use as a context manager; `finish` makes it a pack, anything else removes it."""

    def __init__(self, out: Path, entries: Mapping[str, TensorEntry], force: bool = False) -> None:
        """Raises StorageError if `out` exists, unless `force`, and then if it is anything but a pack.

        total_bytes: the size of the files of weights. Entering raises StorageError if the disk is too small.
        """
        self.out = out
        self._entries = entries
        self._check_target(force)
        self._dense = self._plan_dense()
        self._experts = self._plan_experts()
        self._header, self._starts = build_header(self._dense)
        self._sizes = {DENSE: len(self._header) + sum(size for _, _, size in self._dense.values())}
        for prefix, (layout, count) in self._experts.items():
            self._sizes[expert_file(prefix)] = layout.record_size * count
        self.total_bytes = sum(self._sizes.values())
        self.folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
        self._files: dict[str, int] = {}
        self._lock = -1

    def _check_target(self, force: bool) -> None:
        if not self.out.exists() and not self.out.is_symlink():
            return
        if not force:
            raise StorageError(f"{self.out} exists already", hint="choose another name, or add --force")
        if self.out.is_symlink() or not self.out.is_dir():
            raise StorageError(f"{self.out} is not a folder, so --force will not replace it")
        held = sorted(path.name for path in self.out.iterdir())
        if held and MANIFEST not in held:
            raise StorageError(f"{self.out} exists and is not a pack, so --force will not replace it")
        foreign = [n for n in held if n not in (MANIFEST, DENSE, *SIDE_FILES) and not _OURS.fullmatch(n)]
        if foreign:
            raise StorageError(
                f"{self.out} holds {', '.join(foreign[:3])}, no part of a pack, so --force will not replace it",
                hint=f"move it out of {self.out}, or choose another name",
            )

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
                self._remove_abandoned()
                self._check_space()
                self.folder.mkdir(parents=True)
                self._lock = os.open(self.folder, os.O_RDONLY)
                with contextlib.suppress(OSError):  # some network file systems lock no folders
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                for name, size in self._sizes.items():
                    self._open(name, size)
                self._write(DENSE, 0, self._header)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove_abandoned(self) -> None:
        """Remove what a killed run left of this very pack: the partial folders nobody holds the lock of."""
        for folder in self.out.parent.glob(f".{glob.escape(self.out.name)}.partial-*"):
            if folder.is_symlink() or not folder.is_dir():
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)

    def _check_space(self) -> None:
        free = shutil.disk_usage(_existing_parent(self.out)).free
        if self.total_bytes > free:
            raise StorageError(
                f"the pack needs {self.total_bytes:,} bytes, and {free:,} are free where {self.out} would be",
                hint="free some space, or choose another disk with -o",
            )

    def _open(self, name: str, size: int) -> None:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[name] = descriptor
        os.ftruncate(descriptor, size)

    def _write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        done = 0
        while done < len(view):
            done += os.pwrite(self._files[name], view[done:], offset + done)

    def put_rows(self, name: str, start: int, values: Weight | Tensor) -> None:
        """Rows `start`.. of a dense tensor: a Weight if it is encoded, else the tensor as it is kept."""
        with _storage_errors(self.out):
            if isinstance(values, Weight):
                for part, tensor in values.parts.items():
                    at = self._starts[f"{name}.{part}"]
                    row = 0 if part == "tensor_scale" else start // values.spec.group * _row_bytes(tensor)
                    self._write(DENSE, at + row, _bytes(tensor))
            else:
                self._write(DENSE, self._starts[name] + start * _row_bytes(values), _bytes(values))

    def put_expert(self, name: str, expert: int, weight: Weight) -> None:
        """One expert's matrix of a fused tensor `...experts.gate_up_proj` or `...down_proj`."""
        prefix, kind = name.rpartition(".")[::2]
        layout, _ = self._experts[prefix]
        with _storage_errors(self.out):
            for piece in layout.slices:
                if piece.kind == kind:
                    at = expert * layout.record_size + piece.offset
                    self._write(expert_file(prefix), at, _bytes(weight.parts[piece.part]))

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
            for descriptor in self._files.values():
                os.fsync(descriptor)
            files, records = {}, {}
            sizes = {expert_file(prefix): layout.record_size for prefix, (layout, _) in self._experts.items()}
            for name in sorted(os.listdir(self.folder)):
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
            _sync_folder(self.folder)
            if self.out.exists():
                # Renamed away first: a folder can't be replaced in one step, but at no time is it half a pack.
                old = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
                os.rename(self.out, old)
                os.rename(self.folder, self.out)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(self.folder, self.out)
            _sync_folder(self.out.parent)


class _storage_errors:
    """Turns a full disk and its like into StorageError."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space, or choose another disk with -o" if full else ""
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


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _row_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size() if tensor.dim() else tensor.element_size()


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
