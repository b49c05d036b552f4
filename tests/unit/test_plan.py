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
from qwenrun.plan.buffers import RUNTIME_CUDA, Run, list_buffers, read_per_token, state_shapes, totals, weight_buffers
from qwenrun.plan.device import find_card
from qwenrun.plan.planner import Budget, Weights, place, weigh, whole_budget
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


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "plan.json").read_text())


@pytest.mark.parametrize("name", zoo_names())
def test_every_member_recipe_and_context_by_hand(name: str) -> None:
    """Byte for byte what tests/golden/build_plan.py sums without this program."""
    config = ModelConfig.from_name(name)
    for recipe, contexts in GOLDEN[name].items():
        for ctx, expected in contexts.items():
            plan = parts(config, recipe, Run(int(ctx)))
            assert {part: plan[part] for part in expected} == expected, (recipe, ctx)
    assert set(GOLDEN) == set(zoo_names())
    assert set(GOLDEN[name]) == set(recipe_names())


def test_two_figures_everybody_can_check() -> None:
    kv = sum(b.nbytes for b in state_shapes(MODEL, Run(262_144)) if b.part == "kv")
    assert kv == 6 * GIB
    live = [b for b in state_shapes(MODEL, Run(1, snapshots=0)) if b.name.endswith("recurrent")]
    assert sum(b.nbytes for b in live) == 144 << 20


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
        ("runtime", "runtime"),
        ("total", "total"),
    ):
        assert page_row(label) == [round(plan[part] / GIB, 2) for plan in plans], label
    for recipe in recipe_names():
        size = total_bytes(Recipe.load(recipe), inventory(MODEL)) / 1e9
        read = read_per_token(MODEL, stored(MODEL, recipe)) / 1e9
        assert page_row(f"`{recipe}`") == [round(size, 2), round(read, 2)], recipe


def held(recipe: str) -> Weights:
    return weigh(MODEL, stored(MODEL, recipe), Run(1, mtp=False, vision=False))


def lean(ctx: int, kv: str = "bf16") -> Run:
    return Run(ctx, kv, mtp=False, vision=False)


@pytest.mark.parametrize(
    ("label", "budget", "ctx"),
    [
        ("`--vram 24GiB --ctx 32k`", Budget(24 * GIB, gpu=True), 32_768),
        ("`--vram 24GiB --ctx 256k`", Budget(24 * GIB, gpu=True), 262_144),
        ("`--ram 12GiB --ctx 4k`", Budget(12 * GIB), 4_096),
        ("`--ram 24GiB --ctx 32k`", Budget(24 * GIB), 32_768),
    ],
)
def test_the_table_of_budgets(label: str, budget: Budget, ctx: int) -> None:
    plan = place(MODEL, held("balanced"), lean(ctx), budget)
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {label} |"))
    assert line == f"| {label} | {plan.slots:,} | {plan.resident:.0%} |".replace("%", " %")


def test_the_answer_about_80_gb() -> None:
    card = find_card("H100")
    need = {
        (recipe, ctx, kv): whole_budget(MODEL, held(recipe), lean(ctx, kv), True) / GIB
        for recipe in ("balanced", "nvfp4", "int4")
        for ctx in (262_144, 1 << 20)
        for kv in ("bf16", "int8")
    }
    have = card.vram / GIB
    at = Budget(card.vram, gpu=True)
    share = place(MODEL, held("balanced"), lean(1 << 20), at).resident
    text = " ".join(PAGE.split())
    assert (
        f"of the card's {have:.2f} GiB, at 262,144 tokens `balanced` takes {need['balanced', 262_144, 'bf16']:.2f} and"
        f" `nvfp4` {need['nvfp4', 262_144, 'bf16']:.2f}: everything is on the card, with any 4-bit recipe. At 1M"
        f" `balanced` takes {need['balanced', 1 << 20, 'bf16']:.2f} with keys and values in BF16: then {share:.0%}"
    ).replace("%", " %") in text
    assert f"With `--kv int8` it is {need['balanced', 1 << 20, 'int8']:.2f}," in text
    assert max(n for (_, ctx, _), n in need.items() if ctx == 262_144) < have
    # "so it is with `int4`, and not with `nvfp4`"
    assert need["int4", 1 << 20, "int8"] < have < need["nvfp4", 1 << 20, "int8"]


def test_the_prose_is_what_is_computed() -> None:
    """Every number of the page outside its tables, computed again; and none is there that is not."""
    prose = " ".join(" ".join(line for line in PAGE.splitlines() if not line.startswith("|")).split())
    c, mib = MODEL, 1 << 20
    per_token = {kv: sum(b.nbytes for b in state_shapes(c, Run(1, kv)) if b.part == "kv") for kv in ("bf16", "int8")}
    live = [b for b in state_shapes(c, Run(1)) if b.part == "state"]
    recurrent = sum(b.nbytes for b in live if b.name.endswith("recurrent"))
    columns = sum(b.nbytes for b in live if b.name.endswith("conv"))
    steps = workspace.steps(c, workspace.Codes.of(stored(c, "balanced")), 512, 262_144)
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
        f"attention takes {steps['attention'] / mib:.0f} MiB at long contexts and the convolution"
        f" {steps['convolution'] / mib:.0f}.",
        f"is held in float32, whatever it is stored in: {copies / 1e6:.0f} MB.",
        f"The fewest slots are {held('balanced').pools[0].slots}:",
        f"320 MiB on a CPU (measured: 220 to 260 without a tokenizer) and {RUNTIME_CUDA / mib:.0f} on a GPU",
        f"a prefill chunk ({Run(1).chunk} tokens)",
    ]
    for phrase in said:
        assert phrase in prose, phrase
        prose = prose.replace(phrase, "", 1)
    # What is left: units, names, the alignment of a record, how near a process keeps to its plan; and the answer
    # about 80 GB, which has a test of its own.
    prose = re.sub(r"## Does it fit 80 GB\?.*?## Tiers", "", prose)
    rest = re.sub(
        r"2\^30|10\^9|2 \(keys, values\)|Qwen3\.5-122B-A10B|122B|4 KiB|INT8|int8|BF16|float16|float32|"
        r"at 90 % of them|3 % of the plan or 64 MiB",
        "",
        prose,
    )
    assert not re.findall(r"\d+", rest), rest
