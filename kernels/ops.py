"""The public ops: what a machine can compute for this model, tensors in, tensors out.

Shape letters: T tokens (queries), S cached positions, H hidden size, N rows and K columns of a matrix,
E experts, I expert width, k experts per token, Hq and Hkv query and key heads of D numbers, nk and nv key and
value heads of the delta rule with dk and dv numbers, C convolution channels, R rotary dimensions.

Each function here asks `dispatch` for the backend on every call, which is right for tools and tests. A hot
path calls `bind` once and keeps what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qwenrun.kernels.dispatch import pick
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

# Ops that are given weights and give back the callable that computes: how many arguments are theirs.
FACTORIES = {"linears": 3, "swiglu": 3, "moe_entry": 8}
# Codes, scales, and if there are tensor scales: what `fit` can search for.
SEARCHED = {("int4", "f16", False), ("int8", "f16", False), ("e2m1", "e4m3", True)}

OPS = (
    "encode",
    "decode",
    "fit",
    "linear",
    "linears",
    "swiglu",
    "moe_entry",
    "embedding",
    "experts",
    "router",
    "largest",
    "attention",
    "decode_attention",
    "rope_tables",
    "apply_rope",
    "delta_rule",
    "delta_net",
    "conv",
    "rms_norm",
    "gated_rms_norm",
)


def bind(op: str, device: str = "cpu", spec: BlockSpec | None = None) -> Callable[..., Any]:
    """The callable that computes `op` there, to be kept: no choice is made when it is called."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(OPS)}")
    return pick(op, device, spec)


def encode(
    values: Tensor,
    spec: BlockSpec,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    tensor_scales: int = 1,
) -> Weight:
    """Round a matrix onto the codes of `spec`.

    values: float32 [..., N, K]. scales: as `spec` stores them, [..., N, K / block]; zeros: uint8 0..15 of the
    same shape; tensor_scale: float32 [..., T]. What is not given follows from the largest magnitudes of each
    block (and of each of `tensor_scales` groups of rows). Codes saturate; ties round to even; a block whose
    scale is zero becomes zero. Raises ValueError where the block does not divide K.
    """
    return pick("encode", values.device.type, spec)(values, spec, scales, zeros, tensor_scale, tensor_scales)


def decode(weight: Weight) -> Tensor:
    """The values of an encoded matrix: float32 [..., N, K]."""
    return pick("decode", weight.codes.device.type, weight.spec)(weight)


def fit(
    values: Tensor,
    spec: BlockSpec,
    trials: Sequence[tuple[float, float]],
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Weight, Tensor]:
    """Encode a matrix with the scales that, of those tried, leave the least squared error in each block.

    values: float32 [N, K], finite. spec: int4 or int8 with float16 scales, or e2m1 with E4M3 scales and, then,
    tensor_scale: float32 [T]. importance: float32 [K], finite and above 0: what an error in each column counts (the
    mean square of what is multiplied with it, say); all the same by default.

    trials: for integers pairs (c, s): the scale that puts a block's largest magnitude at code c, times s (below 1 the
    largest values are clipped and the rest is finer); with c < 0 its sign is the one that puts the extreme value
    there; with zero points and c > 8 it is the range from the smallest to the largest value that has c steps. The
    best is improved by least squares. For e2m1 (steps, 0): E4M3 codes counted from the plain rule's, in whole numbers.
    The plain rule (`encode`) is always tried.

    Returns the weight and float32 [N], the sum of each row's squared errors. The bits are the same on every machine.
    Raises ValueError for a spec that has no search, a block that does not divide K, or other shapes than these.
    """
    if (spec.codes, spec.scale, spec.tensor_scale) not in SEARCHED:
        raise ValueError(f"no search for scales of {spec.codes} with scales {spec.scale!r}")
    if spec.tensor_scale != (tensor_scale is not None):
        raise ValueError(
            f"{spec.codes} needs tensor scales" if spec.tensor_scale else f"{spec.codes} has no tensor scale"
        )
    if importance is not None and importance.shape != values.shape[1:]:
        raise ValueError(f"importance of {list(importance.shape)} columns for values {list(values.shape)}")
    return pick("fit", values.device.type, spec)(values, spec, trials, tensor_scale, importance)


def linear(x: Tensor, w: Weight) -> Tensor:
    """x [T, K] times a matrix [N, K] transposed: [T, N] in x's dtype, accumulated in float32."""
    return pick("linear", x.device.type, w.spec)(x, w)


def linears(
    weights: Sequence[Weight], norm: Tensor | None = None, eps: float = 1e-6
) -> Callable[[Tensor], list[Tensor]]:
    """Several matrices [N_i, K] that read the same input, as one callable: x [T, K] -> [T, N_i] each, in x's dtype.

    norm [K]: what they read is the (zero-centred) `rms_norm` of x with it. What can be known of the matrices is
    settled here, once; the callable keeps them.
    """
    return pick("linears", weights[0].codes.device.type)(weights, norm, eps)


def swiglu(gate: Weight, up: Weight, down: Weight) -> Callable[[Tensor], Tensor]:
    """down(silu(gate x) * up x) as one callable: x [T, H] -> [T, H]; gate, up [I, H], down [H, I]."""
    return pick("swiglu", gate.codes.device.type)(gate, up, down)


def moe_entry(
    norm: Tensor, eps: float, router: Weight, k: int, gate: Weight, up: Weight, down: Weight, shared_gate: Weight
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A mixture-of-experts layer from the mixer's result y to its routed experts, as one callable of x, y [T, H].

    norm [H], router [E, H], gate and up [I, H], down [H, I], shared_gate [1, H]. Gives the residual stream
    s = x + y; n = rms_norm(s), which the routed experts read; `router`'s index [T, k] and weight [T, k]; and what
    they are added to, s + sigmoid(shared_gate n) swiglu(n).
    """
    return pick("moe_entry", norm.device.type)(norm, eps, router, k, gate, up, down, shared_gate)


def embedding(ids: Tensor, w: Weight) -> Tensor:
    """Rows `ids` (int64 [T]) of a matrix [V, H]: float32 [T, H]. Only those rows are decoded."""
    return pick("embedding", ids.device.type, w.spec)(ids, w)


def experts(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    index: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    distinct: int = 0,
) -> Tensor:
    """The weighted sum of the chosen experts' `down(silu(gate(x)) * up(x))`: [T, H] in x's dtype.

    x [T, H]; gate_up [E, 2I, H], the gate's rows first; down [E, H, I]; index int64 [T, k], the chosen
    experts; weight float32 [T, k]; base float32 [T, H], to which the sum is added. Experts that nobody chose are
    not touched. distinct: where the stack holds more than one layer's, how many of them there are to choose from; it
    changes no result, but how a backend lays out its work.

    A row's result does not depend on the other rows of the call, and the k weighted results of a token are
    rounded to float32 and added in the order of `index`: computing the pairs in several calls with k = 1 and
    adding them in that order gives the same bits.
    """
    return pick("experts", x.device.type, gate_up.spec)(x, gate_up, down, index, weight, base, distinct)


def sum_in_order(rows: Tensor) -> Tensor:
    """The sum of [T, k, H] over k, its addends in order: the same bits however the rows were computed."""
    out = rows[:, 0].clone()
    for j in range(1, rows.shape[1]):
        out += rows[:, j]
    return out


def router(x: Tensor, gate: Weight, k: int) -> tuple[Tensor, Tensor]:
    """The top k of softmax(gate x) over all experts in float32, renormalised to sum 1.

    x [T, H], gate [E, H] -> index int64 [T, k], weight float32 [T, k], the largest first.
    """
    return pick("router", x.device.type)(x, gate, k)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of x float32 [V] (all, if there are fewer): values float32 and places int64.

    The largest comes first, of equal ones the lower place. What is no number counts as the largest.
    """
    return pick("largest", x.device.type)(x, count)


def attention(q: Tensor, k: Tensor | Weight, v: Tensor | Weight, scale: float) -> Tensor:
    """Causal grouped-query attention over a cache: [T, Hq, D] in q's dtype, softmax in float32.

    q [T, Hq, D]; k, v [S, Hkv, D], bfloat16 or float32, or stacks of S matrices [Hkv, D] of int8 with one block a
    row; S >= T; query t stands at position S - T + t. Query head h reads key head
    h // (Hq / Hkv). Memory for scores is bounded, whatever S is.
    """
    return pick("attention", q.device.type)(q, k, v, scale)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | Weight, values: Tensor | Weight, place: Tensor, scale: float
) -> Tensor:
    """`attention` of one token whose place only the device knows: [1, Hq, D] in q's dtype.

    k, v float32 [1, Hkv, D] are written to row `place` (int64 [1]) of the caches keys and values [ctx, Hkv, D],
    bfloat16, float32 or stacks of int8 matrices as in `attention`, and q [1, Hq, D] attends to rows 0..place. What
    rows behind hold plays no part. Nothing is asked of the host, so a graph may hold this call.
    """
    return pick("decode_attention", q.device.type)(q, k, v, keys, values, place, scale)


def rope_tables(
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    mrope_section: tuple[int, ...] | None = None,
    yarn: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, R / 2], of frequencies theta^(-2j / R).

    positions: int64 [T] (text), or [3, T] (time, height, width) with `mrope_section`: slot j turns with axis
    j mod 3, axes 1 and 2 only while j < 3 * section. yarn: (factor, original context length), which scales
    the frequencies and multiplies both tables by 0.1 ln(factor) + 1 (arXiv 2309.00071).
    """
    return pick("rope_tables", positions.device.type)(positions, theta, rotary_dim, mrope_section, yarn)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of x [T, heads, D], pairs (j, j + R / 2); the rest passes through."""
    return pick("apply_rope", x.device.type)(x, cos, sin)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """The gated delta rule over T tokens: [T, nv, dv] in v's dtype; `state` is updated in place.

    q, k [T, nk, dk], raw: they are made unit vectors here (epsilon 1e-6 inside the root), q also divided by
    sqrt(dk). v [T, nv, dv]; g float32 [T, nv], the log of the decay, <= 0; beta float32 [T, nv]; state
    float32 [nv, dk, dv]. Value head h uses key head h // (nv / nk). Per token:
    S = exp(g) S; S += k (beta (v - S^T k))^T; o = S^T q (Gated DeltaNet, arXiv 2412.06464).
    """
    return pick("delta_rule", v.device.type)(q, k, v, g, beta, state)


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
    """A Gated DeltaNet layer between its projections: [T, nv * dv]; both states are updated in place.

    qkv [T, C], channels [q | k | v]; z [T, nv * dv]; b, a [T, nv]; conv_weight [C, taps], conv_state [taps - 1, C];
    decay [nv], -exp(A_log); dt_bias [nv]; norm [dv]; state [nv, dk, dv]. All float32: `conv`, then `delta_rule`
    with beta = sigmoid(b) and g = decay softplus(a + dt_bias), then `gated_rms_norm` with z.
    """
    pass_on = (qkv, z, b, a, conv_weight, conv_state, decay, dt_bias, norm, eps, state)
    return pick("delta_net", qkv.device.type)(*pass_on)


def conv(u: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """silu of the causal depthwise convolution of u [T, C]: [T, C]; `state` is updated in place.

    weight [C, taps], the last tap on the current token; state [taps - 1, C], the raw rows before u.
    """
    return pick("conv", u.device.type)(u, weight, state)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6, zero_centred: bool = True) -> Tensor:
    """x / rms(x) * (1 + w) over the last dimension (times w alone if not zero_centred), in float32, one cast."""
    return pick("rms_norm", x.device.type)(x, w, eps, zero_centred)


def gated_rms_norm(o: Tensor, w: Tensor, z: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm of o [T, nv, dv] with the plain weight w [dv], then times silu(z), z as o."""
    return pick("gated_rms_norm", o.device.type)(o, w, z, eps)
