"""Every buffer the engine holds, counted without torch from a config, the storage of its tensors and a run.

The engine's arena is made from this list and nothing else, so the figures printed and the bytes allocated can't
drift. Weights are held as they lie in a pack, but for what is small and not a matrix (norms, biases,
convolutions), which is held in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from qwenrun.errors import ModelError, UsageError
from qwenrun.kernels.spec import Part
from qwenrun.model.config import ModelConfig
from qwenrun.plan.workspace import Codes, workspace
from qwenrun.quant.packfile.layout import expert_layout, expert_pairs
from qwenrun.quant.recipe import Assignment, TensorInfo, stored_bytes

KV_DTYPES = ("bf16", "int8", "f32")
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
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
    "runtime": ("runtime",),
}
# What the process has resident before it opens a model: Python, torch and its libraries. Measured on Linux
# with the CPU build of torch 2.13 (`tests/system/test_budget.py` holds it).
RUNTIME = 320 << 20
# On a card: the CUDA context with its kernels, which torch's allocator does not count. On an H100 with driver 580 and
# torch 2.11 it was 691 to 759 MiB after prompts and decoding (2026-11-26); other cards and drivers take their own.
RUNTIME_CUDA = 800 << 20
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


def held_parts(info: TensorInfo, how: Assignment) -> dict[str, Part]:
    """The arrays a dense tensor is held as: buffer name -> Part.

    An encoded matrix has one per part of its format, `NAME.codes` and so on; another matrix is itself. What is
    no matrix, and a router that a recipe encodes, is decoded to float32 once, when it is loaded. The vision
    tower is counted as it is stored: nothing loads it yet.
    """
    if info.part == "vision":
        return {info.name: Part("codes", info.dtype, info.shape)}
    if len(info.shape) != 2 or (info.part == "router" and how.spec is not None):
        return {info.name: Part("codes", "F32", info.shape)}
    if how.spec is None:
        return {info.name: Part("codes", info.dtype, info.shape)}
    return {f"{info.name}.{p.name}": p for p in how.spec.parts(*info.shape, info.tensor_scales)}


def is_held(info: TensorInfo, run: Run) -> bool:
    """Whether a run has this tensor in memory at all."""
    return not (info.part == "vision" and not run.vision) and not (info.part.startswith("mtp") and not run.mtp)


def expert_records(stored: Iterable[tuple[TensorInfo, Assignment]], run: Run) -> dict[str, tuple[int, int, str]]:
    """Routed experts: prefix -> (bytes of a record as a pack has it, experts, part), in the order of the layers."""
    out = {}
    for prefix, pair in expert_pairs((info, how) for info, how in stored if is_held(info, run)).items():
        info = next(iter(pair))
        out[prefix] = (expert_layout(pair).record_size, info.shape[0], info.part)
    return out


def weight_buffers(stored: Iterable[tuple[TensorInfo, Assignment]], run: Run, packed: bool = True) -> list[Buffer]:
    """One buffer for each array of a dense tensor. A layer's routed experts are one buffer: records, padded as
    they are in a pack; or, not `packed`, one for each of the two stacks."""
    stored = list(stored)
    out = [
        Buffer(name, info.part, part.nbytes, part.shape, part.dtype)
        for info, how in stored
        if is_held(info, run) and not (packed and info.is_experts)
        for name, part in _held(info, how)
    ]
    if packed:
        for prefix, (record, count, part) in expert_records(stored, run).items():
            out.append(Buffer(prefix, part, record * count))
    return out


def _held(info: TensorInfo, how: Assignment) -> Iterable[tuple[str, Part]]:
    if info.is_experts:
        return [(info.name, Part("codes", info.dtype, info.shape))]
    return held_parts(info, how).items()


def run_buffers(config: ModelConfig, codes: Codes, run: Run) -> list[Buffer]:
    """What a run holds beside weights: `run.sequences` states, the workspace (an estimate), and the runtime's own
    memory (a measured constant)."""
    shapes = state_shapes(config, run)
    state = [
        Buffer(sequence_name(n, b.name), b.part, b.nbytes, b.shape, b.dtype)
        for n in range(run.sequences)
        for b in shapes
    ]
    space = Buffer("workspace", "workspace", workspace(config, codes, run.chunk, run.ctx))
    return [*state, space, Buffer("runtime", "runtime", RUNTIME)]


def list_buffers(config: ModelConfig, stored: Iterable[tuple[TensorInfo, Assignment]], run: Run) -> list[Buffer]:
    """Every buffer of a run of a pack, all of its experts included."""
    stored = list(stored)
    return [*weight_buffers(stored, run), *run_buffers(config, Codes.of(stored), run)]


def sequence_name(number: int, name: str) -> str:
    """The name of a buffer of sequence `number`."""
    return f"sequence {number}: {name}"


def totals(buffers: Iterable[Buffer]) -> dict[str, int]:
    """Bytes by printed part: dense, routed, kv, state (with checkpoints), vision, mtp, workspace, runtime, total."""
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
