"""Triton: activations of a decoded token in 16 bits, for products with 4-bit codes that are sums of integers.

Every 16 columns have a step, their largest value's 32512th: a number is 256 high + low times it, both bytes. So a
product with codes is made by the instruction that multiplies four bytes by four and adds them, twice, and errs by some
2e-5 of a sum of random numbers; bfloat16 would err by 2e-3, 8 bits alone by 5e-3.

A row of K columns is 4 K / 8 words: of every word of codes the high bytes of four activations, of the other four, then
the low bytes, each K / 8 words together. Which four are which follows from how codes lie in a word (`byte_of`). Knows
no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def byte_of(column, K, KIND: tl.constexpr):
    """Where a column's high byte is among a row's bytes; its low byte is K bytes further."""
    j = column % 8
    if KIND == 2:  # looked up in the order of a word's bits: columns 0, 4, 1, 5, then 2, 6, 3, 7
        half, at = j % 4 // 2, j % 2 * 2 + j // 4
    else:
        half, at = j // 4, j % 4
    return (half * (K // 8) + column // 8) * 4 + at


@triton.jit
def store_rounded(v, column, codes, steps, K, KIND: tl.constexpr):
    """v f32 [blocks, 16], the columns `column` of one row, which begins at codes (bytes) and steps f32. Columns from K
    on are left out. A step has the unit of `codes.dot8` in it: 1/16 or 1/2."""
    most = tl.max(tl.abs(v), 1)
    number = tl.where(most > 1e-30, 32512.0 / most, 0.0)
    # Adding 1.5 * 2^23 leaves no bits behind the point.
    whole = (v * number[:, None] + 12582912.0 - 12582912.0).to(tl.int32)
    high = (whole + 128) >> 8
    at = byte_of(column, K, KIND)
    tl.store(codes + at, high.to(tl.int8), mask=column < K)
    tl.store(codes + K + at, (whole - high * 256).to(tl.int8), mask=column < K)
    unit: tl.constexpr = 1 / 32512 / (2 if KIND == 2 else 16)
    # What is no number makes the step none.
    block = tl.min(column, 1)
    tl.store(steps + block // 16, most * unit + tl.sum(v * 0.0, 1), mask=block < K)


@triton.jit
def round_rows(x, codes, steps, K, KIND: tl.constexpr, BLOCKS: tl.constexpr):
    """x f32 [T, K] -> codes int8 [T, 2 K], steps f32 [T, K / 16]. Programs: T, BLOCKS blocks of 16 columns."""
    t = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    v = tl.load(x + t * K + column, mask=column < K, other=0.0)
    store_rounded(v, column, codes + t * 2 * K, steps + t * (K // 16), K, KIND)
