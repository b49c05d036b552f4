"""The plan's figures against independent ones, its formulas against themselves, and docs/memory.md against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import UsageError
from qwenrun.model.config import ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run, list_buffers, read_per_token, state_shapes, totals
from qwenrun.quant.recipe import Recipe, recipe_names

GIB = 1 << 30
MODEL = ModelConfig.from_name("122b")


def stored(config: ModelConfig, recipe: str):  # type: ignore[no-untyped-def]
    chosen = Recipe.load(recipe)
    return [(info, chosen.assign(info)) for info in inventory(config)]


def parts(config: ModelConfig, recipe: str, run: Run) -> dict[str, int]:
    return totals(list_buffers(config, stored(config, recipe), run))


# Bytes per token of context, and at 32,768, 262,144 and 1,010,000 tokens in GiB: an independent calculation.
@pytest.mark.parametrize(
    ("name", "kv", "per_token", "gib"),
    [
        ("Qwen3.5-122B-A10B", "bf16", 24_576, (0.750, 6.000, 23.117)),
        ("Qwen3.5-122B-A10B", "int8", 12_384, (0.378, 3.023, 11.649)),
        ("Qwen3.5-35B-A3B", "bf16", 20_480, (None, 5.000, 19.264)),
        ("Qwen3.5-35B-A3B", "int8", 10_320, (None, 2.520, 9.707)),
    ],
)
def test_kv_cache(name: str, kv: str, per_token: int, gib: tuple) -> None:
    config = ModelConfig.from_name(name)
    for ctx, expected in zip((32_768, 262_144, 1_010_000), gib):
        size = sum(b.nbytes for b in state_shapes(config, Run(ctx, kv)) if b.part == "kv")
        assert size == ctx * per_token
        assert expected is None or round(size / GIB, 3) == expected


def test_mtp_cache_is_one_layer_more() -> None:
    size = sum(b.nbytes for b in state_shapes(MODEL, Run(262_144)) if b.part == "mtp")
    assert size == 262_144 * 2_048
    assert not [b for b in state_shapes(MODEL, Run(262_144, mtp=False)) if b.part == "mtp"]


@pytest.mark.parametrize(
    ("name", "recurrent", "columns"), [("122b", 37_748_736, 36 * 12_288 * 3), ("Qwen3.5-35B-A3B", 15_728_640, 737_280)]
)
def test_recurrent_state(name: str, recurrent: int, columns: int) -> None:
    config = ModelConfig.from_name(name)
    buffers = state_shapes(config, Run(1, snapshots=0))
    assert sum(b.nbytes for b in buffers if b.name.endswith(".recurrent")) == 4 * recurrent
    assert sum(b.nbytes for b in buffers if b.name.endswith(".conv")) == 4 * columns
    with_two = state_shapes(config, Run(1, snapshots=2))
    state = sum(b.nbytes for b in buffers if b.part == "state")
    assert sum(b.nbytes for b in with_two if b.part == "snapshots") == 2 * state


# Weight bytes read per decoded token of the 122B in GB: an independent calculation (which counts the small
# tensors of DeltaNet and the router at the rows' precision or BF16; they are under 0.03 GB).
@pytest.mark.parametrize(("recipe", "gigabytes"), [("bf16", 18.017), ("balanced", 7.375), ("int4", 4.702)])
def test_read_per_token(recipe: str, gigabytes: float) -> None:
    assert read_per_token(MODEL, stored(MODEL, recipe)) / 1e9 == pytest.approx(gigabytes, abs=0.03)


def test_weights_are_what_the_recipe_says() -> None:
    run = Run(1)
    for recipe in recipe_names():
        plan = parts(MODEL, recipe, run)
        weights = plan["dense"] + plan["routed"] + plan["vision"] + plan["mtp"]
        from qwenrun.quant.recipe import total_bytes

        exact = total_bytes(Recipe.load(recipe), inventory(MODEL))
        # Records are padded to 4 KiB, an expert of megabytes at a time.
        assert exact <= weights <= exact * 1.001 + 4_096


def test_it_fits_an_80_gb_card() -> None:
    """The point of the program, from the plan alone: everything, at 262,144 tokens, under 74.5 GiB."""
    assert parts(MODEL, "balanced", Run(262_144))["total"] < 80e9


@given(
    st.sampled_from(zoo_names()),
    st.integers(1, 2_000_000),
    st.integers(1, 1_000_000),
    st.sampled_from(["bf16", "int8", "f32"]),
    st.sampled_from(["balanced", "nvfp4"]),
)
@settings(max_examples=30, deadline=None)
def test_more_context_never_takes_less(name: str, ctx: int, more: int, kv: str, recipe: str) -> None:
    config = ModelConfig.from_name(name)
    run, longer = Run(ctx, kv), Run(ctx + more, kv)
    a, b = parts(config, recipe, run), parts(config, recipe, longer)
    assert a["total"] == sum(v for k, v in a.items() if k != "total")
    assert b["kv"] * ctx == a["kv"] * (ctx + more)
    assert a["state"] == b["state"]
    assert all(b[part] >= a[part] for part in a)
    without = parts(config, recipe, Run(ctx, kv, mtp=False, vision=False))
    assert without["mtp"] == without["vision"] == 0
    two = parts(config, recipe, Run(ctx, kv, sequences=2))
    assert two["kv"] == 2 * a["kv"]
    assert two["dense"] == a["dense"]


@pytest.mark.parametrize(
    "bad", [{"ctx": 0}, {"ctx": 1, "kv": "fp8"}, {"ctx": 1, "chunk": 0}, {"ctx": 1, "snapshots": -1}]
)
def test_impossible_runs(bad: dict) -> None:
    with pytest.raises(UsageError):
        Run(**bad)


PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()


def page_row(label: str) -> list[float]:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell.replace(",", "")) for cell in line.split("|")[2:-1]]


def test_the_page_is_what_is_computed() -> None:
    contexts = (4_096, 32_768, 262_144, 1_048_576)
    plans = [parts(MODEL, "balanced", Run(ctx)) for ctx in contexts]
    for label, part in (
        ("weights but routed experts", "dense"),
        ("routed experts", "routed"),
        ("KV cache", "kv"),
        ("DeltaNet state", "state"),
        ("vision tower", "vision"),
        ("MTP head", "mtp"),
        ("workspace", "workspace"),
        ("total", "total"),
    ):
        assert page_row(label) == [round(plan[part] / GIB, 2) for plan in plans], label
    for recipe in recipe_names():
        from qwenrun.quant.recipe import total_bytes

        size = total_bytes(Recipe.load(recipe), inventory(MODEL)) / 1e9
        read = read_per_token(MODEL, stored(MODEL, recipe)) / 1e9
        assert page_row(f"`{recipe}`") == [round(size, 2), round(read, 2)], recipe
    assert re.search(r"\b24,576\b", PAGE)
