"""`qwenrun vram`: plans as a table, one column each: contexts, recipes and KV types side by side.

Cold: reads a config or a manifest, never weights. Knows no formula; `plan` has them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from qwenrun.errors import DoesNotFitError, UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import KV_DTYPES, Run, read_per_token
from qwenrun.plan.device import Card, find_card
from qwenrun.plan.planner import Budget, Plan, Weights, largest_ctx, place, weigh, whole_budget
from qwenrun.plan.speed import DISK, EFFICIENCY, RAM, Rates, Speed, decode_speed
from qwenrun.quant.recipe import DEFAULT, Recipe, recipe_names
from qwenrun.ui import console
from qwenrun.ui.models import Stored, is_pack, stored_in
from qwenrun.ui.tables import fields, table

# What the planner's parts are called here, and the shade of each in a bar.
LABELS = {
    "dense": "weights but routed experts",
    "routed": "routed experts",
    "kv": "KV cache",
    "state": "DeltaNet state",
    "vision": "vision tower",
    "mtp": "MTP head",
    "workspace": "workspace (estimate)",
    "runtime": "program and libraries",
    "total": "total",
}
_BARS = (("dense", "\N{FULL BLOCK}"), ("routed", "\N{DARK SHADE}"), ("kv", "\N{MEDIUM SHADE}"))
_REST = "\N{LIGHT SHADE}"
_BAR_WIDTH = 56


@dataclass(frozen=True)
class VramOptions:
    """What was asked. ctx, recipe, kv: comma-separated. Bytes, and bytes per second; None is not given."""

    ctx: str
    recipe: str | None = None
    kv: str = "bf16"
    gpu: str | None = None
    vram: int | None = None
    ram: int | None = None
    mtp: bool = False
    vision: bool = False
    ram_speed: float = RAM
    disk_speed: float = DISK
    as_json: bool = False


@dataclass(frozen=True)
class Column:
    """One plan without a budget, and what became of it inside the budget, if there is one."""

    recipe: str
    run: Run
    whole: Plan
    yarn_factor: int
    read_per_token: int
    placed: Plan | None = None
    refused: DoesNotFitError | None = None
    largest_ctx: int | None = None
    speed: Speed | None = None

    @property
    def parts(self) -> dict[str, int]:
        return self.whole.parts()


def vram(model: str, options: VramOptions) -> None:
    """Print what `model` needs, and how it would lie in the memory that was named.

    Raises DoesNotFitError, after printing, if a column can't run there at all.
    """
    lengths = sorted({console.parse_tokens(text) for text in options.ctx.split(",")})
    types = _choices(options.kv, KV_DTYPES, "--kv")
    card = find_card(options.gpu) if options.gpu else None
    budget = _budget(options, card)
    rates = _rates(options, card)
    config, variants = described(model, options.recipe)
    columns = []
    held = Run(ctx=1, mtp=options.mtp, vision=options.vision)
    weighed = [(recipe, weigh(config, stored, held)) for recipe, stored in variants]
    for (recipe, weights), kv, ctx in product(weighed, types, lengths):
        columns.append(_column(config, recipe, weights, replace(held, ctx=ctx, kv=kv), budget, rates))
    fitting = _fitting(config, model, options, lengths, types, budget) if budget else {}
    if options.as_json:
        console.document("vram", 1, _as_document(config, columns, options, budget, rates, fitting))
    else:
        console.say(_render(config, columns, options, card, budget, fitting))
    for column in columns:
        if column.refused:
            raise column.refused


def described(model: str, recipe: str | None) -> tuple[ModelConfig, list[tuple[str, Stored]]]:
    """The config of a pack, a Hugging Face folder or a name, and how each tensor is stored, by recipe."""
    path = Path(model).expanduser()
    if is_pack(path):
        if recipe is not None:
            raise UsageError(
                f"{path} is a pack, and has its recipe: --recipe has no meaning for it",
                f"qwenrun vram {path}, or give the Hugging Face folder",
            )
        config, stored, name = stored_in(path)
        return config, [(name, stored)]
    is_folder = path.is_dir() or "/" in model.removeprefix("Qwen/")
    config = ModelConfig.from_folder(path) if is_folder else ModelConfig.from_name(model)
    tensors = inventory(config)
    chosen = [Recipe.load(name.strip()) for name in (recipe or DEFAULT).split(",")]
    return config, [(each.name, [(info, each.assign(info)) for info in tensors]) for each in chosen]


def _choices(text: str, allowed: Sequence[str], option: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in allowed:
            raise UsageError(f"{option} {name!r} is none of {', '.join(allowed)}", f"{option} {allowed[0]}")
    return chosen


def _budget(options: VramOptions, card: Card | None) -> Budget | None:
    vram = options.vram if options.vram is not None else card.vram if card else None
    if vram is not None:
        return Budget(vram, options.ram, gpu=True)
    return None if options.ram is None else Budget(options.ram)


def _rates(options: VramOptions, card: Card | None) -> Rates | None:
    """None if it isn't known how fast the device's memory is."""
    if card:
        return Rates(card.bandwidth, card.link, options.disk_speed, options.ram_speed)
    if options.vram is None and options.ram is not None:
        return Rates(options.ram_speed, None, options.disk_speed)
    return None


def _column(
    config: ModelConfig, recipe: str, weights: Weights, run: Run, budget: Budget | None, rates: Rates | None
) -> Column:
    whole = place(config, weights, run, Budget(gpu=bool(budget and budget.gpu)))
    placed, refused, largest, speed = None, None, None, None
    if budget:
        largest = largest_ctx(config, weights, run, budget)
        try:
            placed = place(config, weights, run, budget)
            speed = decode_speed(placed, weights.stored, rates) if rates else None
        except DoesNotFitError as error:
            refused = error
    read = read_per_token(config, weights.stored)
    return Column(recipe, run, whole, config.yarn_factor(run.ctx), read, placed, refused, largest, speed)


def _fitting(
    config: ModelConfig, model: str, options: VramOptions, lengths: list[int], types: list[str], budget: Budget
) -> dict[int, list[str]]:
    """For each context the recipes (with a KV type) whose every byte fits on the device; not for packs."""
    if is_pack(Path(model).expanduser()) or budget.device is None:
        return {}
    tensors = inventory(config)
    out: dict[int, list[str]] = {ctx: [] for ctx in lengths}
    for name in recipe_names():
        recipe = Recipe.load(name)
        held = Run(ctx=1, mtp=options.mtp, vision=options.vision)
        weights = weigh(config, [(info, recipe.assign(info)) for info in tensors], held)
        for kv, ctx in product(dict.fromkeys([*types, "int8"]), lengths):
            if whole_budget(config, weights, replace(held, ctx=ctx, kv=kv), budget.gpu) <= budget.device:
                out[ctx].append(f"{name} (KV {kv})")
    return out


def _render(
    config: ModelConfig,
    columns: list[Column],
    options: VramOptions,
    card: Card | None,
    budget: Budget | None,
    fitting: dict[int, list[str]],
) -> str:
    recipes = list(dict.fromkeys(column.recipe for column in columns))
    types = list(dict.fromkeys(column.run.kv for column in columns))
    head = fields(
        [
            ("model", config.name),
            ("recipe", ", ".join(recipes)),
            ("KV", f"{', '.join(types)}; {len(config.full_layers)} of {config.num_layers} layers have one"),
            ("budget", _budget_line(budget, card) if budget else ""),
        ]
    )
    titles = [_title(column, len(recipes) > 1, len(types) > 1) for column in columns]
    unit, one = console.size_unit(max(column.whole.total() for column in columns))
    present = [part for part in LABELS if any(round(c.parts[part] / one, 2) for c in columns)]
    rows: list[Sequence[str]] = []
    for part in present:
        if part == "total":
            rows.append(())
        rows.append((LABELS[part], *(f"{column.parts[part] / one:,.2f}" for column in columns)))
    if budget:
        rows += _placement(columns, budget, one)
    out = [head, table((unit, *titles), rows)]
    if console.is_terminal(sys.stdout):
        out.append(_bars(columns, titles, budget))
    return "\n\n".join([*out, "\n".join(_foot(config, columns, options, budget, fitting))])


def _title(column: Column, with_recipe: bool, with_kv: bool) -> str:
    extra = [column.recipe] * with_recipe + [column.run.kv] * with_kv
    return " ".join([*extra, f"ctx {console.tokens(column.run.ctx)}"])


def _budget_line(budget: Budget, card: Card | None) -> str:
    if not budget.gpu:
        return f"RAM {console.size(budget.device or 0)}"
    named = f" ({card.name})" if card else ""
    ram = f"RAM {console.size(budget.host)}" if budget.host is not None else "RAM as needed"
    return f"VRAM {console.size(budget.device or 0)}{named}, {ram}"


def _placement(columns: list[Column], budget: Budget, one: int) -> list[Sequence[str]]:
    """Rows about the plans inside the budget."""

    def row(label: str, cell: Any) -> Sequence[str]:
        return (label, *("-" if c.placed is None else cell(c, c.placed) for c in columns))

    rows: list[Sequence[str]] = [()]
    rows.append(row("in VRAM" if budget.gpu else "in RAM", lambda _, p: f"{p.total() / one:,.2f}"))
    if any(column.whole.experts for column in columns):
        rows.append(row("  resident experts", lambda _, p: f"{p.slots:,}"))
        rows.append(row("  share of all", lambda _, p: f"{p.resident:.0%}"))
    if budget.gpu:
        rows.append(row("in RAM", lambda _, p: f"{p.total('host') / one:,.2f}"))
    rows.append(row("only on disk", lambda _, p: f"{p.total('disk') / one:,.2f}"))
    rows.append(("largest context", *(f"{column.largest_ctx:,}" for column in columns)))
    if any(column.speed for column in columns):
        rows.append(row("tok/s, predicted", lambda c, _: _speed(c.speed)))
        rows.append(row("  bound by", lambda c, _: c.speed.binds if c.speed else "-"))
    return rows


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    digits = 0 if speed.low >= 10 else 1
    return f"{speed.low:,.{digits}f} to {speed.high:,.{digits}f}"


def _bars(columns: list[Column], titles: list[str], budget: Budget | None) -> str:
    limit = budget.device if budget and budget.device else 0
    most = max([limit, *(column.whole.total() for column in columns)])
    width = max(len(title) for title in titles)
    lines = []
    for title, column in zip(titles, columns):
        parts, bar, before = column.parts, "", 0
        for part, shade in (*_BARS, ("", _REST)):
            before = before + parts[part] if part else parts["total"]
            bar += shade * (round(before / most * _BAR_WIDTH) - len(bar))
        if limit:
            at = min(round(limit / most * _BAR_WIDTH), _BAR_WIDTH)
            bar = bar.ljust(_BAR_WIDTH + 1)
            bar = bar[:at] + "|" + bar[at:]
        lines.append(f"{title.rjust(width)}  {bar}".rstrip())
    legend = [f"{shade} {LABELS[part]}" for part, shade in _BARS] + [f"{_REST} the rest"]
    lines.append(" " * (width + 2) + "  ".join(legend + (["| the budget"] if limit else [])))
    return "\n".join(lines)


def _foot(
    config: ModelConfig,
    columns: list[Column],
    options: VramOptions,
    budget: Budget | None,
    fitting: dict[int, list[str]],
) -> list[str]:
    reads = {column.recipe: column.read_per_token for column in columns}
    said = ", ".join(console.decimal_size(n) + (f" ({r})" if len(reads) > 1 else "") for r, n in reads.items())
    lines = [f"{said} of weights are read for every token decoded"]
    for ctx in dict.fromkeys(column.run.ctx for column in columns):
        factor = config.yarn_factor(ctx)
        if factor > 1:
            lines.append(
                f"{ctx:,} tokens are beyond the model's {config.positions:,} positions: needs YaRN with factor {factor}"
            )
    if budget:
        where = "VRAM" if budget.gpu else "RAM"
        for ctx, names in fitting.items():
            whole = ", ".join(names) if names else "no recipe; experts come from a cache"
            lines.append(f"at {ctx:,} tokens {where} holds everything with: {whole}")
    if any(column.speed for column in columns):
        low, high = (f"{share:.0%}" for share in EFFICIENCY)
        named = f"disk {options.disk_speed / 1e9:g} GB/s" + (
            "" if budget and budget.gpu else f", RAM {options.ram_speed / 1e9:g} GB/s"
        )
        lines.append(
            f"speeds are predicted from bytes over bandwidths ({named} assumed): from even routing at {low}, one"
            f" thing after the other, to skewed routing at {high}, all at once"
        )
    return lines


def _as_document(
    config: ModelConfig,
    columns: list[Column],
    options: VramOptions,
    budget: Budget | None,
    rates: Rates | None,
    fitting: dict[int, list[str]],
) -> dict[str, Any]:
    """Plain data, bytes as integers. Fields are only ever added under one version of the document."""
    contexts = []
    for column in columns:
        entry: dict[str, Any] = {
            "ctx": column.run.ctx,
            "kv": column.run.kv,
            "recipe": column.recipe,
            "yarn_factor": column.yarn_factor,
            "bytes": column.parts,
            "read_per_token_bytes": column.read_per_token,
        }
        if budget:
            entry["fits"] = column.placed is not None
            entry["largest_ctx"] = column.largest_ctx
            entry["plan"] = _plan_document(column)
            if column.refused:
                entry["refused"] = column.refused.message
        contexts.append(entry)
    return {
        "model": config.name,
        "recipe": columns[0].recipe,
        "max_position": config.positions,
        "layers": config.num_layers,
        "kv_layers": len(config.full_layers),
        "read_per_token_bytes": columns[0].read_per_token,
        "contexts": contexts,
        "kv": columns[0].run.kv,
        "budget": {"gpu": budget.gpu, "device_bytes": budget.device, "host_bytes": budget.host} if budget else None,
        "rates_bytes_per_second": {"device": rates.device, "link": rates.link, "disk": rates.disk} if rates else None,
        "whole_on_device": [{"ctx": ctx, "recipes": names} for ctx, names in fitting.items()],
    }


def _plan_document(column: Column) -> dict[str, Any] | None:
    plan, speed = column.placed, column.speed
    if plan is None:
        return None
    return {
        "device_bytes": plan.parts(),
        "host_bytes": plan.parts("host"),
        "disk_bytes": plan.parts("disk"),
        "experts": plan.experts,
        "resident_experts": plan.slots,
        "host_experts": plan.host_slots,
        "speed": None
        if speed is None
        else {
            "predicted": True,
            "low_tokens_per_second": speed.low,
            "high_tokens_per_second": speed.high,
            "binds": speed.binds,
            "hit_rate": list(speed.hits),
            "bytes_per_token": speed.moved,
        },
    }
