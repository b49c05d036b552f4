"""The graph against transformers on tiny random checkpoints, float32: prefill, chunks, decode, MTP.

The measure is ||a - b|| / ||b|| over all logits compared. Both sides compute in float32 in another order, so
1e-4 is the bound; a wrong formula is off by 1e-1 or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qwenrun import Engine
from qwenrun.engine.session import Session

TOLERANCE = 1e-4
NAMES = ["moe-4x", "moe-2x-per-expert", "dense-1x-tied", "dense-3x-text-only", "moe-yarn"]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


@contextmanager
def session(folder: Any, **options: Any) -> Iterator[Session]:
    with Engine.open(folder, **{"ctx": 320, "kv": "f32", **options}) as engine:
        yield engine.session()


@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_one_go(tiny: Callable[..., Any], name: str) -> None:
    model = tiny(name)
    ids = model.ids(200, seed=11)
    want = model.logits(ids)
    assert want.std() > 1  # or the comparison would say little
    with session(model.folder, chunk=512) as s:
        got = s.prefill(ids, all_logits=True)
        assert error(got, want) < TOLERANCE
        assert s.tokens == ids
        s.reset()
        assert error(s.prefill(ids), want[-1]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 65])
def test_prefill_in_chunks(tiny: Callable[..., Any], name: str, chunk: int) -> None:
    model = tiny(name)
    ids = model.ids(150, seed=12)
    with session(model.folder, chunk=chunk) as s:
        assert error(s.prefill(ids, all_logits=True), model.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_uneven_calls(tiny: Callable[..., Any], name: str) -> None:
    model = tiny(name)
    ids = model.ids(215, seed=13)
    with session(model.folder) as s:
        rows, start = [], 0
        for size in (1, 1, 7, 63, 2, 64, 1, 65, 11):
            rows.append(s.prefill(ids[start : start + size], all_logits=True))
            start += size
        assert start == len(ids)
        assert error(torch.cat(rows), model.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decode(tiny: Callable[..., Any], name: str) -> None:
    model = tiny(name)
    ids = model.ids(70, seed=14)
    want_tokens, want = model.greedy(ids, 33)
    assert len(set(want_tokens)) > 8
    with session(model.folder) as s:
        rows = [s.prefill(ids)]
        tokens = [int(rows[-1].argmax())]
        for _ in range(32):
            rows.append(s.step(tokens[-1]))
            tokens.append(int(rows[-1].argmax()))
        assert tokens == want_tokens
        assert error(torch.stack(rows), want) < TOLERANCE
        assert s.position == 70 + 32


@pytest.mark.parametrize("name", ["moe-4x", "dense-1x-tied"])
def test_positions_on_three_axes(tiny: Callable[..., Any], name: str) -> None:
    """Time, height and width apart, as the tokens of an image have them."""
    model = tiny(name)
    ids = torch.tensor(model.ids(60, seed=18))
    positions = torch.arange(60).repeat(3, 1)
    positions[1, 20:40] = 20 + torch.arange(20) // 5
    positions[2, 20:40] = 20 + torch.arange(20) % 5
    positions[0, 20:40] = 20
    positions[:, 40:] -= 15
    with torch.no_grad():
        want = model.oracle.model.language_model(input_ids=ids[None], position_ids=positions[:, None])
        plain = model.oracle.model.language_model(input_ids=ids[None])
    with session(model.folder) as s:
        bound = s._engine.model
        got = [
            bound.forward(ids[:33], s._state, positions[:, :33]),
            bound.forward(ids[33:], s._state, positions[:, 33:]),
        ]
    assert error(torch.cat(got), want.last_hidden_state[0]) < TOLERANCE
    assert error(plain.last_hidden_state, want.last_hidden_state) > 1e-2  # the positions matter


def divergence(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and the share of rows whose likeliest token is the same."""
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((got.argmax(-1) == want.argmax(-1)).float().mean())


@pytest.mark.parametrize("name", ["moe-4x", "dense-1x-tied"])
def test_bf16_by_statistics(tiny: Callable[..., Any], name: str) -> None:
    """A BF16 checkpoint with a BF16 cache against float32 transformers of the same (rounded) weights.

    Only cached keys and values are rounded here, so distributions stay close: mean KL divergence below 1e-3
    nats, the likeliest token the same in 97 %; and closer than transformers' own BF16 run, which rounds every
    activation. Bit equality is not to be had: a near-tied expert flips.
    """
    model = tiny(name, torch.bfloat16)
    ids = model.ids(200, seed=15)
    want = model.logits(ids)
    with session(model.folder, kv="bf16") as s:
        kld, top1 = divergence(s.prefill(ids, all_logits=True), want)
    oracle = copy.deepcopy(model.oracle).bfloat16()
    with torch.no_grad():
        other, _ = divergence(oracle(input_ids=torch.tensor([ids])).logits[0].float(), want)
    print(f"{name}: mean KLD {kld:.2e}, top-1 {top1:.1%}; transformers in BF16 {other:.2e}")
    assert kld < 1e-3
    assert top1 > 0.97
    assert kld < other


@pytest.mark.parametrize("name", ["moe-2x-per-expert", "dense-1x-tied"])
def test_int8_cache(tiny: Callable[..., Any], name: str) -> None:
    """Keys and values in INT8, one scale per head and token: mean KL divergence below 5e-3 nats, top-1 95 %."""
    model = tiny(name)
    ids = model.ids(200, seed=16)
    with session(model.folder, kv="int8", chunk=50) as s:
        kld, top1 = divergence(s.prefill(ids, all_logits=True), model.logits(ids))
    print(f"{name}: mean KLD {kld:.2e}, top-1 {top1:.1%}")
    assert 0 < kld < 5e-3
    assert top1 > 0.95


def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + w)


@pytest.mark.parametrize("name", ["moe-4x", "moe-2x-per-expert", "dense-1x-tied"])
def test_mtp(tiny: Callable[..., Any], name: str) -> None:
    """The draft module against transformers' own decoder layer with the same weights, joined by the formula
    fc([norm(embedding of t+1); norm(hidden of t)]) at position t + 1."""
    model = tiny(name)
    ids = model.ids(90, seed=17)
    oracle, weights = model.oracle, model.tensors
    text = oracle.model.language_model
    with torch.no_grad():
        trunk = oracle.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        layer = type(text.layers[-1])(text.config, text.config.num_hidden_layers - 1).float().eval()
        prefix = "mtp.layers.0."
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        nexts, hidden = torch.tensor(ids[1:]), trunk[:-1]
        halves = [
            rms(text.embed_tokens(nexts), weights["mtp.pre_fc_norm_embedding.weight"]),
            rms(hidden, weights["mtp.pre_fc_norm_hidden.weight"]),
        ]
        x = (torch.cat(halves, -1) @ weights["mtp.fc.weight"].T)[None]
        positions = torch.arange(1, len(ids))[None, None].expand(3, 1, -1)
        mask = torch.full((len(nexts), len(nexts)), -torch.inf).triu(1)[None, None]
        x = layer(x, position_embeddings=text.rotary_emb(x, positions), attention_mask=mask)
        x = x[0] if isinstance(x, tuple) else x
        want = rms(x[0], weights["mtp.norm.weight"])
        want_logits = oracle.lm_head(want)
    with Engine.open(model.folder, ctx=128, kv="f32", mtp=True) as engine:
        bound = engine.model
        s = engine.session()
        got_hidden = s.feed(ids, keep_all=True)
        assert error(got_hidden, trunk) < TOLERANCE
        cache = s._state.mtp
        assert cache is not None
        # In two pieces: the module's own cache carries over.
        got = [
            bound.draft(nexts[:40], got_hidden[:40], cache, 0),
            bound.draft(nexts[40:], got_hidden[40:-1], cache, 40),
        ]
        assert error(torch.cat(got), want) < TOLERANCE
        assert error(bound.logits(torch.cat(got)), want_logits) < TOLERANCE
