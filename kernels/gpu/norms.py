"""Triton: norms, and the sum before one. Knows no torch."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.rounded import store_rounded


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


@triton.jit
def add_norm(x, y, w, stream, normed, codes, steps, eps, SIZE, ADDS: tl.constexpr, FOR: tl.constexpr,
             WHOLE: tl.constexpr):  # fmt: skip
    """One row: stream f32 [SIZE] is x + y (with ADDS, else x is), normed its zero-centred norm; that rounded for codes
    of the kind FOR too (codes int8, steps f32), unless that is -1. WHOLE: SIZE or the next power of two. One program.
    """
    at = tl.arange(0, WHOLE // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = at < SIZE
    v = tl.load(x + at, mask=mask, other=0.0)
    by = tl.load(w + at, mask=mask, other=0.0) + 1.0
    if ADDS:
        v += tl.load(y + at, mask=mask, other=0.0)
        tl.store(stream + at, v, mask=mask)
    v *= by * (1.0 / tl.sqrt(tl.sum(tl.sum(v * v, 1), 0) / SIZE + eps))
    tl.store(normed + at, v, mask=mask)
    if FOR >= 0:
        store_rounded(v, at, codes, steps, SIZE, FOR)
