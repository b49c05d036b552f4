"""Every buffer the engine holds, counted without torch from a config, the storage of its tensors and a run.

`state_shapes` is what a session allocates from, so the figures printed and the bytes allocated can't drift.
Weights are counted as they lie in a pack. Norms, biases and convolutions are copied to float32 when a model is
bound (8 MB in the 122B); those copies are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from qwenrun.errors import ModelError, UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.plan.workspace import workspace
from qwenrun.quant.packfile.layout import expert_layout
from qwenrun.quant.recipe import Assignment, TensorInfo, stored_bytes

KV_DTYPES = ("bf16", "int8", "f32")
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
# Parts as they are printed; several parts of the inventory make one.
DENSE = ("embedding", "lm_head", "attention", "gdn", "shared", "mlp", "router", "norm")
# Printed part -> parts of the buffers.
PRINTED = {
    "dense": DENSE,
    "routed": ("routed",),
    "kv": ("kv",),
    "state": ("state", "snapshots"),
    "vision": ("vision",),
    "mtp": ("mtp", "mtp_routed"),
    "workspace": ("workspace",),
}
_PRINTED_AS = {part: name for name, parts in PRINTED.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Run:
    """How a model is run.

    ctx: tokens a sequence may have. kv: "bf16", "int8" (with a float16 scale per head and token) or "f32".
    chunk: tokens per prefill step. mtp, vision: whether those weights are held (and the MTP layer's own KV).
    snapshots: checkpoints of the DeltaNet state a sequence keeps. sequences: how many there are.
    """

    ctx: int
    kv: str = "bf16"
    chunk: int = 512
    mtp: bool = True
    vision: bool = True
    snapshots: int = 2
    sequences: int = 1

    def __post_init__(self) -> None:
        if self.kv not in KV_DTYPES:
            raise UsageError(f"KV type {self.kv!r} is none of {', '.join(KV_DTYPES)}", hint="--kv bf16")
        for name in ("ctx", "chunk", "sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.snapshots < 0:
            raise UsageError(f"snapshots can't be negative: {self.snapshots}")


@dataclass(frozen=True, slots=True)
class Buffer:
    """One lasting allocation. part: embedding, routed, kv, state, ... ; dtype as safetensors spells it, or ""
    for a buffer of several types."""

    name: str
    part: str
    nbytes: int
    shape: tuple[int, ...] = ()
    dtype: str = ""


def state_shapes(config: ModelConfig, run: Run) -> tuple[Buffer, ...]:
    """What one sequence allocates: the KV cache, the DeltaNet states and their checkpoints.

    Names: `layers.I.k`, `.v` [ctx, Hkv, D] (with kv "int8" also `.k_scale`, `.v_scale` [ctx, Hkv]);
    `layers.I.conv` [taps - 1, C] and `layers.I.recurrent` [nv, dk, dv], float32; checkpoint S of those two is
    `snapshots.S.layers.I.conv` and so on; the MTP layer's cache, if `run.mtp`, is `mtp.k` and so on.
    """
    out: list[Buffer] = []
    for i in range(config.num_layers):
        if config.is_full(i):
            out += _kv(f"layers.{i}", "kv", config, run)
        else:
            out += _delta(f"layers.{i}", "state", config)
    for number in range(run.snapshots):
        for i in config.linear_layers:
            out += _delta(f"snapshots.{number}.layers.{i}", "snapshots", config)
    if run.mtp and config.mtp_layers:
        out += _kv("mtp", "mtp", config, run)
    return tuple(out)


def _buffer(name: str, part: str, shape: tuple[int, ...], dtype: str) -> Buffer:
    return Buffer(name, part, prod(shape) * DTYPE_BYTES[dtype], shape, dtype)


def _kv(name: str, part: str, config: ModelConfig, run: Run) -> list[Buffer]:
    dtype = {"bf16": "BF16", "int8": "I8", "f32": "F32"}[run.kv]
    heads = (run.ctx, config.num_kv_heads)
    out = [_buffer(f"{name}.{x}", part, (*heads, config.head_dim), dtype) for x in "kv"]
    if run.kv == "int8":
        out += [_buffer(f"{name}.{x}_scale", part, heads, "F16") for x in "kv"]
    return out


def _delta(name: str, part: str, config: ModelConfig) -> list[Buffer]:
    recurrent = (config.linear_value_heads, config.linear_key_dim, config.linear_value_dim)
    return [
        _buffer(f"{name}.conv", part, (config.conv_kernel - 1, config.conv_channels), "F32"),
        _buffer(f"{name}.recurrent", part, recurrent, "F32"),
    ]


def weight_buffers(stored: Iterable[tuple[TensorInfo, Assignment]], run: Run) -> list[Buffer]:
    """One buffer a tensor; a layer's routed experts are one buffer, its records padded as they are in a pack."""
    out = []
    experts: dict[str, list[tuple[TensorInfo, Assignment]]] = {}
    for info, how in stored:
        if (info.part == "vision" and not run.vision) or (info.part.startswith("mtp") and not run.mtp):
            continue
        if info.is_experts:
            experts.setdefault(info.name.rpartition(".")[0], []).append((info, how))
        else:
            out.append(Buffer(info.name, info.part, stored_bytes(info, how)))
    for prefix, pair in experts.items():
        info = pair[0][0]
        size = expert_layout(dict(pair)).record_size * info.shape[0]
        out.append(Buffer(prefix, info.part, size))
    return out


def list_buffers(config: ModelConfig, stored: Iterable[tuple[TensorInfo, Assignment]], run: Run) -> list[Buffer]:
    """Every buffer of a run: weights as stored, `run.sequences` states, and the workspace (an estimate)."""
    stored = list(stored)
    state = [
        Buffer(f"sequence {n}: {b.name}", b.part, b.nbytes, b.shape, b.dtype)
        for n in range(run.sequences)
        for b in state_shapes(config, run)
    ]
    return [
        *weight_buffers(stored, run),
        *state,
        Buffer("workspace", "workspace", workspace(config, stored, run.chunk, run.ctx)),
    ]


def totals(buffers: Iterable[Buffer]) -> dict[str, int]:
    """Bytes by printed part: dense, routed, kv, state (with checkpoints), vision, mtp, workspace, total."""
    out = dict.fromkeys(PRINTED, 0)
    for buffer in buffers:
        if buffer.part not in _PRINTED_AS:
            # Packs bring their own names of parts.
            raise ModelError(f"{buffer.name}: part {buffer.part!r} is none of {', '.join(_PRINTED_AS)}")
        out[_PRINTED_AS[buffer.part]] += buffer.nbytes
    return out | {"total": sum(out.values())}


def read_per_token(config: ModelConfig, stored: Iterable[tuple[TensorInfo, Assignment]]) -> int:
    """Weight bytes read to decode one token: everything dense but the embedding's other rows, and top_k of the
    routed experts. Without the MTP head and the vision tower."""
    total = 0.0
    for info, how in stored:
        size = stored_bytes(info, how)
        if info.part == "routed":
            total += size * config.top_k / info.shape[0]
        elif info.part == "embedding":
            # One row of the table; a tied table is read whole as the head.
            total += size if config.tie_embeddings else size / info.shape[0]
        elif not info.part.startswith(("mtp", "vision")):
            total += size
    return round(total)
