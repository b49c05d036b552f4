"""Triton: products with encoded matrices, as a pack stores them.

A tiled matrix is read as int32 words: word s of row r of a tile holds the columns 8s..8s+7, its bits 8j..8j+3 column
8s+j and its bits 8j+4..8j+7 column 8s+4+j. A tile's words lie step after step, 16 rows each, so that what a program
reads is one run of memory. Activations come split: those of the same place in all words lie together (`split_rows`), or
in all 16 words of a block of 128 columns (`split_blocks`).

Knows no torch; `launch` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.codes import nibble, scale_of


@triton.jit
def split_rows(x, out, K, BLOCK: tl.constexpr):
    """x f32 [T, K] -> out [T, 8, K / 8]. Programs: T."""
    t = tl.program_id(0).to(tl.int64)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + t * K + at, mask=at < K, other=0.0)
        tl.store(out + t * K + (at % 8) * (K // 8) + at // 8, v.to(out.dtype.element_ty), mask=at < K)


@triton.jit
def split_blocks(x, out, K, WIDTH):
    """x [T, K] -> out [T, WIDTH], for tensor cores: of 128 columns the first of every word of 8, then the second, and
    so on; zero behind column K. Programs: T, blocks of 128 columns."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, 128)
    at = block * 128 + i % 16 * 8 + i // 16
    v = tl.load(x + t * K + at, mask=at < K, other=0.0)
    tl.store(out + t * WIDTH + block * 128 + i, v.to(out.dtype.element_ty))


@triton.jit
def zero_point(zeros, place, rows, mask):
    """The zero points f32 of tiled rows: byte r % 8 of a block's 8 has row r's in its low half for r < 8."""
    pair = tl.load(zeros + place * 8 + rows % 8, mask=mask, other=0).to(tl.int32)
    return tl.where(rows < 8, pair & 15, pair >> 4).to(tl.float32)


@triton.jit
def tile_sums(x, codes, scales, zeros, tiles, there, first, last, K, KIND: tl.constexpr, SCALE: tl.constexpr,
              ZERO: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """f32 [ROWS]: rows of tiles times one split row x, over the words first..last-1.

    ROWS is a multiple of 16; row r is row r % 16 of tile tiles[r], if there[r].
    """
    lane = (tl.arange(0, ROWS) % 16)[None, :]
    line = tiles[None, :] * (K // 8)
    acc = tl.zeros([STEPS, ROWS], tl.float32)
    for start in range(first, last, STEPS):
        step = start + tl.arange(0, STEPS)
        inside = step < last
        mask = inside[:, None] & there[None, :]
        word = tl.load(codes + (line + step[:, None]) * 16 + lane, mask=mask, other=0)
        place = tiles[None, :] * (K // BLOCK) + (step * 8 // BLOCK)[:, None]
        by = scale_of(tl.load(scales + place * 16 + lane, mask=mask, other=0), SCALE)
        sums = tl.zeros([STEPS, ROWS], tl.float32)
        plain = tl.zeros([STEPS], tl.float32)
        for j in tl.static_range(4):
            a = tl.load(x + j * (K // 8) + step, mask=inside, other=0.0)
            b = tl.load(x + (4 + j) * (K // 8) + step, mask=inside, other=0.0)
            sums += nibble(word, 8 * j, KIND) * a[:, None]
            sums += nibble(word, 8 * j + 4, KIND) * b[:, None]
            plain += a + b
        if KIND == 0:
            if ZERO:
                sums -= zero_point(zeros, place, lane, mask) * plain[:, None]
            else:
                sums -= 8.0 * plain[:, None]
        acc += sums * by
    return tl.sum(acc, 0)


@triton.jit
def tensor_scale_of(scales, row, N, COUNT: tl.constexpr):
    """Of rows of a matrix with COUNT float32 scales of its own; 1 without any."""
    if COUNT == 0:
        return row.to(tl.float32) * 0.0 + 1.0
    else:
        return tl.load(scales + row * COUNT // N)


@triton.jit
def gemv_tiled(x, codes, scales, zeros, tensor_scales, out, N, K, SHARE, KIND: tl.constexpr, SCALE: tl.constexpr,
               ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """One split row x f32: out f32 [shares, N], the sums over each SHARE words. Programs: ROWS of N, shares."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < N
    share = tl.program_id(1)
    first = share * SHARE
    last = tl.minimum(first + SHARE, K // 8)
    sums = tile_sums(x, codes, scales, zeros, row // 16, there, first, last, K, KIND, SCALE, ZERO, BLOCK, STEPS, ROWS)
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
def columns(word, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Words int32 [16, ROWS] of 16 steps as the numbers f32 [128, ROWS] that their codes stand for, in the order of
    `split_blocks`: the first code of every word, then the second, and so on."""
    ab = tl.join(nibble(word, 0, KIND), nibble(word, 4, KIND))
    cd = tl.join(nibble(word, 8, KIND), nibble(word, 12, KIND))
    ef = tl.join(nibble(word, 16, KIND), nibble(word, 20, KIND))
    gh = tl.join(nibble(word, 24, KIND), nibble(word, 28, KIND))
    # [16, ROWS, low or high, second pair of bytes, odd byte]
    all_ = tl.join(tl.join(ab, ef), tl.join(cd, gh))
    return tl.reshape(tl.permute(all_, (2, 3, 4, 0, 1)), [128, ROWS])


@triton.jit
def spread(by, ROWS: tl.constexpr):
    """[16, ROWS], one for each word, as [128, ROWS] in the order of `columns`."""
    return tl.reshape(tl.broadcast_to(by[None, :, :], [8, 16, ROWS]), [128, ROWS])


@triton.jit
def gemm_tiled(x, codes, scales, zeros, tensor_scales, out, sources, order, block_matrix, block_first, block_last, N, K,
               WIDTH, codes_step, scales_step, zeros_step, tensor_step, KIND: tl.constexpr, SCALE: tl.constexpr,
               ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Rows of activations, sorted by the matrix of a stack they are multiplied with: out f32 [rows, N].

    x [*, WIDTH] as `split_blocks` gives it. Row p of the sorted ones is row sources[order[p]] of x and row order[p] of
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
        tile, lane = (row // 16).to(tl.int64)[None, :], (row % 16)[None, :]
        there = (row < N)[None, :]
        at = x + (source * WIDTH)[:, None] + tl.arange(0, 128)[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K // 8, 16):
            step = start + tl.arange(0, 16)
            # Behind the last word x is zero.
            word = tl.load(codes + (tile * (K // 8) + step[:, None]) * 16 + lane,
                           mask=(step < K // 8)[:, None] & there, other=0)  # fmt: skip
            value = columns(word, KIND, BN)
            if BLOCK == 128:
                # One block's columns: products of integers, exact in bfloat16, and the scale on their sum.
                place = tile * (K // BLOCK) + start // 16
                if KIND == 0:
                    value -= zero_point(zeros, place, lane, there) if ZERO else 8.0
                by = scale_of(tl.load(scales + place * 16 + lane, mask=there, other=0), SCALE)
            else:
                mask = (step < K // 8)[:, None] & there
                place = tile * (K // BLOCK) + (step * 8 // BLOCK)[:, None]
                if KIND == 0:
                    value -= spread(zero_point(zeros, place, lane, mask), BN) if ZERO else 8.0
                value *= spread(scale_of(tl.load(scales + place * 16 + lane, mask=mask, other=0), SCALE), BN)
            rows = tl.load(at + start * 8, mask=real[:, None], other=0.0)
            if BLOCK == 128:
                acc += tl.dot(rows, value.to(x.dtype.element_ty)) * by
            else:
                acc = tl.dot(rows, value.to(x.dtype.element_ty), acc)
        if TENSOR > 0:
            own = tensor_scales + matrix * tensor_step + row * TENSOR // N
            acc *= tl.load(own, mask=row < N, other=0.0)[None, :]
        tl.store(out + pair[:, None] * N + row[None, :], acc, mask=real[:, None] & there)


@triton.jit
def gemv_plain(x, codes, scales, out, N, K, BLOCK: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """One row x f32 [K] times rows side by side: out f32 [N]. Programs: blocks of BN rows.

    RUN columns, what a thread reads at once, lie in one block and have one scale.
    """
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
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
    tl.store(out + row, tl.sum(tl.sum(acc, 2), 1), mask=there)


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
