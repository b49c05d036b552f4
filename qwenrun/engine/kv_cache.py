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
        self._attention = bind("attention", k.device.type, Weight.plain(k).spec)
        self._decode_attention = bind("decode_attention", k.device.type, Weight.plain(k).spec)

    def attend(self, start: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k, v f32 [T, Hkv, D] at rows start.., attend with q [T, Hq, D] to rows 0..start+T-1."""
        end = start + k.shape[0]
        self.k[start:end] = k
        self.v[start:end] = v
        return self._attention(q, self.k[:end], self.v[:end], scale)

    def attend_at(self, place: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The same for one token at row place, i64 [1] on the device, which the host need not know."""
        return self._decode_attention(q, k, v, self.k, self.v, place, scale)


class Int8KV:
    """k, v: int8 [ctx, Hkv, D] with scales float16 [ctx, Hkv], one per head and token.

    The codec is that of the weights: a head's D numbers are one block, scaled by their largest magnitude.
    """

    def __init__(self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        self.spec = BlockSpec("int8", block=k.shape[-1], scale="f16")
        self.k, self.v, self.k_scale, self.v_scale = k, v, k_scale, v_scale
        device = k.device.type
        self._attention = bind("attention", device, self.spec)
        self._decode_attention = bind("decode_attention", device, self.spec)
        self._encode = bind("encode", device, self.spec)

    def attend(self, start: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As PlainKV's; keys and values are decoded a block of rows at a time, where the kernel reads them."""
        end = start + k.shape[0]
        for codes, scales, values in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            encoded = self._encode(values, self.spec)
            codes[start:end] = encoded.codes
            scales[start:end] = encoded.scales.squeeze(-1)
        return self._attention(q, *self.rows(end), scale)

    def attend_at(self, place: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As PlainKV's."""
        return self._decode_attention(q, k, v, *self.rows(self.k.shape[0]), place, scale)

    def rows(self, end: int) -> tuple[Weight, Weight]:
        """Keys and values 0..end-1 as stacks of matrices [Hkv, D], views."""
        groups, size = self.k.shape[1:]
        keys = Weight(self.spec, groups, size, self.k[:end], self.k_scale[:end, :, None])
        return keys, Weight(self.spec, groups, size, self.v[:end], self.v_scale[:end, :, None])
