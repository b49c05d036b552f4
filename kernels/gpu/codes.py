"""Triton: what codes mean. Codes and scales of every stored format as float32, by moving bits.

No fp8 or fp4 type of the hardware is used, so every card from sm_80 on computes the same, and so does Triton's
interpreter. Products of codes with rounded activations (`rounded`) are of integers: four bytes at a time by the card's
instruction for that, one by one in the interpreter, which knows no assembly. The kinds are numbered as in
kernels/cpu/csrc/matrix.h. Knows no matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(raw, KIND: tl.constexpr):
    """The float32 of a scale's bits as they were loaded: uint16 of float16 (0), uint8 of E4M3 (1) or of E8M0 (2)."""
    bits = raw.to(tl.int32)
    if KIND == 0:
        return raw.to(tl.float16, bitcast=True).to(tl.float32)
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
def number(word, SHIFT: tl.constexpr, KIND: tl.constexpr, LESS: tl.constexpr):
    """The number f32 that bits SHIFT..SHIFT+3 of an int32 word stand for: 0..15 less LESS for int4 (0), the E2M1 number
    (2)."""
    if KIND == 0:
        # 2^23 plus an integer below 2^23 has that integer's bits in its mantissa: a code where it is, or 12 bits lower.
        if SHIFT > 16:
            return less_magic((word >> 12) & (15 << (SHIFT - 12)), SHIFT - 12, LESS)
        else:
            return less_magic(word & (15 << SHIFT), SHIFT, LESS)
    else:
        # Sign, exponent and mantissa at a float32's place are 2^-126 of the number. -2^31 is the sign bit.
        bits = (moved(word, 22 - SHIFT) & 0x01C00000) | (moved(word, 28 - SHIFT) & -2147483648)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def less_magic(bits, SHIFT: tl.constexpr, LESS: tl.constexpr):
    """bits int32, a code from bit SHIFT on and nothing else, as a float32 less LESS."""
    unit: tl.constexpr = 1 / (1 << SHIFT)
    magic: tl.constexpr = 8388608 / (1 << SHIFT) + LESS
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) * unit - magic


@triton.jit
def whole_numbers(high, low):
    """Activations int32 [.., .., 4] of words of high and of low bytes [.., ..]: 256 high + low, both -128..127."""
    up = 24 - 8 * tl.arange(0, 4)[None, None, :]
    return ((high[:, :, None] << up) >> 24) * 256 + ((low[:, :, None] << up) >> 24)


@triton.jit
def half_steps(bits):
    """Twice the E2M1 number of an int32's lowest four bits: an integer in -12..12."""
    mantissa, exponent = bits & 1, (bits >> 1) & 3
    size = tl.where(exponent == 0, mantissa, (mantissa + 2) << tl.maximum(exponent - 1, 0))
    return tl.where((bits & 8) != 0, -size, size)


@triton.jit
def dot_plainly(word, a_high, b_high, a_low, b_low, KIND: tl.constexpr):
    """`dot8` without assembly."""
    j = tl.arange(0, 4)[None, None, :]
    first, second = whole_numbers(a_high, a_low), whole_numbers(b_high, b_low)
    if KIND == 0:
        low, high = ((word[:, :, None] >> (8 * j)) & 15) - 8, ((word[:, :, None] >> (8 * j + 4)) & 15) - 8
        return tl.sum((low * first + high * second) * 16, 2)
    else:
        low, high = half_steps(word[:, :, None] >> (4 * j)), half_steps(word[:, :, None] >> (16 + 4 * j))
        return tl.sum(low * first + high * second, 2)


# Bytes of the codes, in two words, to be multiplied with the activations' high bytes, then with their low ones.
_DOT = """
    dp4a.s32.s32 sum, first, $2, 0;
    dp4a.s32.s32 sum, second, $3, sum;
    shl.b32 sum, sum, 8;
    dp4a.s32.s32 sum, first, $4, sum;
    dp4a.s32.s32 $0, second, $5, sum;
    }"""
# 16 (code - 8): a code in the upper four bits, its top bit turned. 0x6A is (a & b) ^ c.
DOT_INT4 = tl.constexpr(
    """{
    .reg .b32 first, second, sum;
    shl.b32 first, $1, 4;
    lop3.b32 first, first, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 second, $1, 0xF0F0F0F0, 0x80808080, 0x6A;"""
    + _DOT
)
# Looked up, those of positive and of negative numbers; bit 3 of a code says which.
DOT_E2M1 = tl.constexpr(
    """{
    .reg .b32 at, pick, plus, minus, first, second, sum;
    and.b32 at, $1, 0x77777777;
    shr.u32 pick, $1, 1;
    lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 plus, 0x03020100, 0x0C080604, at;
    prmt.b32 minus, 0xFDFEFF00, 0xF4F8FAFC, at;
    prmt.b32 first, plus, minus, pick;
    shr.u32 at, at, 16;
    shr.u32 pick, pick, 16;
    prmt.b32 plus, 0x03020100, 0x0C080604, at;
    prmt.b32 minus, 0xFDFEFF00, 0xF4F8FAFC, at;
    prmt.b32 second, plus, minus, pick;"""
    + _DOT
)


@triton.jit
def dot8(word, a_high, b_high, a_low, b_low, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int32: the codes of a word times eight activations, as `rounded` gives them: 16 (code - 8) times an activation
    for int4 (0), 2 times an E2M1 number times it (2). All are broadcast."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            DOT_INT4 if KIND == 0 else DOT_E2M1, "=r,r,r,r,r,r", [word, a_high, b_high, a_low, b_low],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return dot_plainly(word, a_high, b_high, a_low, b_low, KIND)


@triton.jit
def eight_int4(word, less):
    """The eight int4 codes of a word less a number, bfloat16, by assembly. less int32: the bits of -(128 + that number)
    as bfloat16, twice."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, one;
        mov.b32 one, 0x3F803F80;
        shr.u32 b, $8, 4;
        shr.u32 c, $8, 8;
        shr.u32 d, $8, 12;
        lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 a, a, one, $9;
        fma.rn.bf16x2 b, b, one, $9;
        fma.rn.bf16x2 c, c, one, $9;
        fma.rn.bf16x2 d, d, one, $9;
        mov.b32 {$0, $2}, a;
        mov.b32 {$4, $6}, b;
        mov.b32 {$1, $3}, c;
        mov.b32 {$5, $7}, d;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [word, less], dtype=(tl.int16,) * 8, is_pure=True, pack=1,
    )  # fmt: skip
