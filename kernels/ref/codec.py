"""Encoding and decoding, generic over BlockSpec: code tables and three scale types, no format by name.

Pure torch, float32 arithmetic, any device. Knows nothing of how a good scale is found: without scales it
takes the largest magnitude of each block, which is the plain rule every better one is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qwenrun.kernels.spec import CODE_BITS, BlockSpec
from qwenrun.kernels.weight import Weight

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0
_PLAIN_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# The largest magnitude a block's codes can hold on both sides of zero.
CODE_MAX = {"int4": 7.0, "int8": 127.0, "e2m1": 6.0}


@cache
def _e2m1_table(device: torch.device) -> Tensor:
    """The value of each of the 16 codes; code 8 is -0."""
    positive = torch.tensor(E2M1_VALUES, device=device)
    return torch.cat([positive, -positive])


@cache
def _e2m1_midpoints(device: torch.device) -> Tensor:
    """Upper bounds, inclusive, of codes 0..6. A midpoint goes to its even neighbour: bounds above an odd code
    are lowered by one step of float32, so that the midpoint itself goes up."""
    values = torch.tensor(E2M1_VALUES, device=device)
    midpoints = (values[1:] + values[:-1]) / 2
    midpoints[1::2] = torch.nextafter(midpoints[1::2], torch.zeros((), device=device))
    return midpoints


@cache
def _e4m3_table(device: torch.device) -> Tensor:
    """The value of each E4M3 bit pattern (OCP 8-bit floating point, no infinities, 0x7F and 0xFF are NaN)."""
    code = torch.arange(256, device=device)
    sign = 1 - 2 * (code >> 7).float()
    exponent, mantissa = (code >> 3) & 15, (code & 7).float()
    subnormal = mantissa * 2.0**-9
    normal = (1 + mantissa / 8) * torch.exp2(exponent.float() - 7)
    value = sign * torch.where(exponent == 0, subnormal, normal)
    return torch.where((code & 127) == 127, torch.nan, value)


def e4m3_decode(bits: Tensor) -> Tensor:
    """uint8 bit patterns -> float32."""
    return _e4m3_table(bits.device)[bits.int()]


def e4m3_encode(values: Tensor) -> Tensor:
    """float32 -> uint8 bit patterns: nearest, ties to even, magnitudes above 448 become 448, NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e8m0_decode(bits: Tensor) -> Tensor:
    """uint8 exponents -> float32 powers of two 2^(bits - 127); 255 is NaN (OCP Microscaling Formats v1.0)."""
    return torch.where(bits == 255, torch.nan, torch.exp2(bits.float() - 127))


def e8m0_encode(values: Tensor) -> Tensor:
    """float32 >= 0 -> the exponent of the largest power of two not above it, 0 for zero."""
    exponent = torch.frexp(values).exponent - 1
    return torch.where(values > 0, exponent + 127, 0).clamp(0, 254).to(torch.uint8)


def decode_scales(spec: BlockSpec, scales: Tensor) -> Tensor:
    """Stored scales -> float32, same shape."""
    if spec.scale == "e4m3":
        return e4m3_decode(scales)
    if spec.scale == "e8m0":
        return e8m0_decode(scales)
    return scales.float()


def encode_scales(spec: BlockSpec, scales: Tensor) -> Tensor:
    """float32 scales -> as stored, nearest (E8M0: rounded down, as the OCP rule for block scales has it)."""
    if spec.scale == "e4m3":
        return e4m3_encode(scales)
    if spec.scale == "e8m0":
        return e8m0_encode(scales)
    limit = torch.finfo(torch.float16).max
    return scales.clamp(-limit, limit).to(torch.float16)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [..., n] -> bytes [..., ceil(n / 2)], the even one in the low nibble."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """bytes [..., ceil(count / 2)] -> uint8 codes [..., count]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :count]


def quantize_codes(spec: BlockSpec, scaled: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Values already divided by their scale -> codes, one uint8 (int8: one int8) each; nearest, saturating.

    scaled: float32 [...]; zeros: float32, broadcastable, for specs with zero points.
    """
    if spec.codes == "e2m1":
        magnitude = torch.bucketize(scaled.abs(), _e2m1_midpoints(scaled.device), out_int32=True)
        return (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    if spec.codes == "int8":
        return scaled.round().clamp(-127, 127).to(torch.int8)
    zero = 8.0 if zeros is None else zeros
    return (scaled.round() + zero).clamp(0, 15).to(torch.uint8)


def dequantize_codes(spec: BlockSpec, codes: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Unpacked codes -> float32 values before scaling."""
    if spec.codes == "e2m1":
        return _e2m1_table(codes.device)[codes.int()]
    if spec.codes == "int8":
        return codes.float()
    return codes.float() - (8.0 if zeros is None else zeros)


def _tensor_scale_rows(tensor_scale: Tensor, rows: int) -> Tensor:
    """float32 [..., T] -> [..., rows, 1, 1], each row's own."""
    per_row = tensor_scale.repeat_interleave(rows // tensor_scale.shape[-1], dim=-1)
    return per_row[..., None, None]


def encode(
    values: Tensor,
    spec: BlockSpec,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    tensor_scales: int = 1,
) -> Weight:
    """See `qwenrun.kernels.ops.encode`."""
    rows, cols = values.shape[-2:]
    if spec.tile:
        return encode(values, replace(spec, tile=False), scales, zeros, tensor_scale, tensor_scales).tiled()
    if spec.plain:
        return Weight.plain(values.to(_PLAIN_DTYPES[spec.codes]).contiguous())
    spec.parts(rows, cols, tensor_scales)  # refuses a block that does not divide the row
    blocks = values.float().unflatten(-1, (-1, spec.block))
    if spec.tensor_scale and tensor_scale is None:
        groups = values.float().abs().unflatten(-2, (tensor_scales, -1)).amax((-2, -1))
        limit = E4M3_MAX if spec.scale == "e4m3" else 1.0
        tensor_scale = groups / (limit * CODE_MAX[spec.codes])
    if tensor_scale is not None:
        per_row = _tensor_scale_rows(tensor_scale, rows)
        blocks = torch.where(per_row > 0, blocks / per_row, 0.0)
    if scales is None:
        if spec.zero:
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            scales = encode_scales(spec, (high - low) / 15)
            step = decode_scales(spec, scales)
            zeros = torch.where(step > 0, -low / step, 0.0).round().clamp(0, 15).to(torch.uint8)
        elif spec.scale == "e8m0":
            # The power of two that puts the largest value's exponent on the largest code's (4 for E2M1).
            scales = encode_scales(spec, blocks.abs().amax(-1) / 4.0)
        else:
            scales = encode_scales(spec, blocks.abs().amax(-1) / CODE_MAX[spec.codes])
    step = decode_scales(spec, scales)[..., None]
    zero = zeros.float()[..., None] if zeros is not None else None
    scaled = torch.where(step != 0, blocks / step, 0.0)
    codes = quantize_codes(spec, scaled, zero).flatten(-2)
    return Weight(
        spec,
        rows,
        cols,
        pack_nibbles(codes) if CODE_BITS[spec.codes] == 4 else codes,
        scales.contiguous(),
        pack_nibbles(zeros) if zeros is not None else None,
        tensor_scale,
    )


def decode(weight: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.decode`."""
    weight = weight.row_major()
    spec = weight.spec
    if spec.plain:
        return weight.codes.float()
    assert weight.scales is not None
    codes = weight.codes
    if CODE_BITS[spec.codes] == 4:
        codes = unpack_nibbles(codes, weight.cols)
    codes = codes.unflatten(-1, (-1, spec.block))
    zeros = None
    if weight.zeros is not None:
        zeros = unpack_nibbles(weight.zeros, weight.cols // spec.block).float()[..., None]
    values = dequantize_codes(spec, codes, zeros) * decode_scales(spec, weight.scales)[..., None]
    if weight.tensor_scale is not None:
        values = values * _tensor_scale_rows(weight.tensor_scale, weight.rows)
    return values.flatten(-2)
