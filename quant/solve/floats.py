"""Scales for NVFP4: E4M3 codes around the one that puts a block's largest magnitude at 6, and at 4.

A block scale is one of 127 numbers, so the neighbours are tried one by one. Anchoring the largest value at 4
instead of 6 wins where the rest of a block lies where E2M1's grid is fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.ops import encode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

NEIGHBOURS_OF_6 = (-2, -1, 0, 1, 2)
NEIGHBOURS_OF_4 = (-1, 0, 1)
LARGEST_CODE = 126  # 448; 127 is NaN


def solve_nvfp4(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None = None) -> Weight:
    """values float32 [R, C]; tensor_scale float32 [R], each row's own."""
    assert tensor_scale is not None
    per_row = tensor_scale[:, None]
    normed = torch.where(per_row > 0, values / per_row, 0.0)
    blocks = normed.unflatten(1, (-1, spec.block))
    largest = blocks.abs().amax(-1)
    # The plain rule first: a later candidate must be strictly better to take its place.
    best_code = _e4m3_bits(largest / 6.0)
    best_error = _error(blocks, best_code)
    for anchor, neighbours in ((6.0, NEIGHBOURS_OF_6), (4.0, NEIGHBOURS_OF_4)):
        centre = _e4m3_bits(largest / anchor).to(torch.int16)
        for offset in neighbours:
            code = (centre + offset).clamp(0, LARGEST_CODE).to(torch.uint8)
            error = _error(blocks, code)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_code = torch.where(better, code, best_code)
    return encode(values, spec, scales=best_code, tensor_scale=tensor_scale)


def _e4m3_bits(scales: Tensor) -> Tensor:
    return scales.clamp(0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def _error(blocks: Tensor, code: Tensor) -> Tensor:
    """Squared error of each block with the scale of bit pattern `code`; [R, blocks]."""
    scale = code.view(torch.float8_e4m3fn).float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    x = blocks * inverse[..., None]
    magnitude = x.abs()
    # E2M1's grid has steps of 1/2 below 2, 1 below 4, 2 up to 6; rounding half to even on each agrees with
    # rounding half to even on codes.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    error = ((magnitude / step).round_().mul_(step)).clamp_(max=6.0).sub_(magnitude)
    return torch.einsum("rbk,rbk->rb", error, error) * scale.square()
