"""The search for integer codes' scales: of several trial scales the one whose codes fit best, by least squares.

Given codes q, the scale that fits values w best is <w, q> / <q, q>, and the error left is |w|^2 - <w, q>^2 / <q, q>.
So the trial with the largest <w, q>^2 / <q, q> wins, its scale is rounded to float16, and the codes once more to it.
Only operations that IEEE 754 rounds correctly, and sums in an order of their own: the result is the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

F16_MAX = 65504.0


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


def fit(
    blocks: Tensor,
    starts: Tensor,
    plain: Tensor,
    low: float,
    high: float,
    zeros: Tensor | None = None,
    plain_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `qwenrun.kernels.ops.fit`."""
    codes, terms = torch.empty_like(blocks), torch.empty_like(blocks)
    best, scale = torch.zeros(blocks.shape[1]), torch.zeros(blocks.shape[1])
    zero = torch.full((blocks.shape[1],), 8.0) if zeros is not None else None
    for number, start in enumerate(starts):
        torch.mul(blocks, inverse_or_zero(start), out=codes).round_()
        if zeros is None:
            codes.clamp_(low, high)
        else:
            codes.clamp_(-zeros[number], 15 - zeros[number])
        cross = sum_blocks(torch.mul(blocks, codes, out=terms))
        square = sum_blocks(torch.mul(codes, codes, out=terms))
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > best
        best = torch.maximum(gain, best)
        scale = torch.where(better, cross / square, scale)
        if zero is not None and zeros is not None:
            zero = torch.where(better, zeros[number], zero)

    def rounded(step: Tensor, shift: Tensor | None) -> Tensor:
        torch.div(blocks, torch.where(step != 0, step, torch.inf), out=codes).round_()
        if shift is not None:
            codes.add_(shift)
        return codes.clamp_(low, high)

    def error(step: Tensor, shift: Tensor | None) -> Tensor:
        made = rounded(step, shift)
        if shift is not None:
            made.sub_(shift)
        off = made.mul_(step).sub_(blocks)
        return sum_blocks(torch.mul(off, off, out=terms))

    found = scale.clamp(-F16_MAX, F16_MAX).to(torch.float16).float()
    worse = error(plain, plain_zero) < error(found, zero)
    found = torch.where(worse, plain, found)
    if zero is not None and plain_zero is not None:
        zero = torch.where(worse, plain_zero, zero)
    return found.to(torch.float16), rounded(found, zero), zero
