"""What is observed against what the same matrices read in transformers, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenrun import Engine
from qwenrun.measure.observe import Sums, observe
from qwenrun.model.config import ModelConfig

CTX = 60


def seen_by_transformers(
    tiny: Any, pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Sums of squares by the matrix's name, and behind `#` those of one expert; every product passes `linear`."""
    owners = {}
    for name, value in tiny.oracle.state_dict().items():
        if name.endswith("_proj") and value.dim() == 3:
            owners |= {value[e].data_ptr(): f"{name}#{e}" for e in range(len(value))}
        elif value.dim() == 2:
            owners[value.data_ptr()] = name
    found: dict[str, torch.Tensor] = {}
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        name = owners[weight.data_ptr()]
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        found[name] = found.get(name, 0) + rows.square().sum(0)
        return plain(x, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", linear)
        for piece in pieces:
            tiny.logits(piece)
    return found


@pytest.mark.parametrize("name", ["moe-4x", "moe-2x-per-expert", "dense-1x-tied", "dense-3x-text-only"])
def test_the_squares_are_those_of_transformers(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tiny(name)
    ids = model.ids(2 * CTX + 31, seed=21)
    want = seen_by_transformers(model, [ids[at : at + CTX] for at in range(0, len(ids), CTX)], monkeypatch)
    sums = Sums(ModelConfig.from_folder(model.folder))
    with Engine.open(model.folder, ctx=CTX, kv="f32", chunk=25, watch=sums) as engine:
        seen = observe(engine, sums, ids)
    assert (seen.tokens, seen.pieces, seen.stopped) == (len(ids), 3, False)
    observed = sums.observed()
    compared = set()
    for name, each in observed.items():
        if each.mean_squares.dim() == 1:
            rows = {name: (each.mean_squares, each.tokens[0])}
        else:
            rows = {f"{name}#{e}": (mean, each.tokens[e]) for e, mean in enumerate(each.mean_squares)}
        for key, (mean, tokens) in rows.items():
            if tokens == 0:
                assert key not in want
                assert (mean == 0).all()
                continue
            compared.add(key)
            got = mean.double() * tokens
            assert (got - want[key]).abs().max() < 1e-3 * want[key].max(), key
    # A tied head is the embedding, for which nothing is said; all others are there.
    left = set(want) - compared
    assert left == ({"lm_head.weight"} & set(want) if model.variant.tied else set())
    if model.variant.moe:
        layers = ModelConfig.from_folder(model.folder).num_layers
        assert seen.experts == layers * model.variant.text["num_experts"]
        chosen = {key for key in want if "down_proj#" in key}
        assert seen.unseen_experts == seen.experts - len(chosen)


@pytest.mark.parametrize("name", ["moe-4x", "dense-1x-tied"])
def test_a_watched_model_computes_the_same(tiny: Callable[..., Any], name: str) -> None:
    model = tiny(name)
    ids = model.ids(CTX, seed=22)
    with Engine.open(model.folder, ctx=CTX, kv="f32", watch=Sums(ModelConfig.from_folder(model.folder))) as engine:
        got = engine.session().prefill(ids, all_logits=True)
    want = model.logits(ids)
    assert (got - want).norm() < 1e-4 * want.norm()
