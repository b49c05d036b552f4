"""Triton: products of NVFP4 matrices with rows encoded as NVFP4 too, by the FP4 tensor cores of sm_100 and sm_120.

A tile's bytes hold the columns (0, 4), (1, 5), (2, 6), (3, 7) of every 8, so that is the order of the rows' bytes here.
Rows are rounded to 4 bits: faster where the cores are the limit, and not the numbers that 16 bits give. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.codes import scale_of


@triton.jit
def e4m3_bits(a):
    """The bits of the E4M3 number next to a f32 from 0 to 448, ties to even: int32."""
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6 they lie 2^-9 apart; adding 2^23 leaves no bits behind the point.
    small = (a * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15
    return tl.where(a < 0.015625, small, normal)


@triton.jit
def e2m1_bits(x):
    """The code of the E2M1 number next to x f32, ties to the even code, at most 6: int32."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code + 8 * (x < 0).to(tl.int32)


@triton.jit
def encode_rows(x, codes, scales, row_scales, K, BLOCK: tl.constexpr):
    """x f32 [T, K] as NVFP4, each row with a scale of its own: codes u8 [T, K / 2] in a tile's order, scales u8
    [T, K / 16] of E4M3, row_scales f32 [T]. As `ref.encode` does with a tensor scale a row, but for quotients that are
    not rounded as exactly: one in millions goes the other way. Programs: T."""
    t = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + t * K + at, mask=at < K, other=0.0)))
    whole = tl.max(most, 0) / 2688.0
    tl.store(row_scales + t, whole)
    by = tl.where(whole > 0, whole, 1.0)
    block, i = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, :]
    for start in range(0, K, 256):
        at = start + block * 16 + i // 4 * 8 + i % 4
        low = tl.load(x + t * K + at, mask=at < K, other=0.0) / by
        high = tl.load(x + t * K + at + 4, mask=at < K, other=0.0) / by
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        bits = e4m3_bits(tl.minimum(largest / 6.0, 448.0))
        step = scale_of(bits, 1)[:, None]
        # Without a step all of the block is too small to be anything but zero.
        by_step = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
        byte = e2m1_bits(low * by_step) | (e2m1_bits(high * by_step) << 4)
        tl.store(codes + t * (K // 2) + start // 2 + block * 8 + i, byte.to(tl.uint8), mask=at < K)
        place = start // 16 + tl.arange(0, 16)
        tl.store(scales + t * (K // 16) + place, bits.to(tl.uint8), mask=place < K // 16)


@triton.jit
def gemm_fp4(x, x_scales, row_scales, codes, scales, tensor_scales, out, sources, order, block_matrix, block_first,
             block_last, N, K, codes_step, scales_step, tensor_step, TENSOR: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """`matmul.gemm_tiled` with rows that `encode_rows` made, of which row_scales are to be multiplied with."""
    b, n = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(block_first + b), tl.load(block_last + b)
    if first < last:
        matrix = tl.load(block_matrix + b)
        codes += matrix * codes_step
        scales += matrix * scales_step
        p = first + tl.arange(0, BM)
        real = p < last
        pair = tl.load(order + p, mask=real, other=0)
        source = tl.load(sources + pair, mask=real, other=0)
        row = n * BN + tl.arange(0, BN)
        tile, lane = (row // 16).to(tl.int64), row % 16
        there = row < N
        byte, eighth = tl.arange(0, 64)[None, :], tl.arange(0, 8)[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K // 8, 16):
            step = start + tl.arange(0, 16)
            word = tl.load(codes + (tile[None, :] * (K // 8) + step[:, None]) * 16 + lane[None, :],
                           mask=(step < K // 8)[:, None] & there[None, :], other=0)  # fmt: skip
            even = tl.join(word & 255, (word >> 16) & 255)
            odd = tl.join((word >> 8) & 255, (word >> 24) & 255)
            # [16 words, BN, byte 0 or 2, the next one] -> the bytes of a row one after the other
            right = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [64, BN]).to(tl.uint8)
            place = start // 2 + eighth
            inside = place < K // 16
            right_by = tl.load(scales + (tile[:, None] * (K // 16) + place) * 16 + lane[:, None],
                               mask=there[:, None] & inside, other=0)  # fmt: skip
            at = start * 4 + byte
            left = tl.load(x + source[:, None] * (K // 2) + at, mask=real[:, None] & (at < K // 2), other=0)
            left_by = tl.load(x_scales + source[:, None] * (K // 16) + place, mask=real[:, None] & inside, other=0)
            acc = tl.dot_scaled(left, left_by.to(tl.float8e4nv, bitcast=True), "e2m1", right,
                                right_by.to(tl.float8e4nv, bitcast=True), "e2m1", acc)  # fmt: skip
        acc *= tl.load(row_scales + source, mask=real, other=0.0)[:, None]
        if TENSOR > 0:
            own = tensor_scales + matrix * tensor_step + row * TENSOR // N
            acc *= tl.load(own, mask=there, other=0.0)[None, :]
        tl.store(out + pair[:, None] * N + row[None, :], acc, mask=real[:, None] & there[None, :])
