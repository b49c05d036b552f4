"""Tiny random checkpoints in the hub's layout, and the transformers model with the same weights beside each.

Weights are scaled so that every layer matters: logits have a standard deviation of about 2, the decay of the
DeltaNet state ranges from fast to slow, and routing margins are not all tiny.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
GDN, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Variant:
    """One point of the family: what differs from the common tiny shape."""

    seed: int
    text: dict[str, Any]
    tied: bool = False
    per_expert: bool = False
    per_expert_mtp: bool = True
    text_only: bool = False  # names without `language_model.`, no vision tower, no MTP
    rope: dict[str, Any] = field(default_factory=dict)

    @property
    def moe(self) -> bool:
        return "num_experts" in self.text


VARIANTS = {
    # value heads 4x key heads, odd head and expert counts, all layers of both kinds
    "moe-4x": Variant(1, {**MOE, "linear_num_key_heads": 2, "linear_num_value_heads": 8}),
    # one tensor per expert, 2x, two kv heads
    "moe-2x-per-expert": Variant(
        2,
        {
            **MOE,
            "num_experts": 7,
            "num_experts_per_tok": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
        },
        per_expert=True,
        per_expert_mtp=False,
    ),
    "dense-1x-tied": Variant(
        3, {"intermediate_size": 88, "linear_num_key_heads": 3, "linear_num_value_heads": 3}, tied=True
    ),
    "dense-3x-text-only": Variant(
        4,
        {
            "intermediate_size": 72,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_value_head_dim": 24,
            "layer_types": [FULL, GDN, GDN],
            "num_hidden_layers": 3,
        },
        text_only=True,
    ),
    # rows that every quantized block divides
    "dense-blocks": Variant(
        6,
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "layer_types": [GDN, FULL],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
    ),
    "moe-blocks": Variant(
        7,
        {
            **MOE,
            "hidden_size": 128,
            "layer_types": [GDN, FULL],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "moe_intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "moe-yarn": Variant(
        5,
        {
            **MOE,
            "num_attention_heads": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": [GDN, FULL],
            "num_hidden_layers": 2,
        },
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


def config_json(variant: Variant) -> dict[str, Any]:
    """config.json as the hub's files have it, with tiny numbers."""
    kind = "qwen3_5_moe" if variant.moe else "qwen3_5"
    text = {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 7,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 48,
        "layer_types": [GDN, FULL, GDN, GDN, FULL],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 1024,
        "model_type": f"{kind}_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 3,
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "vocab_size": 131,
        "tie_word_embeddings": variant.tied,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            **variant.rope,
        },
        **variant.text,
    }
    vision = {
        "deepstack_visual_indexes": [],
        "depth": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 48,
        "model_type": kind,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    family = "Qwen3_5Moe" if variant.moe else "Qwen3_5"
    if variant.text_only:
        return {"architectures": [f"{family}ForCausalLM"], **text}
    return {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": variant.tied,
        "image_token_id": 120,
        "video_token_id": 121,
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
    }


def build_oracle(raw: dict[str, Any]) -> Any:
    """The transformers model of a config.json, float32, plain PyTorch paths."""
    import transformers

    family = raw["architectures"][0].removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM")
    text_only = raw["architectures"][0].endswith("ForCausalLM")
    config_class = getattr(transformers, f"{family}TextConfig" if text_only else f"{family}Config")
    config = config_class(**json.loads(json.dumps(raw)))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, raw["architectures"][0])(config)
    return model.float().eval()


def random_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A value that keeps activations of order one and makes the tensor matter."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.linspace(-3.0, 1.5, shape[0]) + 0.1 * noise
    if name.endswith("dt_bias"):
        return noise - 1.0
    if name.endswith("linear_attn.norm.weight"):
        return 1.0 + 0.3 * noise
    if name.endswith("conv1d.weight"):
        return 0.7 * noise
    if name.endswith("embed_tokens.weight"):  # a tied table is also the head: keep its logits moderate
        return 0.3 * noise
    if name.endswith("mlp.gate.weight") or "lm_head" in name:
        return 2.0 * noise / shape[-1] ** 0.5
    if len(shape) == 1:  # the zero-centred norms
        return 0.3 * noise
    return 1.5 * noise / shape[-1] ** 0.5


def mtp_shapes(oracle: Any, variant: Variant) -> dict[str, tuple[int, ...]]:
    """The hub's `mtp.*` names; transformers knows none of them. Shapes are those of the last trunk layer."""
    text = config_json(variant)["text_config"]
    hidden = text["hidden_size"]
    shapes = {f"mtp.{n}.weight": (hidden,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    prefix = f"model.language_model.layers.{text['num_hidden_layers'] - 1}."
    for name, value in oracle.state_dict().items():
        if name.startswith(prefix):
            shapes["mtp.layers.0." + name.removeprefix(prefix)] = tuple(value.shape)
    assert "mtp.layers.0.self_attn.q_proj.weight" in shapes
    return shapes


def per_expert(name: str, value: Tensor) -> dict[str, Tensor]:
    """One fused expert tensor [E, ...] as the tensors of the per-expert layout."""
    prefix, _, kind = name.rpartition(".")
    if kind == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": value[e].clone() for e in range(len(value))}
    half = value.shape[1] // 2
    out = {}
    for e in range(len(value)):
        out[f"{prefix}.{e}.gate_proj.weight"] = value[e, :half].clone()
        out[f"{prefix}.{e}.up_proj.weight"] = value[e, half:].clone()
    return out


def store(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


@dataclass(frozen=True)
class Tiny:
    """A checkpoint folder, the transformers model of the same weights, and the tensors by hub name (fused)."""

    name: str
    variant: Variant
    folder: Path
    oracle: Any
    tensors: dict[str, Tensor]

    @property
    def vocab_size(self) -> int:
        return 131

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """transformers' logits for a whole sequence: [T, V]."""
        return self.oracle(input_ids=torch.tensor([ids])).logits[0].float()

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> tuple[list[int], Tensor]:
        """`count` greedy tokens by transformers' own cache, and the logits they came from [count, V]."""
        out = self.oracle(input_ids=torch.tensor([ids]), use_cache=True)
        rows, tokens = [out.logits[0, -1]], [int(out.logits[0, -1].argmax())]
        while len(tokens) < count:
            step = torch.tensor([tokens[-1:]])
            out = self.oracle(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)

    def ids(self, count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab_size, (count,), generator=generator).tolist()


def make_tiny(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    variant = VARIANTS[name]
    raw = config_json(variant)
    generator = torch.Generator().manual_seed(variant.seed)
    oracle = build_oracle(raw)
    tensors = {}
    for key, value in oracle.state_dict().items():
        if not (variant.tied and key == "lm_head.weight"):
            tensors[key] = random_value(key, tuple(value.shape), generator)
    if not variant.text_only:
        for key, shape in mtp_shapes(oracle, variant).items():
            tensors[key] = random_value(key, shape, generator)
    keep = ("A_log", "linear_attn.norm.weight")  # F32 on the hub
    tensors = {k: v if k.endswith(keep) else v.to(dtype) for k, v in tensors.items()}
    loaded = oracle.load_state_dict({k: v.float() for k, v in tensors.items() if not k.startswith("mtp.")}, False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if variant.tied else [])
    oracle.tie_weights()
    stored: dict[str, Tensor] = {}
    for key, value in tensors.items():
        split = variant.per_expert_mtp if key.startswith("mtp.") else variant.per_expert
        stored |= per_expert(key, value) if ".experts." in key and split else {key: value}
    store(folder, raw, stored)
    return Tiny(name, variant, folder, oracle, tensors)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """tiny(name, dtype=torch.float32) -> Tiny, made once a session."""
    made: dict[tuple[str, torch.dtype], Tiny] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
        key = (name, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / f"{name}-{dtype}".replace("torch.", "")
            made[key] = make_tiny(folder, name, dtype)
        return made[key]

    return get
