"""DeviceCache: slots on a GPU, fed from the slots in RAM over a stream of its own.

The same questions as ExpertCache answers, one tier up: an expert that is not on the device is held in RAM (and
read from disk if it is not there either), then copied. Nothing here calls CUDA: a Mover does, and tests give one
that records the order of things and does its copies as late as it may. Two rules are kept: a slot is not
overwritten before the last kernel that reads it is done, and a slot in RAM stays until its copy is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qwenrun.engine.events import ExpertUse
from qwenrun.engine.expert_cache import ExpertCache, SlotCache
from qwenrun.engine.slots import HALF_LIFE

Mark = Any


class Mover(Protocol):
    """Copies beside the computation. A Mark is a place in the order of work on the device."""

    def copy(self, source: Tensor, target: Tensor, after: Mark | None) -> Mark:
        """Begin to copy host bytes to device bytes, not before `after` is reached; the Mark of its end."""

    def mark(self) -> Mark:
        """The place behind all computation that was begun so far."""

    def wait_for(self, mark: Mark) -> None:
        """Computation that is begun from now on comes after `mark`."""

    def reached(self, mark: Mark) -> bool:
        """Whether everything before `mark` is done."""

    def synchronize(self, mark: Mark) -> None:
        """Block until everything before `mark` is done."""


class CudaMover:
    """A side stream and events."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._main = torch.cuda.current_stream(device)

    def copy(self, source: Tensor, target: Tensor, after: Mark | None) -> Mark:
        if after is not None:
            self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def mark(self) -> Mark:
        return self._main.record_event()

    def wait_for(self, mark: Mark) -> None:
        self._main.wait_event(mark)

    def reached(self, mark: Mark) -> bool:
        return mark.query()

    def synchronize(self, mark: Mark) -> None:
        mark.synchronize()


class DeviceCache(SlotCache):
    """Slots on a device over an ExpertCache in RAM."""

    def __init__(self, host: ExpertCache, slots: Tensor, mover: Mover, half_life: float = HALF_LIFE) -> None:
        super().__init__(host.files, slots, half_life)
        self.host = host
        self._mover = mover
        # Experts claimed on the device whose bytes are not in RAM yet; copies begun, and not waited for.
        self._waiting: set[int] = set()
        self._copies: dict[int, Mark] = {}
        # Copies whose slots in RAM are still theirs, and the last kernels that read a slot on the device.
        self._lent: list[tuple[Mark, int]] = []
        self._readers: dict[int, Mark] = {}

    def counts(self) -> ExpertUse:
        """The counts of both tiers; hits and waiting are those of the device."""
        return replace(self.stats, disk_bytes=self.host.stats.disk_bytes)

    def _under_way(self) -> int:
        return len(self._waiting)

    def _unsettled(self) -> bool:
        return bool(self._waiting or self._copies)

    def touch(self, keys: Sequence[int], counts: Sequence[int], now: float) -> None:
        super().touch(keys, counts, now)
        # To RAM an expert that has a slot on the device is worth less: it is asked for above.
        absent = [(key, count) for key, count in zip(keys, counts) if self.table.slot_of[key] < 0]
        self.host.touch([key for key, _ in absent], [count for _, count in absent], now)

    def ready(self, key: int) -> bool:
        if self.table.slot_of[key] < 0 or key in self._waiting:
            return False
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._mover.wait_for(copy)
        return True

    def used(self, keys: Iterable[int]) -> None:
        if not self.table.contended:
            return  # nobody will ever be given their slots
        mark = self._mover.mark()
        for key in keys:
            self._readers[int(self.table.slot_of[key])] = mark

    def hold(self, key: int) -> bool:
        if key in self._waiting and (self.host.failed(key) or self.host.table.slot_of[key] < 0):
            self._drop(key)
        slot = int(self.table.slot_of[key])
        if slot >= 0:
            self.table.pin(slot)
            return True
        self._take_back(block=False)
        if not self.host.hold(key):
            self._take_back(block=True)
            if not self.host.hold(key):
                return False
        slot = self.table.claim(key)
        if slot < 0:
            self.host.release(key)
            return False
        self._forget_evicted()
        self._waiting.add(key)
        self._advance(key)
        return True

    def _forget_evicted(self) -> None:
        """The expert that had the slot may still be on its way (an answer was interrupted): its copy is before the
        next one on the same stream; what was only claimed lets its slot in RAM go."""
        self._copies = {k: mark for k, mark in self._copies.items() if self.table.slot_of[k] >= 0}
        for key in [k for k in self._waiting if self.table.slot_of[k] < 0]:
            self._waiting.discard(key)
            self.host.release(key)

    def wait(self, keys: Iterable[int]) -> list[int]:
        keys = list(keys)
        for key in keys:
            self._advance(key)
        arrived = [key for key in keys if self.ready(key)]
        if arrived or not keys:
            return arrived
        begun = time.perf_counter()
        try:
            self.host.wait(key for key in keys if key in self._waiting)
            for key in keys:
                self._advance(key)
        except Exception:
            for key in [k for k in self._waiting if self.host.table.slot_of[k] < 0]:
                self._drop(key)
            raise
        finally:
            self.stats.stall_seconds += time.perf_counter() - begun
        return [key for key in keys if self.ready(key)]

    def _advance(self, key: int) -> None:
        """Begin the copy of a claimed expert whose bytes are in RAM."""
        if key not in self._waiting:
            return
        if not self.host.ready(key):
            return
        slot = int(self.table.slot_of[key])
        source = self.host.slots[int(self.host.table.slot_of[key])]
        mark = self._mover.copy(source, self.slots[slot], self._readers.pop(slot, None))
        self._waiting.discard(key)
        self._copies[key] = mark
        self._lent.append((mark, key))
        self.stats.copied_bytes += self.record

    def _drop(self, key: int) -> None:
        """What was to be copied did not reach RAM."""
        self._waiting.discard(key)
        if self.table.slot_of[key] >= 0:
            self.table.drop(key)

    def _take_back(self, block: bool) -> None:
        """Release the slots in RAM whose copies are done; wait for the oldest if `block`."""
        if block and self._lent:
            self._mover.synchronize(self._lent[0][0])
        kept = []
        for mark, key in self._lent:
            if self._mover.reached(mark):
                self.host.release(key)
            else:
                kept.append((mark, key))
        self._lent = kept
