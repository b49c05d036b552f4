"""A sequence's memory: what is planned is what is allocated, and checkpoints bring back what they took."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from qwenrun.engine.kv_cache import Int8KV, PlainKV
from qwenrun.engine.state import SequenceState
from qwenrun.kernels.ops import decode
from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import Run, list_buffers, state_shapes


def small(name: str = "Qwen3.5-35B-A3B", **text: Any) -> ModelConfig:
    """A member of the zoo with its layers cut to eight."""
    raw = copy.deepcopy(ModelConfig.from_name(name).raw)
    raw["text_config"].update(num_hidden_layers=8, layer_types=raw["text_config"]["layer_types"][:8], **text)
    return ModelConfig.from_hf(raw)


def live_bytes(state: SequenceState) -> int:
    """Bytes of the memory a state holds; no two tensors share any."""
    places = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in state.buffers.values())
    assert all(at + size <= following for (at, size), (following, _) in itertools.pairwise(places))
    return sum(size for _, size in places)


@pytest.mark.parametrize("kv", ["bf16", "int8", "f32"])
@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("name", ["Qwen3.5-35B-A3B", "Qwen3.5-27B"])
def test_planned_bytes_are_allocated_bytes(new_state: Any, name: str, kv: str, mtp: bool) -> None:
    config = small(name)
    run = Run(ctx=77, kv=kv, mtp=mtp, snapshots=3)
    state = new_state(config, run)
    planned = sum(b.nbytes for b in state_shapes(config, run))
    assert state.nbytes == planned == live_bytes(state)
    # The figures that a plan prints are of the same list.
    printed = [b for b in list_buffers(config, [], run) if b.name.startswith("sequence")]
    assert sum(b.nbytes for b in printed) == planned
    # And by hand: 2 attention layers (one more for MTP), 6 DeltaNet layers, live and in 3 checkpoints.
    per_head = {"bf16": 2 * 256, "int8": 256 + 2, "f32": 4 * 256}[kv]
    caches = (2 + mtp) * 2 * 77 * config.num_kv_heads * per_head
    heads = config.linear_value_heads
    delta = 6 * (heads * 128 * 128 + 3 * (2 * 16 * 128 + heads * 128)) * 4
    assert planned == caches + 4 * delta


def test_the_layers_hold_the_allocated_memory(new_state: Any) -> None:
    """No layer works on memory of its own, and none shares with another."""
    config = small()
    state = new_state(config, Run(ctx=5, kv="f32", mtp=False, snapshots=0))
    for tensor in state.buffers.values():
        tensor.fill_(float("nan"))
    seen = 0
    for i, layer in enumerate(state.layers):
        parts = (layer.k, layer.v) if config.is_full(i) else (layer.conv, layer.recurrent)
        for part in parts:
            assert part.isnan().all()
            part.zero_()
            seen += part.numel()
    assert not any(t.isnan().any() for t in state.buffers.values())
    assert seen * 4 == state.nbytes


def fill(state: SequenceState, value: float) -> None:
    for layer in state.layers:
        if hasattr(layer, "conv"):
            layer.conv.fill_(value)
            layer.recurrent.fill_(-value)


def value_of(state: SequenceState) -> set[float]:
    values = set()
    for layer in state.layers:
        if hasattr(layer, "conv"):
            values |= set(layer.conv.unique().tolist()) | set((-layer.recurrent).unique().tolist())
    return {v + 0.0 for v in values}


def at(state: SequenceState, position: int) -> None:
    """Pretend that `position` tokens were fed, and mark the state with that number."""
    state.position = position
    fill(state, float(position))


def test_checkpoints(new_state: Any) -> None:
    config = small()
    state = new_state(config, Run(ctx=50, mtp=False, snapshots=2))
    assert state.nearest(50) == 0
    for position in (10, 20):
        at(state, position)
        state.checkpoint()
    at(state, 30)
    assert state.checkpoints == (10, 20)
    assert [state.nearest(t) for t in (9, 10, 19, 20, 50)] == [0, 10, 10, 20, 20]
    assert state.restore_nearest(15) == 10
    assert (state.position, value_of(state)) == (10, {10.0})
    # 20 is the one unused longest now, so a third takes its slot.
    at(state, 40)
    state.checkpoint()
    assert state.checkpoints == (10, 40)
    assert state.restore_nearest(45) == 40
    assert value_of(state) == {40.0}
    # Writing after 10 makes 40 a checkpoint of something else.
    state.forget_after(10)
    assert state.checkpoints == (10,)
    assert state.restore_nearest(9) == 0
    assert (state.position, value_of(state)) == (0, {0.0})
    state.reset()
    assert state.checkpoints == ()


def test_a_checkpoint_can_be_taken_again(new_state: Any) -> None:
    config = small()
    state = new_state(config, Run(ctx=50, mtp=False, snapshots=1))
    at(state, 10)
    state.checkpoint()
    fill(state, 99.0)
    state.checkpoint()
    fill(state, 1.0)
    state.restore_nearest(10)
    assert value_of(state) == {99.0}


def test_without_slots_only_the_start_is_left(new_state: Any) -> None:
    state = new_state(small(), Run(ctx=50, mtp=False, snapshots=0))
    at(state, 10)
    state.checkpoint()
    assert state.restore_nearest(50) == 0


def test_copies_are_independent(new_state: Any) -> None:
    state = new_state(small(), Run(ctx=50, mtp=False))
    at(state, 7)
    saved = state.copy()
    at(state, 8)
    state.restore(saved)
    assert (state.position, value_of(state)) == (7, {7.0})


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query over all rows, by the book; two query heads a key head."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = torch.einsum("thd,shd->ths", q, k).mul(0.25).softmax(-1)
    return torch.einsum("ths,shd->thd", weights, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_cache_rounds_once(dtype: torch.dtype) -> None:
    cache = PlainKV(torch.full((6, 2, 8), torch.nan, dtype=dtype), torch.full((6, 2, 8), torch.nan, dtype=dtype))
    k, v, q = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 4, 8)
    first = cache.attend(0, q[:1], k[:1], v[:1], 0.25)
    last = cache.attend(1, q[1:], k[1:], v[1:], 0.25)[-1:]
    assert torch.equal(cache.k[:4], k.to(dtype))
    assert torch.equal(cache.v[:4], v.to(dtype))
    assert cache.k[4:].isnan().all()
    rounded_k, rounded_v = k.to(dtype).float(), v.to(dtype).float()
    torch.testing.assert_close(first, attention(q[:1], rounded_k[:1], rounded_v[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, attention(q[3:], rounded_k, rounded_v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_int8_cache(seed: int) -> None:
    """Within half a step of what was written (a step is the head's largest magnitude over 127), plus the
    rounding of the scale to float16; a slice decodes its own rows; attention uses the decoded values."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(9, 2, 32, generator=generator) * torch.rand(9, 2, 1, generator=generator) for _ in "kv")
    q = torch.randn(9, 4, 32, generator=generator)
    k[3] = 0
    cache = Int8KV(
        torch.full((12, 2, 32), 99, dtype=torch.int8),
        torch.full((12, 2, 32), 99, dtype=torch.int8),
        torch.full((12, 2), torch.nan, dtype=torch.float16),
        torch.full((12, 2), torch.nan, dtype=torch.float16),
    )
    cache.attend(0, q[:5], k[:5], v[:5], 0.25)
    last = cache.attend(5, q[5:], k[5:], v[5:], 0.25)[-1:]
    keys, values = cache.rows(9)
    for rows, want in ((keys, k), (values, v)):
        assert (rows.lead, rows.rows, rows.cols) == ((9,), 2, 32)
        step = want.abs().amax(-1, keepdim=True) / 127
        got = decode(rows)
        assert ((got - want).abs() <= step * (0.5 + 127 * 2**-11 + 1e-6)).all()
    assert torch.equal(decode(keys)[3], torch.zeros(2, 32))
    torch.testing.assert_close(last, attention(q[8:], decode(keys), decode(values)), rtol=1e-5, atol=1e-5)
