"""Scales for INT4 and INT8: candidates around the largest magnitude, each improved by least squares.

Given codes q, the scale that fits values w best is <w, q> / <q, q>, and the error left is
|w|^2 - <w, q>^2 / <q, q>. So the candidate with the largest <w, q>^2 / <q, q> wins, its scale is rounded to
float16, and the codes are rounded once more onto that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.ops import decode, encode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

# The largest magnitude is put at code LIMIT / shrink: below 1, it is clipped and the rest is finer.
INT4_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
INT8_SHRINK = (1.0, 0.985)
AFFINE_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
F16_MAX = 65504.0


def solve_symmetric(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Weight:
    """INT4 or INT8 without zero points: values float32 [R, C]."""
    blocks = values.unflatten(1, (-1, spec.block))
    low, high = (-8.0, 7.0) if spec.codes == "int4" else (-127.0, 127.0)
    largest, smallest = blocks.amax(-1), blocks.amin(-1)
    magnitude = torch.maximum(largest, -smallest)
    if spec.codes == "int4":
        # -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
        extreme = torch.where(largest > -smallest, largest, smallest)
        starts = [extreme / -8.0 * shrink for shrink in INT4_SHRINK]
        starts += [magnitude / 7.0 * shrink for shrink in INT4_SHRINK[:3]]
    else:
        starts = [magnitude / 127.0 * shrink for shrink in INT8_SHRINK]
    best_gain = torch.zeros_like(magnitude)
    best_scale = magnitude / high
    scratch = torch.empty_like(blocks)
    for start in starts:
        inverse = torch.where(start != 0, 1 / start, 0.0)
        torch.mul(blocks, inverse[..., None], out=scratch)
        scratch.round_().clamp_(low, high)
        cross = torch.einsum("rbk,rbk->rb", blocks, scratch)
        square = torch.einsum("rbk,rbk->rb", scratch, scratch)
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, cross / square, best_scale)
    return _better(values, spec, best_scale.clamp(-F16_MAX, F16_MAX).to(torch.float16), None)


def solve_affine(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Weight:
    """INT4 with zero points: values float32 [R, C]."""
    blocks = values.unflatten(1, (-1, spec.block))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best_gain = torch.zeros_like(low)
    best_scale = (high - low) / 15
    best_zero = torch.zeros_like(low)
    for shrink in AFFINE_SHRINK:
        start = (high - low) / 15 * shrink
        inverse = torch.where(start > 0, 1 / start, 0.0)
        # Shrunk about the middle of the range; zero itself stays a code.
        zero = (-(low + high) / 2 * inverse + 7.5).round().clamp(0, 15)
        q = ((blocks * inverse[..., None]).round() + zero[..., None]).clamp(0, 15) - zero[..., None]
        cross = torch.einsum("rbk,rbk->rb", blocks, q)
        square = torch.einsum("rbk,rbk->rb", q, q)
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, cross / square, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    scale = best_scale.clamp(-F16_MAX, F16_MAX).to(torch.float16)
    return _better(values, spec, scale, best_zero.to(torch.uint8))


def _better(values: Tensor, spec: BlockSpec, scales: Tensor, zeros: Tensor | None) -> Weight:
    """The given scales, but the plain rule's in blocks where that turns out better after all rounding."""
    searched = encode(values, spec, scales=scales, zeros=zeros)
    plain = encode(values, spec)
    worse = _block_error(values, plain) < _block_error(values, searched)
    if not worse.any():
        return searched
    assert plain.scales is not None
    scales = torch.where(worse, plain.scales, scales)
    if zeros is not None:
        assert plain.zeros is not None
        unpacked = torch.stack([plain.zeros & 15, plain.zeros >> 4], dim=-1).flatten(-2)[:, : zeros.shape[1]]
        zeros = torch.where(worse, unpacked, zeros)
    return encode(values, spec, scales=scales, zeros=zeros)


def _block_error(values: Tensor, weight: Weight) -> Tensor:
    """Squared error of each block, float32 [R, blocks]."""
    error = (decode(weight) - values).unflatten(1, (-1, weight.spec.block))
    return torch.einsum("rbk,rbk->rb", error, error)
