"""The plan's figures against independent ones, its formulas against themselves, and docs/memory.md against it."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import ModelError, UsageError
from qwenrun.model.config import ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.plan import workspace
from qwenrun.plan.buffers import Run, list_buffers, read_per_token, state_shapes, totals, weight_buffers
from qwenrun.plan.planner import plan_table
from qwenrun.quant.recipe import Assignment, Recipe, TensorInfo, recipe_names, stored_bytes, total_bytes

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
        exact = total_bytes(Recipe.load(recipe), inventory(MODEL))
        # Records are padded to 4 KiB, an expert of megabytes at a time.
        assert exact <= weights <= exact * 1.001 + 4_096


LINEARS = ["*_proj.weight", "*.in_proj_qkv.weight", "*.in_proj_z.weight", "mtp.fc.weight", "lm_head.weight"]
# Only rows that this program's formats can make. GB with vision and MTP, and GB read per token, of an independent
# calculation that counts the small tensors of a part (convolution, in_proj_a and _b) at that part's precision.
SHAPES = {
    "everything BF16": ({}, 250.17, 18.017),
    "routed int4 g128, the rest BF16": ({"model.*.experts.*": "int4-g128"}, 78.04, 12.638),
    "routed int4 g64, the rest BF16": ({"model.*.experts.*": "int4-g64"}, 79.85, 12.694),
    "routed int4 g32, the rest BF16": ({"model.*.experts.*": "int4-g32"}, 83.47, 12.808),
    "routed NVFP4, the rest BF16": ({"model.*.experts.*": "nvfp4"}, 83.47, 12.808),
    "linears NVFP4, embedding BF16": ({"*.experts.*": "nvfp4", **dict.fromkeys(LINEARS, "nvfp4")}, 72.16, 5.122),
    "linears int4 g128, embedding INT8": (
        {"*.experts.*": "int4-g128", "*.embed_tokens.weight": "int8-g128", **dict.fromkeys(LINEARS, "int4-g128")},
        65.61,
        4.702,
    ),
    "linears int4 g32, embedding INT8": (
        {"*.experts.*": "int4-g32", "*.embed_tokens.weight": "int8-g128", **dict.fromkeys(LINEARS, "int4-g32")},
        71.41,
        5.122,
    ),
    "balanced": (None, 68.28, 7.375),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_known_shapes(shape: str) -> None:
    rules, gigabytes, read = SHAPES[shape]
    if rules is None:
        recipe = Recipe.load(shape)
    else:
        made = [{"match": "model.visual.*", "format": "keep"}]
        made += [{"match": match, "format": form} for match, form in rules.items()]
        recipe = Recipe.from_dict({"name": "test", "rules": made}, "test")
    there = [(info, recipe.assign(info)) for info in inventory(MODEL)]
    assert sum(stored_bytes(*pair) for pair in there) / 1e9 == pytest.approx(gigabytes, rel=0.001)
    # Records padded to 4 KiB; NVFP4's 12 bytes of tensor scales begin a page of their own.
    assert sum(b.nbytes for b in weight_buffers(there, Run(1))) / 1e9 == pytest.approx(gigabytes, rel=0.0015)
    # Those small tensors (0.03 GB as BF16) weigh more among what one token reads.
    assert 0 <= read_per_token(MODEL, there) / 1e9 - read + 0.001 < 0.035


def test_a_table() -> None:
    runs = [Run(4_096), Run(262_144, kv="int8"), Run(1_010_000)]
    table = plan_table(MODEL, stored(MODEL, "int4"), runs, "int4")
    assert [plan.parts for plan in table.contexts] == [parts(MODEL, "int4", run) for run in runs]
    assert [plan.yarn_factor for plan in table.contexts] == [1, 1, 4]
    document = json.loads(json.dumps(table.to_json()))
    assert document["model"] == "Qwen3.5-122B-A10B"
    assert (document["layers"], document["kv_layers"], document["max_position"]) == (48, 12, 262_144)
    assert document["read_per_token_bytes"] == read_per_token(MODEL, stored(MODEL, "int4"))
    assert [(c["ctx"], c["kv"], c["yarn_factor"]) for c in document["contexts"]] == [
        (4_096, "bf16", 1),
        (262_144, "int8", 1),
        (1_010_000, "bf16", 4),
    ]
    assert document["contexts"][0]["bytes"] == table.contexts[0].parts


def test_what_a_pack_may_claim() -> None:
    """Parts and shapes come from a file: an unknown part is named, routed experts of a dense model no crash."""
    odd = TensorInfo("x", (4, 4), "BF16", "tail")
    with pytest.raises(ModelError, match="x: part 'tail' is none of"):
        totals(list_buffers(MODEL, [(odd, Assignment("keep", None))], Run(1)))
    experts = TensorInfo("model.layers.0.mlp.experts.down_proj", (8, 4, 4), "BF16", "routed")
    dense = ModelConfig.from_name("Qwen3.5-9B")
    assert read_per_token(dense, [(experts, Assignment("keep", None))]) == 0


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
@settings(max_examples=20, deadline=None)
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
    # Additive: the parts of the whole list are those of its pieces.
    buffers = list_buffers(config, stored(config, recipe), run)
    halves = totals(buffers[::2]), totals(buffers[1::2])
    assert {part: halves[0][part] + halves[1][part] for part in a} == a


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
        size = total_bytes(Recipe.load(recipe), inventory(MODEL)) / 1e9
        read = read_per_token(MODEL, stored(MODEL, recipe)) / 1e9
        assert page_row(f"`{recipe}`") == [round(size, 2), round(read, 2)], recipe


def test_the_prose_is_what_is_computed() -> None:
    """Every number of the page outside its tables, computed again; and none is there that is not."""
    prose = " ".join(" ".join(line for line in PAGE.splitlines() if not line.startswith("|")).split())
    c, mib = MODEL, 1 << 20
    per_token = {kv: sum(b.nbytes for b in state_shapes(c, Run(1, kv)) if b.part == "kv") for kv in ("bf16", "int8")}
    live = [b for b in state_shapes(c, Run(1)) if b.part == "state"]
    recurrent = sum(b.nbytes for b in live if b.name.endswith("recurrent"))
    columns = sum(b.nbytes for b in live if b.name.endswith("conv"))
    steps = workspace.steps(c, stored(c, "balanced"), 512, 262_144)
    few = "experts of few tokens"
    small = [i for i in inventory(c) if i.part in ("norm", "gdn") and len(i.shape) != 2]
    copies = sum(4 * prod(i.shape) for i in small)
    assert (Run(1).snapshots, c.num_layers // len(c.full_layers)) == (2, 4)  # spelled out on the page
    said = [
        f"The 122B has {len(c.full_layers)} such layers of {c.num_layers}:",
        f"{len(c.full_layers)} x 2 x {c.num_kv_heads} x {c.head_dim} x 2 = {per_token['bf16']:,} bytes per token",
        f"a float16 scale: {per_token['int8']:,}.",
        f"Counting all {c.num_layers} layers gives four times as much",
        f"{len(c.linear_layers)} layers x {c.linear_value_heads} value heads x {c.linear_key_dim} x"
        f" {c.linear_value_dim} float32 = {recurrent / mib:.0f} MiB",
        f"the last {c.conv_kernel - 1} inputs of each layer's convolution ({c.conv_channels:,} channels, float32),"
        f" {columns / mib:.0f} MiB",
        f"three times {(recurrent + columns) / mib:.0f} MiB",
        f"({sum(b.nbytes for b in state_shapes(c, Run(1)) if b.part == 'mtp'):,} bytes per token in BF16)",
        f"the chosen {c.top_k} of {c.num_experts} experts of each layer",
        f"256k is {c.positions:,} tokens, all the model was trained for; 1M here is {1 << 20:,}, which needs a YaRN"
        f" factor of {c.yarn_factor(1 << 20)}",
        f"the {c.top_k} chosen experts of each are decoded to float32 together ({steps[few] / mib:.0f} MiB",
        f"attention takes {steps['attention'] / mib:.0f} MiB at long contexts and the convolution"
        f" {steps['convolution'] / mib:.0f}.",
        f"copied to float32 when the model is bound ({copies / 1e6:.0f} MB)",
        f"a prefill chunk ({Run(1).chunk} tokens)",
    ]
    for phrase in said:
        assert phrase in prose, phrase
        prose = prose.replace(phrase, "", 1)
    # What is left: units, names, the alignment of a record, and what Python and torch take (measured).
    rest = re.sub(
        r"2\^30|10\^9|2 \(keys, values\)|Qwen3\.5-122B-A10B|122B|4 KiB|INT8|int8|BF16|float16|float32|0\.2 GiB",
        "",
        prose,
    )
    assert not re.findall(r"\d+", rest), rest
