"""A matrix encoded with scales chosen by error search (`kernels.ops.fit`), and what that lost.

Never worse than the plain rule (largest magnitude to largest code) on any block, for that rule's result is among
those tried. Knows nothing of files and names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwenrun.kernels.ops import decode, encode, fit
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant.formats import Format

# Raised when the same matrix is encoded to other bytes than before: half a pack is not gone on with then.
REVISION = 2


@dataclass(frozen=True, slots=True)
class Solved:
    """A matrix encoded: the sums of its values' squares and of its errors', and how many rows decode to zeros."""

    weight: Weight
    signal: float
    noise: float
    zero_rows: int


def tensor_scale_of(spec: BlockSpec, magnitudes: Tensor) -> Tensor | None:
    """The tensor scales of a matrix whose groups of rows have the largest magnitudes `magnitudes` (f32 [T]).

    They put the largest block scale at E4M3's largest value: amax / (448 * 6). None if the format has none.
    """
    return magnitudes / (448.0 * 6.0) if spec.tensor_scale else None


def solve(
    form: Format,
    values: Tensor,
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
    tile: bool = False,
) -> Solved:
    """Encode `values` (float32 [R, C], finite) with the best of `form`'s scales.

    tensor_scale: float32 [T], T a divisor of R, for formats that have one; row r belongs to number r * T // R.
    importance: float32 [C], what an error in each column counts. tile: the result is in tiles.
    """
    # Rows in float32, which is fast, their sums in float64, which is exact enough for billions of values.
    signal = torch.linalg.vector_norm(values, dim=-1).double().square_()
    if form.spec.plain:
        weight = encode(values, form.spec)
        noise = (weight.codes.float() - values).square_().sum(-1)
    else:
        weight, noise = fit(values, replace(form.spec, tile=tile), form.trials, tensor_scale, importance)
    return Solved(weight, signal.sum().item(), noise.sum(dtype=torch.float64).item(), _zero_rows(weight, signal, noise))


def _zero_rows(weight: Weight, signal: Tensor, noise: Tensor) -> int:
    """How many rows decode to zeros: looked at are those that lost much of what they were, or were nothing."""
    count, group = 0, weight.spec.group
    for start in (noise >= 0.5 * signal).nonzero().flatten().div(group, rounding_mode="floor").unique().tolist():
        values = decode(weight.row_range(start * group, (start + 1) * group))
        count += int((values == 0).all(-1).sum())
    return count
