"""A Hugging Face folder of safetensors: its tensors by canonical name, read piece by piece.

Canonical: routed experts are fused ([E, 2I, H] with the gate's rows first, [E, H, I]), also where the files
hold one tensor per expert and projection. Files are read by position into buffers, never mapped, so that the
memory used is what was asked for. Every name and size that comes from outside is checked first.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenrun.quant.errors import CheckpointError
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


class Checkpoint:
    """An open folder. `tensors`: {canonical name: (shape, dtype)}, in the order of shards and of their data.

    Close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, config: dict[str, Any], places: dict[str, _Place], shards: list[str]) -> None:
        self.folder = folder
        self.config = config
        self.shards = shards
        self._places = places
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()  # tensors are read by several threads
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self._split: dict[str, int] = {}  # canonical names stored as one tensor per expert -> how many experts
        self._collect()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and headers of `folder`. Raises CheckpointError naming what is wrong."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder", hint="give the folder that holds config.json")
        config = _read_json(folder / "config.json", "so it is not a model folder")
        if quantized := config.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            raise CheckpointError(
                f"{folder}: the checkpoint is already quantized ({method or 'by what, it does not say'}),"
                " which can't be imported yet",
                hint="quantize from the BF16 checkpoint",
            )
        if (folder / INDEX).is_file():
            weight_map = _weight_map(folder)
        elif (folder / SINGLE).is_file():
            weight_map = None
        else:
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}", hint="download the model again")
        shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        places: dict[str, _Place] = {}
        for shard in shards:
            for name, entry in read_header(contained(folder, shard)).items():
                if weight_map is not None and weight_map.get(name) != shard:
                    raise CheckpointError(f"{folder / shard} holds {name}, which {INDEX} does not place there")
                places[name] = _Place(shard, entry)
        for name, shard in (weight_map or {}).items():
            if name not in places:
                raise CheckpointError(
                    f"{folder / INDEX} places {name} in {shard}, which does not hold it",
                    hint="download the shard again",
                )
        return cls(folder, config, places, shards)

    def _collect(self) -> None:
        split: dict[str, dict[tuple[int, str], str]] = {}
        for name, place in self._places.items():
            if found := _PER_EXPERT.fullmatch(name):
                prefix, number, projection = found.groups()
                kind = "down_proj" if projection == "down" else "gate_up_proj"
                group = split.setdefault(f"{prefix}.{kind}", {})
                group[int(number), projection] = name
                # Stand-in at the place of the first part, so that the order of the files is kept.
                self.tensors.setdefault(f"{prefix}.{kind}", ((), ""))
            else:
                self.tensors[name] = (place.entry.shape, place.entry.dtype)
        for canonical, group in split.items():
            if canonical in self._places:
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
                    entry = self._places[group[number, projection]].entry
                    shapes.add(entry.shape)
                    dtypes.add(entry.dtype)
            if len(shapes) != 1 or len(dtypes) != 1 or len(shape := shapes.pop()) != 2:
                raise CheckpointError(f"{self.folder}: the experts of {canonical} differ in shape or dtype")
            self._split[canonical] = count
            self.tensors[canonical] = ((count, shape[0] * len(projections), shape[1]), dtypes.pop())

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
        prefix, kind = name.rpartition(".")[::2]
        if kind == "down_proj":
            return self._read(f"{prefix}.{expert}.down_proj.weight")
        return torch.cat([self._read(f"{prefix}.{expert}.{half}_proj.weight") for half in ("gate", "up")])

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
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

    def shards_of(self, name: str) -> list[str]:
        """The files a canonical tensor is read from, sorted."""
        if name not in self._split:
            return [self._places[name].shard]
        prefix, _, kind = name.rpartition(".")
        projections = ("down",) if kind == "down_proj" else ("gate", "up")
        names = (f"{prefix}.{e}.{p}_proj.weight" for e in range(self._split[name]) for p in projections)
        return sorted({self._places[each].shard for each in names})

    def in_file_order(self) -> Iterator[str]:
        """Canonical names, shard by shard, in the order of their data."""
        return iter(self.tensors)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

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
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
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
