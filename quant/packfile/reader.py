"""Opens a pack: checks the manifest and every size against the files, then maps them. Nothing is copied.

Tensors are views of mapped files: pages are read when they are touched and shared between processes. Hashes
are not checked on opening (that reads everything); `verify` does, every time anew.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import TORCH_DTYPES, Weight
from qwenrun.quant.errors import CheckpointError, PackError
from qwenrun.quant.packfile.layout import (
    DENSE,
    KINDS,
    MANIFEST,
    ExpertLayout,
    Manifest,
    expert_file,
    expert_layout,
    expert_pairs,
    read_manifest,
)
from qwenrun.quant.packfile.safetensors import DTYPES, Entry, read_header
from qwenrun.quant.packfile.writer import file_sha256

_HINT = "qwenrun verify PACK tells what is damaged; make or copy the pack again"


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """A layer's routed experts: stacks of E matrices, strided views over `record_size`-byte records in `path`."""

    gate_up: Weight
    down: Weight
    record_size: int
    path: Path


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """A layer's expert records as a file: `count` of `record_size` bytes each.

    shapes: spec, rows and columns of gate_up and of down. crc32: one number a record, or empty if the pack was
    written before there were any.
    """

    path: Path
    count: int
    layout: ExpertLayout
    shapes: tuple[tuple[BlockSpec, int, int], tuple[BlockSpec, int, int]]
    crc32: tuple[int, ...]

    @property
    def record_size(self) -> int:
        return self.layout.record_size

    def stacks(self, data: Tensor) -> tuple[Weight, Weight]:
        """gate_up [S, 2I, H] and down [S, H, I] over uint8 data [S, record_size]: records in a file or in slots."""
        flat, count = data.view(-1), data.shape[0]
        out = []
        for kind, (spec, rows, cols) in zip(KINDS, self.shapes):
            parts = {
                piece.part: _strided(flat, piece.dtype, piece.shape, piece.offset, self.record_size, count)
                for piece in self.layout.slices
                if piece.kind == kind
            }
            out.append(Weight.from_parts(spec, rows, cols, parts))
        return out[0], out[1]


class PackReader:
    """An open pack. `tensors`: {name: TensorEntry}; `config`: the Hugging Face config as a dictionary."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.config = manifest.config
        self.tensors = manifest.tensors
        self._maps: dict[str, tuple[mmap.mmap, Tensor]] = {}
        self._fd = -1
        self._check_files()
        self._dense = self._check_dense()
        self._layouts = self._check_experts()

    @classmethod
    def open(cls, path: Path) -> PackReader:
        """Raises PackError: no pack, another version, or sizes that do not agree."""
        return cls(path, read_manifest(path))

    def _check_files(self) -> None:
        for name, (size, _) in self.manifest.files.items():
            file = self.path / name
            if not file.is_file() or file.is_symlink():
                raise PackError(f"{file} is missing", hint=_HINT)
            if file.stat().st_size != size:
                raise PackError(f"{file} has {file.stat().st_size:,} bytes where {size:,} are due", hint=_HINT)

    def _need_file(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise PackError(f"{self.path}: {name} is not among the files of the pack", hint=_HINT)
        return self.path / name

    def _check_dense(self) -> dict[str, Entry]:
        try:
            entries = read_header(self._need_file(DENSE))
        except CheckpointError as error:
            raise PackError(error.message, hint=_HINT) from error
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in self.tensors.items():
            if entry.info.is_experts:
                continue
            if entry.assignment.spec is None:
                expected[name] = (entry.info.dtype, entry.info.shape)
            else:
                rows, cols = entry.info.shape
                for part in entry.spec.parts(rows, cols, entry.info.tensor_scales):
                    expected[f"{name}.{part.name}"] = (part.dtype, part.shape)
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        if found != expected:
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise PackError(f"{self.path / DENSE} does not hold what {MANIFEST} says: {', '.join(names[:3])}", _HINT)
        return entries

    def _check_experts(self) -> dict[str, tuple[ExpertLayout, int]]:
        layouts: dict[str, tuple[ExpertLayout, int]] = {}
        owners: dict[str, str] = {}
        for prefix, pair in expert_pairs(self.manifest.stored).items():
            owner = owners.setdefault(expert_file(prefix), prefix)
            if owner != prefix:
                raise PackError(f"{self.path}: {owner} and {prefix} would share {expert_file(prefix)}", hint=_HINT)
            layout, counts = expert_layout(pair), {info.shape[0] for info in pair}
            if len(counts) != 1:
                raise PackError(f"{self.path}: {prefix} has {counts} experts")
            count = counts.pop()
            size = self._need_file(expert_file(prefix)).stat().st_size
            if size != layout.record_size * count:
                raise PackError(
                    f"{self.path / expert_file(prefix)} has {size:,} bytes where {count} records of"
                    f" {layout.record_size:,} are due",
                    hint=_HINT,
                )
            sums = len(self.manifest.records.get(expert_file(prefix), ())) or count
            if sums != count:
                raise PackError(f"{self.path}: {count} records of {prefix}, and {sums} checksums of them", hint=_HINT)
            layouts[prefix] = (layout, count)
        return layouts

    def _map(self, name: str) -> Tensor:
        if name not in self._maps:
            with (self.path / name).open("rb") as file:
                # A private mapping: torch wants writable memory, and nothing here ever writes to it.
                mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._maps[name] = (mapped, torch.frombuffer(mapped, dtype=torch.uint8))
        return self._maps[name][1]

    def _stored(self, name: str) -> Tensor:
        entry = self._dense[name]
        dtype, width = DTYPES[entry.dtype]
        data = self._map(DENSE)[entry.start : entry.start + entry.nbytes]
        if entry.start % width:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor that was kept as it was, in its own dtype and shape."""
        return self._stored(name)

    def weight(self, name: str, load: Callable[[str], Tensor] | None = None) -> Weight:
        """A dense matrix, encoded or kept. load: gives the array of a stored name; by default a view of the file."""
        load, entry = load or self._stored, self.tensors[name]
        if entry.assignment.spec is None:
            return Weight.plain(load(name))
        rows, cols = entry.info.shape
        parts = entry.spec.parts(rows, cols, entry.info.tensor_scales)
        return Weight.from_parts(entry.spec, rows, cols, {p.name: load(f"{name}.{p.name}") for p in parts})

    def experts(self, prefix: str) -> ExpertBlock:
        """The routed experts of a layer; `prefix` is such as `model.language_model.layers.3.mlp.experts`."""
        file = self.expert_file(prefix)
        gate_up, down = file.stacks(self._map(file.path.name).view(file.count, file.record_size))
        return ExpertBlock(gate_up, down, file.record_size, file.path)

    def expert_file(self, prefix: str) -> ExpertFile:
        """The file of a layer's routed experts, not opened."""
        layout, count = self._layouts[prefix]
        name = expert_file(prefix)
        entries = [self.tensors[f"{prefix}.{kind}"] for kind in KINDS]
        shapes = [(e.spec, e.info.shape[1], e.info.shape[2]) for e in entries]
        return ExpertFile(self.path / name, count, layout, (shapes[0], shapes[1]), self.manifest.records.get(name, ()))

    @property
    def expert_prefixes(self) -> tuple[str, ...]:
        """The names of all layers' routed experts, in the order of the manifest."""
        return tuple(self._layouts)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read an array of the dense file, `NAME` or `NAME.part`, into a tensor of its dtype and shape.

        Raises PackError if the file can't be read or ends too soon.
        """
        entry = self._dense[name]
        if out.dtype != DTYPES[entry.dtype][0] or tuple(out.shape) != entry.shape:
            raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, not {out.dtype} {list(out.shape)}")
        self.read_rows_into(name, 0, out)

    def read_rows_into(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start`.. of an array of the dense file into a contiguous tensor of as many rows."""
        entry = self._dense[name]
        row = entry.nbytes // entry.shape[0] if entry.shape else entry.nbytes
        view = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        at, done = entry.start + start * row, 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor(), [view[done:]], at + done)
                if count == 0:
                    raise PackError(f"{self.path / DENSE} ends inside {name}", hint=_HINT)
                done += count
        except OSError as error:
            raise PackError(f"{self.path / DENSE} can't be read: {error.strerror}", hint=_HINT) from error

    def _descriptor(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self.path / DENSE, os.O_RDONLY)
        return self._fd

    def forget_pages(self) -> None:
        """Tell the system that the dense file will not be read again: its pages need not be kept."""
        if self._fd >= 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def bytes_by_part(self) -> dict[str, int]:
        """Stored bytes of every part of the model, expert records with their padding."""
        out: dict[str, int] = {}
        for name, entry in self.tensors.items():
            if not entry.info.is_experts:
                prefix = "" if entry.assignment.spec is None else "."
                size = sum(
                    e.nbytes for n, e in self._dense.items() if n == name or (prefix and n.rpartition(".")[0] == name)
                )
                out[entry.info.part] = out.get(entry.info.part, 0) + size
        for prefix, (layout, count) in self._layouts.items():
            part = self.tensors[f"{prefix}.down_proj"].info.part
            out[part] = out.get(part, 0) + layout.record_size * count
        return out

    def close(self) -> None:
        """Close the dense file and forget the mappings; they go when the last tensor over them does."""
        self._maps.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PackReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _strided(data: Tensor, dtype: str, shape: tuple[int, ...], offset: int, record: int, count: int) -> Tensor:
    """[count, *shape] over records: element 0 of record i lies at i * record + offset."""
    typed = data.view(TORCH_DTYPES[dtype])
    width = typed.element_size()
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return typed.as_strided((count, *shape), (record // width, *strides), typed.storage_offset() + offset // width)


def verify(path: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Hash every file of a pack again and check all sizes. Raises PackError naming every file that differs."""
    with PackReader.open(path) as pack:
        manifest = pack.manifest
    damaged = [name for name, (_, digest) in manifest.files.items() if file_sha256(path / name, progress) != digest]
    extra = sorted(set(os.listdir(path)) - set(manifest.files) - {MANIFEST})
    if damaged:
        raise PackError(f"{path}: {', '.join(damaged)} does not match its sha256", hint="make or copy the pack again")
    if extra:
        raise PackError(f"{path}: {', '.join(extra)} does not belong to the pack", hint=f"remove it from {path}")
    return manifest
