"""The kernels for cards where the table of cases does not reach: many tokens, long caches, stacks in slots, poison, and
what the compiler makes of them. Interpreted on the CPU (conftest sets TRITON_INTERPRET)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import Tape
from torch import Tensor

from qwenrun.engine.engine import Engine
from qwenrun.kernels import gpu, ref
from qwenrun.kernels.cases import SPECS, cases, inputs
from qwenrun.kernels.dispatch import pick, refusal
from qwenrun.kernels.gpu import tiles
from qwenrun.kernels.ops import FACTORIES
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.measure.synth import synth_config, synthesize
from qwenrun.quant.recipe import Recipe

WHY = refusal("gpu", "rms_norm", "cpu", None)
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"the GPU backend {WHY}")


# What 16 bits of a token's activations leave of a product with 4-bit codes (`kernels.gpu.rounded`).
SIXTEEN_BITS = 6e-5


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_nothing_interpreted_is_chosen() -> None:
    for op in ("linear", "attention", "rms_norm"):
        assert pick(op, "cpu", SPECS["int4-g128-tiled"]) is not getattr(gpu, op)


@pytest.mark.parametrize("storage", ["int4-g128-tiled", "nvfp4-tiled"])
def test_a_long_row_is_cut_into_shares(storage: str) -> None:
    """More words than a share, and not a multiple of it."""
    w = ref.encode(torch.randn(32, 128 * 21), SPECS[storage])
    x = torch.randn(1, 128 * 21)
    assert error(gpu.linear(x, w), ref.linear(x, w)) < SIXTEEN_BITS


@pytest.mark.parametrize("storage", ["int4-g128-tiled", "int4-g32-zero-tiled", "nvfp4-tiled", "int8-g32", "bf16"])
@pytest.mark.parametrize("tokens", [40, 70])
def test_a_prompt_in_larger_tiles(storage: str, tokens: int) -> None:
    """More rows than a small tile has, and columns that fill no block of 128 where the format allows it."""
    spec = SPECS.get(storage) or BlockSpec("int4", 32, "f16", zero=True, tile=True)
    cols = {128: 256, 32: 160, 16: 144, 0: 90}[spec.block]
    w = ref.encode(torch.randn(144, cols), spec)
    x = torch.randn(tokens, cols)
    assert error(gpu.linear(x, w), ref.linear(x, w)) < 1e-5


def test_experts_of_a_prompt_in_larger_tiles() -> None:
    """Most tokens choose one of them, and the two matrices have different formats."""
    gate_up = ref.encode(torch.randn(3, 192, 144), SPECS["nvfp4-tiled"], tensor_scales=2)
    down = ref.encode(torch.randn(3, 144, 96), BlockSpec("int4", 32, "f16", tile=True))
    x, weight = torch.randn(140, 144) / 8, torch.rand(140, 1)
    index = torch.ones(140, 1, dtype=torch.int64)
    index[::50] = 2
    want = ref.experts(x, gate_up, down, index, weight)
    assert error(gpu.experts(x, gate_up, down, index, weight), want) < 1e-5


def test_rows_of_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with NVFP4 on both sides: those of rows that the reference has rounded, and experts alike."""
    tokens = 150
    from triton.runtime import interpreter

    from qwenrun.kernels.gpu import launch

    def e4m3(handle: Any, compute_type: Any) -> Any:
        """The interpreter takes every scale for E8M0."""
        return torch.from_numpy(handle.data.copy()).view(torch.float8_e4m3fn).float().numpy()

    monkeypatch.setattr(interpreter, "_dot_scaled_scale_to_f32", e4m3)
    monkeypatch.setattr(launch, "FP4", True)
    spec = SPECS["nvfp4-tiled"]

    def rounded(x: Tensor) -> Tensor:
        return ref.decode(ref.encode(x, SPECS["nvfp4"], tensor_scales=len(x)))

    w = ref.encode(torch.randn(144, 272), spec, tensor_scales=3)
    x = torch.randn(tokens, 272) * torch.rand(tokens, 1) * 100
    x[0, :40], x[1] = 0.0, 0.0
    x[2, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]) * 448
    want = ref.linear(rounded(x), w)
    assert error(gpu.linear(x, w), want) < 2e-3
    assert error(gpu.linear(x, w), ref.linear(x, w)) > 1e-2
    assert error(gpu.linear(x[:9], w), ref.linear(x[:9], w)) < 1e-5  # few rows are not rounded
    gate_up, down = ref.encode(torch.randn(2, 64, 80), spec, tensor_scales=2), ref.encode(torch.randn(2, 80, 32), spec)
    x, index = torch.randn(tokens, 80) / 4, torch.randint(0, 2, (tokens, 1))
    rows = torch.stack([ref.linear(rounded(x)[t : t + 1], gate_up[int(index[t])])[0] for t in range(tokens)])
    middle = rounded(torch.nn.functional.silu(rows[:, :32]) * rows[:, 32:])
    want = torch.stack([ref.linear(middle[t : t + 1], down[int(index[t])])[0] for t in range(tokens)])
    assert error(gpu.experts(x, gate_up, down, index, torch.ones(tokens, 1)), want) < 5e-3


@pytest.mark.parametrize("rows", [1, 33, 65])
@pytest.mark.parametrize("target", [75, 80, 86, 90, 103, 121])
def test_every_card_has_tiles(rows: int, target: int) -> None:
    """Cards between those that were compiled for have the tiles of the one before."""
    for spec in SPECS.values():
        tile = tiles.choose(rows, spec, target)
        assert tile.rows >= min(rows, 64)
    assert tiles.choose(rows, SPECS["nvfp4-tiled"], 103) == tiles.choose(rows, SPECS["nvfp4-tiled"], 100)


@pytest.mark.parametrize("storage", ["int4-g32-zero-tiled", "nvfp4-tiled"])
def test_experts_in_slots_of_a_cache(storage: str) -> None:
    """A stack whose records have other bytes between them; those must not be read: they are NaN."""
    spec = SPECS.get(storage) or BlockSpec("int4", 32, "f16", zero=True, tile=True)
    gate_up, down = ref.encode(torch.randn(5, 64, 64), spec), ref.encode(torch.randn(5, 64, 32), spec)
    strided = []
    for weight in (gate_up, down):
        parts = {}
        for name, tensor in weight.parts.items():
            size = tensor[0].numel()
            fill = float("nan") if tensor.dtype.is_floating_point else 127
            record = torch.full((5, size + 64), fill, dtype=tensor.dtype)
            record[:, 32 : 32 + size] = tensor.flatten(1)
            parts[name] = record[:, 32 : 32 + size].unflatten(1, tensor.shape[1:])
        strided.append(Weight.from_parts(weight.spec, weight.rows, weight.cols, parts))
    for tokens in (1, 6):
        x, weight, base = torch.randn(tokens, 64) / 8, torch.rand(tokens, 2), torch.randn(tokens, 64)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        want = ref.experts(x, gate_up, down, index, weight, base)
        assert error(gpu.experts(x, *strided, index, weight, base), want) < 2 * SIXTEEN_BITS


@pytest.mark.parametrize(("tokens", "length"), [(1, 700), (3, 40), (33, 300)])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_attention_of_stored_keys(tokens: int, length: int, form: str) -> None:
    """Several splits, several blocks of queries, keys as a cache holds them."""
    q = torch.randn(tokens, 8, 32)
    k, v = (torch.randn(length, 2, 32) for _ in range(2))
    if form == "int8":
        spec = BlockSpec("int8", 32, "f16")
        given = (ref.encode(k, spec), ref.encode(v, spec))
    else:
        given = (k.bfloat16(), v.bfloat16())
    assert error(gpu.attention(q, *given, 0.2), ref.attention(q, *given, 0.2)) < 1e-5


@pytest.mark.parametrize(("place", "length"), [(0, 9), (300, 1030)])
@pytest.mark.parametrize("form", ["bf16", "f32", "int8"])
def test_a_token_decoded_at_a_place_only_the_device_knows(place: int, length: int, form: str) -> None:
    """The row that is added is stored as the reference stores it, bit for bit; rows behind are no numbers."""
    q, k, v = torch.randn(1, 8, 32), torch.randn(1, 2, 32), torch.randn(1, 2, 32)
    k[0, 1] = 0.0
    caches, at, spec = {}, torch.tensor([place]), BlockSpec("int8", 32, "f16")
    keys, values = (torch.randn(length, 2, 32) for _ in range(2))
    for name in ("ref", "gpu"):
        if form == "int8":
            caches[name] = [ref.encode(x, spec) for x in (keys, values)]
            for cache in caches[name]:
                cache.scales[place + 1 :] = float("nan")
        else:
            dtype = torch.bfloat16 if form == "bf16" else torch.float32
            caches[name] = [x.to(dtype, copy=True) for x in (keys, values)]
            for cache in caches[name]:
                cache[place + 1 :] = float("nan")
    got = gpu.decode_attention(q, k, v, *caches["gpu"], at, 0.2)
    want = ref.decode_attention(q, k, v, *caches["ref"], at, 0.2)
    assert error(got, want) < 1e-5
    for mine, theirs in zip(caches["gpu"], caches["ref"], strict=True):
        parts = [(mine, theirs)] if form != "int8" else zip(mine.parts.values(), theirs.parts.values(), strict=True)
        for a, b in parts:
            assert torch.equal(a[: place + 1], b[: place + 1])


@pytest.mark.parametrize("positions", [torch.tensor([0, 7, 262143]), torch.tensor([[5, 9], [100, 3], [1000, 70]])])
@pytest.mark.parametrize("yarn", [None, (4.0, 262144)])
def test_rotary_angles(positions: Tensor, yarn: tuple[float, int] | None) -> None:
    given = (positions, 1e7, 24, (5, 4, 3), yarn)
    for got, want in zip(gpu.rope_tables(*given), ref.rope_tables(*given), strict=True):
        assert error(got, want) < 1e-6


def test_the_largest_of_equal_ones_and_of_no_numbers() -> None:
    """As the reference orders them, in several passes."""
    x = torch.randn(700).mul(3).round()
    x[[3, 500]] = float("inf")
    x[600] = float("nan")
    for count in (1, 20, 300):
        values, ids = gpu.largest(x, count)
        wanted, places = ref.largest(x, count)
        assert torch.equal(ids, places)
        assert ids[0] == 600
        assert torch.equal(values[1:], wanted[1:])
    x.fill_(-float("inf"))
    assert gpu.largest(x, 3)[1].tolist() == [0, 1, 2] == ref.largest(x, 3)[1].tolist()


def test_a_router_without_numbers_chooses_experts_that_exist() -> None:
    index, weight = gpu.router(torch.full((2, 32), float("nan")), Weight.plain(torch.randn(5, 32)), 3)
    assert index.min() >= 0
    assert index.max() < 5
    assert weight.isnan().all()


@pytest.mark.parametrize(("tokens", "cut_at"), [(9, 4), (100, 33), (65, 64)])
@pytest.mark.parametrize("decay", [1.0, 200.0])
def test_the_delta_rule_continues_from_its_state(tokens: int, cut_at: int, decay: float) -> None:
    """Token by token and in chunks, also where a state is forgotten at once."""
    q, k, v = torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 4, 24)
    g, beta = -torch.rand(tokens, 4) * decay, torch.rand(tokens, 4)
    state = torch.randn(4, 16, 24)
    want, parts = state.clone(), state.clone()
    whole = ref.delta_rule(q, k, v, g, beta, want)
    pieces = (slice(0, cut_at), slice(cut_at, tokens))
    cut = [gpu.delta_rule(*(x[p] for x in (q, k, v, g, beta)), parts) for p in pieces]
    # A chunk's decays are differences of sums of up to 32 of them, which float32 rounds by 2^-24 of the sum.
    bound = 1e-5 + 32 * decay * 2**-24
    assert error(torch.cat(cut), whole) < bound
    assert error(parts, want) < bound


def test_not_a_number_comes_through() -> None:
    w = ref.encode(torch.randn(32, 128), SPECS["int4-g128-tiled"])
    x = torch.randn(2, 128)
    x[1, 5] = float("nan")
    y = gpu.linear(x, w)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    for kind in ("int4-g128-tiled", "nvfp4-tiled"):
        one = ref.encode(torch.randn(32, 128), SPECS[kind])
        assert gpu.linear(x[1:], one).isnan().all()
        assert (gpu.linear(torch.zeros(1, 128), one) == 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler's tools are in Triton's Linux wheels")
@pytest.mark.parametrize("name", ["gemm_tiled nvfp4 32x64", "experts gate_up int4-g128", "attend_part int8"])
def test_compiled_for_every_card(name: str) -> None:
    """Ahead of time, without one: `make gpu-aot` does so with all kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qwenrun.kernels.gpu.aot", "--json", "--only", name]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    found = json.loads(run.stdout)["kernels"]
    assert {one["target"] for one in found} == {80, 89, 90, 100, 120}
    for one in found:
        assert one["spills"] == 0
        assert one["loads"].get("128", 0) > 0
        assert bool(one["tensor_cores"]) == ("gate_up" not in name)


SMALL = {"hidden_size": 128, "vocab_size": 64, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
SMALL |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"num_experts_per_tok": 2, "full_attention_interval": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize("recipe", ["int4", "nvfp4"])
def test_a_model_through_them(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole pack, a prompt and a token more: experts sorted and one by one, DeltaNet, attention, the logits."""
    raw = synth_config("35b", layers=2, experts=4, changes=SMALL)
    path = synthesize(tmp_path / "pack", raw, Recipe.load(recipe), name="tiny").path
    logits = {}
    for backend in ("ref", "gpu"):
        monkeypatch.setenv("QWENRUN_BACKEND", backend)
        with Engine.open(path, ctx=32) as engine:
            assert engine.config.layer_types == ("linear_attention", "full_attention")
            session = engine.session()
            logits[backend] = [session.prefill([5, 9, 60, 3, 17]), session.step(44)]
    for got, want in zip(logits["gpu"], logits["ref"], strict=True):
        assert error(got, want) < 1e-4


ONE_TOKEN = [
    *("linear-int4-g32-tiled-T1", "linears-nvfp4-tiled-T1", "swiglu-nvfp4-tiled-T1", "moe_entry-int4-g32-tiled-T1"),
    *("moe_entry-bf16-T1", "experts-nvfp4-tiled-T1", "router-bf16-T1", "decode_attention-S700", "delta_net-T1"),
    *("rms_norm", "apply_rope", "largest-V300"),
]


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_a_graph_can_hold_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the kernels of one token nothing is asked of the host; the kernels themselves can't ask."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def apart(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(*args, **kwargs)

    case = next(c for c in cases() if c.name.startswith(name))
    given = inputs(case, torch.Generator().manual_seed(1))
    kernel, own = getattr(gpu, case.op), FACTORIES.get(case.op, 0)
    work, rest = (kernel(*given[:own]), given[own:]) if own else (kernel, given)
    work(*rest)  # as the first token, before anything is recorded
    monkeypatch.setattr(GridExecutor, "__call__", apart)
    Tape().record(lambda: work(*rest))


def test_what_a_token_moves_is_what_it_has_to() -> None:
    """At a 32nd of the rows: memory that outlives an op moves once. Scratch is a share of a whole layer's rows, and is
    bounded where it does not depend on how many there are; `make gpu-traffic` counts whole layers."""
    from qwenrun.kernels.gpu.steps import decode_steps
    from qwenrun.kernels.gpu.traffic import BOUND, measure

    wanted = ("linear out int4-g128", "linear qkv int8-g128", "experts int4-g128", "attention int8 128", "delta_net")
    found = {step.name: measure(step) for step in decode_steps(32, (128,), 2) if step.name in wanted}
    assert len(found) == len(wanted)
    for name, one in found.items():
        assert 0.97 < one.kept / one.minimum < BOUND, name
        if not name.startswith(("linear out", "attention")):
            assert one.ratio < BOUND, name


def test_what_is_read_twice_counts_twice() -> None:
    from qwenrun.kernels.gpu.steps import Step, nbytes
    from qwenrun.kernels.gpu.traffic import measure

    x, w = torch.randn(1, 1024), Weight.plain(torch.randn(64, 1024))
    once = measure(Step("", "linear", (x, w), nbytes(x, w) + 4 * w.rows))
    assert 0.97 < once.ratio < 1.05
    twice = measure(Step("", "linears", ([w, w], None, 1e-6, x), nbytes(w)))
    assert 2 < twice.ratio < 2.1
