"""Scales for INT4 and INT8: candidates around the largest magnitude, each improved by least squares.

Given codes q, the scale that fits values w best is <w, q> / <q, q>, and the error left is
|w|^2 - <w, q>^2 / <q, q>. So the candidate with the largest <w, q>^2 / <q, q> wins, its scale is rounded to
float16, and the codes are rounded once more onto that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.solve.blocks import Solved, inverse_or_zero, sum_blocks

# The largest magnitude is put at code LIMIT / shrink: below 1, it is clipped and the rest is finer.
INT4_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
INT8_SHRINK = (1.0, 0.985)
AFFINE_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
F16_MAX = 65504.0


def solve_symmetric(blocks: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Solved:
    """INT4 or INT8 without zero points: blocks float32 [block, n]."""
    low, high = (-8.0, 7.0) if spec.codes == "int4" else (-127.0, 127.0)
    magnitude = blocks.abs().amax(0)
    search = _Search(blocks)
    for start in _symmetric_starts(blocks, magnitude, spec.codes):
        search.try_codes(search.scaled(start).clamp_(low, high))
    plain = _f16(magnitude / high)
    scales, codes = search.finish(plain, None, low, high)
    if spec.codes == "int8":
        return Solved(codes.to(torch.int8), scales)
    return Solved(codes.add_(8.0).to(torch.uint8), scales)


def solve_affine(blocks: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Solved:
    """INT4 with zero points: blocks float32 [block, n].

    The symmetric candidates are among those tried (with 8 for the zero), so a zero point is never a loss.
    """
    low, high = blocks.amin(0).clamp_(max=0), blocks.amax(0).clamp_(min=0)
    search = _Search(blocks)
    eight = torch.full_like(low, 8.0)
    for start in _symmetric_starts(blocks, torch.maximum(high, -low), spec.codes):
        search.try_codes(search.scaled(start).clamp_(-8.0, 7.0), eight)
    for shrink in AFFINE_SHRINK:
        start = (high - low) / 15 * shrink
        # Shrunk about the middle of the range; zero itself stays a code.
        zero = (-(low + high) / 2 * inverse_or_zero(start) + 7.5).round_().clamp_(0, 15)
        search.try_codes(search.scaled(start).clamp_(-zero, 15 - zero), zero)
    plain = _f16((high - low) / 15)
    step = plain.float()
    plain_zero = torch.where(step > 0, -low / step, 0.0).round_().clamp_(0, 15)
    scales, codes = search.finish(plain, plain_zero, 0.0, 15.0)
    return Solved(codes.to(torch.uint8), scales, search.zeros.to(torch.uint8))


def _symmetric_starts(blocks: Tensor, magnitude: Tensor, codes: str) -> list[Tensor]:
    """Scales to try, [n]: the largest magnitude at the last code or, shrunk, somewhat beyond it."""
    if codes == "int8":
        return [magnitude / 127.0 * shrink for shrink in INT8_SHRINK]
    # -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
    extreme = torch.where(blocks.amax(0) == magnitude, magnitude, -magnitude)
    return [extreme / -8.0 * shrink for shrink in INT4_SHRINK] + [magnitude / 7.0 * s for s in INT4_SHRINK[:3]]


def _f16(scale: Tensor) -> Tensor:
    return scale.clamp(-F16_MAX, F16_MAX).to(torch.float16)


class _Search:
    """The best of the codes tried for each block, and the scale that fits them."""

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks
        self._codes, self._terms = torch.empty_like(blocks), torch.empty_like(blocks)
        self._gain, self._scale = torch.zeros(blocks.shape[1]), torch.zeros(blocks.shape[1])
        self.zeros = torch.full((blocks.shape[1],), 8.0)

    def scaled(self, scale: Tensor) -> Tensor:
        """The blocks divided by their scales and rounded; the next call uses the same memory."""
        return torch.mul(self._blocks, inverse_or_zero(scale), out=self._codes).round_()

    def try_codes(self, codes: Tensor, zero: Tensor | None = None) -> None:
        """codes: float32, whole numbers, their zero point already taken off."""
        cross = sum_blocks(torch.mul(self._blocks, codes, out=self._terms))
        square = sum_blocks(torch.mul(codes, codes, out=self._terms))
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > self._gain
        self._gain = torch.maximum(gain, self._gain)
        self._scale = torch.where(better, cross / square, self._scale)
        if zero is not None:
            self.zeros = torch.where(better, zero, self.zeros)

    def finish(self, plain: Tensor, plain_zero: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
        """(scales float16 [n], codes float32 [block, n]): the best ones found, but the plain rule's scale
        (and zero) in blocks where that turns out better after all rounding.

        low, high: the codes' range; with zero points, that of codes their zero point is added to.
        """
        found, zeros = _f16(self._scale), None if plain_zero is None else self.zeros
        worse = self._error(plain, plain_zero, low, high) < self._error(found, zeros, low, high)
        found = torch.where(worse, plain, found)
        if plain_zero is not None:
            self.zeros = zeros = torch.where(worse, plain_zero, self.zeros)
        codes = self._rounded(found.float(), zeros, low, high)
        return found, codes

    def _rounded(self, step: Tensor, zero: Tensor | None, low: float, high: float) -> Tensor:
        codes = torch.div(self._blocks, torch.where(step != 0, step, torch.inf), out=self._codes).round_()
        if zero is not None:
            codes.add_(zero)
        return codes.clamp_(low, high)

    def _error(self, scale: Tensor, zero: Tensor | None, low: float, high: float) -> Tensor:
        step = scale.float()
        codes = self._rounded(step, zero, low, high)
        if zero is not None:
            codes.sub_(zero)
        error = codes.mul_(step).sub_(self._blocks)
        return sum_blocks(torch.mul(error, error, out=self._terms))
