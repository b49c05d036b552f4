"""Synthetic packs: they open and run like real ones, the seed decides every byte, and routing is as even as asked."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenrun.engine.engine import Engine
from qwenrun.errors import ModelError, UsageError
from qwenrun.kernels.ops import decode
from qwenrun.measure.synth import Pool, main, popularity, random_weight, synth_config, synthesize, zoo_config
from qwenrun.model.config import ModelConfig
from qwenrun.model.moe import MoE
from qwenrun.quant import formats
from qwenrun.quant.packfile.reader import PackReader, verify
from qwenrun.quant.recipe import Recipe

SMALL = {"hidden_size": 256, "vocab_size": 640, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4}


def small(**options: Any) -> dict[str, Any]:
    return synth_config("35b", layers=4, experts=options.pop("experts", 16), changes=SMALL, **options)


def contents(pack: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pack.iterdir()}


@pytest.mark.parametrize("recipe", ["balanced", "nvfp4", "int4", "bf16"])
def test_a_pack_opens_verifies_and_runs(tmp_path: Path, recipe: str) -> None:
    written = synthesize(tmp_path / "p", small(mtp=True), Recipe.load(recipe), name="tiny")
    assert written.nbytes == sum(p.stat().st_size for p in written.path.iterdir() if p.name != "pack.json")
    verify(written.path)
    with Engine.open(written.path, ctx=64, mtp=True) as engine:
        assert engine.config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
        assert (engine.config.num_experts, engine.config.vision) == (16, None)
        session = engine.session()
        logits = session.prefill(list(range(0, 640, 20)))
        assert torch.isfinite(logits).all()
        assert 0.5 < logits.std() < 2
        assert torch.isfinite(session.step(1)).all()


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    recipe = Recipe.load("nvfp4")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, small(), recipe, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_no_two_experts_are_equal(tmp_path: Path) -> None:
    synthesize(tmp_path / "p", small(experts=64), Recipe.load("int4"))
    with PackReader.open(tmp_path / "p") as pack:
        seen = set()
        for layer in range(4):
            block = pack.experts(f"model.language_model.layers.{layer}.mlp.experts")
            for stack in (block.gate_up, block.down):
                seen |= {stack.codes[e].numpy().tobytes() for e in range(64)}
        assert len(seen) == 2 * 4 * 64


@pytest.mark.parametrize("name", sorted(formats.registry()))
def test_every_format_decodes_to_the_spread_asked_for(name: str) -> None:
    weight = random_weight(Pool(0), formats.parse(name).spec, 512, 1024, 1 / 32, 2, name)
    values = decode(weight)
    assert torch.isfinite(values).all()
    assert values.std().item() == pytest.approx(1 / 32, rel=0.03)
    assert abs(values.mean().item()) < 1e-3
    # No direction in which all rows agree: that would grow from layer to layer.
    assert torch.linalg.matrix_norm(values, 2) < 3


def test_a_slice_longer_than_the_pool() -> None:
    cut = Pool.cut(np.arange(10), 25, np.random.default_rng(0))
    assert len(cut) == 25
    assert Counter(cut.tolist()).keys() == set(range(10))


def test_popularity_is_what_was_asked_for() -> None:
    for experts, zipf in ((16, 0.5), (256, 1.0), (256, 2.0)):
        wanted = popularity(experts, 8, zipf)
        assert wanted.sum() == pytest.approx(8)
        assert wanted.max() <= 0.95
        assert wanted[-2] / wanted[-1] == pytest.approx((experts / (experts - 1)) ** zipf)


def shares(pack: Path, tokens: int = 200) -> list[float]:
    """In each layer, the share of the choices that went to the most popular quarter of the experts."""
    found = []
    with Engine.open(pack, ctx=256) as engine:
        for layer in engine.model.layers:
            assert isinstance(layer.mlp, MoE)
            routed, experts = layer.mlp.routed, layer.mlp.router.rows

            def watch(x: Any, index: Any, *rest: Any, routed: Any = routed, experts: int = experts) -> Any:
                counts = index.flatten().bincount(minlength=experts).sort(descending=True).values
                found.append(counts[: experts // 4].sum().item() / index.numel())
                return routed(x, index, *rest)

            layer.mlp.routed = watch
        generator = torch.Generator().manual_seed(0)
        engine.session().prefill(torch.randint(0, 640, (tokens,), generator=generator).tolist())
    return found


def test_routing_can_be_skewed(tmp_path: Path) -> None:
    config = small(experts=64)
    synthesize(tmp_path / "even", config, Recipe.load("int4"))
    synthesize(tmp_path / "skewed", config, Recipe.load("int4"), zipf=1.0)
    wanted = popularity(64, 8, 1.0)[:16].sum() / 8
    assert max(shares(tmp_path / "even")) < 0.45
    for share in shares(tmp_path / "skewed"):
        assert math.isclose(share, wanted, abs_tol=0.1)


def test_the_config_of_a_member() -> None:
    config = synth_config("122b", layers=24, experts=128)
    parsed = ModelConfig.from_hf(config)
    assert (parsed.num_layers, parsed.num_experts, parsed.mtp_layers) == (24, 128, 0)
    assert parsed.full_layers == (3, 7, 11, 15, 19, 23)
    assert parsed.hidden_size == zoo_config("122b")["text_config"]["hidden_size"]
    assert ModelConfig.from_hf(synth_config("27b", layers=4)).is_moe is False


def test_what_can_not_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no experts"):
        synth_config("27b", experts=8)
    with pytest.raises(UsageError, match="no such key"):
        synth_config("35b", changes={"hiden_size": 4})
    with pytest.raises(ModelError, match="num_experts_per_tok"):
        synth_config("35b", experts=4)
    out = str(tmp_path / "p")
    assert main([out, "--model", "no such model"]) == 2
    (tmp_path / "p").mkdir()
    assert main([out, "--model", "35b", "--layers", "4"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    arguments = ["--model", "35b", "--layers", "4", "--experts", "8", "--recipe", "int4", "--seed", "3"]
    assert main([str(tmp_path / "p"), *arguments, *changes]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "MB/s" in captured.err
    manifest = verify(tmp_path / "p")
    assert manifest.source == {"name": "synthetic-35b", "seed": 3, "zipf": 0.0}
    assert manifest.recipe["name"] == "int4"
