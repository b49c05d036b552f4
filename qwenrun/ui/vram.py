"""`qwenrun vram`: the planner's list of buffers as a table, one column a context length.

Cold: reads a config or a manifest, never weights. Knows no formula; `plan` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenrun.errors import DoesNotFitError, UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run
from qwenrun.plan.planner import PlanTable, plan_table
from qwenrun.quant.recipe import DEFAULT, Assignment, Recipe, TensorInfo
from qwenrun.ui import console
from qwenrun.ui.models import is_pack, manifest_of
from qwenrun.ui.tables import fields, table

# What the planner's parts are called here.
LABELS = {
    "dense": "weights but routed experts",
    "routed": "routed experts",
    "kv": "KV cache",
    "state": "DeltaNet state",
    "vision": "vision tower",
    "mtp": "MTP head",
    "workspace": "workspace (estimate)",
    "total": "total",
}

# Counted because a pack holds them; the engine does not use them yet.
NOT_LOADED = ("vision", "mtp")

Stored = list[tuple[TensorInfo, Assignment]]


def vram(model: str, ctx: str, *, recipe: str | None, kv: str, budget: str | None, as_json: bool) -> None:
    """Print the bytes of each part of `model` for the contexts in `ctx` ("4k,32k").

    Raises DoesNotFitError, after printing, if a context needs more than `budget`.
    """
    lengths = sorted({console.parse_tokens(text) for text in ctx.split(",")})
    limit = console.parse_size(budget, "--budget") if budget else None
    config, stored, how = described(model, recipe)
    plan = plan_table(config, stored, [Run(ctx=length, kv=kv) for length in lengths], how)
    if as_json:
        console.document("vram", 1, {**plan.to_json(), "kv": kv, "budget_bytes": limit})
    else:
        console.say(_render(plan, kv))
    first = next((context for context in plan.contexts if limit is not None and context.total > limit), None)
    if first and limit is not None:
        raise DoesNotFitError(
            f"at {first.run.ctx:,} tokens {config.name} needs {console.size(first.total)},"
            f" which is {console.size(first.total - limit)} more than {console.size(limit)}",
            "a shorter --ctx, --kv int8 or a smaller --recipe",
        )


def described(model: str, recipe: str | None) -> tuple[ModelConfig, Stored, str]:
    """(config, how each tensor is stored, the recipe's name) of a pack, a Hugging Face folder or a name."""
    path = Path(model).expanduser()
    if is_pack(path):
        manifest = manifest_of(path)
        config = ModelConfig.from_hf(manifest.config, name=path.resolve().name)
        if recipe is None:
            stored = [(entry.info, entry.assignment) for entry in manifest.tensors.values()]
            return config, stored, str(manifest.recipe.get("name", ""))
        raise UsageError(
            f"{path} is a pack, and has its recipe: --recipe has no meaning for it",
            f"qwenrun vram {path}, or give the Hugging Face folder",
        )
    is_folder = path.is_dir() or "/" in model.removeprefix("Qwen/")
    config = ModelConfig.from_folder(path) if is_folder else ModelConfig.from_name(model)
    chosen = Recipe.load(recipe or DEFAULT)
    return config, [(info, chosen.assign(info)) for info in inventory(config)], chosen.name


def _render(plan: PlanTable, kv: str) -> str:
    head = fields(
        [
            ("model", plan.model),
            ("recipe", plan.recipe),
            ("KV", f"{kv}, {plan.kv_layers} of {plan.layers} layers have one"),
        ]
    )
    unit, one = console.size_unit(max(context.total for context in plan.contexts))
    present = [part for part in LABELS if any(context.parts[part] for context in plan.contexts)]
    rows: list[Sequence[str]] = []
    for part in present:
        if part == "total":
            rows.append(())
        rows.append((LABELS[part], *(f"{context.parts[part] / one:,.2f}" for context in plan.contexts)))
    body = table((unit, *(f"ctx {console.tokens(context.run.ctx)}" for context in plan.contexts)), rows)
    foot = [f"{console.decimal_size(plan.read_per_token)} of weights are read for every token decoded"]
    unused = [LABELS[part] for part in NOT_LOADED if part in present]
    if unused:
        foot.append(f"{' and '.join(unused)}: in the pack, not loaded by this version")
    for context in plan.contexts:
        if context.yarn_factor > 1:
            foot.append(
                f"{context.run.ctx:,} tokens are beyond the model's {plan.positions:,} positions:"
                f" needs YaRN with factor {context.yarn_factor}"
            )
    return "\n\n".join([head, body, "\n".join(foot)])
