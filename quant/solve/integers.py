"""Scales for INT4 and INT8: trial scales around the largest magnitude; `ops.fit` takes the best and improves it."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.ops import fit
from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.solve.blocks import Solved, inverse_or_zero

# The largest magnitude is put at code LIMIT / shrink: below 1, it is clipped and the rest is finer.
INT4_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
INT8_SHRINK = (1.0, 0.985)
AFFINE_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
F16_MAX = 65504.0


def solve_symmetric(blocks: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Solved:
    """INT4 or INT8 without zero points: blocks float32 [block, n]."""
    low, high = (-8.0, 7.0) if spec.codes == "int4" else (-127.0, 127.0)
    magnitude = blocks.abs().amax(0)
    starts = torch.stack(_symmetric_starts(blocks, magnitude, spec.codes))
    scales, codes, _ = fit(blocks, starts, _f16(magnitude / high), low, high)
    if spec.codes == "int8":
        return Solved(codes.to(torch.int8), scales)
    return Solved(codes.add_(8.0).to(torch.uint8), scales)


def solve_affine(blocks: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Solved:
    """INT4 with zero points: blocks float32 [block, n].

    The symmetric candidates are among those tried (with 8 for the zero), so a zero point is never a loss.
    """
    low, high = blocks.amin(0).clamp_(max=0), blocks.amax(0).clamp_(min=0)
    starts = _symmetric_starts(blocks, torch.maximum(high, -low), spec.codes)
    zeros = [torch.full_like(low, 8.0)] * len(starts)
    for shrink in AFFINE_SHRINK:
        start = (high - low) / 15 * shrink
        starts.append(start)
        # Shrunk about the middle of the range; zero itself stays a code.
        zeros.append((-(low + high) / 2 * inverse_or_zero(start) + 7.5).round_().clamp_(0, 15))
    plain = _f16((high - low) / 15)
    plain_zero = torch.where(plain > 0, -low / plain, 0.0).round_().clamp_(0, 15)
    scales, codes, zero = fit(blocks, torch.stack(starts), plain, 0.0, 15.0, torch.stack(zeros), plain_zero)
    assert zero is not None
    return Solved(codes.to(torch.uint8), scales, zero.to(torch.uint8))


def _symmetric_starts(blocks: Tensor, magnitude: Tensor, codes: str) -> list[Tensor]:
    """Scales to try, [n]: the largest magnitude at the last code or, shrunk, somewhat beyond it."""
    if codes == "int8":
        return [magnitude / 127.0 * shrink for shrink in INT8_SHRINK]
    # -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
    extreme = torch.where(blocks.amax(0) == magnitude, magnitude, -magnitude)
    return [extreme / -8.0 * shrink for shrink in INT4_SHRINK] + [magnitude / 7.0 * s for s in INT4_SHRINK[:3]]


def _f16(scale: Tensor) -> Tensor:
    """Rounded to float16, as float32."""
    return scale.clamp(-F16_MAX, F16_MAX).to(torch.float16).float()
