"""Where every buffer lies: `place` divides the list of buffers over the tiers of a machine inside a budget.

The same plan is printed by `qwenrun vram` and allocated by the engine's arena. Tiers: `device` is where kernels
read weights (VRAM, or RAM on a machine without a GPU), `host` is RAM beside a GPU, `disk` is the pack itself.
Everything but routed experts and an untied embedding lies on the device; experts have slots there, as many as
the budget leaves room for, and what has no slot is read from the next tier when a token asks for it.
Knows no table, no unit and no speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qwenrun.errors import DoesNotFitError
from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import (
    RUNTIME,
    RUNTIME_CUDA,
    Buffer,
    Run,
    expert_records,
    run_buffers,
    totals,
    weight_buffers,
)
from qwenrun.plan.workspace import Codes, card_workspace
from qwenrun.quant.recipe import Assignment, Recipe, TensorInfo, recipe_names

# Reads in flight beside the experts that are computed: enough to keep a disk busy.
WINDOW = 8
# Contexts are proposed in steps of this many tokens.
CTX_STEP = 256

Stored = Iterable[tuple[TensorInfo, Assignment]]


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be used: device and host as the module says; None is no limit. gpu: the device is a GPU."""

    device: int | None = None
    host: int | None = None
    gpu: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """Routed experts whose records have one size, and the slots for them.

    prefixes: the layers' names. experts: how many there are in all of them. slots, host_slots: places on the
    device and (only beside a GPU) in RAM.
    """

    record: int
    prefixes: tuple[str, ...]
    experts: int
    slots: int
    host_slots: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every buffer and its tier. `device` and `host` hold the slots of the pools as buffers `slots.N`,
    uint8 [slots, record]; `disk` is what stays in the pack: the experts beyond the slots of both tiers (an
    amount, not certain ones), an embedding that is read by rows."""

    config: ModelConfig
    run: Run
    budget: Budget
    device: tuple[Buffer, ...]
    host: tuple[Buffer, ...]
    disk: tuple[Buffer, ...]
    pools: tuple[Pool, ...]

    def total(self, tier: str = "device") -> int:
        """Bytes in a tier: "device", "host" or "disk"."""
        return sum(buffer.nbytes for buffer in getattr(self, tier))

    def parts(self, tier: str = "device") -> dict[str, int]:
        """Bytes by printed part in a tier, as `totals` names them."""
        return totals(getattr(self, tier))

    @property
    def experts(self) -> int:
        return sum(pool.experts for pool in self.pools)

    @property
    def slots(self) -> int:
        """Experts that can be on the device at once."""
        return sum(pool.slots for pool in self.pools)

    @property
    def host_slots(self) -> int:
        return sum(pool.host_slots for pool in self.pools)

    @property
    def resident(self) -> float:
        """Share of the routed experts that fits on the device: 1.0 if nothing is ever read twice."""
        return self.slots / self.experts if self.experts else 1.0

    @property
    def embedding_on_disk(self) -> bool:
        return any(buffer.part == "embedding" for buffer in self.disk)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model, counted once for many runs: `weigh` makes it.

    dense: buffers that can't be elsewhere. embedding: those that may stay on disk. pools: with as few slots as they
    can do with.
    """

    stored: tuple[tuple[TensorInfo, Assignment], ...]
    packed: bool
    codes: Codes
    dense: tuple[Buffer, ...]
    embedding: tuple[Buffer, ...]
    pools: tuple[Pool, ...]


def weigh(config: ModelConfig, stored: Stored, run: Run, packed: bool = True) -> Weights:
    """Count the tensors that `run` holds (its `mtp` and `vision` alone matter here).

    packed: the weights come from a pack, whose records can be read one by one; a Hugging Face folder has to be
    in memory whole.
    """
    stored = tuple(stored)
    held = weight_buffers([s for s in stored if not (packed and s[0].is_experts)], run, packed)
    movable = ("embedding",) if packed and not config.tie_embeddings else ()
    dense = tuple(b for b in held if b.part not in movable)
    embedding = tuple(b for b in held if b.part in movable)
    groups: dict[int, list[tuple[str, int]]] = {}
    if packed:
        for prefix, (record, count, _) in expert_records(stored, run).items():
            groups.setdefault(record, []).append((prefix, count))
    pools = []
    for record, members in groups.items():
        count = sum(n for _, n in members)
        # A decoded token's experts in the layer that runs and in the next, or the window of reads.
        least = min(count, max(2 * config.top_k, config.top_k + WINDOW))
        pools.append(Pool(record, tuple(name for name, _ in members), count, least))
    return Weights(stored, packed, Codes.of(stored), dense, embedding, tuple(pools))


@dataclass(frozen=True, slots=True)
class _Need:
    """What a run must have on the device: buffers that can't be elsewhere, and those that may stay on disk."""

    fixed: tuple[Buffer, ...]
    embedding: tuple[Buffer, ...]
    pools: tuple[Pool, ...]

    @property
    def least(self) -> int:
        return _bytes(self.fixed) + sum(pool.record * pool.slots for pool in self.pools)

    @property
    def most(self) -> int:
        return _bytes(self.fixed + self.embedding) + sum(pool.record * pool.experts for pool in self.pools)


def _need(config: ModelConfig, weights: Weights, run: Run, gpu: bool) -> _Need:
    held = run_buffers(config, weights.codes, run)
    if gpu:
        own = {"runtime": RUNTIME_CUDA, "workspace": card_workspace(config, run.chunk, run.ctx)}
        held = [replace(b, nbytes=own.get(b.part, b.nbytes)) for b in held]
    return _Need((*weights.dense, *held), weights.embedding, weights.pools)


def place(config: ModelConfig, weights: Weights, run: Run, budget: Budget) -> Plan:
    """The plan of a run inside `budget`: as many resident experts as fit.

    Raises DoesNotFitError with the shortfall, the parts, and what would fit.
    """
    need = _need(config, weights, run, budget.gpu)
    host_fixed = (Buffer("runtime", "runtime", RUNTIME),) if budget.gpu else ()
    disk: tuple[Buffer, ...] = ()
    if budget.device is None or need.most <= budget.device:
        fixed = need.fixed + need.embedding
        pools = tuple(replace(pool, slots=pool.experts) for pool in need.pools)
    elif need.least <= budget.device:
        fixed, disk = need.fixed, need.embedding
        pools = _more_slots(need.pools, budget.device - need.least)
    else:
        raise _no_fit(config, weights, run, budget, need)
    if budget.gpu:
        pools = _host_slots(pools, budget, _bytes(host_fixed))
    beyond = [max(0, p.experts - max(p.slots, p.host_slots)) * p.record for p in pools]
    return Plan(
        config=config,
        run=run,
        budget=budget,
        device=fixed + _slots(pools, "slots"),
        host=host_fixed + _slots(pools, "host_slots"),
        disk=disk + tuple(Buffer(f"experts.{n}", "routed", size) for n, size in enumerate(beyond) if size),
        pools=pools,
    )


def largest_ctx(config: ModelConfig, weights: Weights, run: Run, budget: Budget) -> int:
    """The most tokens, a multiple of 256, that the budget can hold a context of with the fewest experts resident;
    at most the model's positions; 0 if not even one step fits."""

    def fits(ctx: int) -> bool:
        need = _need(config, weights, replace(run, ctx=ctx), budget.gpu)
        return budget.device is None or need.least <= budget.device

    low, high = 0, max(1, config.positions // CTX_STEP)
    if fits(high * CTX_STEP):
        return high * CTX_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * CTX_STEP) else (low, middle - 1)
    return low * CTX_STEP


def least_budget(config: ModelConfig, weights: Weights, run: Run, gpu: bool = False) -> int:
    """Bytes on the device below which nothing runs: everything that must lie there, and the fewest slots."""
    return _need(config, weights, run, gpu).least


def whole_budget(config: ModelConfig, weights: Weights, run: Run, gpu: bool = False) -> int:
    """Bytes on the device with which every expert is resident."""
    return _need(config, weights, run, gpu).most


def _bytes(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _more_slots(pools: Sequence[Pool], room: int) -> tuple[Pool, ...]:
    """Give every pool the same share of its missing slots, and what is left over to the first that can use it."""
    missing = sum(pool.record * (pool.experts - pool.slots) for pool in pools)
    share = min(1.0, room / missing) if missing else 0.0
    out = [replace(pool, slots=pool.slots + int(share * (pool.experts - pool.slots))) for pool in pools]
    room -= sum(new.record * (new.slots - old.slots) for new, old in zip(out, pools))
    for n, pool in enumerate(out):
        more = min(pool.experts - pool.slots, max(room, 0) // pool.record)
        out[n] = replace(pool, slots=pool.slots + more)
        room -= more * pool.record
    return tuple(out)


def _host_slots(pools: Sequence[Pool], budget: Budget, fixed: int) -> tuple[Pool, ...]:
    """Slots in RAM for what has none in VRAM; never fewer than the window that feeds the device."""
    wanted = [pool.experts if pool.slots < pool.experts else min(WINDOW, pool.experts) for pool in pools]
    least = tuple(replace(p, host_slots=min(WINDOW, w)) for p, w in zip(pools, wanted))
    room = None if budget.host is None else budget.host - fixed - sum(p.record * p.host_slots for p in least)
    if room is None:
        return tuple(replace(p, host_slots=w) for p, w in zip(pools, wanted))
    if room < 0:
        raise DoesNotFitError(
            f"beside the GPU {_gib(budget.host or 0)} of RAM are too few: {-room:,} bytes are missing for this program"
            " and the records on their way to the card",
            f"--ram {_gib(fixed + sum(p.record * p.host_slots for p in least) + (64 << 20))}",
        )
    asked = sum(p.record * (w - p.host_slots) for p, w in zip(least, wanted))
    share = min(1.0, room / asked) if asked else 0.0
    return tuple(replace(p, host_slots=p.host_slots + int(share * (w - p.host_slots))) for p, w in zip(least, wanted))


def _slots(pools: Sequence[Pool], which: str) -> tuple[Buffer, ...]:
    out = []
    for number, pool in enumerate(pools):
        count = getattr(pool, which)
        if count:
            shape = (count, pool.record)
            out.append(Buffer(f"slots.{number}", "routed", count * pool.record, shape, "U8"))
    return tuple(out)


def _no_fit(config: ModelConfig, weights: Weights, run: Run, budget: Budget, need: _Need) -> DoesNotFitError:
    """What is missing and of what; the hint names everything that would fit."""
    have = budget.device or 0
    least = need.least
    names = {"dense": "weights", "routed": "experts", "kv": "KV cache", "state": "DeltaNet state"}
    lines = [f"{names.get(k, k)} {_gib(v)}" for k, v in totals(need.fixed).items() if v and k != "total"]
    slots = sum(pool.slots * pool.record for pool in need.pools)
    if slots:
        lines.append(f"the fewest experts {_gib(slots)}")
    where = "VRAM" if budget.gpu else "memory"
    ways = []
    if run.kv != "int8" and _need(config, weights, replace(run, kv="int8"), budget.gpu).least <= have:
        ways.append("--kv int8")
    shorter = min(largest_ctx(config, weights, run, budget), run.ctx)
    if 0 < shorter < run.ctx:
        ways.append(f"--ctx {shorter}")
    ways += _smaller_recipes(config, weights, run, budget)
    if not weights.packed and config.is_moe:
        ways.append("a pack, whose experts need not be in memory: qwenrun quantize SRC -o PACK")
    if not ways:
        ways.append(f"{'--vram' if budget.gpu else '--ram'} {-(-least // 2**20)}MiB")
    return DoesNotFitError(
        f"{config.name or 'the model'} with a context of {run.ctx:,} tokens needs at least {_gib(least)} of {where},"
        f" {_gib(least - have)} more than the {_gib(have)} there are\n  {', '.join(lines)}",
        ", or ".join(ways),
    )


def _smaller_recipes(config: ModelConfig, weights: Weights, run: Run, budget: Budget) -> list[str]:
    """The largest recipe with which the run would fit where the one at hand does not."""
    infos = [info for info, _ in weights.stored]
    fitting = []
    for name in recipe_names():
        recipe = Recipe.load(name)
        other = weigh(config, [(info, recipe.assign(info)) for info in infos], run)
        least = _need(config, other, run, budget.gpu).least
        if least <= (budget.device or 0):
            fitting.append((least, name))
    return [f"--recipe {max(fitting)[1]}"] if fitting else []


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:,.0f} MiB"
