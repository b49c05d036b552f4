"""Triton: attention over a KV cache, split over the cache, and the pieces put together; the row a token adds to it.

Rows of a program are pairs of a query token and one of the query heads that share a key head: with 16 of them a
decoded token fills a tensor core's tile. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.codes import scale_of


@triton.jit
def store_row(k, v, keys, values, k_scales, v_scales, place, GROUPS, D: tl.constexpr, KIND: tl.constexpr):
    """k, v f32 [Hkv, D] to row `place` int64 [1] of the caches [ctx, Hkv, D]: float32 (0), the bits of bfloat16 as
    uint16 (1), or int8 with float16 scales [ctx, Hkv] (2), encoded as `ref` does. Programs: key heads, k and v.
    """
    group = tl.program_id(0)
    at = tl.load(place) * GROUPS + group
    d = tl.arange(0, D)
    if tl.program_id(1) == 0:
        x = tl.load(k + group * D + d)
        store_values(x, keys, k_scales, at, d, D, KIND)
    else:
        x = tl.load(v + group * D + d)
        store_values(x, values, v_scales, at, d, D, KIND)


@triton.jit
def store_values(x, codes, scales, at, d, D: tl.constexpr, KIND: tl.constexpr):
    """x f32 [D] as row `at` of one cache."""
    if KIND == 0:
        tl.store(codes + at * D + d, x)
    elif KIND == 1:
        # By its bits, for the interpreter's bfloat16 is not to be trusted: to nearest, ties to even.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(codes + at * D + d, tl.where(x != x, 0x7FC0, bits).to(tl.uint16))
    else:
        scale = tl.minimum(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), 65504.0).to(tl.float16)
        step = scale.to(tl.float32)
        # Adding 1.5 * 2^23 leaves no bits behind the point: rounded to nearest, ties to even.
        code = tl.div_rn(x, tl.where(step > 0, step, 1.0)) + 12582912.0 - 12582912.0
        code = tl.where(step > 0, tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
        tl.store(codes + at * D + d, code.to(tl.int8))
        tl.store(scales + at, scale.to(tl.uint16, bitcast=True))


@triton.jit
def split_of(place, SPLITS, LEAST: tl.constexpr):
    """(Rows 0..place of a cache: how many; the positions of each of at most SPLITS splits.) Few have LEAST each."""
    length = (tl.load(place) + 1).to(tl.int32)
    return length, tl.maximum((length + SPLITS - 1) // SPLITS, LEAST)


@triton.jit
def attend_part(q, k, v, k_scales, v_scales, parts, mixed, place, scale, T, S, PER_SPLIT, GROUPS, SHARED: tl.constexpr,
                INT8: tl.constexpr, LEAST: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr,
                BS: tl.constexpr):  # fmt: skip
    """q OPERAND [T, Hq, D], k, v [S, Hkv, D] (INT8: with float16 scales [S, Hkv]) -> per row and split its largest
    score and sum of weights, parts f32 [splits, T * Hq, 2], and what the weights mix, mixed f32 [splits, T * Hq, D].

    Row m of a group is token m // SHARED, head m % SHARED. Programs: blocks of BM rows, key heads, splits of
    PER_SPLIT positions. With LEAST, S and PER_SPLIT follow from `place` (see `split_of`), and splits behind do nothing.
    """
    if LEAST:
        S, PER_SPLIT = split_of(place, tl.num_programs(2), LEAST)
    group, split = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    real = m < T * SHARED
    token = m // SHARED
    row = token * (GROUPS * SHARED) + group * SHARED + m % SHARED
    d = tl.arange(0, D)
    query = tl.load(q + row[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    position = S - T + token
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
        if LEAST:  # one token, which sees all there is
            scores = tl.where(there[None, :], scores, float("-inf"))
        else:
            scores = tl.where(there[None, :] & (s[None, :] <= position[:, None]), scores, float("-inf"))
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
    if first < S:
        before = split.to(tl.int64) * (T * GROUPS * SHARED)
        parts += before * 2
        mixed += before * D
        tl.store(parts + row * 2, top, mask=real)
        tl.store(parts + row * 2 + 1, total, mask=real)
        tl.store(mixed + row[:, None] * D + d[None, :], acc, mask=real[:, None])


@triton.jit
def join_parts(parts, mixed, out, place, ROWS, SPLITS, LEAST: tl.constexpr, MOST: tl.constexpr, D: tl.constexpr,
               SLICE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out f32 [ROWS, D] of what `attend_part` left, at most MOST splits (a power of two), BLOCK of them read at a time.
    Programs: rows, slices of D."""
    if LEAST:
        length, per_split = split_of(place, SPLITS, LEAST)
        SPLITS = (length + per_split - 1) // per_split
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    split = tl.arange(0, MOST)
    at = (split * ROWS + r) * 2
    tops = tl.load(parts + at, mask=split < SPLITS, other=float("-inf"))
    most = tl.max(tops, 0)
    total = tl.sum(tl.exp(tops - most) * tl.load(parts + at + 1, mask=split < SPLITS, other=0.0), 0)
    acc = tl.zeros([SLICE], tl.float32)
    for start in range(0, SPLITS, BLOCK):
        few = start + tl.arange(0, BLOCK)
        there = few < SPLITS
        place_of = few * ROWS + r
        by = tl.exp(tl.load(parts + place_of * 2, mask=there, other=float("-inf")) - most)
        piece = tl.load(mixed + place_of[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(by[:, None] * piece, 0)
    tl.store(out + r * D + d, acc / total)
