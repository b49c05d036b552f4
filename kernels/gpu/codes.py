"""Triton: what codes mean. Codes and scales of every stored format as float32, by moving bits.

No fp8 or fp4 type of the hardware is used, so every card from sm_80 on computes the same, and so does Triton's
interpreter. The kinds are numbered as in kernels/cpu/csrc/matrix.h. Knows no matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(raw, KIND: tl.constexpr):
    """The float32 of a scale's bits as they were loaded: uint16 of float16 (0), uint8 of E4M3 (1) or of E8M0 (2)."""
    bits = raw.to(tl.int32)
    if KIND == 0:
        # Exponent and mantissa at a float32's place are 2^-112 of the number; infinities do not occur.
        size = ((bits & 0x7FFF) << 13).to(tl.float32, bitcast=True) * 5.192296858534828e33
        return tl.where((bits & 0x8000) != 0, -size, size)
    elif KIND == 1:
        # 2^-120 of it. 127 is not a number.
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        size = tl.where((bits & 0x7F) == 127, float("nan"), size)
        return tl.where((bits & 0x80) != 0, -size, size)
    else:
        # 2^(bits - 127); the smallest is no normal float32.
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def moved(word, BY: tl.constexpr):
    """word shifted left by BY, or right by -BY; what comes in at the top is for the caller to mask."""
    if BY >= 0:
        return word << BY
    else:
        return word >> (-BY)


@triton.jit
def nibble(word, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """The number that bits SHIFT..SHIFT+3 of an int32 word stand for: 0..15 for int4 (0), the E2M1 number (2)."""
    if KIND == 0:
        # 2^23 plus an integer below 2^23 has that integer's bits in its mantissa.
        bits = (moved(word, -SHIFT) & 15) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388608.0
    else:
        # Sign, exponent and mantissa at a float32's place are 2^-126 of the number. -2^31 is the sign bit.
        bits = (moved(word, 22 - SHIFT) & 0x01C00000) | (moved(word, 28 - SHIFT) & -2147483648)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
