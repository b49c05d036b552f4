"""What this machine has to give: free memory, its own limits and a container's; sizes of graphics cards.

Standard library alone; Linux files, else unknown. Knows no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwenrun.errors import UsageError

# Of what is free, this share is planned with: the system and its page cache need some too.
SHARE = 0.92


def free_memory() -> int | None:
    """Bytes that can be had without swapping, limits of control groups included; None if nothing tells."""
    found = [meminfo("MemAvailable"), *_cgroup_rooms()]
    return min((value for value in found if value is not None), default=None)


def spare_memory() -> int | None:
    """Bytes of RAM to plan with if nobody names a budget; None is no limit, for nothing tells."""
    free = free_memory()
    return None if free is None else int(free * SHARE)


def meminfo(key: str) -> int | None:
    """A figure of /proc/meminfo in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def read_text(path: str | Path) -> str:
    """A file of the system, "" if there is none."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroup_rooms(root: str = "/sys/fs/cgroup", proc: str = "/proc/self/cgroup") -> list[int]:
    """Room under every memory limit this process is under: its own group's and those above it, versions 2 and 1.

    What is only file cache, and not in use, counts as room.
    """
    rooms = []
    for line in read_text(proc).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, limit, used, stat = Path(root), "memory.max", "memory.current", r"^inactive_file (\d+)$"
        elif "memory" in controllers.split(","):
            base, limit, used, stat = (
                Path(root) / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                r"^total_inactive_file (\d+)$",
            )
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            most, current = read_text(folder / limit).strip(), read_text(folder / used).strip()
            if not (most.isdigit() and current.isdigit()) or int(most) >= 1 << 60:
                continue
            files = re.search(stat, read_text(folder / "memory.stat"), re.MULTILINE)
            rooms.append(max(int(most) - int(current) + (int(files[1]) if files else 0), 0))
    return rooms


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card. vram: bytes a program sees; bandwidth: of its memory, and link: of copies from RAM (PCIe
    with 16 lanes, some four fifths of its nominal speed), bytes per second."""

    name: str
    vram: int
    bandwidth: float
    link: float


def _card(name: str, mib: int, gbs: int, link: int) -> Card:
    return Card(name, mib << 20, gbs * 1e9, link * 1e9)


_PCIE4, _PCIE5 = 25, 50
# Memory as nvidia-smi prints it, bandwidths as the maker states them.
CARDS = (
    _card("RTX 3060 12GB", 12288, 360, _PCIE4),
    _card("RTX 3090", 24576, 936, _PCIE4),
    _card("RTX 4060 Ti 16GB", 16380, 288, _PCIE4 // 2),
    _card("RTX 4080", 16376, 717, _PCIE4),
    _card("RTX 4090", 24564, 1008, _PCIE4),
    _card("RTX 5070 Ti", 16303, 896, _PCIE5),
    _card("RTX 5080", 16303, 960, _PCIE5),
    _card("RTX 5090", 32607, 1792, _PCIE5),
    _card("RTX A6000", 49140, 768, _PCIE4),
    _card("RTX 6000 Ada", 49140, 960, _PCIE4),
    _card("RTX PRO 6000", 97887, 1792, _PCIE5),
    _card("L4", 23034, 300, _PCIE4),
    _card("L40S", 46068, 864, _PCIE4),
    _card("A100 40GB", 40960, 1555, _PCIE4),
    _card("A100 80GB", 81920, 2039, _PCIE4),
    _card("H100", 81559, 3352, _PCIE5),
    _card("H100 PCIe", 81559, 2039, _PCIE5),
    _card("H200", 143771, 4800, _PCIE5),
    _card("B200", 183359, 8000, _PCIE5),
)


def find_card(name: str) -> Card:
    """The card a person means: "RTX 4090", "4090", "h100". Raises UsageError naming those that are known."""
    wanted = _plain(name)
    exact = [card for card in CARDS if _plain(card.name) == wanted]
    part = [card for card in CARDS if wanted and wanted in _plain(card.name)]
    found = exact or part
    if len(found) == 1:
        return found[0]
    which = f"may be {', '.join(card.name for card in found)}" if found else "is not in the table"
    raise UsageError(
        f"the card {name!r} {which}",
        f"one of {', '.join(card.name for card in CARDS)}; or give its memory: --vram 24GiB",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce", "", name.lower())
