"""Triton: the causal convolution and the gated delta rule, token after token, and of a single token with all that is
between a layer's projections. Knows no torch."""

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


@triton.jit
def conv_step(u, weight, state, out, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """`conv` of one token, and the state moves on by it. Programs: blocks of channels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    new = tl.load(u + c, mask=mask, other=0.0)
    total = tl.load(weight + c * TAPS + TAPS - 1, mask=mask, other=0.0) * new
    for j in tl.static_range(TAPS - 1):
        old = tl.load(state + j * C + c, mask=mask, other=0.0)
        total += tl.load(weight + c * TAPS + j, mask=mask, other=0.0) * old
        if j > 0:
            tl.store(state + (j - 1) * C + c, old, mask=mask)
    tl.store(state + (TAPS - 2) * C + c, new, mask=mask)
    tl.store(out + c, total / (1.0 + tl.exp(-total)), mask=mask)


@triton.jit
def delta_step(qkv, a, b, decay, dt_bias, state, out, KEY_HEADS, VALUE_HEADS, ROOT, DK: tl.constexpr, DV: tl.constexpr,
               KEYS: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """`delta_rule` of one token whose heads lie in qkv f32 [C], with the decay and the step size made of a and b here.

    KEYS: DK or the next power of two. Programs: value heads, slices of BV values.
    """
    head, slice_ = tl.program_id(0), tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    i = tl.arange(0, KEYS)
    j = slice_ * BV + tl.arange(0, BV)
    row, column = i < DK, j < DV
    both = row[:, None] & column[None, :]
    at = state + head * DK * DV + i[:, None] * DV + j[None, :]
    query = tl.load(qkv + key_head * DK + i, mask=row, other=0.0)
    key = tl.load(qkv + (KEY_HEADS + key_head) * DK + i, mask=row, other=0.0)
    value = tl.load(qkv + 2 * KEY_HEADS * DK + head * DV + j, mask=column, other=0.0)
    key *= 1.0 / tl.sqrt(tl.sum(key * key, 0) + 1e-6)
    query *= ROOT / tl.sqrt(tl.sum(query * query, 0) + 1e-6)
    rate = tl.load(a + head) + tl.load(dt_bias + head)
    softplus = tl.maximum(rate, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(rate)))
    held = tl.load(at, mask=both, other=0.0) * tl.exp(tl.load(decay + head) * softplus)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + head)))
    error = beta * (value - tl.sum(held * key[:, None], 0))
    held += key[:, None] * error[None, :]
    tl.store(out + head * DV + j, tl.sum(held * query[:, None], 0), mask=column)
    tl.store(at, held, mask=both)
