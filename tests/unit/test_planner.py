"""Placement: never over the budget, never fewer experts for more memory, and refusals whose hints work."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import DoesNotFitError, UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run
from qwenrun.plan.device import _cgroup_rooms, find_card
from qwenrun.plan.planner import (
    WINDOW,
    Budget,
    Plan,
    Weights,
    largest_ctx,
    least_budget,
    place,
    weigh,
    whole_budget,
)
from qwenrun.plan.speed import EFFICIENCY, Rates, decode_speed
from qwenrun.quant.recipe import Recipe

GIB = 1 << 30
MIXED = [
    {"match": "*layers.[01].mlp.experts.*", "format": "int8-g128"},
    {"match": "*.mlp.experts.*", "format": "int4-g128"},
    {"match": "*.embed_tokens.weight", "format": "int8-g128"},
]


@cache
def model(name: str = "Qwen3.5-35B-A3B", layers: int = 8) -> ModelConfig:
    raw = copy.deepcopy(ModelConfig.from_name(name).raw)
    raw["text_config"].update(num_hidden_layers=layers, layer_types=raw["text_config"]["layer_types"][:layers])
    return ModelConfig.from_hf(raw, name)


@cache
def weights(name: str = "Qwen3.5-35B-A3B", recipe: str = "int4", packed: bool = True) -> Weights:
    config = model(name)
    rules = Recipe.from_dict({"name": "mixed", "rules": MIXED}, "") if recipe == "mixed" else Recipe.load(recipe)
    stored = [(info, rules.assign(info)) for info in inventory(config)]
    return weigh(config, stored, RUN, packed)


RUN = Run(4096, mtp=False, vision=False)
NAMES = st.sampled_from(["Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-9B", "Qwen3.5-0.8B"])
RECIPES = st.sampled_from(["int4", "nvfp4", "bf16", "mixed"])
KV = st.sampled_from(["bf16", "int8", "f32"])


def every_byte(plan: Plan) -> int:
    return sum(b.nbytes for b in plan.device if b.part not in ("workspace", "runtime"))


@settings(max_examples=60, deadline=None)
@given(NAMES, RECIPES, KV, st.integers(1, 300_000), st.floats(0, 1.2), st.floats(0, 0.5), st.booleans())
def test_inside_the_budget_and_never_fewer_for_more(
    name: str, recipe: str, kv: str, ctx: int, share: float, more: float, gpu: bool
) -> None:
    config, w, run = model(name), weights(name, recipe), replace(RUN, ctx=ctx, kv=kv)
    least, most = least_budget(config, w, run, gpu), whole_budget(config, w, run, gpu)
    plan, larger = (
        place(config, w, run, Budget(least + int(s * (most - least)), gpu=gpu)) for s in (share, share + more)
    )
    for each in (plan, larger):
        assert each.total() <= (each.budget.device or 0)
        for pool in each.pools:
            assert min(pool.experts, config.top_k + WINDOW) <= pool.slots <= pool.experts
            assert pool.host_slots <= pool.experts
            assert (pool.host_slots > 0) == gpu
        moved = each.embedding_on_disk
        assert moved == (each.budget.device < most and not config.tie_embeddings)  # type: ignore[operator]
        assert each.parts("disk")["dense"] == (sum(b.nbytes for b in w.embedding) if moved else 0)
    assert larger.slots >= plan.slots
    # Not a slot more would fit.
    room = (plan.budget.device or 0) - plan.total()
    assert all(pool.slots == pool.experts or pool.record > room for pool in plan.pools)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("name", "recipe"), [("Qwen3.5-35B-A3B", "mixed"), ("Qwen3.5-9B", "int4")])
def test_the_two_ends_to_the_byte(name: str, recipe: str, gpu: bool) -> None:
    config, w = model(name), weights(name, recipe)
    least, most = least_budget(config, w, RUN, gpu), whole_budget(config, w, RUN, gpu)
    assert place(config, w, RUN, Budget(least, gpu=gpu)).total() <= least
    with pytest.raises(DoesNotFitError):
        place(config, w, RUN, Budget(least - 1, gpu=gpu))
    whole = place(config, w, RUN, Budget(most, gpu=gpu))
    assert (whole.total(), whole.resident, whole.disk) == (most, 1.0, ())
    assert place(config, w, RUN, Budget(most - 1, gpu=gpu)).disk if not config.tie_embeddings else True
    assert place(config, w, RUN, Budget(None, gpu=gpu)).total() == most


def test_two_sizes_of_records() -> None:
    config, w = model(), weights(recipe="mixed")
    assert sorted(len(pool.prefixes) for pool in w.pools) == [2, 6]
    assert len({pool.record for pool in w.pools}) == 2
    least, most = least_budget(config, w, RUN), whole_budget(config, w, RUN)
    plan = place(config, w, RUN, Budget((least + most) // 2))
    shares = [pool.slots / pool.experts for pool in plan.pools]
    assert abs(shares[0] - shares[1]) < 0.02
    slots = {b.name: b for b in plan.device if b.name.startswith("slots")}
    assert [slots[f"slots.{n}"].shape for n in (0, 1)] == [(p.slots, p.record) for p in plan.pools]


def test_a_folder_has_to_be_in_memory_whole() -> None:
    config, w = model(), weights(recipe="bf16", packed=False)
    assert not w.pools
    most = whole_budget(config, w, RUN)
    assert place(config, w, RUN, Budget(most)).resident == 1.0
    with pytest.raises(DoesNotFitError) as caught:
        place(config, w, RUN, Budget(most - 1))
    assert "qwenrun quantize SRC -o PACK" in caught.value.hint


@settings(max_examples=25, deadline=None)
@given(NAMES, RECIPES, st.sampled_from(["bf16", "f32"]), st.floats(0, 1))
def test_the_largest_context(name: str, recipe: str, kv: str, share: float) -> None:
    config, w, run = model(name), weights(name, recipe), replace(RUN, kv=kv)
    ends = [least_budget(config, w, replace(run, ctx=ctx)) for ctx in (1, config.positions)]
    budget = Budget(ends[0] + int(share * (ends[1] - ends[0])))
    found = largest_ctx(config, w, run, budget)
    if found:
        place(config, w, replace(run, ctx=found), budget)
    if found < config.positions:
        with pytest.raises(DoesNotFitError):
            place(config, w, replace(run, ctx=found + 256), budget)


@settings(max_examples=40, deadline=None)
@given(NAMES, st.sampled_from(["int4", "nvfp4", "bf16"]), st.sampled_from([4096, 100_000, 262_144]), st.floats(0.3, 1))
def test_what_a_refusal_proposes_works(name: str, recipe: str, ctx: int, share: float) -> None:
    config, w, run = model(name), weights(name, recipe), replace(RUN, ctx=ctx)
    budget = Budget(int(share * least_budget(config, w, run)) - 1)
    with pytest.raises(DoesNotFitError) as caught:
        place(config, w, run, budget)
    error = caught.value
    assert "more than the" in error.message
    assert "runtime" in error.message
    ways = re.findall(r"--(ctx|kv|recipe|ram) (\S+?)(?:,|$)", error.hint)
    assert ways, error.hint
    for option, value in ways:
        if option == "ctx":
            place(config, w, replace(run, ctx=int(value)), budget)
        elif option == "kv":
            place(config, w, replace(run, kv=value), budget)
        elif option == "recipe":
            place(config, weights(name, value), run, budget)
        else:
            place(config, w, run, Budget(int(value.removesuffix("MiB")) << 20))


def test_ram_beside_a_gpu() -> None:
    config, w = model(), weights()
    least = least_budget(config, w, RUN, True)
    plenty = place(config, w, RUN, Budget(least, gpu=True))
    assert plenty.host_slots == plenty.experts
    assert plenty.parts("disk")["routed"] == 0
    record = plenty.pools[0].record
    fixed = plenty.parts("host")["runtime"]
    some = place(config, w, RUN, Budget(least, fixed + 100 * record, gpu=True))
    assert some.host_slots == 100
    assert some.total("host") <= fixed + 100 * record
    assert some.parts("disk")["routed"] == (some.experts - max(some.slots, 100)) * record
    with pytest.raises(DoesNotFitError, match="beside the GPU") as caught:
        place(config, w, RUN, Budget(least, fixed + record, gpu=True))
    proposed = re.search(r"--ram ([\d,.]+) (MiB|GiB)", caught.value.hint)
    assert proposed
    size = float(proposed[1].replace(",", "")) * (GIB if proposed[2] == "GiB" else 1 << 20)
    place(config, w, RUN, Budget(least, int(size), gpu=True))
    # All on the card: RAM is only passed through.
    whole = place(config, w, RUN, Budget(whole_budget(config, w, RUN, True), gpu=True))
    assert whole.host_slots == WINDOW


def test_speed_of_a_model_that_is_all_resident() -> None:
    """By hand: the weights of a token and twice the DeltaNet state, over the bandwidth."""
    config, w = model(), weights()
    plan = place(config, w, RUN, Budget())
    speed = decode_speed(plan, w.stored, Rates(100e9, None, 3e9))
    record, layers = plan.pools[0].record, 8
    state = sum(b.nbytes for b in plan.device if b.part == "state")
    kv = sum(b.nbytes for b in plan.device if b.part == "kv")
    dense = sum(b.nbytes for b in plan.device if b.part in ("attention", "gdn", "shared", "router", "lm_head"))
    moved = speed.moved["memory"] - kv - 2 * state - config.top_k * layers * record
    assert moved == pytest.approx(dense, rel=0.01)  # norms, and an embedding's row
    assert speed.low == pytest.approx(100e9 * EFFICIENCY[0] / speed.moved["memory"])
    assert (speed.binds, speed.hits, speed.moved["disk"]) == ("memory", (1.0, 1.0), 0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.booleans(), st.floats(0, 1))
def test_speed_is_an_interval_and_grows_with_every_bandwidth(share: float, gpu: bool, host: float) -> None:
    config, w = model(), weights()
    least, most = least_budget(config, w, RUN, gpu), whole_budget(config, w, RUN, gpu)
    ram = int((1 + 12 * host) * GIB) if gpu else None
    plan = place(config, w, RUN, Budget(least + int(share * (most - least)), ram, gpu=gpu))
    rates = Rates(1e12, 25e9 if gpu else None, 3e9)
    speed = decode_speed(plan, w.stored, rates)
    assert 0 < speed.low <= speed.high
    assert speed.hits[0] <= speed.hits[1]
    for faster in (replace(rates, device=2e12), replace(rates, disk=6e9), replace(rates, link=50e9 if gpu else None)):
        better = decode_speed(plan, w.stored, faster)
        assert better.low >= speed.low
        assert better.high >= speed.high
    assert speed.binds in ("memory", "RAM", "disk")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("H100", "H100"),
        ("h100 pcie", "H100 PCIe"),
        ("pro 6000", "RTX PRO 6000"),
        ("A100 80", "A100 80GB"),
    ],
)
def test_a_card_by_its_name(said: str, name: str) -> None:
    assert find_card(said).name == name


@pytest.mark.parametrize(
    ("said", "why"), [("Voodoo 2", "is not in the table"), ("A100", "may be A100 40GB"), ("", "is not in the table")]
)
def test_a_card_that_is_not_clear(said: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        find_card(said)
    assert "--vram" in caught.value.hint


def group(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 2, the group's own limit and its parent's; version 1 beside it; what is unlimited is none."""
    proc = tmp_path / "cgroup"
    proc.write_text("0::/app/inner\n3:cpu,cpuacct:/\n")
    group(tmp_path, memory__max="max", memory__current=5)
    group(tmp_path / "app", memory__max=1000, memory__current=400, memory__stat="anon 1\ninactive_file 50")
    group(tmp_path / "app" / "inner", memory__max=900, memory__current=700)
    assert sorted(_cgroup_rooms(str(tmp_path), str(proc))) == [200, 650]
    proc.write_text("7:hugetlb,memory:/job\n0::/nowhere\n")
    group(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=500,
        memory__usage_in_bytes=600,
        memory__stat="inactive_file 1\ntotal_inactive_file 70",
    )
    assert _cgroup_rooms(str(tmp_path), str(proc)) == [0]
    assert _cgroup_rooms(str(tmp_path), str(tmp_path / "none")) == []
