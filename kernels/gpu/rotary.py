"""Triton: rotary positions. Knows no torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rope_tables(positions, frequencies, axes, cos, sin, gain, T, HALF: tl.constexpr, SIZE: tl.constexpr):
    """positions int64 [axes, T]; slot j turns by frequencies[j] a position of axis axes[j] -> cos, sin f32 [T, HALF].

    SIZE: HALF or the next power of two. Programs: T.
    """
    t = tl.program_id(0)
    j = tl.arange(0, SIZE)
    mask = j < HALF
    axis = tl.load(axes + j, mask=mask, other=0)
    place = tl.load(positions + axis * T + t, mask=mask, other=0).to(tl.float32)
    angle = place * tl.load(frequencies + j, mask=mask, other=0.0)
    tl.store(cos + t * HALF + j, tl.cos(angle) * gain, mask=mask)
    tl.store(sin + t * HALF + j, tl.sin(angle) * gain, mask=mask)


@triton.jit
def apply_rope(x, cos, sin, out, HEADS, D, HALF: tl.constexpr, SIZE: tl.constexpr):
    """x [T, HEADS, D] with pairs (j, j + HALF) turned, the rest as it is -> out. SIZE: D or the next power of two.

    Programs: T, HEADS.
    """
    t = tl.program_id(0).to(tl.int64)
    row = (t * HEADS + tl.program_id(1)) * D
    d = tl.arange(0, SIZE)
    mask = d < D
    first = d < HALF
    turned = d < 2 * HALF
    slot = tl.where(first, d, d - HALF)
    v = tl.load(x + row + d, mask=mask, other=0.0)
    other = tl.load(x + row + tl.where(first, d + HALF, d - HALF), mask=mask & turned, other=0.0)
    c = tl.load(cos + t * HALF + slot, mask=turned, other=1.0)
    s = tl.load(sin + t * HALF + slot, mask=turned, other=0.0)
    tl.store(out + row + d, v * c + tl.where(first, -other, other) * s, mask=mask)
