"""What the solvers share: their result, and a sum over blocks that rounds the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Solved:
    """n blocks encoded. codes: [block, n], one a byte, as the spec stores them (uint8, int8 for int8); scales: [n]
    as stored (float16, or uint8 bit patterns); zeros: uint8 [n], or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def sum_blocks(terms: Tensor) -> Tensor:
    """The sums of the columns of `terms` [block, n], which is overwritten: halves are added until one row is left.

    torch.sum groups its additions by the machine's vector width and a column's place; this does not.
    """
    count = terms.shape[0]
    while count > 1:
        half = (count + 1) // 2
        terms[: count - half].add_(terms[half:count])
        count = half
    return terms[0].clone()


def inverse_or_zero(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0."""
    return torch.where(scale != 0, 1 / scale, 0.0)
