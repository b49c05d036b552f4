"""Triton: the gated delta rule of a prompt, C tokens of a chunk at a time, in products of matrices.

Inside a chunk every token corrects what those before it wrote. With G the sum of the log decays up to a token,
A[i, j] = beta_i (k_i . k_j) exp(G_i - G_j) below the diagonal, and S the state before the chunk, what the tokens write
is
    U = (I + A)^-1 beta (V - exp(G) K S);    o = exp(G) Q S + (Q K^T exp(G_i - G_j), on and below the diagonal) U
and the state after it is exp(G_C) S + (K exp(G_C - G))^T U: the delta rule of `ops.delta_rule`, summed up (the chunked
form of Gated DeltaNet, arXiv 2412.06464). Only exponents <= 0 are taken, so nothing overflows. Products are of OPERAND,
sums, the inverse and the state of float32. Knows no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_rows(x, at, step, mask, i):
    """Rows at (at int64 [C], step floats apart) of a head's i numbers, made unit vectors: f32 [C, KEYS]."""
    rows = tl.load(x + at[:, None] * step + i[None, :], mask=mask, other=0.0)
    return rows / tl.sqrt(tl.sum(rows * rows, 1) + 1e-6)[:, None]


@triton.jit
def chunk_inside(q, k, g, beta, inverse, within, T, q_step, k_step, KEY_HEADS, VALUE_HEADS, ROOT, DK: tl.constexpr,
                 KEYS: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """What a chunk's tokens are to each other, whatever the state: (I + A)^-1 and the decayed Q K^T,
    inverse, within f32 [chunks, VALUE_HEADS, C, C]. Programs: chunks, value heads.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    c, i = tl.arange(0, C), tl.arange(0, KEYS)
    t = chunk * C + c
    real = t < T
    mask = real[:, None] & (i < DK)[None, :]
    key = unit_rows(k + key_head * DK, t, k_step, mask, i)
    query = unit_rows(q + key_head * DK, t, q_step, mask, i) * ROOT
    decay = tl.cumsum(tl.load(g + t * VALUE_HEADS + head, mask=real, other=0.0), 0)
    rate = tl.load(beta + t * VALUE_HEADS + head, mask=real, other=0.0)
    lower = c[:, None] >= c[None, :]
    less = tl.where(lower, tl.exp(tl.where(lower, decay[:, None] - decay[None, :], 0.0)), 0.0)
    to = (chunk * VALUE_HEADS + head) * C * C + c[:, None] * C + c[None, :]
    turned = tl.trans(key.to(OPERAND))
    tl.store(within + to, tl.dot(query.to(OPERAND), turned) * less)
    below = tl.where(c[:, None] > c[None, :], rate[:, None] * less, 0.0)
    solved = -tl.dot(key.to(OPERAND), turned) * below
    # Row by row: what row n of A takes of the rows above it, which are solved.
    for n in range(1, C):
        row = tl.sum(tl.where((c == n)[:, None], solved, 0.0), 0)
        row += tl.sum(row[:, None] * solved, 0)
        solved = tl.where((c == n)[:, None], row[None, :], solved)
    tl.store(inverse + to, solved + tl.where(c[:, None] == c[None, :], 1.0, 0.0))


@triton.jit
def chunk_states(q, k, v, g, beta, inverse, within, state, out, T, q_step, k_step, v_step, KEY_HEADS, VALUE_HEADS, ROOT,
                 DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr, OPERAND: tl.constexpr, BV: tl.constexpr,
                 C: tl.constexpr):  # fmt: skip
    """Chunk after chunk on BV values of one head, the state in registers: out f32 [T, VALUE_HEADS, DV], and the state
    f32 [VALUE_HEADS, DK, DV] moves on. Programs: value heads, slices.
    """
    head, slice_ = tl.program_id(0), tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    c, i, j = tl.arange(0, C), tl.arange(0, KEYS), slice_ * BV + tl.arange(0, BV)
    column = (j < DV)[None, :]
    both = (i < DK)[:, None] & column
    held_at = state + head * DK * DV + i[:, None] * DV + j[None, :]
    held = tl.load(held_at, mask=both, other=0.0)
    for start in range(0, T, C):
        t = start + c.to(tl.int64)
        real = t < T
        mask = real[:, None] & (i < DK)[None, :]
        key = unit_rows(k + key_head * DK, t, k_step, mask, i)
        query = unit_rows(q + key_head * DK, t, q_step, mask, i) * ROOT
        value = tl.load(v + t[:, None] * v_step + head * DV + j[None, :], mask=real[:, None] & column, other=0.0)
        rates = tl.load(g + t * VALUE_HEADS + head, mask=real, other=0.0)
        decay, whole = tl.cumsum(rates, 0), tl.sum(rates, 0)
        carried = tl.exp(decay)[:, None]
        rate = tl.load(beta + t * VALUE_HEADS + head, mask=real, other=0.0)[:, None]
        at = (start // C * VALUE_HEADS + head).to(tl.int64) * C * C + c[:, None] * C + c[None, :]
        before = held.to(OPERAND)
        error = rate * (value - carried * tl.dot(key.to(OPERAND), before))
        written = tl.dot(tl.load(inverse + at).to(OPERAND), error.to(OPERAND)).to(OPERAND)
        read = carried * tl.dot(query.to(OPERAND), before)
        read = tl.dot(tl.load(within + at).to(OPERAND), written, read)
        tl.store(out + (t[:, None] * VALUE_HEADS + head) * DV + j[None, :], read, mask=real[:, None] & column)
        kept = tl.trans(key * tl.exp(whole - decay)[:, None])
        held = tl.dot(kept.to(OPERAND), written, held * tl.exp(whole))
    tl.store(held_at, held, mask=both)
