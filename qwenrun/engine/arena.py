"""Arena: the memory of a plan. Every lasting buffer of the engine is a tensor of it, under the plan's name.

One region a tier, taken at once: if it can't be had, nothing was loaded yet. On a CPU the region is an anonymous
mapping, whose pages become resident when they are first written; beside a GPU the host's region is page-locked.
Knows no weights and no cache.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from qwenrun.errors import DoesNotFitError
from qwenrun.kernels.weight import TORCH_DTYPES
from qwenrun.plan.buffers import Buffer, sequence_name
from qwenrun.plan.planner import Plan

# Tensors begin at multiples of a cache line; slots of experts at pages, where O_DIRECT can read to.
ALIGN, PAGE = 64, 4096
# mallopt's number for it (malloc.h), and the bytes from which on a block is mapped and unmapped by itself.
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 8 << 20
# Counted in the plan, but allocated for a moment by torch, or there before the arena was.
NOT_HELD = ("workspace", "runtime")


class Arena:
    """Tensors by name: `arena[name]` on the device, `arena.host[name]` in RAM beside a GPU.

    nbytes: the bytes of all of them, which is the plan's figure; up to 64 bytes a tensor more are taken.
    """

    def __init__(self, device: torch.device, tensors: dict[str, Tensor], host: dict[str, Tensor]) -> None:
        self.device = device
        self._tensors = tensors
        self.host = host

    @classmethod
    def from_plan(cls, plan: Plan, device: torch.device | str = "cpu") -> Arena:
        """Take the memory of `plan`. Raises DoesNotFitError if the system refuses it."""
        device = torch.device(device)
        _give_back_large_blocks()
        pinned = device.type == "cuda"
        return cls(device, _take(plan.device, device), _take(plan.host, torch.device("cpu"), pinned))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in (self._tensors, self.host) for t in part.values())

    def sequence(self, number: int) -> dict[str, Tensor]:
        """The buffers of one sequence's state, by their names in `state_shapes`."""
        prefix = sequence_name(number, "")
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}


def _give_back_large_blocks() -> None:
    """Have glibc return what a kernel needed for a moment when it is freed.

    By default it raises its threshold to the largest block that was ever freed (up to 32 MiB), and serves such
    blocks from a heap that fragments: a process of 1.1 GiB had 2.3 GiB of freed blocks resident beside it.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _take(buffers: Iterable[Buffer], device: torch.device, pinned: bool = False) -> dict[str, Tensor]:
    places: list[tuple[Buffer, int]] = []
    end = 0
    for buffer in buffers:
        if buffer.part in NOT_HELD:
            continue
        align = PAGE if buffer.name.startswith("slots.") else ALIGN
        end = -(-end // align) * align
        places.append((buffer, end))
        end += buffer.nbytes
    region = _region(end, device, pinned)
    return {b.name: _view(region[at : at + b.nbytes], b) for b, at in places}


def _view(data: Tensor, buffer: Buffer) -> Tensor:
    return data.view(TORCH_DTYPES[buffer.dtype]).view(buffer.shape)


def _region(size: int, device: torch.device, pinned: bool) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    try:
        if device.type != "cpu" or pinned:
            return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, RuntimeError, OverflowError) as error:
        raise DoesNotFitError(
            f"{size:,} bytes of memory can't be had on {device}: {error}",
            "a smaller --ram or --vram, or a shorter --ctx",
        ) from error
    with suppress(OSError, AttributeError):  # not every kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
