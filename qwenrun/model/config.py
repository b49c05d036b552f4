"""ModelConfig: what a `config.json` of the Qwen3.5 family says, checked, with nothing guessed.

Reads the mixture-of-experts and the dense form, with the text part nested (`text_config`) or flat. Class
defaults of other libraries differ from the released files in places that matter, so a missing key is an
error. Knows nothing of weights or quantization.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

from qwenrun.errors import ModelError, UsageError

ZOO = Path(__file__).parent / "zoo"
DEFAULT_MODEL = "Qwen3.5-122B-A10B"
LINEAR, FULL = "linear_attention", "full_attention"
# model_type of a config -> (is the text part nested, is it a mixture of experts)
_KNOWN = {
    "qwen3_5_moe": (True, True),
    "qwen3_5": (True, False),
    "qwen3_5_moe_text": (False, True),
    "qwen3_5_text": (False, False),
}
# Larger numbers than these are a broken or hostile file, not a model.
_MAX_SIZE = 1 << 24
_MAX_CONFIG_BYTES = 4 << 20
DTYPES = ("bfloat16", "float16", "float32")
# Keys that would change the maths, and the values under which it is the one implemented here. A file need not
# have them; one that has another value is another model.
_TEXT_MUST_BE: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
    "mtp_use_dedicated_embeddings": (False,),
}
# As YaRN's authors chose them; the rotary kernel has no other.
_YARN_MUST_BE: dict[str, tuple[object, ...]] = {
    "beta_fast": (32,),
    "beta_slow": (1,),
    "truncate": (True,),
    "attention_factor": (),
    "mscale": (),
    "mscale_all_dim": (),
}
_VISION_MUST_BE: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([],),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `rotary_dim` of each head's dimensions turn, with frequencies theta^(-2j/rotary_dim).

    kind is "default" or "yarn"; factor and original_max_position have a meaning for "yarn" alone.
    """

    theta: float
    rotary_dim: int
    mrope_section: tuple[int, ...]
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0

    @property
    def yarn(self) -> tuple[float, int] | None:
        return (self.factor, self.original_max_position) if self.kind == "yarn" else None


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's sizes."""

    depth: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    out_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    num_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """A member of the family. Sizes are numbers of elements; `raw` is the file's own dictionary."""

    name: str
    model_type: str
    is_moe: bool
    hidden_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    vocab_size: int
    rms_norm_eps: float
    tie_embeddings: bool
    max_position: int
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    conv_kernel: int
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    mlp_size: int
    mtp_layers: int
    vision: VisionConfig | None
    eos_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @cached_property
    def positions(self) -> int:
        """Tokens the rotary positions reach: what the model was made for, or what its YaRN stretches that to."""
        stretched = int(self.rope.factor * self.rope.original_max_position)
        return max(self.max_position, stretched) if self.rope.yarn else self.max_position

    def yarn_factor(self, ctx: int) -> int:
        """The smallest whole YaRN factor under which `ctx` tokens have positions; 1 if they have without more.

        Published for this family are 2 (524,288 tokens) and 4 (1,010,000).
        """
        if ctx <= self.positions:
            return 1
        return -(-ctx // (self.rope.original_max_position or self.max_position))

    @cached_property
    def key_size(self) -> int:
        """Channels of all DeltaNet key heads together (as many as of its query heads)."""
        return self.linear_key_heads * self.linear_key_dim

    @cached_property
    def value_size(self) -> int:
        """Channels of all DeltaNet value heads together."""
        return self.linear_value_heads * self.linear_value_dim

    @cached_property
    def conv_channels(self) -> int:
        """Channels the causal convolution runs over: queries, keys and values."""
        return 2 * self.key_size + self.value_size

    @cached_property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers, the only ones with a KV cache."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    @cached_property
    def linear_layers(self) -> tuple[int, ...]:
        """Indices of the Gated DeltaNet layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LINEAR)

    def is_full(self, layer: int) -> bool:
        return self.layer_types[layer] == FULL

    @classmethod
    def from_hf(cls, data: object, name: str = "") -> ModelConfig:
        """Check and convert a parsed `config.json`. Raises ModelError naming the key that is wrong."""
        where = f"config of {name}" if name else "config.json"
        top = _Reader(data, where)
        model_type = top.text("model_type")
        if model_type not in _KNOWN:
            raise ModelError(
                f"{where}: model_type {_shown(model_type)} is not an architecture qwenrun knows"
                f" (it knows {', '.join(_KNOWN)})",
                hint="qwenrun runs the Qwen3.5 and Qwen3.6 family; see: qwenrun vram --help",
            )
        nested, is_moe = _KNOWN[model_type]
        text = top.section("text_config") if nested else top
        text.must_be(_TEXT_MUST_BE)
        layers = text.size("num_hidden_layers", limit=4096)
        head_dim = text.size("head_dim")
        text.require(head_dim % 2 == 0, "head_dim", f"{head_dim} is odd")
        heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
        key_heads, value_heads = text.size("linear_num_key_heads"), text.size("linear_num_value_heads")
        text.require(heads % kv_heads == 0, "num_attention_heads", f"{heads} is no multiple of {kv_heads} KV heads")
        text.require(
            value_heads % key_heads == 0,
            "linear_num_value_heads",
            f"{value_heads} is no multiple of {key_heads} key heads",
        )
        experts = text.size("num_experts") if is_moe else 0
        top_k = text.size("num_experts_per_tok") if is_moe else 0
        text.require(top_k <= experts, "num_experts_per_tok", f"{top_k} of {experts} experts")
        hidden = text.size("hidden_size")
        return cls(
            name=name,
            model_type=model_type,
            is_moe=is_moe,
            hidden_size=hidden,
            num_layers=layers,
            layer_types=_layer_types(text, layers),
            vocab_size=text.size("vocab_size"),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_embeddings=(top if top.has("tie_word_embeddings") else text).flag("tie_word_embeddings"),
            max_position=text.size("max_position_embeddings", limit=1 << 40),
            dtype=_dtype(top, text),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=_rope(text, head_dim),
            linear_key_heads=key_heads,
            linear_value_heads=value_heads,
            linear_key_dim=text.size("linear_key_head_dim"),
            linear_value_dim=text.size("linear_value_head_dim"),
            conv_kernel=text.size("linear_conv_kernel_dim", limit=64),
            num_experts=experts,
            top_k=top_k,
            expert_size=text.size("moe_intermediate_size") if is_moe else 0,
            shared_size=text.size("shared_expert_intermediate_size") if is_moe else 0,
            mlp_size=0 if is_moe else text.size("intermediate_size"),
            mtp_layers=_mtp_layers(text),
            vision=_vision(top.section("vision_config"), hidden) if nested and top.has("vision_config") else None,
            eos_ids=_eos(text if text.has("eos_token_id") else top),
            raw=top.data,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """The config of a Hugging Face folder. Raises ModelError if there is none, or it is not valid."""
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no config.json, so it is not a model folder", hint="ls " + str(folder))
        return cls.from_hf(read_json(path), name=folder.resolve().name)

    @classmethod
    def from_name(cls, name: str) -> ModelConfig:
        """A member of the shipped zoo, by name (case and an owner's prefix do not matter)."""
        wanted = name.rpartition("/")[2].lower()
        names = {known.lower(): known for known in zoo_names()}
        if wanted not in names:
            matches = [k for n, k in names.items() if wanted and wanted in n]
            if len(matches) == 1:
                wanted = matches[0].lower()
            else:
                close = matches or [names[n] for n in difflib.get_close_matches(wanted, names, 3, 0.4)]
                what = "is more than one model" if matches else "is no model of the family and no folder here"
                raise UsageError(
                    f"{name!r} {what}",
                    hint=f"qwenrun vram {close[0]}" if close else "one of: " + ", ".join(zoo_names()),
                )
        known = names[wanted]
        return cls.from_hf(read_json(ZOO / f"{known}.json"), name=known)


def zoo_names() -> tuple[str, ...]:
    """The names of the models whose configs are shipped."""
    return tuple(sorted(path.stem for path in ZOO.glob("*.json")))


def read_json(path: Path) -> object:
    """Parse a small JSON file; ModelError if it is unreadable, too large or not JSON."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes is too large for a configuration file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="download the file again") from error


def _shown(value: object, limit: int = 80) -> str:
    """A value of a file for an error message: escaped, and not longer than a line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested a thousand deep, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


class _Reader:
    """A dictionary whose values are fetched with their type checked."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ModelError(f"{where} is not a JSON object but {type(data).__name__}")
        self.data: dict[str, Any] = data
        self.where = where

    def fail(self, key: str, why: str) -> ModelError:
        return ModelError(f"{self.where}: {key}: {why}", hint="compare the file with the one on the hub")

    def require(self, true: bool, key: str, why: str) -> None:
        if not true:
            raise self.fail(key, why)

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def need(self, key: str) -> Any:
        self.require(self.has(key), key, "is missing")
        return self.data[key]

    def must_be(self, allowed: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse a file in which one of these keys is there (and not null) with a value that is not listed."""
        for key, values in allowed.items():
            if self.has(key) and self.data[key] not in values:
                known = f"only {' or '.join(map(repr, values))} is known" if values else "is not known"
                raise self.fail(key, f"{_shown(self.data[key])}: {known}")

    def section(self, key: str) -> _Reader:
        return _Reader(self.need(key), f"{self.where}: {key}")

    def text(self, key: str) -> str:
        value = self.need(key)
        self.require(isinstance(value, str), key, f"{_shown(value)} is not a string")
        return value

    def size(self, key: str, limit: int = _MAX_SIZE) -> int:
        value = self.need(key)
        self.require(type(value) is int and 0 < value <= limit, key, f"{_shown(value)} is not a number in 1..{limit}")
        return value

    def number(self, key: str) -> float:
        value = self.need(key)
        good = type(value) in (int, float) and 0 < value < 1e30
        self.require(good, key, f"{_shown(value)} is not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.need(key)
        self.require(isinstance(value, bool), key, f"{_shown(value)} is not true or false")
        return value


def _layer_types(text: _Reader, layers: int) -> tuple[str, ...]:
    if text.has("layer_types"):
        types = text.get("layer_types")
        text.require(isinstance(types, list), "layer_types", f"{_shown(types)} is not a list")
        for i, kind in enumerate(types):
            text.require(kind in (LINEAR, FULL), "layer_types", f"{_shown(kind)} (layer {i}) is not {LINEAR} or {FULL}")
        text.require(len(types) == layers, "layer_types", f"has {len(types)} entries for {layers} layers")
        return tuple(types)
    interval = text.size("full_attention_interval", limit=4096)
    return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers))


def _dtype(top: _Reader, text: _Reader) -> str:
    for reader in (text, top):
        for key in ("dtype", "torch_dtype"):
            if reader.has(key):
                value = reader.text(key)
                reader.require(value in DTYPES, key, f"{_shown(value)} is none of {', '.join(DTYPES)}")
                return value
    raise text.fail("dtype", "is missing")


def _rope(text: _Reader, head_dim: int) -> RopeConfig:
    rope = _rope_section(text)
    kind = rope.text("rope_type")
    rope.require(kind in ("default", "yarn"), "rope_type", f"{_shown(kind)} is not 'default' or 'yarn'")
    # Some files repeat the factor beside rope_parameters; the inner one is what is used.
    factor = rope.number("partial_rotary_factor")
    rotary = int(head_dim * factor)
    good = 0 < rotary <= head_dim and rotary % 2 == 0
    rope.require(good, "partial_rotary_factor", f"{factor} of {head_dim} dimensions")
    section = rope.need("mrope_section")
    good = isinstance(section, list) and len(section) == 3 and all(type(n) is int and n >= 0 for n in section)
    rope.require(good, "mrope_section", f"{_shown(section)} is not three numbers")
    rope.require(sum(section) == rotary // 2, "mrope_section", f"{section} does not sum to {rotary // 2}")
    interleaved = rope.get("mrope_interleaved")
    rope.require(interleaved is True, "mrope_interleaved", f"{_shown(interleaved)}: only true is known")
    plain = RopeConfig(rope.number("rope_theta"), rotary, tuple(section))
    if kind == "default":
        return plain
    rope.must_be(_YARN_MUST_BE)
    stretch = rope.number("factor")
    rope.require(1 <= stretch <= 1024, "factor", f"{stretch} is not in 1..1024")
    original = rope.size("original_max_position_embeddings")
    return replace(plain, kind=kind, factor=stretch, original_max_position=original)


def _rope_section(text: _Reader) -> _Reader:
    """`rope_parameters`, or the spelling before it: `rope_scaling`, with two of its keys beside it."""
    if text.has("rope_parameters") or not text.has("rope_scaling"):
        return text.section("rope_parameters")
    old = text.section("rope_scaling")
    beside = {key: text.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    return _Reader({**beside, "rope_type": old.get("type"), **old.data}, old.where)


def _mtp_layers(text: _Reader) -> int:
    value = 0 if text.get("mtp_num_hidden_layers") is None else text.get("mtp_num_hidden_layers")
    good = type(value) is int and value in (0, 1)
    text.require(good, "mtp_num_hidden_layers", f"{_shown(value)} is not 0 or 1")
    return value


def _eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    good = all(type(i) is int and 0 <= i < _MAX_SIZE for i in ids)
    reader.require(good, "eos_token_id", f"{_shown(value)} is not a token id or a list of them")
    return tuple(ids)


def _vision(vision: _Reader, text_hidden: int) -> VisionConfig:
    vision.must_be(_VISION_MUST_BE)
    hidden, heads = vision.size("hidden_size"), vision.size("num_heads")
    vision.require(hidden % heads == 0, "num_heads", f"{heads} does not divide {hidden}")
    out, positions = vision.size("out_hidden_size"), vision.size("num_position_embeddings")
    vision.require(out == text_hidden, "out_hidden_size", f"{out}, and the text part has {text_hidden}")
    # The learned positions are a square table, sampled in both directions.
    vision.require(isqrt(positions) ** 2 == positions, "num_position_embeddings", f"{positions} is no square")
    return VisionConfig(
        depth=vision.size("depth", limit=4096),
        hidden_size=hidden,
        mlp_size=vision.size("intermediate_size"),
        num_heads=heads,
        out_size=out,
        patch_size=vision.size("patch_size"),
        temporal_patch_size=vision.size("temporal_patch_size"),
        merge_size=vision.size("spatial_merge_size"),
        in_channels=vision.size("in_channels"),
        num_positions=positions,
    )
