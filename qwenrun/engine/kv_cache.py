"""Keys and values of one sequence in one attention layer: as BF16 or float32 rows, or as INT8 with a scale.

Memory is given from outside (`state` allocates it once). Knows no model and no tokens: rows are written and
read by number, and rows behind the last written one hold whatever was there.
"""

from __future__ import annotations

from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight


class PlainKV:
    """k, v: [ctx, Hkv, D] in bf16 or f32; what is written is rounded to that type."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v f32 [T, Hkv, D] at rows start..; return rows 0..start+T-1 as views."""
        end = start + k.shape[0]
        self.k[start:end] = k
        self.v[start:end] = v
        return self.k[:end], self.v[:end]
