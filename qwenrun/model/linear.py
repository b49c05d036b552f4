"""Linear: a stored matrix together with the kernel that multiplies by it, picked once when the model is bound.

Knows no tensor name and no layer.
"""

from __future__ import annotations

from torch import Tensor

from qwenrun.kernels.ops import linears
from qwenrun.kernels.weight import Weight


class Linear:
    """y = x W^T for W [rows, cols] in any stored format: x [T, cols] -> [T, rows], accumulated in float32."""

    __slots__ = ("_apply", "weight")

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self._apply = linears((weight,))

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)[0]
