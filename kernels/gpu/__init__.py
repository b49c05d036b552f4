"""The backend for NVIDIA cards: Triton kernels that read weights as a pack stores them.

Triton itself is imported at the first call. With TRITON_INTERPRET=1 the kernels are interpreted on the CPU, for tests:
nothing chooses them there unless it is told to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from qwenrun.kernels import composed, ref
from qwenrun.kernels.dispatch import Backend
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PLAIN = ("bf16", "f32")


@cache
def _no_card() -> str:
    if find_spec("triton") is None:
        return "needs triton: pip install triton"
    if not INTERPRETED and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        return "needs an NVIDIA card of compute capability 8.0 or newer"
    return ""


def _refuses(op: str, spec: BlockSpec | None) -> str:
    if why := _no_card():
        return why
    if spec is None:
        return ""
    if op not in ("linear", "experts"):
        return ""
    if spec.tile or spec.codes in _PLAIN or (spec.codes == "int8" and spec.scale == "f16"):
        return ""
    return f"has no {op} for {spec.codes} row by row"


BACKEND = Backend(
    "gpu",
    priority=-1 if INTERPRETED else 20,
    devices=("cpu",) if INTERPRETED else ("cuda",),
    refuses=_refuses,
    # Of one token; a prompt's are bfloat16 on a card.
    rounds=("int4", "e2m1"),
    rounded_bits=16,
)


@cache
def _launch() -> ModuleType:
    from qwenrun.kernels.gpu import launch

    return launch


def linear(x: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.linear`. A matrix of a layer that it has no kernel for is the reference's."""
    if _refuses("linear", w.spec):
        return ref.linear(x, w)
    return _launch().product(x, w).to(x.dtype)


def experts(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    index: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    distinct: int = 0,
) -> Tensor:
    """See `qwenrun.kernels.ops.experts`. Those of many tokens that are not tiled are the reference's."""
    launch, specs = _launch(), (gate_up.spec, down.spec)
    if all(spec.tile for spec in specs):
        return launch.experts(x, gate_up, down, index, weight, base, distinct).to(x.dtype)
    if index.numel() <= launch.FEW_PAIRS and not any(spec.tile or _refuses("experts", spec) for spec in specs):
        return launch.few_plain(x, gate_up, down, index, weight, base).to(x.dtype)
    return ref.experts(x, gate_up, down, index, weight, base)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6, zero_centred: bool = True) -> Tensor:
    """See `qwenrun.kernels.ops.rms_norm`."""
    return _launch().rms_norm(x, w, eps, zero_centred).to(x.dtype)


def gated_rms_norm(o: Tensor, w: Tensor, z: Tensor, eps: float = 1e-6) -> Tensor:
    """See `qwenrun.kernels.ops.gated_rms_norm`."""
    return _launch().gated_rms_norm(o, w, z, eps).to(o.dtype)


def _served(
    k: Tensor | Weight, v: Tensor | Weight, size: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]] | None:
    """Keys and values, and the scales of int8 ones, if the kernels can read them."""
    if isinstance(k, Weight) and isinstance(v, Weight):
        if k.spec != v.spec or k.spec.codes != "int8" or k.spec.scale != "f16" or k.spec.block != k.cols:
            return None
        arrays, scales = (k.codes, v.codes), (k.scales, v.scales)
    else:
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        arrays, scales = (k, v), (None, None)
    whole = all(a is None or a.is_contiguous() for a in (*arrays, *scales))
    return (arrays, scales) if whole and size in _launch().HEAD_SIZES and arrays[1].shape[-1] == size else None


def attention(q: Tensor, k: Tensor | Weight, v: Tensor | Weight, scale: float) -> Tensor:
    """See `qwenrun.kernels.ops.attention`. What it has no kernel for is the reference's."""
    served = _served(k, v, q.shape[-1])
    if served is None:
        return ref.attention(q, k, v, scale)
    arrays, scales = served
    return _launch().attention(q, *arrays, *scales, scale).to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | Weight, values: Tensor | Weight, place: Tensor, scale: float
) -> Tensor:
    """See `qwenrun.kernels.ops.decode_attention`. What it has no kernel for is the reference's."""
    served = _served(keys, values, q.shape[-1])
    if served is None:
        return ref.decode_attention(q, k, v, keys, values, place, scale)
    return _launch().decode_attention(q, (k, v), *served, place, scale).to(q.dtype)


def rope_tables(
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    mrope_section: tuple[int, ...] | None = None,
    yarn: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.rope_tables`."""
    return _launch().rope_tables(positions, theta, rotary_dim, mrope_section, yarn)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.apply_rope`."""
    return _launch().apply_rope(x, cos, sin).to(x.dtype)


def router(x: Tensor, gate: Weight, k: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.router`."""
    launch, rows = _launch(), x.float()
    return launch.choose(linear(rows, gate) if _refuses("linear", gate.spec) else launch.exact_product(rows, gate), k)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.largest`. Many of them are the reference's."""
    launch = _launch()
    return launch.largest(x, count) if count <= launch.SORTED // 2 else ref.largest(x, count)


def conv(u: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.conv`."""
    return _launch().conv(u, weight, state).to(u.dtype)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.delta_rule`."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        return ref.delta_rule(q, k, v, g, beta, state)
    return _launch().delta_rule(q.float(), k.float(), v.float(), g.float(), beta.float(), state).to(v.dtype)


_OWN = sys.modules[__name__]


def linears(
    weights: Sequence[Weight], norm: Tensor | None = None, eps: float = 1e-6
) -> Callable[[Tensor], list[Tensor]]:
    """See `qwenrun.kernels.ops.linears`. One token's row is normed and split once for all."""
    many, rows = composed.linears(_OWN, weights, norm, eps), not any(_refuses("linear", w.spec) for w in weights)

    def apply(x: Tensor) -> list[Tensor]:
        if not rows or x.shape[0] > 1:
            return many(x)
        launch = _launch()
        row = launch.row(x) if norm is None else launch.add_norm(x, None, norm, eps, launch.kind_of(weights))[1]
        return [out.to(x.dtype) for out in launch.linears(row, weights)]

    return apply


def swiglu(gate: Weight, up: Weight, down: Weight) -> Callable[[Tensor], Tensor]:
    """See `qwenrun.kernels.ops.swiglu`."""
    many, rows = composed.swiglu(_OWN, gate, up, down), not any(_refuses("linear", w.spec) for w in (gate, up, down))

    def apply(x: Tensor) -> Tensor:
        if not rows or x.shape[0] > 1:
            return many(x)
        launch = _launch()
        return launch.row_swiglu(launch.row(x), gate, up, down).to(x.dtype)

    return apply


def moe_entry(
    norm: Tensor, eps: float, router: Weight, k: int, gate: Weight, up: Weight, down: Weight, shared_gate: Weight
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See `qwenrun.kernels.ops.moe_entry`."""
    many = composed.moe_entry(_OWN, norm, eps, router, k, gate, up, down, shared_gate)
    rows = not any(_refuses("linear", w.spec) for w in (router, gate, up, down, shared_gate))

    def apply(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not rows or x.shape[0] > 1:
            return many(x, y)
        return _launch().moe_entry(x, y, norm, eps, router, k, (gate, up, down), shared_gate)

    return apply


def delta_net(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    eps: float,
    state: Tensor,
) -> Tensor:
    """See `qwenrun.kernels.ops.delta_net`."""
    given = (qkv, z, b, a, conv_weight, conv_state, decay, dt_bias, norm, eps, state)
    kept = all(x.dtype == torch.float32 and x.is_contiguous() for x in (conv_state, state))
    return _launch().delta_net(*given) if kept and qkv.shape[0] == 1 else composed.delta_net(_OWN, *given)
