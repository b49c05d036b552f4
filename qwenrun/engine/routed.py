"""RoutedExperts: one layer's routed experts computed out of the cache, the resident ones while others are on the way.

The kernel is given the cache's slots as its stack of experts, and the numbers of slots in place of the numbers
of experts. The weighted rows of all pairs of token and expert are added in the router's order at the end, so the
result is the same bits whatever was resident. Knows no file and no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwenrun.engine.expert_cache import ExpertCache, SlotCache
from qwenrun.kernels.ops import bind, sum_in_order
from qwenrun.model.linear import SeeExpert
from qwenrun.model.moe import showing
from qwenrun.plan.planner import WINDOW


@dataclass(frozen=True, slots=True)
class Assist:
    """The CPU beside a GPU: computes missing experts where they lie in RAM, if that is sooner than copying them.

    cpu, link: bytes of experts per second that the CPU computes, and that reach the device; measured.
    """

    host: ExpertCache
    cpu: float
    link: float

    def share(self, missing: int) -> int:
        """How many of `missing` experts in RAM the CPU takes, so that it is done when the last copy arrives."""
        if self.cpu <= 0:
            return 0
        times = [(max(n / self.cpu, (missing - n) / self.link), n) for n in range(missing + 1)]
        return min(times)[1]


class RoutedExperts:
    """The routed experts of the layer `prefix`: a callable as `model.moe` wants it."""

    def __init__(self, prefix: str, cache: SlotCache, device: torch.device, assist: Assist | None = None) -> None:
        self._prefix, self._cache, self._device = prefix, cache, device
        self._first, self._count = cache.first[prefix], cache.files[prefix].count
        self._stack = cache.stacks(prefix)
        self._op = bind("experts", device.type, self._stack[0].spec)
        self._assist = assist
        if assist is not None:
            self._host_stack = assist.host.stacks(prefix)
            self._host_op = bind("experts", "cpu", self._host_stack[0].spec)
        self._tokens = 0
        # Called with the chosen experts, numpy int64 [T, k], if somebody records routes.
        self.trace: Callable[[np.ndarray], None] | None = None

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """x f32 [T, H], index i64 [T, k], weight f32 [T, k], base f32 [T, H] -> base plus the weighted sum."""
        wanted, keys, slots = self.look_up(index)
        if slots is not None:
            out = self.compute(x, torch.from_numpy(slots).to(self._device), weight, base)
        else:
            out = self.fetch_and_compute(x, wanted, keys, weight, base)
        self.done(keys, slots is not None)
        return out

    def watch(self, see: SeeExpert) -> None:
        """Show from now on what each expert reads, of those that the device computes."""
        key_of = self._cache.table.key_of
        self._op = showing(see, self._op, lambda slot: int(key_of[slot]) - self._first)

    def look_up(self, index: Tensor) -> tuple[np.ndarray, list[int], np.ndarray | None]:
        """The chosen experts' keys [T, k], every one of them once, and their slots [T, k] if all are there."""
        cache = self._cache
        chosen = index.cpu().numpy()
        if self.trace is not None:
            self.trace(chosen)
        wanted = chosen + self._first
        if len(chosen) == 1:
            keys = wanted[0].tolist()  # one token's choices are distinct
            counts = [1] * len(keys)
        else:
            unique, many = np.unique(wanted, return_counts=True)
            keys, counts = unique.tolist(), many.tolist()
        self._tokens += len(chosen)
        cache.touch(keys, counts, self._tokens)
        cache.stats.lookups += len(keys)
        slots = cache.lookup(wanted)
        if slots is not None:
            cache.stats.hits += len(keys)
        return wanted, keys, slots

    def compute(self, x: Tensor, slots: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """The kernel alone, slots i64 [T, k] in place of experts; nothing of it is the host's to know."""
        return self._op(x, *self._stack, slots, weight, base, self._count)

    def fetch_and_compute(self, x: Tensor, wanted: np.ndarray, keys: list[int], weight: Tensor, base: Tensor) -> Tensor:
        """The same when some are not there."""
        return _Pass(self, x, wanted, weight).run(keys).add_(base)

    def done(self, keys: list[int], there: bool) -> None:
        """The kernels that read these experts' slots were begun. there: `look_up` had all of them."""
        if there:
            self._cache.used(keys)
        self._cache.forget_ahead(self._prefix, keys)

    def table(self) -> np.ndarray | None:
        """i64 [E]: the slot of each of the layer's experts, if all are there and none will ever have to make room."""
        cache = self._cache
        own = np.arange(self._first, self._first + self._count)
        slots = cache.slots_of(own)
        settled = not cache.table.contended and slots.min() >= 0
        if not settled or self.trace is not None or cache.lookup(own) is None:
            return None
        return slots

    def bring(self, most: int) -> None:
        """Have up to `most` of the layer's experts come to the device that are not there, if every expert has a slot.
        Raises what reading an expert raises."""
        cache = self._cache
        if cache.table.contended:
            return
        own = np.arange(self._first, self._first + self._count)
        held = [key for key in own[cache.slots_of(own) < 0][:most].tolist() if cache.hold(key)]
        flying = set(held)
        try:
            while flying:
                flying.difference_update(cache.wait(flying))
        finally:
            for key in held:
                cache.release(key)

    def count_hits(self, count: int) -> None:
        """`count` experts were found in `table`, on the device, by nobody's asking."""
        self._cache.stats.lookups += count
        self._cache.stats.hits += count


class _Pass:
    """One call some of whose experts are not there."""

    def __init__(self, layer: RoutedExperts, x: Tensor, wanted: np.ndarray, weight: Tensor) -> None:
        self.layer, self.cache = layer, layer._cache
        self.x, self.shape = x, wanted.shape
        self.flat = wanted.ravel()
        self.weight = weight.reshape(-1, 1)
        # The pairs of token and expert, those of one expert together.
        self.order = np.argsort(self.flat, kind="stable")
        self.sorted = self.flat[self.order]
        self.rows = torch.empty(len(self.flat), x.shape[1], dtype=torch.float32, device=x.device)
        self.held: set[int] = set()
        self.lent: set[int] = set()

    def run(self, keys: list[int]) -> Tensor:
        cache = self.cache
        hits = [key for key in keys if cache.ready(key)]
        cache.stats.hits += len(hits)
        here = set(hits)
        missing = [key for key in keys if key not in here]
        try:
            for key in hits:
                cache.hold(key)
                self.held.add(key)
            helped = self._helped(missing)
            queue = deque(key for key in missing if key not in helped)
            flying: set[int] = set()
            self._feed(queue, flying)
            self._compute(hits)
            if helped:
                self._compute_on_cpu(helped)
            while queue or flying:
                self._feed(queue, flying)
                if not flying:
                    # Every slot is pinned by what was read ahead for other layers: rare, and it is let go.
                    for prefix in cache.first:
                        cache.forget_ahead(prefix, ())
                    self._feed(queue, flying)
                    if not flying:
                        raise RuntimeError("no slot for an expert: all are pinned")
                arrived = cache.wait(flying)
                self._compute(arrived)
                flying.difference_update(arrived)
        finally:
            for key in self.held:
                cache.release(key)
            for key in self.lent:
                self.layer._assist.host.release(key)  # type: ignore[union-attr]
        return sum_in_order(self.rows.view(*self.shape, -1))

    def _feed(self, queue: deque[int], flying: set[int]) -> None:
        while queue and len(flying) < WINDOW and self.cache.hold(queue[0]):
            self.held.add(queue[0])
            flying.add(queue.popleft())

    def _pairs(self, keys: list[int]) -> np.ndarray:
        """The numbers of all pairs of these experts."""
        starts = np.searchsorted(self.sorted, keys, "left")
        ends = np.searchsorted(self.sorted, keys, "right")
        return np.concatenate([self.order[a:b] for a, b in zip(starts, ends)])

    def _compute(self, keys: list[int]) -> None:
        """The rows of these experts, which are there and held; then they are let go."""
        if not keys:
            return
        pairs = self._pairs(keys)
        slots = self.cache.slots_of(self.flat[pairs])
        # One copy to the device, for each waits for the one before.
        slots, at, tokens = torch.from_numpy(np.stack([slots, pairs, pairs // self.shape[1]])).to(self.x.device)
        x = self.x[tokens]
        layer, weight = self.layer, self.weight[at]
        self.rows[at] = layer._op(x, *layer._stack, slots[:, None], weight, None, len(keys))
        self.cache.used(keys)
        for key in keys:
            self.held.discard(key)
            self.cache.release(key)

    def _helped(self, missing: list[int]) -> set[int]:
        """The missing experts that the CPU takes: of those in RAM, the last ones."""
        assist = self.layer._assist
        if assist is None:
            return set()
        there = [key for key in missing if assist.host.ready(key)]
        count = assist.share(len(there))
        taken = set(there[len(there) - count :])
        for key in taken:
            # Reads for the other experts must not take their slots meanwhile.
            assist.host.hold(key)
            self.lent.add(key)
        return taken

    def _compute_on_cpu(self, keys: set[int]) -> None:
        assist = self.layer._assist
        assert assist is not None
        pairs = self._pairs(sorted(keys))
        slots = torch.from_numpy(assist.host.slots_of(self.flat[pairs]))
        at, tokens = torch.from_numpy(np.stack([pairs, pairs // self.shape[1]])).to(self.x.device)
        x, weight = self.x[tokens].cpu(), self.weight[at].cpu()
        made = self.layer._host_op(x, *self.layer._host_stack, slots[:, None], weight)
        self.rows[at] = made.to(self.x.device)
        self.cache.stats.assisted += len(keys)
