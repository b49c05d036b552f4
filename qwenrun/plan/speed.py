"""An interval for decode speed: the bytes a token moves in a plan, over the bandwidths of what moves them; on a card
what its launches take too.

Predicted, never measured. The slow end: routing is uniform, every resource works alone, at a part of its
bandwidth, and the context is full. The fast end: routing is skewed as real models' is, all resources work at
once, near their bandwidths, and the context is empty. Knows no machine: bandwidths are given.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenrun.plan.buffers import read_per_token
from qwenrun.plan.planner import Plan, Stored

# Shares of a stated bandwidth that decoding reaches: good kernels 80 to 90 % of it, plain ones half.
EFFICIENCY = (0.5, 0.9)
# Seconds that a layer's launches take on a card beside that: an H100 took 57 us a layer beyond half of its bandwidth
# (docs/gpu.md, 2026-11-26); half of it is what fewer of them may leave.
LAUNCHES = (60e-6, 30e-6)
# Share of lookups that find their expert when a share s of the experts is resident: s if routing is uniform, about
# s^0.6 where a cache was measured on a real model of 128 experts (19 % -> 37 %, 57 % -> 74 %; kekzl/imp PR 1374).
SKEW = 0.6
RAM, DISK = 60e9, 3.5e9


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second: of the device's memory, of copies from RAM to it (None: the device is the CPU), of disk, and
    of RAM beside a GPU, where the CPU computes some of the experts that the device has not."""

    device: float
    link: float | None
    disk: float
    ram: float = RAM


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second from `low` to `high`, and what bounds the fast end: "memory", "RAM" (beside a GPU: what the
    CPU computes and what is copied, shared so that both end together) or "disk".

    hits: share of experts found on the device, uniform and skewed. moved: bytes a token of the slow end reads from
    the device's memory, from RAM beside it, and from disk.
    """

    low: float
    high: float
    binds: str
    hits: tuple[float, float]
    moved: dict[str, int]


def decode_speed(plan: Plan, stored: Stored, rates: Rates) -> Speed:
    """What decoding one sequence may reach in `plan`."""
    stored = list(stored)
    experts = _expert_bytes(plan)
    fixed = read_per_token(plan.config, stored) - _stored_expert_bytes(plan, stored)
    # Every DeltaNet state is read and written; keys and values are read as far as the context is full.
    state = 2 * sum(b.nbytes for b in plan.device if b.part == "state") // plan.run.sequences
    kv = sum(b.nbytes for b in plan.device if b.part == "kv") // plan.run.sequences
    device, host = plan.resident, _host_share(plan)
    ends = []
    for share, full, efficiency in ((1.0, 1.0, EFFICIENCY[0]), (SKEW, 0.0, EFFICIENCY[1])):
        near = device**share
        either = max(near, min(1.0, device + host) ** share)
        moved = {
            "memory": fixed + experts + state + round(full * kv),
            "RAM": round((1 - near) * experts) if rates.link else 0,
            "disk": round((1 - either) * experts),
        }
        # The slow end copies everything; the fast end computes a part where it lies.
        beside = (rates.link or 1.0) + (rates.ram if share < 1 else 0)
        speeds = {"memory": rates.device, "RAM": beside, "disk": rates.disk}
        ends.append((moved, {name: moved[name] / (speeds[name] * efficiency) for name in moved}, near))
    (moved, slow, uniform), (_, fast, skewed) = ends
    binds = max(fast, key=lambda name: fast[name])
    launches = [plan.config.num_layers * seconds if rates.link else 0.0 for seconds in LAUNCHES]
    times = (sum(slow.values()) + launches[0], max(fast.values()) + launches[1])
    return Speed(1 / times[0], 1 / times[1], binds, (uniform, skewed), moved)


def _expert_bytes(plan: Plan) -> int:
    """Bytes of the records of the routed experts that a token uses, in all layers."""
    layers = sum(not name.startswith("mtp.") for pool in plan.pools for name in pool.prefixes)
    if not layers:
        return 0
    records = sum(p.record for p in plan.pools for name in p.prefixes if not name.startswith("mtp."))
    return plan.config.top_k * records


def _stored_expert_bytes(plan: Plan, stored: Stored) -> int:
    """What `read_per_token` counts for the same experts: without the records' padding."""
    routed = [(info, how) for info, how in stored if info.part == "routed"]
    return read_per_token(plan.config, routed) if plan.pools else 0


def _host_share(plan: Plan) -> float:
    """Share of the experts that RAM holds beside those on the device."""
    return min(1.0 - plan.resident, plan.host_slots / plan.experts) if plan.experts else 0.0
