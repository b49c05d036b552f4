"""Triton: attention over a KV cache, split over the cache, and the pieces put together.

Rows of a program are pairs of a query token and one of the query heads that share a key head: with 16 of them a
decoded token fills a tensor core's tile. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.decode import scale_of


@triton.jit
def attend_part(q, k, v, k_scales, v_scales, parts, mixed, scale, T, S, PER_SPLIT, GROUPS, SHARED: tl.constexpr,
                INT8: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr,
                BS: tl.constexpr):  # fmt: skip
    """q f32 [T, Hq, D], k, v [S, Hkv, D] (INT8: with float16 scales [S, Hkv]) -> per row and split its largest score
    and sum of weights, parts f32 [splits, T * Hq, 2], and what the weights mix, mixed f32 [splits, T * Hq, D].

    Row m of a group is token m // SHARED, head m % SHARED. Programs: blocks of BM rows, key heads, splits of
    PER_SPLIT positions.
    """
    group, split = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    real = m < T * SHARED
    token = m // SHARED
    row = token.to(tl.int64) * (GROUPS * SHARED) + group * SHARED + m % SHARED
    d = tl.arange(0, D)
    query = tl.load(q + row[:, None] * D + d[None, :], mask=real[:, None], other=0.0).to(OPERAND)
    place = S - T + token
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, S)
    # No row of this block sees beyond its last token.
    seen = tl.minimum(last, S - T + (tl.program_id(0) * BM + BM - 1) // SHARED + 1)
    for start in range(first, seen, BS):
        s = start + tl.arange(0, BS)
        there = s < last
        at = s.to(tl.int64) * GROUPS + group
        key = tl.load(k + at[None, :] * D + d[:, None], mask=there[None, :], other=0).to(tl.float32)
        scores = tl.dot(query, key.to(OPERAND)) * scale
        if INT8:
            scores *= scale_of(tl.load(k_scales + at, mask=there, other=0), 0)[None, :]
        scores = tl.where(there[None, :] & (s[None, :] <= place[:, None]), scores, float("-inf"))
        most = tl.maximum(top, tl.max(scores, 1))
        # A row that sees nothing yet has no maximum to take off.
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp(scores - base[:, None])
        less = tl.exp(top - base)
        total = total * less + tl.sum(weight, 1)
        value = tl.load(v + at[:, None] * D + d[None, :], mask=there[:, None], other=0).to(tl.float32)
        if INT8:
            weight *= scale_of(tl.load(v_scales + at, mask=there, other=0), 0)[None, :]
        acc = tl.dot(weight.to(OPERAND), value.to(OPERAND), acc * less[:, None])
        top = most
    at = (split * T * GROUPS * SHARED + row) * 2
    tl.store(parts + at, top, mask=real)
    tl.store(parts + at + 1, total, mask=real)
    tl.store(mixed + (at // 2)[:, None] * D + d[None, :], acc, mask=real[:, None])


@triton.jit
def join_parts(parts, mixed, out, ROWS, SPLITS, D: tl.constexpr):
    """out f32 [ROWS, D] of what `attend_part` left. Programs: rows."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    most = float("-inf")
    for split in range(SPLITS):
        most = tl.maximum(most, tl.load(parts + (split * ROWS + r) * 2))
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for split in range(SPLITS):
        at = split * ROWS + r
        by = tl.exp(tl.load(parts + at * 2) - most)
        total += by * tl.load(parts + at * 2 + 1)
        acc += by * tl.load(mixed + at * D + d)
    tl.store(out + r * D + d, acc / total)
