"""ExpertCache: a pool of slots in RAM over the expert files; what is asked for and has no slot is read into one.
SlotCache: what it has in common with slots on a device (`device_cache`), and all that the rest of the engine sees.

One thread, the engine's, asks; reads run beside it. A slot that is being read into, or whose expert is being
computed, is pinned and stays. Knows no token and no weight: experts are keys, and records are bytes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

import numpy as np
from torch import Tensor

from qwenrun.engine.events import ExpertUse
from qwenrun.engine.expert_store import ExpertStore
from qwenrun.engine.slots import HALF_LIFE, SlotTable
from qwenrun.kernels.weight import Weight
from qwenrun.quant.packfile.reader import ExpertFile


class SlotCache(ABC):
    """Slots [S, record] uint8 of one tier, for the experts of the layers in `files`, whose records have one size.

    The key of an expert is the first key of its layer (`first[prefix]`) plus its number.
    """

    def __init__(self, files: dict[str, ExpertFile], slots: Tensor, half_life: float) -> None:
        self.files = files
        self.first: dict[str, int] = {}
        keys = 0
        for prefix, file in files.items():
            self.first[prefix] = keys
            keys += file.count
        self.table = SlotTable(keys, slots.shape[0], half_life)
        self.slots = slots
        self.record = slots.shape[1]
        self.stats = ExpertUse()
        self._ahead: dict[str, set[int]] = {prefix: set() for prefix in files}

    @abstractmethod
    def ready(self, key: int) -> bool:
        """Whether the expert is in its slot, whole, for what is computed from now on."""

    @abstractmethod
    def hold(self, key: int) -> bool:
        """Pin the expert's slot, until `release`; begin to fetch it if it has none. False if all slots are pinned."""

    @abstractmethod
    def wait(self, keys: Iterable[int]) -> list[int]:
        """Those of the held `keys` that are ready, after waiting for the first if none is. Raises what its read
        raised; that expert then has no slot."""

    @abstractmethod
    def used(self, keys: Iterable[int]) -> None:
        """Kernels that read these experts' slots were just begun."""

    @abstractmethod
    def counts(self) -> ExpertUse:
        """A copy of the counts so far."""

    @abstractmethod
    def _under_way(self) -> int:
        """How many experts have a slot and no bytes yet."""

    def _unsettled(self) -> bool:
        """Whether an expert that has a slot may still have to be asked about."""
        return self._under_way() > 0

    def stacks(self, prefix: str) -> tuple[Weight, Weight]:
        """gate_up and down of a layer as stacks over all slots: expert s is whatever lies in slot s."""
        return self.files[prefix].stacks(self.slots)

    def touch(self, keys: Sequence[int], counts: Sequence[int], now: float) -> None:
        """At token `now`, counts[i] tokens chose keys[i]."""
        if self.table.contended:
            for key, count in zip(keys, counts):
                self.table.touch(key, count, now)

    def lookup(self, keys: np.ndarray) -> np.ndarray | None:
        """The slots of `keys`, if every one of them is ready; else None."""
        slots = self.slots_of(keys)
        if slots.min() < 0 or (self._unsettled() and not all(self.ready(int(key)) for key in np.unique(keys))):
            return None
        return slots

    def slots_of(self, keys: np.ndarray) -> np.ndarray:
        """int64, as many as keys: where held experts lie."""
        return self.table.slot_of[keys]

    def release(self, key: int) -> None:
        """Give one `hold` back."""
        slot = int(self.table.slot_of[key])
        if slot >= 0:
            self.table.unpin(slot)

    def prefetch(self, prefix: str, experts: Iterable[int], limit: int) -> None:
        """Begin to fetch those of a layer's experts that have no slot, with at most `limit` under way; they stay
        until `forget_ahead`."""
        for expert in experts:
            key = self.first[prefix] + expert
            if self._under_way() >= limit:
                return
            if self.table.slot_of[key] < 0 and self.hold(key):
                self._ahead[prefix].add(key)
                self.stats.ahead += 1

    def forget_ahead(self, prefix: str, used: Iterable[int]) -> None:
        """The layer has been computed, with `used`: what was fetched ahead for it is like any other expert now."""
        ahead = self._ahead[prefix]
        if ahead:
            self.stats.ahead_used += len(ahead.intersection(used))
            for key in ahead:
                self.release(key)
            ahead.clear()


class ExpertCache(SlotCache):
    """Slots in RAM over the expert files."""

    def __init__(
        self, files: dict[str, ExpertFile], slots: Tensor, store: ExpertStore, half_life: float = HALF_LIFE
    ) -> None:
        super().__init__(files, slots, half_life)
        self._owner = [(prefix, expert) for prefix, file in files.items() for expert in range(file.count)]
        self._bytes = slots.numpy().data.cast("B")
        self._store = store
        self._reads: dict[int, Future[None]] = {}

    def counts(self) -> ExpertUse:
        return replace(self.stats)

    def used(self, keys: Iterable[int]) -> None:
        """Nothing to remember: on a CPU a kernel is done when its call returns."""

    def _under_way(self) -> int:
        return len(self._reads)

    def ready(self, key: int) -> bool:
        if self.table.slot_of[key] < 0:
            return False
        read = self._reads.get(key)
        if read is None:
            return True
        if not read.done() or read.exception() is not None:
            return False
        self._landed(key)
        return True

    def failed(self, key: int) -> bool:
        """Whether the expert's read ended with an error, which nobody has been told yet."""
        read = self._reads.get(key)
        return read is not None and read.done() and read.exception() is not None

    def hold(self, key: int) -> bool:
        if self.failed(key):
            # An old error, of a pass that ended with another one: this is a new try.
            self._forget(key)
        slot = int(self.table.slot_of[key])
        if slot >= 0:
            self.table.pin(slot)
            return True
        self._sweep()
        slot = self.table.claim(key)
        if slot < 0:
            return False
        # A read holds a pin of its own: whoever asked may be gone (Ctrl-C) before the bytes are there.
        self.table.pin(slot)
        at = slot * self.record
        self._reads[key] = self._store.read(*self._owner[key], self._bytes[at : at + self.record])
        return True

    def wait(self, keys: Iterable[int]) -> list[int]:
        keys = list(keys)
        self._raise_failed(keys)
        arrived = [key for key in keys if self.ready(key)]
        if arrived or not keys:
            return arrived
        begun = time.perf_counter()
        wait([self._reads[key] for key in keys], return_when=FIRST_COMPLETED)
        self.stats.stall_seconds += time.perf_counter() - begun
        self._raise_failed(keys)
        return [key for key in keys if self.ready(key)]

    def _raise_failed(self, keys: Iterable[int]) -> None:
        for key in keys:
            if self.failed(key):
                error = self._reads[key].exception()
                self._forget(key)
                assert error is not None
                raise error

    def _landed(self, key: int) -> None:
        del self._reads[key]
        self.table.unpin(int(self.table.slot_of[key]))
        self.stats.disk_bytes += self.record

    def _forget(self, key: int) -> None:
        """A read has failed: its slot is free, and the expert has none."""
        del self._reads[key]
        self.table.drop(key)

    def _sweep(self) -> None:
        """Let go what reads that nobody waits for any more have pinned."""
        for key, read in list(self._reads.items()):
            if read.done() and not self.ready(key) and self.table.pins(int(self.table.slot_of[key])) == 1:
                self._forget(key)
