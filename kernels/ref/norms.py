"""RMS norms in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6, zero_centred: bool = True) -> Tensor:
    """See `qwenrun.kernels.ops.rms_norm`."""
    x32 = x.float()
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    scale = w.float() + 1 if zero_centred else w.float()
    return (y * scale).to(x.dtype)


def gated_rms_norm(o: Tensor, w: Tensor, z: Tensor, eps: float = 1e-6) -> Tensor:
    """See `qwenrun.kernels.ops.gated_rms_norm`."""
    return rms_norm(o, w, eps, zero_centred=False) * F.silu(z.float()).to(o.dtype)
