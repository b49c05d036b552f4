"""Keys and values of one sequence in one attention layer: BF16 or float32 rows, or INT8 rows with scales.

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


class Int8KV:
    """k, v: int8 [ctx, Hkv, D] with scales float16 [ctx, Hkv], one per head and token.

    The codec is that of the weights: a head's D numbers are one block, scaled by their largest magnitude.
    """

    def __init__(self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        self.spec = BlockSpec("int8", block=k.shape[-1], scale="f16")
        self.k, self.v, self.k_scale, self.v_scale = k, v, k_scale, v_scale
        self._encode = bind("encode", k.device.type, self.spec)
        self._decode = bind("decode", k.device.type, self.spec)

    def write(self, start: int, k: Tensor, v: Tensor) -> tuple[Int8Rows, Int8Rows]:
        """Store k, v f32 [T, Hkv, D] at rows start..; return rows 0..start+T-1, decoded where they are read."""
        end = start + k.shape[0]
        for codes, scales, values in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            encoded = self._encode(values, self.spec)
            codes[start:end] = encoded.codes
            scales[start:end] = encoded.scales.squeeze(-1)
        return self._rows(self.k[:end], self.k_scale[:end]), self._rows(self.v[:end], self.v_scale[:end])

    def _rows(self, codes: Tensor, scales: Tensor) -> Int8Rows:
        return Int8Rows(codes, scales, self)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """int8 [S, Hkv, D] and their scales [S, Hkv] -> f32 [S, Hkv, D]."""
        return self._decode(Weight(self.spec, codes.shape[1], codes.shape[2], codes, scales[..., None]))


class Int8Rows:
    """Stands for the decoded f32 tensor [S, Hkv, D], of which the attention kernel reads a block at a time:
    only the rows of a slice are ever decoded."""

    __slots__ = ("_cache", "_codes", "_scales", "shape")

    def __init__(self, codes: Tensor, scales: Tensor, cache: Int8KV) -> None:
        self._codes, self._scales, self._cache = codes, scales, cache
        self.shape = codes.shape

    def __getitem__(self, rows: slice) -> Tensor:
        return self._cache.decode(self._codes[rows], self._scales[rows])
