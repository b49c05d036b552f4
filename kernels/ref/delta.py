"""The gated delta rule, one token at a time and by chunks, and the causal convolution before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
L2_EPS = 1e-6


def conv(u: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.conv`."""
    taps = weight.float()
    window = torch.cat([state.to(u.dtype), u])  # [K-1 + T, C]
    out = window.float().unfold(0, taps.shape[1], 1).mul(taps).sum(-1)
    state.copy_(window[window.shape[0] - state.shape[0] :])
    return F.silu(out).to(u.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.delta_rule`."""
    dtype = v.dtype
    repeat = v.shape[1] // k.shape[1]
    # [nv, T, d], a key head repeated for the value heads it serves.
    q, k = (_unit(x.float()).transpose(0, 1).repeat_interleave(repeat, dim=0) for x in (q, k))
    q = q * k.shape[-1] ** -0.5
    v, g, beta = v.float().transpose(0, 1), g.T, beta.T
    if v.shape[1] == 1:
        out = _step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)[:, None]
    else:
        out = _chunked(q, k, v, g, beta, state)
    return out.transpose(0, 1).to(dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [nv, dk], v [nv, dv], g, beta [nv]; the state decays, is corrected, then read."""
    state.mul_(g.exp()[:, None, None])
    delta = beta[:, None] * (v - torch.einsum("hk,hkv->hv", k, state))
    state.baddbmm_(k[:, :, None], delta[:, None, :])
    return torch.einsum("hk,hkv->hv", q, state)


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """T tokens, CHUNK at a time: q, k [nv, T, dk], v [nv, T, dv], g, beta [nv, T].

    Inside a chunk the corrections solve a unit lower triangular system; only exponents <= 0 are taken, so
    nothing can overflow. One chunk's matrices are alive at a time.
    """
    outs = []
    for start in range(0, v.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        qc, kc, vc, bc = q[:, part], k[:, part], v[:, part], beta[:, part, None]
        total = g[:, part].cumsum(-1)
        size = total.shape[-1]
        decay = (total[:, :, None] - total[:, None, :]).tril().exp().tril()
        system = torch.eye(size, device=v.device) + (bc * (kc @ kc.transpose(1, 2)) * decay).tril(-1)
        carried = total.exp()[..., None]
        right = torch.cat([bc * vc, bc * carried * kc], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        values = solved[..., : vc.shape[-1]] - solved[..., vc.shape[-1] :] @ state
        outs.append(carried * (qc @ state) + ((qc @ kc.transpose(1, 2)) * decay) @ values)
        last = total[:, -1:, None]
        keys = (last - total[..., None]).exp() * kc
        state.mul_(last.exp()).baddbmm_(keys.transpose(1, 2), values)
    return torch.cat(outs, dim=1)
