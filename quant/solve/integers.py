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
AFFINE_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
F16_MAX = 65504.0


def solve_symmetric(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Weight:
    """INT4 or INT8 without zero points: values float32 [R, C]."""
    blocks = values.unflatten(1, (-1, spec.block))
    low, high = (-8.0, 7.0) if spec.codes == "int4" else (-127.0, 127.0)
    search = _Search(blocks)
    for start in _symmetric_starts(blocks, spec.codes):
        search.try_codes(search.scaled(start).clamp_(low, high))
    return _better(values, spec, search.scales(), None)


def solve_affine(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Weight:
    """INT4 with zero points: values float32 [R, C].

    The symmetric candidates are among those tried (with 8 for the zero), so a zero point is never a loss.
    """
    blocks = values.unflatten(1, (-1, spec.block))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    search = _Search(blocks)
    eight = torch.full_like(low, 8.0)
    for start in _symmetric_starts(blocks, spec.codes):
        search.try_codes(search.scaled(start).clamp_(-8.0, 7.0), eight)
    for shrink in AFFINE_SHRINK:
        start = (high - low) / 15 * shrink
        inverse = torch.where(start > 0, 1 / start, 0.0)
        # Shrunk about the middle of the range; zero itself stays a code.
        zero = (-(low + high) / 2 * inverse + 7.5).round().clamp(0, 15)
        below = -zero[..., None]
        search.try_codes(torch.clamp(search.scaled(start), below, below + 15), zero)
    return _better(values, spec, search.scales(), search.zeros.to(torch.uint8))


def _symmetric_starts(blocks: Tensor, codes: str) -> list[Tensor]:
    """Scales to try, [R, B]: the largest magnitude at the last code or, shrunk, somewhat beyond it."""
    largest, smallest = blocks.amax(-1), blocks.amin(-1)
    magnitude = torch.maximum(largest, -smallest)
    if codes == "int8":
        return [magnitude / 127.0 * shrink for shrink in INT8_SHRINK]
    # -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
    extreme = torch.where(largest > -smallest, largest, smallest)
    return [extreme / -8.0 * shrink for shrink in INT4_SHRINK] + [magnitude / 7.0 * s for s in INT4_SHRINK[:3]]


class _Search:
    """The best of the codes tried for each block, and the scale that fits them."""

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks
        self._scratch = torch.empty_like(blocks)
        shape = blocks.shape[:-1]
        self._gain, self._scale = torch.zeros(shape), torch.zeros(shape)
        self.zeros = torch.full(shape, 8.0)

    def scaled(self, scale: Tensor) -> Tensor:
        """The blocks divided by their scales and rounded; the next call uses the same memory."""
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        return torch.mul(self._blocks, inverse[..., None], out=self._scratch).round_()

    def try_codes(self, codes: Tensor, zero: Tensor | None = None) -> None:
        """codes: float32, whole numbers, their zero point already taken off."""
        cross = torch.einsum("rbk,rbk->rb", self._blocks, codes)
        square = torch.einsum("rbk,rbk->rb", codes, codes)
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > self._gain
        self._gain = torch.where(better, gain, self._gain)
        self._scale = torch.where(better, cross / square, self._scale)
        if zero is not None:
            self.zeros = torch.where(better, zero, self.zeros)

    def scales(self) -> Tensor:
        """float16 [R, B]."""
        return self._scale.clamp(-F16_MAX, F16_MAX).to(torch.float16)


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
