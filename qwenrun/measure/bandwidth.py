"""How fast this machine reads memory: the ceiling that decoding, which reads every active weight, runs against.

Several kinds of read of one buffer far larger than the caches, by all of torch's threads; the best of all
passes is the figure. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from qwenrun.measure.machine import machine
from qwenrun.plan.device import free_memory

# Times the last-level cache, within these bounds and a quarter of what is free.
CACHES, SMALLEST, LARGEST = 8, 256 << 20, 2 << 30
PASSES = 5

METHOD = "best of {passes} passes each of sum, maximum and dot product over {mib:,} MiB of float32, {threads} threads"


def read_bandwidth(progress: Callable[[int, int], None] | None = None) -> tuple[float, str]:
    """(bytes per second, how it was measured)."""
    import torch

    size = min(max(CACHES * (machine().cache_bytes or 0), SMALLEST), LARGEST)
    free = free_memory()
    if free is not None:
        size = min(size, max(free // 4, 16 << 20))
    # Filled by all threads, so that on a machine with several memory nodes each has its share.
    buffer = torch.empty(size // 4, dtype=torch.float32).fill_(1.0)
    reads: list[Callable[[], object]] = [buffer.sum, buffer.max, lambda: torch.dot(buffer, buffer)]
    best, total = 0.0, len(reads) * PASSES
    for number in range(total):
        read = reads[number % len(reads)]
        begun = time.perf_counter()
        read()
        best = max(best, buffer.nbytes / (time.perf_counter() - begun))
        if progress:
            progress(number + 1, total)
    how = METHOD.format(passes=PASSES, mib=buffer.nbytes >> 20, threads=torch.get_num_threads())
    return best, how


def card_bandwidth() -> tuple[float, str]:
    """The same of the card's memory, by sums. An engine's cap on what torch may take is lifted: this is no model."""
    import torch

    torch.cuda.set_per_process_memory_fraction(1.0)
    free, _ = torch.cuda.mem_get_info()
    buffer = torch.ones(min(LARGEST, free // 2) // 4, dtype=torch.float32, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = 0.0
    for _ in range(3 * PASSES):
        begin.record()
        buffer.sum()
        end.record()
        end.synchronize()
        best = max(best, buffer.nbytes / (begin.elapsed_time(end) / 1e3))
    return best, f"best of {3 * PASSES} sums over {buffer.nbytes >> 20:,} MiB on {torch.cuda.get_device_name()}"
