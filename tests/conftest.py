"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_hub import FakeHub

if TYPE_CHECKING:
    import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports Triton: kernels for cards are interpreted, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def real_tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the real Qwen3.5 tokenizer.json, built once and kept in pytest's cache."""
    folder = Path(request.config.cache.mkdir("qwen3_5-tokenizer"))
    if not (folder / "tokenizer.json").is_file():
        spec = importlib.util.spec_from_file_location("build_tokenizer", GOLDEN / "build_tokenizer.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(folder)
    return folder


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine that the program is pointed to, with nothing on it yet; waits are short."""
    from qwenrun.hub import remote

    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(remote, "TIMEOUT", 2.0)
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "eos_token_id": 3,
        "head_dim": 32,
        "hidden_size": 128,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 64,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "shared_expert_intermediate_size": 128,
        "vocab_size": 320,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 128,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    per_expert: bool = False,
    shards: int = 2,
    seed: int = 0,
    drop: Callable[[str], bool] = lambda name: False,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, value: value,
) -> Path:
    """Write a random checkpoint with every tensor of `config` in `folder`, in the hub's layout.

    per_expert: one tensor per expert and projection, in trunk and MTP. drop, change: by canonical name.
    """
    import torch
    from safetensors.torch import save_file

    from qwenrun.model.config import ModelConfig
    from qwenrun.model.inventory import inventory

    config = config or TINY_CONFIG
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, torch.Tensor] = {}
    for info in inventory(ModelConfig.from_hf(config, "tiny")):
        value = torch.randn(info.shape, generator=generator) * 0.05
        value = change(info.name, value).to(dtypes[info.dtype])
        if drop(info.name):
            continue
        if not (info.is_experts and per_expert):
            stored[info.name] = value
            continue
        prefix, _, kind = info.name.rpartition(".")
        for e, matrix in enumerate(value):
            if kind == "down_proj":
                stored[f"{prefix}.{e}.down_proj.weight"] = matrix.clone()
            else:
                gate, up = matrix.chunk(2)
                stored[f"{prefix}.{e}.gate_proj.weight"] = gate.clone()
                stored[f"{prefix}.{e}.up_proj.weight"] = up.clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    weight_map = {}
    names = list(stored)
    for number in range(shards):
        shard = f"model.safetensors-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: stored[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def checkpoint_maker() -> Callable[..., Path]:
    """`write_checkpoint`."""
    return write_checkpoint


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A config of a tiny model, for a test to change."""
    return json.loads(json.dumps(TINY_CONFIG))


@pytest.fixture
def quantize() -> Callable[..., Any]:
    """quantize(source, out, recipe="balanced", **options) -> Report: what `qwenrun quantize` does."""

    def run(source: Path, out: Path, recipe: str = "balanced", **options: Any) -> Any:
        from qwenrun.model.config import ModelConfig
        from qwenrun.model.inventory import match
        from qwenrun.quant.convert import convert
        from qwenrun.quant.packfile.checkpoint import Checkpoint
        from qwenrun.quant.recipe import Recipe

        with Checkpoint.open(source) as checkpoint:
            config = ModelConfig.from_hf(checkpoint.config, source.name)
            found = match(config, checkpoint.tensors, str(source))
            return convert(checkpoint, out, Recipe.load(recipe), found.tensors, notes=found.notes, **options)

    return run


@pytest.fixture(scope="session")
def new_state() -> Callable[..., Any]:
    """new_state(config, run): the state of a sequence in an arena of its own, planned without any weight."""
    from qwenrun.engine.arena import Arena
    from qwenrun.engine.state import SequenceState
    from qwenrun.plan.planner import Budget, place, weigh

    def make(config: Any, run: Any) -> SequenceState:
        arena = Arena.from_plan(place(config, weigh(config, [], run), run, Budget()))
        return SequenceState(config, run, arena.sequence(0))

    return make
