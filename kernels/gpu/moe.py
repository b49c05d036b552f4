"""Triton: routed experts for a few tokens, read through the numbers of the slots they lie in.

A prompt's many tokens go expert by expert through `matmul.gemm_tiled`. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.matmul import tensor_scale_of, tile_sums


@triton.jit
def gate_up_tiled(x, index, codes, scales, zeros, tensor_scales, middle, H, INNER, K_CHOSEN: tl.constexpr, codes_step,
                  scales_step, zeros_step, tensor_step, KIND: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                  TENSOR: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """silu(gate x) * up x of every pair of token and choice: middle f32 [pairs, 8, INNER / 8], split.

    x f32 [T, 8, H / 8]; index int64 [T, k] says which matrix of the stack. Programs: pairs, tiles of INNER.
    """
    pair, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    matrix = tl.load(index + pair)
    codes += matrix * codes_step
    scales += matrix * scales_step
    zeros += matrix * zeros_step
    x += pair // K_CHOSEN * H
    # A tile of the gate and the same one of up, side by side: x is read once for both.
    both = tl.arange(0, 32)
    tiles = tile + both // 16 * (INNER // 16)
    sums = tile_sums(x, codes, scales, zeros, tiles, both < 32, 0, H // 8, H, KIND, SCALE, ZERO, BLOCK, STEPS, 32)
    sums *= tensor_scale_of(tensor_scales + matrix * tensor_step, tiles * 16, 2 * INNER, TENSOR)
    gate, up = tl.split(tl.trans(tl.reshape(sums, [2, 16])))
    row = tile * 16 + tl.arange(0, 16)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(middle + pair * INNER + (row % 8) * (INNER // 8) + row // 8, made)


@triton.jit
def swiglu_tiled(x, g_codes, g_scales, g_zeros, g_tensor, u_codes, u_scales, u_zeros, u_tensor, middle, H, INNER,
                 KIND: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, TENSOR: tl.constexpr,
                 BLOCK: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """The same of one split row x f32 and two matrices [INNER, H]: middle f32 [8, INNER / 8]. Programs: tiles."""
    row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    tiles, there = row // 16, row < INNER
    gate = tile_sums(x, g_codes, g_scales, g_zeros, tiles, there, 0, H // 8, H, KIND, SCALE, ZERO, BLOCK, STEPS, 16)
    up = tile_sums(x, u_codes, u_scales, u_zeros, tiles, there, 0, H // 8, H, KIND, SCALE, ZERO, BLOCK, STEPS, 16)
    gate *= tensor_scale_of(g_tensor, row, INNER, TENSOR)
    up *= tensor_scale_of(u_tensor, row, INNER, TENSOR)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(middle + (row % 8) * (INNER // 8) + row // 8, made)


@triton.jit
def down_tiled(middle, index, weight, codes, scales, zeros, tensor_scales, base, out, H, INNER, codes_step, scales_step,
               zeros_step, tensor_step, K_CHOSEN: tl.constexpr, HAS_BASE: tl.constexpr, KIND: tl.constexpr,
               SCALE: tl.constexpr, ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr,
               STEPS: tl.constexpr):  # fmt: skip
    """out f32 [T, H]: the weighted results of a token's experts in the router's order, then base [T, H].

    Programs: tokens, tiles of H.
    """
    t, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tile * 16 + tl.arange(0, 16)
    total = tl.zeros([16], tl.float32)
    for j in range(K_CHOSEN):
        pair = t * K_CHOSEN + j
        matrix = tl.load(index + pair)
        sums = tile_sums(middle + pair * INNER, codes + matrix * codes_step, scales + matrix * scales_step,
                         zeros + matrix * zeros_step, row // 16, row < H, 0, INNER // 8, INNER, KIND, SCALE, ZERO,
                         BLOCK, STEPS, 16)  # fmt: skip
        sums *= tensor_scale_of(tensor_scales + matrix * tensor_step, row, H, TENSOR)
        total += sums * tl.load(weight + pair)
    if HAS_BASE:
        total += tl.load(base + t * H + row)
    tl.store(out + t * H + row, total)


@triton.jit
def silu_times(both, middle, INNER, WIDTH, BLOCK: tl.constexpr, FORM: tl.constexpr):
    """both f32 [rows, 2 INNER], gate then up -> middle [rows, WIDTH], silu(gate) * up: as it is (FORM 0), or in the
    order of `matmul.split_rows` (1) or `split_blocks` (2). Programs: rows, blocks of WIDTH.
    """
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + r * 2 * INNER + at, mask=at < INNER, other=0.0)
    up = tl.load(both + r * 2 * INNER + INNER + at, mask=at < INNER, other=0.0)
    made = gate / (1.0 + tl.exp(-gate)) * up
    to = at
    if FORM == 1:
        to = (at % 8) * (INNER // 8) + at // 8
    elif FORM == 2:
        to = at // 128 * 128 + at % 8 * 16 + at % 128 // 8
    tl.store(middle + r * WIDTH + to, made.to(middle.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def weighted_sum(rows, weight, base, out, H, K_CHOSEN: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
    """out f32 [T, H]: rows [T, k, H] times weight [T, k], in order, then base. Programs: T, blocks of H."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K_CHOSEN):
        part = tl.load(rows + (t * K_CHOSEN + j) * H + at, mask=at < H, other=0.0)
        total += part * tl.load(weight + t * K_CHOSEN + j)
    if HAS_BASE:
        total += tl.load(base + t * H + at, mask=at < H, other=0.0)
    tl.store(out + t * H + at, total, mask=at < H)
