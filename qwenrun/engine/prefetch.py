"""Prefetcher: reads the next layer's experts while this layer's are computed, as long as that pays.

The next layer's router is applied early, to the residual stream before this layer's experts have been added to
it. Whether that gains anything depends on disk, processor and model, so it is tried: some tokens with it, some
without, and for a while whichever made the engine lose less time. Knows neither weights nor files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from qwenrun.engine.expert_cache import SlotCache
from qwenrun.model.layer import Layer
from qwenrun.plan.planner import WINDOW

# Tokens of a trial of either way, and tokens until the next one.
TRIAL, KEEP = 12, 240
# Longer passes ask for nearly all experts anyway, and read them in a row.
LONGEST = 4


class Prefetcher:
    """Looks ahead in all layers of a model. `on`: whether it reads ahead now."""

    def __init__(self, layers: Sequence[Layer], caches: Sequence[tuple[str, SlotCache] | None]) -> None:
        """caches: for each layer the name of its experts and their cache; None if they are not in a cache."""
        self.on = True
        self._cost = {True: 0.0, False: 0.0}
        self._count = 0
        self._spent = 0.0
        self._stalls = 0.0
        self._all = list({id(c[1]): c[1] for c in caches if c is not None}.values())
        steps = [(here, there, cache) for here, there, cache in zip(layers, layers[1:], caches[1:]) if cache]
        for number, (here, there, (prefix, cache)) in enumerate(steps):
            here.between = partial(self._look, number == 0, there, prefix, cache)

    def _look(self, first: bool, there: Layer, prefix: str, cache: SlotCache, x: Tensor) -> None:
        if x.shape[0] > LONGEST:
            return
        if first:
            self._next_token()
        if not self.on:
            return
        begun = time.perf_counter()
        experts = there.preview(x)
        if experts is not None:
            chosen = dict.fromkeys(experts.flatten().tolist())
            cache.prefetch(prefix, chosen, WINDOW)
        self._spent += time.perf_counter() - begun

    def _next_token(self) -> None:
        """Charge the last token's loss to the way it was computed, and choose the way of this one."""
        stalls = sum(cache.stats.stall_seconds for cache in self._all)
        loss, self._stalls, self._spent = stalls - self._stalls + self._spent, stalls, 0.0
        count = self._count
        # The first token of a trial pays for the state the other way left behind.
        if 0 < count <= 2 * TRIAL and (count - 1) % TRIAL:
            self._cost[self.on] += loss
        self._count = count + 1
        if count < TRIAL:
            self.on = True
        elif count < 2 * TRIAL:
            self.on = False
        elif count == 2 * TRIAL:
            self.on = self._cost[True] < self._cost[False]
        elif count >= 2 * TRIAL + KEEP:
            self._count, self._cost = 0, {True: 0.0, False: 0.0}
