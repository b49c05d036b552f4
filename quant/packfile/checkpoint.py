"""A Hugging Face folder of safetensors: its tensors by canonical name, read piece by piece.

Canonical: routed experts are fused ([E, 2I, H] with the gate's rows first, [E, H, I]), also where the files
hold one tensor per expert and projection. Files are read by position into buffers, never mapped, so that the
memory used is what was asked for. Every name and size that comes from outside is checked first.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant import foreign
from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile import strict
from qwenrun.quant.packfile.safetensors import DTYPES, Entry, read_header, read_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_INDEX_BYTES = 100 << 20
_SHARD = re.compile(r"[\w.-]+\.safetensors")
# A number has one spelling: `01`, or one of a thousand digits, is some other tensor.
_PER_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(0|[1-9][0-9]{0,4})\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class _Place:
    shard: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class _Coded:
    """A matrix that somebody has quantized: its layout, where its arrays are, and its shape."""

    layout: foreign.Layout
    arrays: dict[str, _Place]
    shape: tuple[int, int]


# Values of decoded matrices are given in float32, and stand for the 16 bits that they were made from.
_CODED_DTYPE = "BF16"


class Supply(Protocol):
    """Where the files of weights come from while they are read. Those of a folder are there; a hub's come one by one,
    and go when they have been used. Calls come from one thread.

    room: bytes of disk that it takes, beside the pack's, where the pack is made.
    """

    room: int

    def identity(self, name: str) -> list[object]:
        """What tells whether a file is the same as when a stopped run read it."""

    def known(self, name: str) -> tuple[str, int] | None:
        """A file's sha256 and bytes, where they are known and checked before it is read."""
        return None

    def origin(self) -> dict[str, object]:
        """The repository and revision, if it is not the folder's name that tells them."""
        return {}

    def begin(self, order: Sequence[str]) -> None:
        """These files will be asked for, in this order."""
        return

    def is_ready(self, names: Sequence[str]) -> bool:
        """Whether all of them can be read now; if not, they are on their way. Raises what went wrong with them."""
        return True

    def wait(self) -> None:
        """Until something changes."""
        return

    def release(self, name: str) -> None:
        """It will not be read again."""
        return

    def close(self) -> None:
        """Nothing more is asked for."""
        return


class OwnFiles(Supply):
    """Those of a folder: they are there, and stay."""

    room = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def identity(self, name: str) -> list[object]:
        there = (self._folder / name).stat()
        return [name, there.st_size, there.st_mtime_ns]


class Checkpoint:
    """An open folder. `tensors`: {canonical name: (shape, dtype)}, in the order of shards and of their data.

    imported: how its matrices were quantized before, in a word; "" if they were not. Close it, or use it as a context
    manager.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], places: dict[str, _Place], shards: list[str], supply: Supply
    ) -> None:
        self.folder = folder
        self.supply = supply
        self.shards = shards
        self._quantization: dict[str, Any] = config.get("quantization_config") or {}
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self._places, self._coded = places, self._find_coded(places)
        self.imported = ", ".join(sorted({coded.layout.name for coded in self._coded.values()}))
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()  # tensors are read by several threads
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self._split: dict[str, int] = {}  # canonical names stored as one tensor per expert -> how many experts
        self._collect()

    @classmethod
    def open(
        cls, folder: Path, header: Callable[[str], dict[str, Entry]] | None = None, supply: Supply | None = None
    ) -> Checkpoint:
        """Read config, index and headers of `folder`. Raises CheckpointError naming what is wrong.

        header, supply: how to know what a file of weights holds, and to get it, if they are not there yet.
        """
        if header is None:
            header = lambda shard: read_header(contained(folder, shard))  # noqa: E731
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder", hint="give the folder that holds config.json")
        config = _read_json(folder / "config.json", "so it is not a model folder")
        if (quantized := config.get("quantization_config")) and not isinstance(quantized, dict):
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config is no object")
        if (folder / INDEX).is_file():
            weight_map = _weight_map(folder)
        elif supply or (folder / SINGLE).is_file():
            weight_map = None
        else:
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}", hint="download the model again")
        shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        places: dict[str, _Place] = {}
        for shard in shards:
            for name, entry in header(shard).items():
                if weight_map is not None and weight_map.get(name) != shard:
                    raise CheckpointError(f"{folder / shard} holds {name}, which {INDEX} does not place there")
                places[name] = _Place(shard, entry)
        for name, shard in (weight_map or {}).items():
            if name not in places:
                raise CheckpointError(
                    f"{folder / INDEX} places {name} in {shard}, which does not hold it",
                    hint="download the shard again",
                )
        return cls(folder, config, places, shards, supply or OwnFiles(folder))

    def _collect(self) -> None:
        split: dict[str, dict[tuple[int, str], str]] = {}
        stored = self._in_order()
        for name, described in stored.items():
            if found := _PER_EXPERT.fullmatch(name):
                prefix, number, projection = found.groups()
                kind = "down_proj" if projection == "down" else "gate_up_proj"
                group = split.setdefault(f"{prefix}.{kind}", {})
                group[int(number), projection] = name
                # Stand-in at the place of the first part, so that the order of the files is kept.
                self.tensors.setdefault(f"{prefix}.{kind}", ((), ""))
            else:
                self.tensors[name] = described
        for canonical, group in split.items():
            if canonical in stored:
                raise CheckpointError(f"{self.folder}: {canonical} is there both fused and one by one")
            projections = ("down",) if canonical.endswith("down_proj") else ("gate", "up")
            count = max(number for number, _ in group) + 1
            shapes, dtypes = set(), set()
            for number in range(count):
                for projection in projections:
                    if (number, projection) not in group:
                        prefix = canonical.rpartition(".")[0]
                        raise CheckpointError(
                            f"{self.folder}: {prefix}.{number}.{projection}_proj.weight is missing",
                            hint="download the model again",
                        )
                    shape_, dtype = stored[group[number, projection]]
                    shapes.add(shape_)
                    dtypes.add(dtype)
            if len(shapes) != 1 or len(dtypes) != 1 or len(shape := shapes.pop()) != 2:
                raise CheckpointError(f"{self.folder}: the experts of {canonical} differ in shape or dtype")
            self._split[canonical] = count
            self.tensors[canonical] = ((count, shape[0] * len(projections), shape[1]), dtypes.pop())

    def _find_coded(self, places: dict[str, _Place]) -> dict[str, _Coded]:
        """The matrices that are stored as other tools quantize them, by the names of what they stand for."""
        if not self._quantization:
            return {}
        found = {}
        for name, (layout, arrays) in foreign.find(places, foreign.layouts(self._quantization)).items():
            there = {part: places[array] for part, array in arrays.items()}
            for part, types in {**layout.arrays, **layout.others}.items():
                if part in there and there[part].entry.dtype not in types.split():
                    raise CheckpointError(f"{self.folder}: {arrays[part]} is {there[part].entry.dtype}, not {types}")
            try:
                shape = layout.shape({part: place.entry.shape for part, place in there.items()})
            except (ValueError, IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(f"{part} {list(place.entry.shape)}" for part, place in there.items())
                raise CheckpointError(
                    f"{self.folder}: the arrays of {name} do not fit each other as {layout.name}: {shapes}",
                    hint="download the model again",
                ) from error
            found[name] = _Coded(layout, there, shape)
        return found

    def _in_order(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what is stored, in the order of the files; a matrix of several arrays is at its first."""
        owner = {id(place): name for name, coded in self._coded.items() for place in coded.arrays.values()}
        described: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, place in self._places.items():
            if (matrix := owner.get(id(place))) is not None:
                described.setdefault(matrix, (self._coded[matrix].shape, _CODED_DTYPE))
            else:
                described[name] = (place.entry.shape, place.entry.dtype)
        return described

    def check_dtypes(self) -> None:
        """Raise CheckpointError for tensors that are not BF16, F16 or F32."""
        for name, (_, dtype) in self.tensors.items():
            if dtype not in ("BF16", "F16", "F32"):
                raise CheckpointError(f"{self.folder}: {name} is {dtype}; BF16, F16 or F32 is needed")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the first dimension of a canonical tensor (all of it by default), as stored.

        For routed experts a row is an expert.
        """
        if name in self._split:
            count = self._split[name]
            return torch.stack([self._expert(name, e) for e in range(start, count if stop is None else stop)])
        return self._read(name, start, stop)

    def _expert(self, name: str, expert: int) -> Tensor:
        return torch.cat([self._read(each) for each in self._names_of(name, expert)])

    def is_coded(self, name: str) -> bool:
        """Whether a canonical tensor is quantized already, as a whole or its first expert."""
        return (self._names_of(name) or [name])[0] in self._coded

    def encoded(self, name: str, spec: BlockSpec, expert: int | None = None) -> Weight | None:
        """The codes that a tensor, or one expert of it, has in the checkpoint, as `spec` stores them; None if that
        would take rounding. Raises CheckpointError."""
        names = [name] if expert is None else self._names_of(name, expert) or [name]
        parts = [self._coded[each] for each in names if each in self._coded]
        if len(parts) < len(names) or any(part.layout.codes != spec.codes for part in parts):
            return None
        made = [part.layout.weight(self._arrays(part), self._quantization) for part in parts]
        return foreign.fitting(foreign.joined(made), spec)

    def _arrays(self, coded: _Coded) -> dict[str, Tensor]:
        return {part: read_tensor(self._descriptor(p.shard), p.entry) for part, p in coded.arrays.items()}

    def _names_of(self, name: str, expert: int = 0) -> list[str]:
        """The stored matrices that one expert of a canonical tensor is made of; none if it is stored whole."""
        if name not in self._split:
            return []
        prefix, _, kind = name.rpartition(".")
        halves = ("down",) if kind == "down_proj" else ("gate", "up")
        return [f"{prefix}.{expert}.{half}_proj.weight" for half in halves]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if (coded := self._coded.get(name)) is not None:
            return coded.layout.values(self._arrays(coded), self._quantization)[start:stop]
        place = self._places[name]
        if place.entry.dtype not in DTYPES:
            raise CheckpointError(f"{self.folder}: {name} is {place.entry.dtype}; BF16, F16 or F32 is needed")
        return read_tensor(self._descriptor(place.shard), place.entry, start, stop)

    def _descriptor(self, shard: str) -> int:
        with self._opening:
            if shard not in self._descriptors:
                try:
                    self._descriptors[shard] = os.open(self.folder / shard, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{self.folder / shard} can't be read: {error.strerror}") from error
            return self._descriptors[shard]

    def forget(self, shard: str) -> None:
        """Close a file that is not read again."""
        with self._opening:
            if (descriptor := self._descriptors.pop(shard, None)) is not None:
                os.close(descriptor)

    def shards_of(self, name: str) -> list[str]:
        """The files a canonical tensor is read from, sorted."""
        experts = range(self._split.get(name, 0))
        names = [each for expert in experts for each in self._names_of(name, expert)] or [name]
        places = (self._coded[n].arrays.values() if n in self._coded else [self._places[n]] for n in names)
        return sorted({place.shard for group in places for place in group})

    def in_file_order(self) -> Iterator[str]:
        """Canonical names, shard by shard, in the order of their data."""
        return iter(self.tensors)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self.supply.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, {otherwise}", hint=f"ls {path.parent}")
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes is too large")
        data = strict.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="download the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map", hint="download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / INDEX} places {name} in {shard!r}, which is no name of a shard in this folder",
                hint="do not use this checkpoint: its index points outside its own folder",
            )
    return weight_map


def contained(folder: Path, name: str) -> Path:
    """The path of a file of `folder`, refused if it leads out of it, but for the hub cache's `blobs` beside it."""
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path} is missing", hint="download the model again")
    real, home = path.resolve(), folder.resolve()
    # In the hub's cache a snapshot is models--X/snapshots/REV, and its files link to models--X/blobs.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent != home and (blobs is None or real.parent != blobs):
        raise CheckpointError(f"{path} is a link out of the model's folder, to {real}")
    return path
