"""Experts: the caches of a plan's pools put together, over the pack's expert files. Engine.open makes one.

Decides how the files are read (past the page cache, where that could not hold them) and what the CPU does beside
a GPU; the rest is in the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from qwenrun.engine.arena import Arena
from qwenrun.engine.device_cache import CudaMover, DeviceCache, Mover
from qwenrun.engine.events import ExpertUse
from qwenrun.engine.expert_cache import ExpertCache, SlotCache
from qwenrun.engine.expert_store import ExpertStore
from qwenrun.engine.prefetch import Prefetcher
from qwenrun.engine.routed import Assist, RoutedExperts
from qwenrun.kernels.ops import bind
from qwenrun.model.qwen3_5 import Model
from qwenrun.plan.device import free_memory
from qwenrun.plan.planner import Plan
from qwenrun.quant.packfile.reader import ExpertFile, PackReader


class Experts:
    """All routed experts of an open pack. direct: reads pass the page cache by."""

    def __init__(
        self, pack: PackReader, plan: Plan, arena: Arena, direct: bool | None = None, mover: Mover | None = None
    ) -> None:
        """direct: by default where the page cache can't hold the files. mover: how bytes reach a device that is not
        the CPU; by default CUDA's."""
        self._plan = plan
        self._device = arena.device
        gpu = plan.budget.gpu
        files = {prefix: pack.expert_file(prefix) for pool in plan.pools for prefix in pool.prefixes}
        self._store = ExpertStore(files, _past_the_page_cache(plan, files) if direct is None else direct)
        self.direct = self._store.direct
        self._caches: dict[str, SlotCache] = {}
        self._assists: dict[str, Assist | None] = {}
        self._routed: dict[str, RoutedExperts] = {}
        for number, pool in enumerate(plan.pools):
            mine = {prefix: files[prefix] for prefix in pool.prefixes}
            slots = arena.host[f"slots.{number}"] if gpu else arena[f"slots.{number}"]
            host = ExpertCache(mine, slots, self._store)
            cache: SlotCache = host
            assist = None
            if gpu:
                mover = mover or CudaMover(arena.device)
                cache = DeviceCache(host, arena[f"slots.{number}"], mover)
                if pool.slots < pool.experts:
                    assist = measure_assist(host, arena[f"slots.{number}"], mover, plan.config.top_k)
            for prefix in pool.prefixes:
                self._caches[prefix], self._assists[prefix] = cache, assist

    def of(self, prefix: str) -> RoutedExperts:
        """The callable for a layer's experts."""
        self._routed[prefix] = RoutedExperts(prefix, self._caches[prefix], self._device, self._assists[prefix])
        return self._routed[prefix]

    def look_ahead(self, model: Model) -> None:
        """Read experts ahead where not all have a slot."""
        if self._plan.slots < self._plan.experts:
            here = [routed for layer in model.layers if (routed := getattr(layer.mlp, "routed", None))]
            names = {id(routed): prefix for prefix, routed in self._routed.items()}
            Prefetcher(model.layers, [(names[id(r)], self._caches[names[id(r)]]) for r in here])

    def stats(self) -> ExpertUse:
        """Counts of all pools together."""
        caches = {id(cache): cache for cache in self._caches.values()}
        return sum((cache.counts() for cache in caches.values()), ExpertUse())

    def disk_reads(self) -> tuple[int, float]:
        """Bytes read, and seconds in which any read was under way, since the engine was opened."""
        return self._store.bytes_read, self._store.read_seconds

    def record(self, sink: Callable[[str, np.ndarray], None] | None) -> None:
        for prefix, routed in self._routed.items():
            routed.trace = None if sink is None else partial(sink, prefix)

    def close(self) -> None:
        self._store.close()


def _past_the_page_cache(plan: Plan, files: dict[str, ExpertFile]) -> bool:
    """Whether the page cache has no room for the expert files beside the plan: what it kept would be thrown out
    again before it is asked for, and copying costs time."""
    total = sum(file.count * file.record_size for file in files.values())
    free = free_memory()
    own = plan.total("host") if plan.budget.gpu else plan.total("device")
    return free is None or free < total + own


def measure_assist(host: ExpertCache, slots: torch.Tensor, mover: Mover, top_k: int, passes: int = 3) -> Assist:
    """Set the CPU's speed on experts beside the link's: both on whatever bytes are in the slots."""
    count = min(top_k, len(host.slots), len(slots))
    nbytes = count * host.record

    def copy() -> None:
        for slot in range(count):
            mark = mover.copy(host.slots[slot], slots[slot], None)
        mover.synchronize(mark)

    gate_up, down = host.stacks(next(iter(host.files)))
    experts = bind("experts", "cpu", gate_up.spec)
    x, index = torch.zeros(1, gate_up.cols), torch.arange(count)[None]
    weight = torch.ones(1, count)

    def compute() -> None:
        experts(x, gate_up, down, index, weight)

    return Assist(host, cpu=nbytes / _best(compute, passes), link=nbytes / _best(copy, passes))


def _best(work: Callable[[], None], passes: int) -> float:
    times = []
    for _ in range(passes):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return max(min(times), 1e-9)
