"""Triton: products with encoded matrices, as a pack stores them.

A tiled matrix is read as int32 words: word s of row r of a tile holds the columns 8s..8s+7, its bits 8j..8j+3 column
8s+j and its bits 8j+4..8j+7 column 8s+4+j. A tile's words lie step after step, 16 rows each, so that what a program
reads is one run of memory. One row of activations comes in 16 bits (`rounded`), many as tensor cores take them.

Knows no torch; `launch` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.codes import dot8, eight_int4, number, scale_of


@triton.jit
def zero_point(zeros, place, rows, mask):
    """The zero points f32 of tiled rows: byte r % 8 of a block's 8 has row r's in its low half for r < 8."""
    pair = tl.load(zeros + place * 8 + rows % 8, mask=mask, other=0).to(tl.int32)
    return tl.where(rows < 8, pair & 15, pair >> 4).to(tl.float32)


@triton.jit
def tile_sums(x, steps, codes, scales, zeros, tiles, lanes, there, first, last, K, KIND: tl.constexpr,
              SCALE: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
              STEPS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """f32 [ROWS]: row lanes[r] of tile tiles[r], if there[r], times one rounded row, x int32 and steps f32, over the
    words first..last-1."""
    lane = lanes[None, :]
    line = tiles[None, :] * (K // 8)
    acc = tl.zeros([STEPS, ROWS], tl.float32)
    for start in range(first, last, STEPS):
        step = start + tl.arange(0, STEPS)
        inside = step < last
        mask = inside[:, None] & there[None, :]
        word = tl.load(codes + (line + step[:, None]) * 16 + lane, mask=mask, other=0)
        place = tiles[None, :] * (K // BLOCK) + (step * 8 // BLOCK)[:, None]
        by = scale_of(tl.load(scales + place * 16 + lane, mask=mask, other=0), SCALE)
        a_high = tl.load(x + step, mask=inside, other=0)[:, None]
        b_high = tl.load(x + K // 8 + step, mask=inside, other=0)[:, None]
        a_low = tl.load(x + K // 4 + step, mask=inside, other=0)[:, None]
        b_low = tl.load(x + K // 8 * 3 + step, mask=inside, other=0)[:, None]
        unit = tl.load(steps + step // 2, mask=inside, other=0.0)[:, None]
        sums = dot8(word, a_high, b_high, a_low, b_low, KIND, ASSEMBLY).to(tl.float32)
        if ZERO:
            # A word of nines is one everywhere.
            ones = dot8(a_high * 0 - 0x66666667, a_high, b_high, a_low, b_low, KIND, ASSEMBLY).to(tl.float32)
            sums += (8.0 - zero_point(zeros, place, lane, mask)) * ones
        acc += sums * (by * unit)
    return tl.sum(acc, 0)


@triton.jit
def tensor_scale_of(scales, row, N, COUNT: tl.constexpr):
    """Of rows of a matrix with COUNT float32 scales of its own; 1 without any."""
    if COUNT == 0:
        return row.to(tl.float32) * 0.0 + 1.0
    else:
        return tl.load(scales + row * COUNT // N)


@triton.jit
def gemv_tiled(x, steps, codes, scales, zeros, tensor_scales, out, N, K, SHARE, KIND: tl.constexpr,
               SCALE: tl.constexpr, ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr,
               ASSEMBLY: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """One rounded row: out f32 [shares, N], the sums over each SHARE words. Programs: ROWS of N, shares."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, ROWS) % 16
    if ROWS < 16:
        lanes += tl.program_id(0) * ROWS % 16
    there = row < N
    share = tl.program_id(1)
    first = share * SHARE
    last = tl.minimum(first + SHARE, K // 8)
    sums = tile_sums(x, steps, codes, scales, zeros, row // 16, lanes, there, first, last, K, KIND, SCALE, ZERO,
                     BLOCK, ASSEMBLY, STEPS, ROWS)  # fmt: skip
    by = tensor_scale_of(tensor_scales, tl.minimum(row, N - 1), N, TENSOR)
    tl.store(out + share * N + row, sums * by, mask=there)


@triton.jit
def add_shares(parts, base, gate, out, N, SHARES: tl.constexpr, ONTO: tl.constexpr, BLOCK: tl.constexpr):
    """out f32 [N]: the sum of parts [SHARES, N], in order; with ONTO base + sigmoid(gate) times that, gate f32 [1].

    Programs: blocks of N.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(parts + share * N + at, mask=at < N, other=0.0)
    if ONTO:
        by = 1.0 / (1.0 + tl.exp(-tl.load(gate)))
        total = tl.load(base + at, mask=at < N, other=0.0) + by * total
    tl.store(out + at, total, mask=at < N)


@triton.jit
def columns(word, by, zero, KIND: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr, ASSEMBLY: tl.constexpr,
            OPERAND: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Words int32 [ROWS / R, 16 steps, R rows] as the numbers OPERAND [128, ROWS] that their codes stand for, times by
    f32 with SCALED; ZERO: int4 codes less zero f32. A word's eight lie side by side, as a thread writes them."""
    if ASSEMBLY and KIND == 0 and not SCALED:
        # -128 as bfloat16 is 0xC300, and numbers below 128 are its low bits.
        less = word * 0 + ((zero.to(tl.int32) if ZERO else 8) + 0xC300)
        less = (less << 16) | less
        a, b, c, d, e, f, g, h = eight_int4(word, less)
        ab, cd = tl.join(as_bf16(a), as_bf16(b)), tl.join(as_bf16(c), as_bf16(d))
        ef, gh = tl.join(as_bf16(e), as_bf16(f)), tl.join(as_bf16(g), as_bf16(h))
    else:
        ab = tl.join(column(word, 0, by, zero, KIND, SCALED, ZERO, OPERAND),
                     column(word, 1, by, zero, KIND, SCALED, ZERO, OPERAND))  # fmt: skip
        cd = tl.join(column(word, 2, by, zero, KIND, SCALED, ZERO, OPERAND),
                     column(word, 3, by, zero, KIND, SCALED, ZERO, OPERAND))  # fmt: skip
        ef = tl.join(column(word, 4, by, zero, KIND, SCALED, ZERO, OPERAND),
                     column(word, 5, by, zero, KIND, SCALED, ZERO, OPERAND))  # fmt: skip
        gh = tl.join(column(word, 6, by, zero, KIND, SCALED, ZERO, OPERAND),
                     column(word, 7, by, zero, KIND, SCALED, ZERO, OPERAND))  # fmt: skip
    # [tile, step, row, odd, second pair, upper four]
    all_ = tl.join(tl.join(ab, cd), tl.join(ef, gh))
    return tl.reshape(tl.permute(all_, (1, 5, 4, 3, 0, 2)), [128, ROWS])


@triton.jit
def as_bf16(bits):
    """int16 bits of bfloat16 numbers."""
    return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def column(word, J: tl.constexpr, by, zero, KIND: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr,
           OPERAND: tl.constexpr):  # fmt: skip
    """Column J of every word's eight: see `columns`."""
    value = number(word, 8 * (J % 4) + J // 4 * 4, KIND, 0 if ZERO else 8)
    if KIND == 0 and ZERO:
        value -= zero
    if SCALED:
        value *= by
    return value.to(OPERAND)


@triton.jit
def gemm_tiled(x, codes, scales, zeros, tensor_scales, out, sources, order, block_matrix, block_first, block_last, N, K,
               WIDTH, codes_step, scales_step, zeros_step, tensor_step, KIND: tl.constexpr, SCALE: tl.constexpr,
               ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Rows of activations, sorted by the matrix of a stack they are multiplied with: out f32 [rows, N].

    x [*, WIDTH], zero from column K on. Row p of the sorted ones is row sources[order[p]] of x and row order[p] of
    out. Program (b, n): the rows block_first[b]..block_last[b]-1, at most BM, and BN rows of matrix block_matrix[b];
    empty blocks do nothing.
    """
    b, n = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(block_first + b), tl.load(block_last + b)
    if first < last:
        matrix = tl.load(block_matrix + b)
        codes += matrix * codes_step
        scales += matrix * scales_step
        zeros += matrix * zeros_step
        p = first + tl.arange(0, BM)
        real = p < last
        pair = tl.load(order + p, mask=real, other=0)
        source = tl.load(sources + pair, mask=real, other=0)
        row = n * BN + tl.arange(0, BN)
        # Tile by tile, so that a warp's words are those of many steps, and what its threads write to shared memory at
        # once are runs in different banks; with scales of their own for few columns that takes too many registers.
        RUN: tl.constexpr = 16 if BLOCK == 128 else BN
        across = n * BN + tl.arange(0, BN // RUN)[:, None, None] * RUN + tl.arange(0, RUN)[None, None, :]
        tile, lane = (across // 16).to(tl.int64), across % 16
        i, there, real_rows = tl.arange(0, 16)[None, :, None], across < N, (row < N)[None, :]
        at = x + (source * WIDTH)[:, None] + tl.arange(0, 128)[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K // 8, 16):
            step = start + i
            # Behind the last word x is zero.
            mask = (step < K // 8) & there
            word = tl.load(codes + (tile * (K // 8) + step) * 16 + lane, mask=mask, other=0)
            rows = tl.load(at + start * 8, mask=real[:, None], other=0.0)
            # Of a block of 128 the products are of integers, exact in bfloat16, and the scale comes on their sum.
            if BLOCK == 128:
                place = tile * (K // BLOCK) + start // 16
                zero = zero_point(zeros, place, lane, there) if ZERO else word
                value = columns(word, word, zero, KIND, False, ZERO, ASSEMBLY, x.dtype.element_ty, BN)
                own = (row // 16).to(tl.int64) * (K // BLOCK) + start // 16
                by = scale_of(tl.load(scales + own * 16 + row % 16, mask=row < N, other=0), SCALE)
                acc += tl.dot(rows, value) * by[None, :]
            else:
                place = tile * (K // BLOCK) + step * 8 // BLOCK
                by = scale_of(tl.load(scales + place * 16 + lane, mask=mask, other=0), SCALE)
                zero = zero_point(zeros, place, lane, mask) if ZERO else by
                value = columns(word, by, zero, KIND, True, ZERO, ASSEMBLY, x.dtype.element_ty, BN)
                acc = tl.dot(rows, value, acc)
        if TENSOR > 0:
            own = tensor_scales + matrix * tensor_step + row * TENSOR // N
            acc *= tl.load(own, mask=row < N, other=0.0)[None, :]
        tl.store(out + pair[:, None] * N + row[None, :], acc, mask=real[:, None] & real_rows)


@triton.jit
def plain_sums(x, codes, scales, row, N, K, BLOCK: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """f32 [BN]: rows `row` of a matrix stored side by side times one row x f32 [K].

    RUN columns, what a thread reads at once, lie in one block and have one scale.
    """
    there = row < N
    acc = tl.zeros([BN, BK // RUN, RUN], tl.float32)
    for start in range(0, K, BK):
        run = start + tl.arange(0, BK // RUN) * RUN
        at = run[:, None] + tl.arange(0, RUN)[None, :]
        inside = run < K
        mask = there[:, None, None] & inside[None, :, None] & (at < K)[None, :, :]
        value = tl.load(codes + row[:, None, None] * K + at[None, :, :], mask=mask, other=0).to(tl.float32)
        given = tl.load(x + at, mask=at < K, other=0.0)
        if SCALED:
            place = row[:, None] * (K // BLOCK) + (run // BLOCK)[None, :]
            by = scale_of(tl.load(scales + place, mask=there[:, None] & inside[None, :], other=0), 0)
            acc += value * given[None, :, :] * by[:, :, None]
        else:
            acc += value * given[None, :, :]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def gemv_plain(x, codes, scales, out, N, K, BLOCK: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """One row x f32 [K] times rows side by side: out f32 [N]. Programs: blocks of BN rows. See `plain_sums`."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    tl.store(out + row, plain_sums(x, codes, scales, row, N, K, BLOCK, SCALED, BN, BK, RUN), mask=row < N)


@triton.jit
def gemv_plain_pairs(x, index, codes, scales, out, N, K, SHARED, codes_step, scales_step, BLOCK: tl.constexpr,
                     SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """`gemv_plain` of pairs: row pair // SHARED of x f32 [*, K] times matrix index[pair] of a stack, index int64: out
    f32 [pairs, N]. Programs: blocks of BN rows, pairs."""
    pair = tl.program_id(1).to(tl.int64)
    matrix = tl.load(index + pair)
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    sums = plain_sums(x + pair // SHARED * K, codes + matrix * codes_step, scales + matrix * scales_step, row, N, K,
                      BLOCK, SCALED, BN, BK, RUN)  # fmt: skip
    tl.store(out + pair * N + row, sums, mask=row < N)


@triton.jit
def gemm_plain(x, codes, scales, out, T, N, K, BLOCK: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Rows x [T, K] times rows side by side: out f32 [T, N]. Programs: blocks of BM tokens, of BN rows.

    BK columns lie in one block: products of its codes are exact, and the scale comes on their sum.
    """
    t = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        rows = tl.load(x + t[:, None] * K + at[None, :], mask=(t < T)[:, None] & (at < K)[None, :], other=0.0)
        mask = (at < K)[:, None] & (row < N)[None, :]
        value = tl.load(codes + row[None, :] * K + at[:, None], mask=mask, other=0).to(x.dtype.element_ty)
        if SCALED:
            by = scale_of(tl.load(scales + row * (K // BLOCK) + start // BLOCK, mask=row < N, other=0), 0)
            acc += tl.dot(rows, value) * by[None, :]
        else:
            acc = tl.dot(rows, value, acc)
    tl.store(out + t[:, None] * N + row[None, :], acc, mask=(t < T)[:, None] & (row < N)[None, :])
