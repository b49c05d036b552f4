"""Scales for NVFP4: E4M3 codes around the one that puts a block's largest magnitude at 6, and at 4.

A block scale is one of 127 numbers, so the neighbours are tried one by one. Anchoring the largest value at 4
instead of 6 (a scale of 4 or 5 codes more) wins where the rest of a block lies where E2M1's grid is fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.solve.blocks import Solved, inverse_or_zero, sum_blocks

# Codes to try, counted from the plain rule's: a later one must be strictly better to take its place. With +2, the
# least often chosen of -2..6 (0.2 % of the blocks of a Gaussian matrix), 0.002 dB would be gained.
OFFSETS = (0, -1, 1, -2, 3, 4, 5, 6)
LARGEST_CODE = 126  # 448; 127 is NaN
_EXPONENT = 0x7F800000  # of a float32
_TO_EVEN = 1.5 * 2.0**23  # adding and subtracting it rounds to whole numbers, halves to even


def solve_nvfp4(blocks: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Solved:
    """blocks float32 [block, n]; tensor_scale float32 [n], each block's own."""
    assert tensor_scale is not None
    normed = blocks / torch.where(tensor_scale > 0, tensor_scale, torch.inf)
    magnitude = normed.abs()
    grid = _Grid(magnitude)
    centre = (magnitude.amax(0) / 6.0).clamp_(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
    best_code, best_error = centre, grid.error(_value(centre))
    for offset in OFFSETS[1:]:
        code = (centre + offset).clamp_(0, LARGEST_CODE)
        error = grid.error(_value(code))
        better = error < best_error
        best_error = torch.minimum(error, best_error)
        best_code = torch.where(better, code, best_code)
    codes = grid.codes(_value(best_code)).to(torch.uint8)
    return Solved(codes.add_((normed < 0).to(torch.uint8), alpha=8), best_code.to(torch.uint8))


def _value(code: Tensor) -> Tensor:
    """What an E4M3 code stands for, float32."""
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()


class _Grid:
    """Rounds magnitudes [block, n], divided by a scale, onto E2M1's 0 0.5 1 1.5 2 3 4 6."""

    def __init__(self, magnitude: Tensor) -> None:
        self._magnitude = magnitude
        self._scaled, self._power, self._near = (torch.empty_like(magnitude) for _ in range(3))

    def _round(self) -> Tensor:
        """The grid's values nearest to `_scaled`. Its steps are 1/2 below 2, 1 below 4, 2 up to 6: half the power of
        two below a value, at least 1/2. Halves go to the even multiple, which is also the even code."""
        torch.bitwise_and(self._scaled.view(torch.int32), _EXPONENT, out=self._power.view(torch.int32))
        step = self._power.clamp_(min=1.0).mul_(0.5 * _TO_EVEN)
        return torch.add(self._scaled, step, out=self._near).sub_(step).clamp_(max=6.0)

    def error(self, scale: Tensor) -> Tensor:
        """Squared error of each block, [n]."""
        torch.mul(self._magnitude, inverse_or_zero(scale), out=self._scaled)
        error = self._round().sub_(self._scaled)
        # A scale of 0 leaves everything: counted in the unit of the values themselves.
        lost = sum_blocks(torch.mul(error, error, out=self._power)) * scale.square()
        return torch.where(scale > 0, lost, torch.inf)

    def codes(self, scale: Tensor) -> Tensor:
        """Codes 0..7, float32 [block, n]: twice the value up to 2, then fewer to a unit."""
        torch.div(self._magnitude, torch.where(scale > 0, scale, torch.inf), out=self._scaled)
        near = self._round()
        return torch.minimum(torch.minimum(near * 2, near + 2), near * 0.5 + 4)
