"""What this machine is: processor, memory, caches, disk, and the libraries that compute. Linux files, else unknown.

Cold but for `diagnose`. Knows no model.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwenrun.plan.device import free_memory, meminfo, read_text

# The instruction sets kernels for this program are written for, as /proc/cpuinfo spells them.
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
OPS = (
    "linear",
    "embedding",
    "experts",
    "attention",
    "delta_rule",
    "conv",
    "rms_norm",
    "router",
    "encode",
    "decode",
)


@dataclass(frozen=True)
class Machine:
    """cores: those this process may use. Bytes; None where the system does not say."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int | None
    cache_bytes: int | None

    def line(self) -> str:
        """One line for a report of speed."""
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.cpu}, {self.cores} core{'' if self.cores == 1 else 's'}{memory}"


@cache
def machine() -> Machine:
    """This machine, as far as it tells."""
    info = read_text("/proc/cpuinfo")
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return Machine(
        cpu=" ".join(name[1].split()) if name else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=tuple(flag for flag in FLAGS if flag in known),
        memory_bytes=meminfo("MemTotal"),
        cache_bytes=_last_level_cache(),
    )


def peak_rss() -> int | None:
    """The most bytes this process has had resident so far; None if the system does not say."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", read_text("/proc/self/status"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", read_text(str(path)).strip())
        if match:
            sizes.append(int(match[1]) * {"K": 1 << 10, "M": 1 << 20}[match[2]])
    return max(sizes, default=None)


def diagnose() -> dict[str, Any]:
    """Everything `qwenrun doctor` tells: the machine, the libraries, and the backend of every op (on int4 weights)."""
    import torch

    from qwenrun.kernels.dispatch import backends, explain
    from qwenrun.kernels.spec import BlockSpec

    here = machine()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": here.cpu,
        "cpu_flags": list(here.flags),
        "cores": here.cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": here.memory_bytes,
        "available_memory_bytes": free_memory(),
        "cache_bytes": here.cache_bytes,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "libraries": {name: _version(name) for name in ("torch", "safetensors", "tokenizers", "numpy", "triton")},
        "kernels": {name: detail for name, found in backends().items() if (detail := found.BACKEND.detail())},
        "backends": explain(OPS, spec=BlockSpec("int4", 128, "f16")),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
