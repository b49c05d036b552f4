"""Products with encoded matrices: linear, embedding, routed experts, router.

Weights are decoded row block by row block, so that the float32 copy alive at a time stays small however
large the matrix is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.ops import sum_in_order
from qwenrun.kernels.ref.codec import decode
from qwenrun.kernels.ref.norms import rms_norm
from qwenrun.kernels.spec import TILE_ROWS
from qwenrun.kernels.weight import Weight

# Values decoded at a time: 8M float32 are 32 MiB, and as much again for the steps of decoding.
DECODE_VALUES = 8 << 20


def linear(x: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.linear`."""
    if w.spec.codes == "f32":
        return F.linear(x.float(), w.codes).to(x.dtype)
    step = max(TILE_ROWS, DECODE_VALUES // w.cols // TILE_ROWS * TILE_ROWS)
    if w.rows <= step:
        return F.linear(x.float(), decode(w)).to(x.dtype)
    blocks = [w.row_range(r, min(r + step, w.rows)) for r in range(0, w.rows, step)]
    return torch.cat([F.linear(x.float(), decode(block)) for block in blocks], dim=-1).to(x.dtype)


def linears(
    weights: Sequence[Weight], norm: Tensor | None = None, eps: float = 1e-6
) -> Callable[[Tensor], list[Tensor]]:
    """See `qwenrun.kernels.ops.linears`."""

    def apply(x: Tensor) -> list[Tensor]:
        read = x if norm is None else rms_norm(x, norm, eps)
        return [linear(read, w) for w in weights]

    return apply


def swiglu(gate: Weight, up: Weight, down: Weight) -> Callable[[Tensor], Tensor]:
    """See `qwenrun.kernels.ops.swiglu`."""
    return lambda x: linear(F.silu(linear(x, gate)).mul_(linear(x, up)), down)


def moe_entry(
    norm: Tensor, eps: float, router: Weight, k: int, gate: Weight, up: Weight, down: Weight, shared_gate: Weight
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See `qwenrun.kernels.ops.moe_entry`."""
    shared = swiglu(gate, up, down)

    def apply(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        stream = x + y
        normed = rms_norm(stream, norm, eps)
        index, weight = top_k(linear(normed, router), k)
        base = torch.addcmul(stream, torch.sigmoid(linear(normed, shared_gate)), shared(normed))
        return stream, normed, index, weight, base

    return apply


def embedding(ids: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.embedding`."""
    group = w.spec.group
    parts = {name: t if name == "tensor_scale" else t[ids // group] for name, t in w.parts.items()}
    rows = decode(Weight(w.spec, len(ids) * group, w.cols, **parts))
    return rows.unflatten(0, (-1, group))[torch.arange(len(ids), device=ids.device), ids % group]


def router(x: Tensor, gate: Weight, k: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.router`."""
    return top_k(linear(x.float(), gate), k)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice of a router from its logits f32 [T, E]: index, and renormalised weight."""
    weight, index = logits.softmax(-1).topk(k, dim=-1)
    return index, weight / weight.sum(-1, keepdim=True)


def experts(
    x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor, base: Tensor | None = None
) -> Tensor:
    """See `qwenrun.kernels.ops.experts`."""
    tokens, k = index.shape
    flat, weights = index.flatten(), weight.flatten()
    order = flat.argsort(stable=True)
    chosen, counts = flat.unique(return_counts=True)
    rows = torch.empty(tokens * k, down.rows, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in zip(chosen.tolist(), counts.tolist()):
        pairs = order[start : start + count]
        hidden = _swiglu(linear(x[pairs // k].float(), gate_up[expert]))
        rows[pairs] = linear(hidden, down[expert]) * weights[pairs, None]
        start += count
    total = sum_in_order(rows.view(tokens, k, -1))
    return (total if base is None else total.add_(base)).to(x.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
