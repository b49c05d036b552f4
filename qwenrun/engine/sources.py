"""Where a model's weights come from: a pack or a Hugging Face folder, read into the arena of a plan.

The two WeightSources of `model.bind`. Routed experts of a pack are not read here: they come from the cache when a
token asks for them. Knows names as they are stored; which of them make a layer, `bind` knows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwenrun.engine.arena import Arena
from qwenrun.kernels.ops import bind, decode
from qwenrun.kernels.weight import TORCH_DTYPES, Weight
from qwenrun.model.moe import Routed, StackedExperts
from qwenrun.model.qwen3_5 import Embedding, Table
from qwenrun.plan.buffers import held_parts
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.reader import PackReader

# A stack of experts is read from a Hugging Face folder in pieces of about this many bytes.
PIECE = 64 << 20


class PackSource:
    """A pack: dense weights are read into the arena, as they are stored.

    routed: the callable for the experts of a layer, by their prefix.
    """

    def __init__(self, pack: PackReader, arena: Arena, routed: Callable[[str], Routed]) -> None:
        self._pack, self._arena = pack, arena
        self.experts = routed
        self.where = str(pack.path)
        self.found = {name: (entry.info.shape, entry.info.dtype) for name, entry in pack.tensors.items()}
        self._read: set[str] = set()

    def weight(self, name: str) -> Weight:
        return self._pack.weight(name, self._load)

    def _load(self, stored: str) -> Tensor:
        """The arena's tensor of a stored array, read the first time it is asked for (a tied table is twice)."""
        held = self._arena[stored]
        if stored not in self._read:
            self._read.add(stored)
            if held.device.type == "cpu":
                self._pack.read_into(stored, held)
            else:
                staging = torch.empty(held.shape, dtype=held.dtype)
                self._pack.read_into(stored, staging)
                held.copy_(staging)
        return held

    def tensor(self, name: str) -> Tensor:
        entry = self._pack.tensors[name]
        held = self._arena[name]
        if entry.assignment.spec is None:
            stored = torch.empty(entry.info.shape, dtype=TORCH_DTYPES[entry.info.dtype])
            self._pack.read_into(name, stored)
            return held.copy_(stored)
        # A recipe of one's own may encode a tensor that is not a layer's matrix here: the router.
        return held.copy_(decode(self._pack.weight(name)))

    def embedding(self, name: str) -> Embedding:
        held = held_parts(self._pack.tensors[name].info, self._pack.tensors[name].assignment)
        if all(part in self._arena for part in held):
            return Table(self.weight(name))
        return DiskTable(self._pack, name, self._arena.device)


class DiskTable:
    """An embedding table that stays in the pack: the rows that are asked for are read, a few KB a token."""

    def __init__(self, pack: PackReader, name: str, device: torch.device) -> None:
        entry = pack.tensors[name]
        self._pack, self._name, self._device = pack, name, device
        self._spec, self._cols = entry.spec, entry.info.shape[1]
        self._parts = held_parts(entry.info, entry.assignment)
        self._decode = bind("decode", device.type, entry.spec)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids i64 [T] -> f32 [T, H]. Raises PackError if the pack can't be read any more."""
        rows, places = ids.cpu().unique(return_inverse=True)
        parts: dict[str, Tensor] = {}
        for stored, part in self._parts.items():
            key = "codes" if stored == self._name else part.name
            if key == "tensor_scale":
                out = torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype])
                self._pack.read_into(stored, out)
            else:
                out = torch.empty((len(rows), *part.shape[1:]), dtype=TORCH_DTYPES[part.dtype])
                for at, row in enumerate(rows.tolist()):
                    self._pack.read_rows_into(stored, row, out[at : at + 1])
            parts[key] = out.to(self._device)
        table = self._decode(Weight(self._spec, len(rows), self._cols, **parts))
        return table[places.to(self._device)]


class CheckpointSource:
    """A Hugging Face folder: weights are read into the arena tensor by tensor, experts too."""

    def __init__(self, checkpoint: Checkpoint, arena: Arena) -> None:
        self._checkpoint, self._arena = checkpoint, arena
        self.where = str(checkpoint.folder)
        self.found = checkpoint.tensors

    def weight(self, name: str) -> Weight:
        return Weight.plain(self.tensor(name))

    def tensor(self, name: str) -> Tensor:
        held = self._arena[name]
        rows = held.shape[0]
        step = max(1, PIECE * rows // max(1, held.numel() * held.element_size()))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            held[start:stop] = self._checkpoint.read(name, start, stop)
        return held

    def embedding(self, name: str) -> Embedding:
        return Table(self.weight(name))

    def experts(self, prefix: str) -> Routed:
        return StackedExperts(self.weight(f"{prefix}.gate_up_proj"), self.weight(f"{prefix}.down_proj"))
