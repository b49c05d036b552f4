"""Bytes of every member of the family, recipe and context, summed by hand: plain arithmetic, nothing of qwenrun.

    python tests/golden/build_plan.py > tests/golden/plan.json

Reads the zoo's configs as JSON. Rules of the recipes and sizes of tensors are written down here once more, so that
a mistake in the program is not one here too.
"""

from __future__ import annotations

import json
from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "qwenrun" / "model" / "zoo"
CONTEXTS = (4_096, 262_144, 1_048_576)
BF16, F32 = 2, 4


def int4(rows: int, cols: int) -> list[int]:
    """Codes, and a float16 scale for 128 values."""
    assert cols % 128 == 0
    return [rows * cols // 2, rows * cols // 128 * 2]


def int8(rows: int, cols: int) -> list[int]:
    assert cols % 128 == 0
    return [rows * cols, rows * cols // 128 * 2]


def nvfp4(rows: int, cols: int, tensor_scales: int = 1) -> list[int]:
    assert cols % 16 == 0
    return [rows * cols // 2, rows * cols // 16, 4 * tensor_scales]


def bf16(rows: int, cols: int) -> list[int]:
    return [rows * cols * BF16]


# What a recipe does to: attention, DeltaNet and shared experts (or the dense MLP); the embedding; the head; routed
# experts; the MTP layer's matrices; its routed experts.
RECIPES = {
    "balanced": (int8, int8, int8, int4, int4, int4),
    "nvfp4": (int8, int8, int8, nvfp4, int4, nvfp4),
    "int4": (int4, int8, int4, int4, int4, int4),
    "bf16": (bf16, bf16, bf16, bf16, bf16, bf16),
}


def up(size: int, step: int) -> int:
    return -(-size // step) * step


def record(form, hidden: int, inner: int) -> int:
    """An expert: gate and up in one matrix, then down; every array at a multiple of 64, the whole at one of 4,096."""
    arrays = form(2 * inner, hidden, 2) if form is nvfp4 else form(2 * inner, hidden)
    at = 0
    for size in [*arrays, *form(hidden, inner)]:
        at = up(at, 64) + size
    return up(at, 4096)


def attention(t: dict, form) -> int:
    hidden, dim = t["hidden_size"], t["head_dim"]
    heads, kv = t["num_attention_heads"] * dim, t["num_key_value_heads"] * dim
    matrices = form(2 * heads, hidden) + form(kv, hidden) + form(kv, hidden) + form(hidden, heads)
    return sum(matrices) + 2 * dim * F32


def deltanet(t: dict, form) -> int:
    hidden, keys = t["hidden_size"], t["linear_num_key_heads"] * t["linear_key_head_dim"]
    heads, width = t["linear_num_value_heads"], t["linear_value_head_dim"]
    values = heads * width
    matrices = form(2 * keys + values, hidden) + form(values, hidden) + form(hidden, values)
    gates = 2 * bf16(heads, hidden)[0]
    small = (2 * keys + values) * t["linear_conv_kernel_dim"] + heads + heads + width
    return sum(matrices) + gates + small * F32


def feed_forward(t: dict, form) -> int:
    """Without routed experts: router, shared expert and its gate; or the dense MLP."""
    hidden = t["hidden_size"]
    if "num_experts" not in t:
        inner = t["intermediate_size"]
        return sum(form(inner, hidden) + form(inner, hidden) + form(hidden, inner))
    inner = t["shared_expert_intermediate_size"]
    shared = form(inner, hidden) + form(inner, hidden) + form(hidden, inner)
    return sum(shared) + bf16(t["num_experts"], hidden)[0] + bf16(1, hidden)[0]


def routed(t: dict, form) -> int:
    return t["num_experts"] * record(form, t["hidden_size"], t["moe_intermediate_size"]) if "num_experts" in t else 0


def vision(v: dict) -> int:
    h, inner, merged = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    patch = h * v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2 + h
    block = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (inner * h + inner) + (h * inner + h)
    merger = 2 * h + (merged * merged + merged) + (v["out_hidden_size"] * merged + v["out_hidden_size"])
    return BF16 * (patch + v["num_position_embeddings"] * h + v["depth"] * block + merger)


def state(t: dict) -> int:
    """Of all DeltaNet layers, once: recurrent, and the last inputs of the convolution."""
    layers = sum(kind == "linear_attention" for kind in t["layer_types"])
    heads, width = t["linear_num_value_heads"], t["linear_value_head_dim"]
    keys = t["linear_num_key_heads"] * t["linear_key_head_dim"]
    channels = 2 * keys + heads * width
    recurrent = heads * t["linear_key_head_dim"] * width
    return layers * F32 * (recurrent + channels * (t["linear_conv_kernel_dim"] - 1))


def sums(config: dict, recipe: str, ctx: int) -> dict[str, int]:
    t = config["text_config"]
    matrices, embedding, head, experts, mtp_matrices, mtp_experts = RECIPES[recipe]
    hidden, vocabulary = t["hidden_size"], t["vocab_size"]
    full = sum(kind == "full_attention" for kind in t["layer_types"])
    linear = len(t["layer_types"]) - full
    tied = config.get("tie_word_embeddings", False) or t.get("tie_word_embeddings", False)
    layer_norms = 2 * hidden * F32
    dense = sum(embedding(vocabulary, hidden)) + (0 if tied else sum(head(vocabulary, hidden))) + hidden * F32
    dense += full * attention(t, matrices) + linear * deltanet(t, matrices)
    dense += len(t["layer_types"]) * (layer_norms + feed_forward(t, matrices))
    kv_layer = ctx * 2 * t["num_key_value_heads"] * t["head_dim"] * BF16
    mtp = 0
    for _ in range(t.get("mtp_num_hidden_layers", 0)):
        mtp += sum(mtp_matrices(hidden, 2 * hidden)) + 3 * hidden * F32 + layer_norms
        mtp += attention(t, mtp_matrices) + feed_forward(t, mtp_matrices) + routed(t, mtp_experts) + kv_layer
    return {
        "dense": dense,
        "routed": len(t["layer_types"]) * routed(t, experts),
        "kv": full * kv_layer,
        "state": 3 * state(t),
        "vision": vision(config["vision_config"]) if "vision_config" in config else 0,
        "mtp": mtp,
    }


def main() -> None:
    table = {
        path.stem: {
            recipe: {str(ctx): sums(json.loads(path.read_text()), recipe, ctx) for ctx in CONTEXTS}
            for recipe in RECIPES
        }
        for path in sorted(ZOO.glob("*.json"))
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
