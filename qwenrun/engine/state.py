"""SequenceState: all the memory of one sequence, allocated once, and checkpoints of the part that can't be cut.

Keys and values can be taken back by forgetting rows. A DeltaNet state can't: it has to be put back from a
copy. Its memory is the arena's, whose tensors are `qwenrun.plan.buffers.state_shapes`. Knows no tokens: the
session keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenrun.engine.delta_state import DeltaState
from qwenrun.engine.kv_cache import Int8KV, PlainKV
from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import Run


@dataclass(frozen=True, slots=True)
class Saved:
    """A copy of all DeltaNet states at `position`."""

    position: int
    tensors: tuple[Tensor, ...]


class SequenceState:
    """Keys, values and DeltaNet states of one sequence of at most `ctx` tokens, and `run.snapshots` slots.

    position: tokens consumed. layers: one state for each layer of the model. mtp: the cache of the draft
    module, if `run.mtp`.
    """

    def __init__(self, config: ModelConfig, run: Run, memory: Mapping[str, Tensor]) -> None:
        """memory: the tensors of `plan.buffers.state_shapes` by name; whatever is in them is cleared."""
        self.ctx = run.ctx
        self.buffers = dict(memory)
        self.device = next(iter(self.buffers.values())).device
        self.layers = tuple(
            self._kv(f"layers.{i}") if config.is_full(i) else self._delta(f"layers.{i}")
            for i in range(config.num_layers)
        )
        self.mtp = self._kv("mtp") if "mtp.k" in self.buffers else None
        linear = config.linear_layers
        self._live = self._states("", linear)
        self._slots = [self._states(f"snapshots.{n}.", linear) for n in range(run.snapshots)]
        # Position of each checkpoint -> its slot, the one unused longest first.
        self._checkpoints: dict[int, int] = {}
        self.reset()

    def _kv(self, name: str) -> PlainKV | Int8KV:
        k, v = self.buffers[f"{name}.k"], self.buffers[f"{name}.v"]
        if k.dtype == torch.int8:
            return Int8KV(k, v, self.buffers[f"{name}.k_scale"], self.buffers[f"{name}.v_scale"])
        return PlainKV(k, v)

    def _delta(self, name: str) -> DeltaState:
        return DeltaState(self.buffers[f"{name}.conv"], self.buffers[f"{name}.recurrent"])

    def _states(self, prefix: str, layers: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(self.buffers[f"{prefix}layers.{i}.{x}"] for i in layers for x in ("conv", "recurrent"))

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        return sum(t.numel() * t.element_size() for t in self.buffers.values())

    def reset(self) -> None:
        """Back to an empty sequence; the checkpoints go too."""
        self._zero()
        self._checkpoints.clear()

    def _zero(self) -> None:
        for tensor in self._live:
            tensor.zero_()
        self.position = 0

    # -- copies that a caller keeps --------------------------------------------------------------------------

    def copy(self) -> Saved:
        return Saved(self.position, tuple(t.clone() for t in self._live))

    def restore(self, saved: Saved) -> None:
        self._put_back(saved.tensors, saved.position)

    def _put_back(self, tensors: tuple[Tensor, ...], position: int) -> None:
        for live, kept in zip(self._live, tensors, strict=True):
            live.copy_(kept)
        self.position = position

    # -- checkpoints: copies in memory that is part of the plan ----------------------------------------------

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Positions that can be restored, beside 0."""
        return tuple(sorted(self._checkpoints))

    def checkpoint(self) -> None:
        """Copy the states here into a slot; the checkpoint unused longest makes room. Without slots: nothing."""
        if not self._slots or self.position == 0:
            return
        if self.position in self._checkpoints:
            slot = self._checkpoints.pop(self.position)
        elif len(self._checkpoints) < len(self._slots):
            slot = next(n for n in range(len(self._slots)) if n not in self._checkpoints.values())
        else:
            slot = self._checkpoints.pop(next(iter(self._checkpoints)))
        for kept, live in zip(self._slots[slot], self._live, strict=True):
            kept.copy_(live)
        self._checkpoints[self.position] = slot

    def nearest(self, target: int) -> int:
        """The furthest position not after `target` that can be restored."""
        return max((p for p in self._checkpoints if p <= target), default=0)

    def restore_nearest(self, target: int) -> int:
        """Go to `nearest(target)`; returns it."""
        position = self.nearest(target)
        if position:
            slot = self._checkpoints.pop(position)
            self._put_back(self._slots[slot], position)
            self._checkpoints[position] = slot
        else:
            self._zero()
        return position

    def forget_after(self, position: int) -> None:
        """Checkpoints after `position` are of tokens that are about to be overwritten."""
        self._checkpoints = {p: slot for p, slot in self._checkpoints.items() if p <= position}
