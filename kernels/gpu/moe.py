"""Triton: routed experts for a few tokens, read through the numbers of the slots they lie in.

A prompt's many tokens go expert by expert through `matmul.gemm_tiled`. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenrun.kernels.gpu.matmul import tensor_scale_of, tile_sums
from qwenrun.kernels.gpu.rounded import store_rounded


@triton.jit
def gate_up_tiled(x, steps, index, codes, scales, zeros, tensor_scales, middle, middle_steps, H, INNER,
                  K_CHOSEN: tl.constexpr, codes_step, scales_step, zeros_step, tensor_step, KIND: tl.constexpr,
                  SCALE: tl.constexpr, ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr,
                  ASSEMBLY: tl.constexpr, STEPS: tl.constexpr, FOR: tl.constexpr):  # fmt: skip
    """silu(gate x) * up x of every pair of token and choice, rounded for codes of the kind FOR: middle int8
    [pairs, 2 INNER], middle_steps f32 [pairs, INNER / 16].

    x int32 [T, H / 2], steps f32 [T, H / 16]; index int64 [T, k] says which matrix of the stack. Programs: pairs, tiles
    of INNER.
    """
    pair, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    matrix = tl.load(index + pair)
    codes += matrix * codes_step
    scales += matrix * scales_step
    zeros += matrix * zeros_step
    token = pair // K_CHOSEN
    # A tile of the gate and the same one of up, side by side: x is read once for both.
    both = tl.arange(0, 32)
    tiles = tile + both // 16 * (INNER // 16)
    sums = tile_sums(x + token * (H // 2), steps + token * (H // 16), codes, scales, zeros, tiles, both % 16, both < 32,
                     0, H // 8, H, KIND, SCALE, ZERO, BLOCK, ASSEMBLY, STEPS, 32)  # fmt: skip
    sums *= tensor_scale_of(tensor_scales + matrix * tensor_step, tiles * 16, 2 * INNER, TENSOR)
    gate, up = tl.split(tl.trans(tl.reshape(sums, [2, 16])))
    made = gate / (1.0 + tl.exp(-gate)) * up
    column = tile * 16 + tl.arange(0, 16)[None, :]
    to, to_steps = middle + pair * 2 * INNER, middle_steps + pair * (INNER // 16)
    store_rounded(made[None, :], column, to, to_steps, INNER, FOR)


@triton.jit
def swiglu_tiled(x, steps, g_codes, g_scales, g_zeros, g_tensor, u_codes, u_scales, u_zeros, u_tensor, middle,
                 middle_steps, H, INNER, KIND: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                 TENSOR: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr, STEPS: tl.constexpr,
                 FOR: tl.constexpr):  # fmt: skip
    """The same of one rounded row and two matrices [INNER, H]; with FOR -1 middle is f32 [INNER]. Programs: tiles."""
    lane = tl.arange(0, 16)
    row = tl.program_id(0).to(tl.int64) * 16 + lane
    tiles, there = row // 16, row < INNER
    gate = tile_sums(x, steps, g_codes, g_scales, g_zeros, tiles, lane, there, 0, H // 8, H, KIND, SCALE, ZERO, BLOCK,
                     ASSEMBLY, STEPS, 16)  # fmt: skip
    up = tile_sums(x, steps, u_codes, u_scales, u_zeros, tiles, lane, there, 0, H // 8, H, KIND, SCALE, ZERO, BLOCK,
                   ASSEMBLY, STEPS, 16)  # fmt: skip
    gate *= tensor_scale_of(g_tensor, row, INNER, TENSOR)
    up *= tensor_scale_of(u_tensor, row, INNER, TENSOR)
    made = gate / (1.0 + tl.exp(-gate)) * up
    if FOR < 0:
        tl.store(middle + row, made)
    else:
        store_rounded(made[None, :], row[None, :], middle, middle_steps, INNER, FOR)


@triton.jit
def down_tiled(middle, steps, index, weight, codes, scales, zeros, tensor_scales, base, out, H, INNER, codes_step,
               scales_step, zeros_step, tensor_step, K_CHOSEN: tl.constexpr, HAS_BASE: tl.constexpr, KIND: tl.constexpr,
               SCALE: tl.constexpr, ZERO: tl.constexpr, TENSOR: tl.constexpr, BLOCK: tl.constexpr,
               ASSEMBLY: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """out f32 [T, H]: the weighted results of a token's experts in the router's order, then base [T, H].

    middle int32 [pairs, INNER / 2], steps f32 [pairs, INNER / 16]. Programs: tokens, ROWS of H.
    """
    t = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, ROWS) % 16
    if ROWS < 16:
        lanes += tl.program_id(1) * ROWS % 16
    total = tl.zeros([ROWS], tl.float32)
    for j in range(K_CHOSEN):
        pair = t * K_CHOSEN + j
        matrix = tl.load(index + pair)
        sums = tile_sums(middle + pair * (INNER // 2), steps + pair * (INNER // 16), codes + matrix * codes_step,
                         scales + matrix * scales_step, zeros + matrix * zeros_step, row // 16, lanes, row < H, 0,
                         INNER // 8, INNER, KIND, SCALE, ZERO, BLOCK, ASSEMBLY, STEPS, ROWS)  # fmt: skip
        sums *= tensor_scale_of(tensor_scales + matrix * tensor_step, tl.minimum(row, H - 1), H, TENSOR)
        total += sums * tl.load(weight + pair)
    if HAS_BASE:
        total += tl.load(base + t * H + row, mask=row < H, other=0.0)
    tl.store(out + t * H + row, total, mask=row < H)


@triton.jit
def silu_times(both, middle, INNER, WIDTH, BLOCK: tl.constexpr):
    """both f32 [rows, 2 INNER], gate then up -> middle [rows, WIDTH], silu(gate) * up, zero from column INNER on.
    Programs: rows, blocks of WIDTH."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + r * 2 * INNER + at, mask=at < INNER, other=0.0)
    up = tl.load(both + r * 2 * INNER + INNER + at, mask=at < INNER, other=0.0)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(middle + r * WIDTH + at, made.to(middle.dtype.element_ty), mask=at < WIDTH)


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
