"""SlotTable: which expert is in which slot, and which one makes room. Decides; moves no byte.

An expert's score is the number of tokens that chose it, each worth half as much after `half_life` tokens (LRFU,
Lee et al. 2001): between LRU (a short half-life) and LFU (a long one). The slot whose expert has the lowest
score makes room, unless it is pinned. docs/log.md has the measurements behind the half-life.
"""

from __future__ import annotations

import math

import numpy as np

HALF_LIFE = 256.0
# Scores grow as 2^(t / half_life) instead of all the others shrinking; scaled back before they overflow.
_RESCALE_AT = 500.0


class SlotTable:
    """Experts are keys 0..keys-1, slots 0..slots-1. slot_of: int64 [keys], -1 without a slot."""

    def __init__(self, keys: int, slots: int, half_life: float = HALF_LIFE) -> None:
        self.slot_of = np.full(keys, -1, dtype=np.int64)
        self.key_of = np.full(slots, -1, dtype=np.int64)
        self._score = np.zeros(keys)
        # What a slot is worth: its key's score; -1 if it is free; infinite while it is pinned.
        self._worth = np.full(slots, -1.0)
        self._pins = np.zeros(slots, dtype=np.int64)
        self._half_life = half_life
        self._origin = 0.0
        self.slots = slots
        # Whether anybody ever has to make room: where nobody does, scores are of no use.
        self.contended = slots < keys

    def touch(self, key: int, count: int, now: float) -> None:
        """`count` tokens chose `key` at time `now`, counted in tokens."""
        age = (now - self._origin) / self._half_life
        if age > _RESCALE_AT:
            self._score *= 2.0**-_RESCALE_AT
            held = np.isfinite(self._worth) & (self.key_of >= 0)
            self._worth[held] = self._score[self.key_of[held]]
            self._origin += _RESCALE_AT * self._half_life
            age -= _RESCALE_AT
        self._score[key] += count * 2.0**age
        slot = self.slot_of[key]
        if slot >= 0 and not self._pins[slot]:
            self._worth[slot] = self._score[key]

    def claim(self, key: int) -> int:
        """A slot for `key`, pinned; whoever had it is forgotten. -1 if every slot is pinned."""
        slot = int(self._worth.argmin())
        if math.isinf(self._worth[slot]):
            return -1
        old = self.key_of[slot]
        if old >= 0:
            self.slot_of[old] = -1
        self.slot_of[key], self.key_of[slot] = slot, key
        self._pins[slot] = 1
        self._worth[slot] = math.inf
        return slot

    def pin(self, slot: int) -> None:
        """Keep the slot until `unpin`; pins are counted."""
        self._pins[slot] += 1
        self._worth[slot] = math.inf

    def unpin(self, slot: int) -> None:
        self._pins[slot] -= 1
        if not self._pins[slot]:
            key = self.key_of[slot]
            self._worth[slot] = self._score[key] if key >= 0 else -1.0

    def pins(self, slot: int) -> int:
        """How often the slot is pinned."""
        return int(self._pins[slot])

    def drop(self, key: int) -> None:
        """Free the slot of `key`, whoever pinned it: what should be in it did not arrive."""
        slot = self.slot_of[key]
        self.slot_of[key] = self.key_of[slot] = -1
        self._pins[slot] = 0
        self._worth[slot] = -1.0

    @property
    def claimable(self) -> int:
        """Slots that are not pinned."""
        return self.slots - int(np.count_nonzero(self._pins))
