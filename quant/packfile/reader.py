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

from qwenrun.kernels.weight import TORCH_DTYPES, Weight
from qwenrun.quant.errors import CheckpointError, PackError
from qwenrun.quant.packfile.layout import (
    DENSE,
    MANIFEST,
    MAX_JSON_BYTES,
    ExpertLayout,
    Manifest,
    expert_file,
    expert_layout,
    parse_manifest,
    strict_json,
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


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the pack at `path`; opens no weights. Raises PackError."""
    file = path / MANIFEST
    if not file.is_file():
        raise PackError(f"{path} is not a pack: it has no {MANIFEST}", hint="qwenrun quantize SRC -o PACK makes one")
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise PackError(f"{file}: {file.stat().st_size:,} bytes is too large for a manifest")
        text = file.read_bytes()
    except OSError as error:
        raise PackError(f"{file} can't be read: {error.strerror}") from error
    return parse_manifest(strict_json(text, str(file)), str(file))


class PackReader:
    """An open pack. `tensors`: {name: TensorEntry}; `config`: the Hugging Face config as a dictionary."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.config = manifest.config
        self.tensors = manifest.tensors
        self._maps: dict[str, tuple[mmap.mmap, Tensor]] = {}
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
        pairs: dict[str, dict] = {}
        for name, entry in self.tensors.items():
            if entry.info.is_experts:
                pairs.setdefault(name.rpartition(".")[0], {})[entry.info] = entry.assignment
        layouts: dict[str, tuple[ExpertLayout, int]] = {}
        owners: dict[str, str] = {}
        for prefix, pair in pairs.items():
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

    def weight(self, name: str) -> Weight:
        """A dense matrix, encoded or kept."""
        entry = self.tensors[name]
        if entry.assignment.spec is None:
            return Weight.plain(self._stored(name))
        rows, cols = entry.info.shape
        parts = entry.spec.parts(rows, cols, entry.info.tensor_scales)
        return Weight.from_parts(entry.spec, rows, cols, {p.name: self._stored(f"{name}.{p.name}") for p in parts})

    def experts(self, prefix: str) -> ExpertBlock:
        """The routed experts of a layer; `prefix` is such as `model.language_model.layers.3.mlp.experts`."""
        layout, count = self._layouts[prefix]
        name = expert_file(prefix)
        data = self._map(name)
        stacks = []
        for kind in ("gate_up_proj", "down_proj"):
            entry = self.tensors[f"{prefix}.{kind}"]
            parts = {
                piece.part: _strided(data, piece.dtype, piece.shape, piece.offset, layout.record_size, count)
                for piece in layout.slices
                if piece.kind == kind
            }
            _, rows, cols = entry.info.shape
            stacks.append(Weight.from_parts(entry.spec, rows, cols, parts))
        return ExpertBlock(stacks[0], stacks[1], layout.record_size, self.path / name)

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
        """Forget the mappings; they go when the last tensor over them does."""
        self._maps.clear()

    def __enter__(self) -> PackReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _strided(data: Tensor, dtype: str, shape: tuple[int, ...], offset: int, record: int, count: int) -> Tensor:
    """[count, *shape] over records: element 0 of record i lies at i * record + offset."""
    typed = data.view(TORCH_DTYPES[dtype])
    width = typed.element_size()
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return typed.as_strided((count, *shape), (record // width, *strides), offset // width)


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
