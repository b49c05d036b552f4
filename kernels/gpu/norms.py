"""Triton: norms. Knows no torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, w, z, out, shift, eps, SIZE, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """out f32 [rows, SIZE]: x / rms(x) * (w + shift), and with GATED times silu(z). Programs: rows."""
    r = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + r * SIZE + at, mask=at < SIZE, other=0.0)
        total += v * v
    by = 1.0 / tl.sqrt(tl.sum(total, 0) / SIZE + eps)
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < SIZE
        v = tl.load(x + r * SIZE + at, mask=mask, other=0.0) * by
        v *= tl.load(w + at, mask=mask, other=0.0) + shift
        if GATED:
            gate = tl.load(z + r * SIZE + at, mask=mask, other=0.0)
            v *= gate / (1.0 + tl.exp(-gate))
        tl.store(out + r * SIZE + at, v, mask=mask)
