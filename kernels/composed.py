"""Ops that are several others in a row, for backends that have no kernel of their own for the whole.

Each takes first the backend's package, whose simpler ops it calls. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.weight import Weight


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice of a router from its logits f32 [T, E]: index, and renormalised weight."""
    weight, index = logits.softmax(-1).topk(k, dim=-1)
    return index, weight / weight.sum(-1, keepdim=True)


def router(own: Any, x: Tensor, gate: Weight, k: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.router`."""
    return top_k(own.linear(x.float(), gate), k)


def linears(
    own: Any, weights: Sequence[Weight], norm: Tensor | None = None, eps: float = 1e-6
) -> Callable[[Tensor], list[Tensor]]:
    """See `qwenrun.kernels.ops.linears`."""

    def apply(x: Tensor) -> list[Tensor]:
        read = x if norm is None else own.rms_norm(x, norm, eps)
        return [own.linear(read, w) for w in weights]

    return apply


def swiglu(own: Any, gate: Weight, up: Weight, down: Weight) -> Callable[[Tensor], Tensor]:
    """See `qwenrun.kernels.ops.swiglu`."""
    return lambda x: own.linear(F.silu(own.linear(x, gate)).mul_(own.linear(x, up)), down)


def moe_entry(
    own: Any,
    norm: Tensor,
    eps: float,
    router: Weight,
    k: int,
    gate: Weight,
    up: Weight,
    down: Weight,
    shared_gate: Weight,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See `qwenrun.kernels.ops.moe_entry`."""
    shared = own.swiglu(gate, up, down)

    def apply(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        stream = x + y
        normed = own.rms_norm(stream, norm, eps)
        index, weight = own.router(normed, router, k)
        base = torch.addcmul(stream, torch.sigmoid(own.linear(normed, shared_gate)), shared(normed))
        return stream, normed, index, weight, base

    return apply


def delta_net(
    own: Any,
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
    (value_heads, dk, dv), tokens = state.shape, qkv.shape[0]
    values = value_heads * dv
    keys = (qkv.shape[1] - values) // 2
    q, k, v = own.conv(qkv, conv_weight, conv_state).split([keys, keys, values], dim=1)
    g, beta = decay * F.softplus(a + dt_bias), torch.sigmoid(b)
    heads = (q.view(tokens, -1, dk), k.view(tokens, -1, dk), v.view(tokens, -1, dv))
    out = own.delta_rule(*heads, g, beta, state)
    return own.gated_rms_norm(out, norm, z.view(tokens, -1, dv), eps).reshape(tokens, -1)
