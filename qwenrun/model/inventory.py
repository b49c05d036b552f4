"""Inventory: every tensor a checkpoint of a config holds, by its Hugging Face name, with shape and part.

One list with three readers: the converter checks a checkpoint against it, the binder a pack, and the planner
counts its bytes. Routed experts appear in their fused form ([E, 2I, H] and [E, H, I]), whatever form a
checkpoint has them in. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from qwenrun.errors import ModelError
from qwenrun.model.config import ModelConfig, VisionConfig
from qwenrun.quant.recipe import TensorInfo

HUB_PREFIX = "model.language_model."
TEXT_PREFIX = "model."
# Stored in float32 on the hub, everything else in the config's dtype.
FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def inventory(config: ModelConfig, prefix: str = HUB_PREFIX) -> tuple[TensorInfo, ...]:
    """All tensors of a complete checkpoint, in the order of the layers. `prefix` stands before trunk names."""
    tensors = [*_trunk(config, prefix)]
    if not config.tie_embeddings:
        tensors.append(_bf16("lm_head.weight", "lm_head", config.vocab_size, config.hidden_size))
    if config.vision:
        tensors += _vision(config.vision)
    for layer in range(config.mtp_layers):
        tensors += _mtp(config, layer)
    dtype = _DTYPES[config.dtype]
    return tuple(t if t.name.endswith(FLOAT32) else replace(t, dtype=dtype) for t in tensors)


def parameters(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """Number of parameters by part."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.part] = counts.get(tensor.part, 0) + prod(tensor.shape)
    return counts


@dataclass(frozen=True, slots=True)
class Match:
    """What a checkpoint holds of a config's inventory: the tensors that are there, in the dtypes they have.

    notes: groups that are absent as a whole and may be (MTP head, vision tower), each a sentence.
    """

    tensors: tuple[TensorInfo, ...]
    notes: tuple[str, ...]


def match(config: ModelConfig, found: Mapping[str, tuple[tuple[int, ...], str]], where: str) -> Match:
    """Compare a checkpoint's tensors, {canonical name: (shape, dtype)}, with the inventory of `config`.

    The MTP head and the vision tower may be absent, each as a whole, for other tools drop them on saving.
    Anything else missing, left over or of another shape is a ModelError that names it.
    """
    prefix = HUB_PREFIX if any(name.startswith(HUB_PREFIX) for name in found) else TEXT_PREFIX
    expected = {info.name: info for info in inventory(config, prefix)}
    notes = []
    for parts, what in ((("mtp", "mtp_routed"), "MTP head"), (("vision",), "vision tower")):
        group = [name for name, info in expected.items() if info.part in parts]
        if group and not any(name in found for name in group):
            notes.append(f"the {what} is not in this checkpoint")
            for name in group:
                del expected[name]
    missing = [name for name in expected if name not in found]
    leftover = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name][0])}, not {list(info.shape)}"
        for name, info in expected.items()
        if name in found and found[name][0] != info.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if leftover:
        problems.append(f"{len(leftover)} not known: {_some(leftover)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if problems:
        raise ModelError(
            f"{where}: tensors do not match the config; " + "; ".join(problems),
            hint="check that config.json and the weights are of the same model, and that the download is complete",
        )
    return Match(tuple(replace(info, dtype=found[name][1]) for name, info in expected.items()), tuple(notes))


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _bf16(name: str, part: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, "BF16", part)


def _trunk(config: ModelConfig, prefix: str) -> list[TensorInfo]:
    hidden = config.hidden_size
    out = [_bf16(f"{prefix}embed_tokens.weight", "embedding", config.vocab_size, hidden)]
    for i in range(config.num_layers):
        layer = f"{prefix}layers.{i}."
        out += _attention(config, layer, "attention") if config.is_full(i) else _deltanet(config, layer)
        out += _feed_forward(config, layer)
    out.append(_bf16(f"{prefix}norm.weight", "norm", hidden))
    return out


def _norms(config: ModelConfig, layer: str, part: str = "norm") -> list[TensorInfo]:
    names = ("input_layernorm", "post_attention_layernorm")
    return [_bf16(f"{layer}{name}.weight", part, config.hidden_size) for name in names]


def _attention(config: ModelConfig, layer: str, part: str) -> list[TensorInfo]:
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv = config.num_heads * dim, config.num_kv_heads * dim
    norm = "norm" if part == "attention" else part
    return [
        # Per head the rows of the query, then those of the output gate.
        _bf16(f"{layer}self_attn.q_proj.weight", part, 2 * heads, hidden),
        _bf16(f"{layer}self_attn.k_proj.weight", part, kv, hidden),
        _bf16(f"{layer}self_attn.v_proj.weight", part, kv, hidden),
        _bf16(f"{layer}self_attn.o_proj.weight", part, hidden, heads),
        _bf16(f"{layer}self_attn.q_norm.weight", norm, dim),
        _bf16(f"{layer}self_attn.k_norm.weight", norm, dim),
        *_norms(config, layer, norm),
    ]


def _deltanet(config: ModelConfig, layer: str) -> list[TensorInfo]:
    hidden, heads = config.hidden_size, config.linear_value_heads
    name = f"{layer}linear_attn."
    return [
        _bf16(f"{name}in_proj_qkv.weight", "gdn", config.conv_channels, hidden),
        _bf16(f"{name}in_proj_z.weight", "gdn", config.value_size, hidden),
        _bf16(f"{name}in_proj_b.weight", "gdn", heads, hidden),
        _bf16(f"{name}in_proj_a.weight", "gdn", heads, hidden),
        _bf16(f"{name}conv1d.weight", "gdn", config.conv_channels, 1, config.conv_kernel),
        TensorInfo(f"{name}A_log", (heads,), "F32", "gdn"),
        _bf16(f"{name}dt_bias", "gdn", heads),
        TensorInfo(f"{name}norm.weight", (config.linear_value_dim,), "F32", "gdn"),
        _bf16(f"{name}out_proj.weight", "gdn", hidden, config.value_size),
        *_norms(config, layer),
    ]


def _feed_forward(config: ModelConfig, layer: str, part: str = "") -> list[TensorInfo]:
    """part: "mtp" for the draft head, whose parts are not told apart but for its routed experts."""
    hidden = config.hidden_size
    if not config.is_moe:
        return _swiglu(f"{layer}mlp.", part or "mlp", hidden, config.mlp_size)
    experts, size = config.num_experts, config.expert_size
    routed = "mtp_routed" if part else "routed"
    return [
        _bf16(f"{layer}mlp.gate.weight", part or "router", experts, hidden),
        # The gate's rows first, then those of up.
        _bf16(f"{layer}mlp.experts.gate_up_proj", routed, experts, 2 * size, hidden),
        _bf16(f"{layer}mlp.experts.down_proj", routed, experts, hidden, size),
        *_swiglu(f"{layer}mlp.shared_expert.", part or "shared", hidden, config.shared_size),
        _bf16(f"{layer}mlp.shared_expert_gate.weight", part or "router", 1, hidden),
    ]


def _swiglu(name: str, part: str, hidden: int, size: int) -> list[TensorInfo]:
    return [
        _bf16(f"{name}gate_proj.weight", part, size, hidden),
        _bf16(f"{name}up_proj.weight", part, size, hidden),
        _bf16(f"{name}down_proj.weight", part, hidden, size),
    ]


def _mtp(config: ModelConfig, number: int) -> list[TensorInfo]:
    hidden, layer = config.hidden_size, f"mtp.layers.{number}."
    return [
        _bf16("mtp.fc.weight", "mtp", hidden, 2 * hidden),
        _bf16("mtp.pre_fc_norm_embedding.weight", "mtp", hidden),
        _bf16("mtp.pre_fc_norm_hidden.weight", "mtp", hidden),
        _bf16("mtp.norm.weight", "mtp", hidden),
        *_attention(config, layer, "mtp"),
        *_feed_forward(config, layer, "mtp"),
    ]


def _vision(vision: VisionConfig) -> list[TensorInfo]:
    width, mlp, merged = vision.hidden_size, vision.mlp_size, vision.hidden_size * vision.merge_size**2
    name = "model.visual."
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)

    def linear(at: str, rows: int, cols: int) -> list[TensorInfo]:
        return [_bf16(f"{at}.weight", "vision", rows, cols), _bf16(f"{at}.bias", "vision", rows)]

    def norm(at: str) -> list[TensorInfo]:
        return [_bf16(f"{at}.weight", "vision", width), _bf16(f"{at}.bias", "vision", width)]

    out = [
        _bf16(f"{name}patch_embed.proj.weight", "vision", width, *patch),
        _bf16(f"{name}patch_embed.proj.bias", "vision", width),
        _bf16(f"{name}pos_embed.weight", "vision", vision.num_positions, width),
    ]
    for i in range(vision.depth):
        block = f"{name}blocks.{i}."
        out += norm(f"{block}norm1") + norm(f"{block}norm2")
        out += linear(f"{block}attn.qkv", 3 * width, width) + linear(f"{block}attn.proj", width, width)
        out += linear(f"{block}mlp.linear_fc1", mlp, width) + linear(f"{block}mlp.linear_fc2", width, mlp)
    out += norm(f"{name}merger.norm")
    out += linear(f"{name}merger.linear_fc1", merged, merged)
    return out + linear(f"{name}merger.linear_fc2", vision.out_size, merged)
