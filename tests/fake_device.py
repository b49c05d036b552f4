"""A device that is not there, for the engine's control flow on one: copies that come late, graphs that are played.

FakeMover copies as late as it may and checks that no slot is overwritten under a kernel that reads it. Tape records
what torch is asked to do, refuses what a graph can't hold (a value read by the host, a tensor made of the host's
numbers), and plays it on the same memory, as a CUDA graph does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeMover:
    """Copies that happen as late as they may, into memory that is poisoned before; checks the two rules.

    A place is a number. Computation is done when its call returns here, so what is checked is what the cache asks
    for: a copy into a slot that kernels were given to read must come `after` the mark behind them.
    """

    def __init__(self) -> None:
        self.rng = random.Random(3)
        self.marks = 0
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.done: set[int] = set()
        self.readers: dict[int, int] = {}
        self.copies = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: int | None) -> int:
        read = self.readers.pop(target.data_ptr(), None)
        assert read is None or after == read, "a slot would be overwritten while a kernel may read it"
        # An earlier copy into the slot is before this one on the side stream.
        if any(t.data_ptr() == target.data_ptr() for _, _, t in self.pending):
            self._finish(max(n for n, _, t in self.pending if t.data_ptr() == target.data_ptr()))
        target.fill_(0xFF)
        self.marks += 1
        self.copies += 1
        self.pending.append((self.marks, source, target))
        return self.marks

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def _finish(self, mark: int) -> None:
        for number, source, target in [p for p in self.pending if p[0] <= mark]:
            target.copy_(source)
            self.done.add(number)
        self.pending = [p for p in self.pending if p[0] > mark]

    def wait_for(self, mark: int) -> None:
        self._finish(mark)

    def reached(self, mark: int) -> bool:
        if self.rng.random() < 0.3:
            self._finish(mark)
        return mark in self.done

    def synchronize(self, mark: int) -> None:
        self._finish(mark)


def watch(cache: Any, mover: FakeMover) -> None:
    """Tell the mover which slots a kernel was given to read."""
    used = cache.used

    def noted(keys: Any) -> None:
        keys = list(keys)
        used(keys)
        for key in keys:
            mover.readers[cache.slots[int(cache.table.slot_of[key])].data_ptr()] = mover.marks

    cache.used = noted


REFUSED = ("_local_scalar_dense", "nonzero", "unique", "_unique", "masked_select", "lift_fresh", "item", "is_nonzero")


class Tape(TorchDispatchMode):
    """Recorder of one device: `played` counts, `recorded` too."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.played = 0
        self._calls: list[Any] = []
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._own: set[int] = set()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self._calls, self._kept, self._own = calls, _, _ = [], {}, set()
        with self:
            made = work()
        # It was recorded, not done: what it changed is put back.
        for storage, before in self._kept.values():
            storage.copy_(before)
        self.recorded += 1

        def play() -> None:
            self.played += 1
            for function, args, kwargs, outs in calls:
                given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(tree_leaves(outs), again, strict=True):
                    # Views and what was changed in place are where they were; all else goes to its own memory.
                    if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                        old.copy_(new)

        return play, made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        masks = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dtype == torch.bool]
        assert not name.startswith(REFUSED), f"{name} has no place in a graph"
        assert name not in ("index", "index_put_") or not masks, "a mask of unknown size has no place in a graph"
        for number, argument in enumerate(function._schema.arguments):
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self._own and storage._cdata not in self._kept:
                        self._kept[storage._cdata] = (storage, storage.clone())
        outs = function(*args, **kwargs)
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._own.add(tensor.untyped_storage()._cdata)
        self._calls.append((function, args, kwargs, outs))
        return outs
