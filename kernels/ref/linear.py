"""Products with encoded matrices: linear, embedding, routed experts.

Weights are decoded row block by row block, so that the float32 copy alive at a time stays small however
large the matrix is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.ops import sum_in_order
from qwenrun.kernels.ref.codec import decode
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


def embedding(ids: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.embedding`."""
    group = w.spec.group
    parts = {name: t if name == "tensor_scale" else t[ids // group] for name, t in w.parts.items()}
    rows = decode(Weight(w.spec, len(ids) * group, w.cols, **parts))
    return rows.unflatten(0, (-1, group))[torch.arange(len(ids), device=ids.device), ids % group]


def experts(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    index: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    distinct: int = 0,
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
