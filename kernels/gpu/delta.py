"""Triton: the causal convolution and the gated delta rule, token after token. Knows no torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv(u, weight, state, out, T, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """out f32 [T, C]: silu of the causal convolution of u [T, C] by weight [C, TAPS], state [TAPS - 1, C] before it.

    The state stays as it was. Programs: tokens, blocks of channels.
    """
    t = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TAPS):
        from_t = tl.full([BLOCK], 0, tl.int64) + t - (TAPS - 1) + j
        new = tl.load(u + from_t * C + c, mask=mask & (from_t >= 0), other=0.0)
        old = tl.load(state + (from_t + TAPS - 1) * C + c, mask=mask & (from_t < 0), other=0.0)
        total += tl.load(weight + c * TAPS + j, mask=mask, other=0.0) * (new + old)
    tl.store(out + t.to(tl.int64) * C + c, total / (1.0 + tl.exp(-total)), mask=mask)


@triton.jit
def delta_rule(q, k, v, g, beta, state, out, T, q_step, k_step, v_step, KEY_HEADS, VALUE_HEADS, ROOT, DK: tl.constexpr,
               DV: tl.constexpr, KEYS: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """The gated delta rule on BV values of one head, the state in registers: see `kernels.ops.delta_rule`.

    Rows of q, k and v lie *_step floats apart. KEYS: DK or the next power of two. Programs: value heads, slices.
    """
    head, slice_ = tl.program_id(0), tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    i = tl.arange(0, KEYS)
    j = slice_ * BV + tl.arange(0, BV)
    row, column = i < DK, j < DV
    both = row[:, None] & column[None, :]
    at = state + head * DK * DV + i[:, None] * DV + j[None, :]
    held = tl.load(at, mask=both, other=0.0)
    for t in range(T):
        key = tl.load(k + t * k_step + key_head * DK + i, mask=row, other=0.0)
        query = tl.load(q + t * q_step + key_head * DK + i, mask=row, other=0.0)
        value = tl.load(v + t * v_step + head * DV + j, mask=column, other=0.0)
        key *= 1.0 / tl.sqrt(tl.sum(key * key, 0) + 1e-6)
        query *= ROOT / tl.sqrt(tl.sum(query * query, 0) + 1e-6)
        held *= tl.exp(tl.load(g + t * VALUE_HEADS + head))
        error = tl.load(beta + t * VALUE_HEADS + head) * (value - tl.sum(held * key[:, None], 0))
        held += key[:, None] * error[None, :]
        tl.store(out + (t * VALUE_HEADS + head) * DV + j, tl.sum(held * query[:, None], 0), mask=column)
    tl.store(at, held, mask=both)
