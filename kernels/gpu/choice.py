"""Triton: the experts a router chooses, and the largest of many numbers. Knows no torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(logits, index, weight, E, CHOSEN: tl.constexpr, SIZE: tl.constexpr):
    """logits f32 [T, E] -> the CHOSEN largest of each row, index int64 and softmax over them, weight f32 [T, CHOSEN].

    That is the softmax over all, renormalised. Of equal ones the lower index. SIZE: E or the next power of two.
    Programs: rows.
    """
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    value = tl.load(logits + t * E + at, mask=at < E, other=float("-inf"))
    most = tl.max(value, 0)
    total = 0.0
    for j in range(CHOSEN):
        best = tl.max(value, 0)
        # Where nothing is a number there is no such place: any will do, but a real one.
        chosen = tl.minimum(tl.min(tl.where(value == best, at, SIZE), 0), E - 1)
        value = tl.where(at == chosen, float("-inf"), value)
        share = tl.exp(best - most)
        total += share
        tl.store(index + t * CHOSEN + j, chosen.to(tl.int64))
        tl.store(weight + t * CHOSEN + j, share)
    tl.debug_barrier()
    for j in range(CHOSEN):
        tl.store(weight + t * CHOSEN + j, tl.load(weight + t * CHOSEN + j) / total)


@triton.jit
def largest(x, keys, values, ids, N, COUNT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """The COUNT largest of each block of BLOCK. FIRST: of x f32 [N], else of keys int64 [N] that a pass before left.
    LAST: there is one block, and its values f32 and ids int64 are wanted, else their keys [blocks, COUNT], which
    follow those that are read.

    A key sorts as its number does, its high half, and then by the place, low ones first. Programs: blocks.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    lowest = -9223372036854775808
    if FIRST:
        v = tl.load(x + at, mask=at < N, other=0.0)
        bits = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
        key = tl.where(at < N, key, lowest)
    else:
        key = tl.load(keys + at, mask=at < N, other=lowest)
    if COUNT == 1:
        key = tl.max(key, 0) + tl.zeros([1], tl.int64)
        rank = tl.arange(0, 1)
    else:
        key = tl.sort(key, descending=True)
        rank = tl.arange(0, BLOCK)
    kept = rank < COUNT
    if LAST:
        ordered = (key >> 32).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        tl.store(values + rank, bits.to(tl.float32, bitcast=True), mask=kept)
        tl.store(ids + rank, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=kept)
    else:
        out = keys if FIRST else keys + N
        tl.store(out + block * COUNT + rank, key, mask=kept)
