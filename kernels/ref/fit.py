"""The search for scales: for each block the scale, of those tried, whose codes leave the least squared error.

Integer codes: given codes q, the scale that fits values w best is <w, q> / <q, q>, and the error left is |w|^2 -
<w, q>^2 / <q, q>. So the trial with the largest <w, q>^2 / <q, q> wins, its scale is rounded to float16, and the codes
once more to it. The plain rule (largest magnitude to largest code) is taken where it is better after all rounding.

E2M1: a block scale is one of 127 numbers, so the neighbours of the plain rule's are tried one by one.

Works on [block, n], each of n blocks a column: a block's scale is then a row vector, and every step a long run over
memory. Only operations that IEEE 754 rounds correctly are used, and sums in an order of their own, so the result
depends on the values alone: not on threads, on how a matrix is cut into rows, or on the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwenrun.kernels.ref.codec import pack_nibbles
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

F16_MAX = 65504.0
# Values worked on at a time: enough that the steps cost more than calling them, few enough to be near the core.
CHUNK_VALUES = 1 << 19
LARGEST_SCALE = 126  # as an E4M3 code: 448; 127 is NaN
_SMALLEST = torch.finfo(torch.float32).tiny  # whose inverse is finite
_EXPONENT = 0x7F800000  # of a float32
_TO_EVEN = 1.5 * 2.0**23  # adding and subtracting it rounds to whole numbers, halves to even

# codes [block, n] as they are stored, a byte each; scales [n] as stored; zeros uint8 [n] or None; noise: [n]
_Found = tuple[Tensor, Tensor, Tensor | None, Tensor]


def sum_blocks(terms: Tensor) -> Tensor:
    """The sums of the columns of `terms` [block, n]: every fourth row is added up from the top, then the four sums.

    torch.sum groups its additions by the machine's vector width and a column's place; this does not.
    """
    first, *others = terms.split(4)
    four = first.clone()
    for part in others:
        four[: len(part)].add_(part)
    count = len(four)
    while count > 1:
        half = (count + 1) // 2
        four[: count - half].add_(four[half:count])
        count = half
    return four[0]


def inverse_or_zero(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale that has no finite inverse."""
    return torch.where(scale.abs() >= _SMALLEST, 1 / scale, 0.0)


def fit(
    values: Tensor,
    spec: BlockSpec,
    trials: Sequence[tuple[float, float]],
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Weight, Tensor]:
    """See `qwenrun.kernels.ops.fit`."""
    rows, cols = values.shape
    plain = replace(spec, tile=False)
    spec.parts(rows, cols, 1 if tensor_scale is None else len(tensor_scale))  # refuses what does not divide
    per_row = None if tensor_scale is None else tensor_scale.repeat_interleave(rows // len(tensor_scale))
    blocks_a_row = cols // spec.block
    pieces: dict[str, list[Tensor]] = {"codes": [], "scales": [], "zeros": []}
    noise = []
    step = max(1, CHUNK_VALUES // cols)
    for start in range(0, rows, step):
        piece = values[start : start + step].float()
        blocks = piece.reshape(-1, spec.block).t().contiguous()
        weights = None
        if importance is not None:
            weights = importance.float().view(-1, spec.block).t().repeat(1, len(piece))
        if per_row is None:
            found = _integers(blocks, spec, trials, weights)
        else:
            scale = per_row[start : start + step].repeat_interleave(blocks_a_row)
            found = _e2m1(blocks, trials, scale, weights)
        codes, scales, zeros, lost = found
        codes = codes.t().reshape(len(piece), -1)
        pieces["codes"].append(codes if spec.codes == "int8" else pack_nibbles(codes))
        pieces["scales"].append(scales.view(len(piece), -1))
        if zeros is not None:
            pieces["zeros"].append(pack_nibbles(zeros.view(len(piece), -1)))
        lost = lost.view(len(piece), -1)
        total = lost[:, 0].clone()
        for block in range(1, blocks_a_row):
            total += lost[:, block]
        noise.append(total)
    joined = {name: torch.cat(made) for name, made in pieces.items() if made}
    weight = Weight(plain, rows, cols, tensor_scale=tensor_scale, **joined)
    return (weight.tiled() if spec.tile else weight), torch.cat(noise)


def _integers(blocks: Tensor, spec: BlockSpec, trials: Sequence[tuple[float, float]], weights: Tensor | None) -> _Found:
    """INT4, with or without zero points, and INT8."""
    least, most, middle = (-127.0, 127.0, 0.0) if spec.codes == "int8" else (-8.0, 7.0, 8.0)
    top, bottom = blocks.amax(0), blocks.amin(0)
    magnitude = torch.maximum(top, -bottom)
    # -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
    extreme = torch.where(top == magnitude, magnitude, -magnitude)
    top, bottom = top.clamp(min=0), bottom.clamp(max=0)
    codes, terms, by = (torch.empty_like(blocks) for _ in range(3))

    def rounded(inverse: Tensor, zero: Tensor) -> Tensor:
        torch.mul(blocks, inverse, out=codes)
        if spec.zero:
            return codes.clamp_(-zero, 15 - zero).round_()
        return codes.clamp_(least, most).round_()

    def error(step: Tensor, zero: Tensor, weighted: bool = True) -> Tensor:
        off = rounded(inverse_or_zero(step), zero).mul_(step).sub_(blocks)
        off.mul_(off)
        return sum_blocks(off.mul_(weights) if weights is not None and weighted else off)

    best, scale = torch.zeros_like(magnitude), torch.zeros_like(magnitude)
    centre = torch.full_like(magnitude, middle)
    zero = centre
    for code, shrink in trials:
        shift = centre
        if spec.zero and code > 8:  # the range from the smallest to the largest value
            start = (top - bottom) / code * shrink
            # Shrunk about the middle of the range; zero itself stays a code.
            shift = (-(bottom + top) / 2 * inverse_or_zero(start) + 7.5).clamp_(0, 15).round_()
        else:
            start = (extreme if code < 0 else magnitude) / code * shrink
        made = rounded(inverse_or_zero(start), shift)
        counted = made if weights is None else torch.mul(made, weights, out=by)
        cross = sum_blocks(torch.mul(counted, blocks, out=terms))
        square = sum_blocks(torch.mul(counted, made, out=terms))
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, cross / square, scale)
        zero = torch.where(better, shift, zero)
    found = _f16(scale)
    if spec.zero:
        plain = _f16((top - bottom) / 15)
        plain_zero = torch.where(plain > 0, -bottom / plain, 0.0).clamp_(0, 15).round_()
    else:
        plain, plain_zero = _f16(magnitude / most), centre
    simple, noise = error(plain, plain_zero), error(found, zero)
    worse = simple < noise
    found, zero = torch.where(worse, plain, found), torch.where(worse, plain_zero, zero)
    noise = torch.where(worse, simple, noise) if weights is None else error(found, zero, weighted=False)
    made = rounded(inverse_or_zero(found), zero).add_(zero)
    stored = made.to(torch.int8 if spec.codes == "int8" else torch.uint8)
    return stored, found.to(torch.float16), zero.to(torch.uint8) if spec.zero else None, noise


def _f16(scale: Tensor) -> Tensor:
    """Rounded to float16, as float32."""
    return scale.clamp(-F16_MAX, F16_MAX).to(torch.float16).float()


def _e2m1(
    blocks: Tensor, trials: Sequence[tuple[float, float]], tensor_scale: Tensor, weights: Tensor | None
) -> _Found:
    """NVFP4. tensor_scale: float32 [n], each block's own."""
    normed = blocks / torch.where(tensor_scale > 0, tensor_scale, torch.inf)
    magnitude = normed.abs()
    scaled, power, near = (torch.empty_like(magnitude) for _ in range(3))

    def on_grid(inverse: Tensor) -> Tensor:
        """The values of E2M1's 0 0.5 1 1.5 2 3 4 6 nearest to magnitude * inverse. The grid's steps are 1/2 below 2,
        1 below 4, 2 up to 6: half the power of two below a value, at least 1/2. Halves go to the even multiple."""
        torch.mul(magnitude, inverse, out=scaled)
        torch.bitwise_and(scaled.view(torch.int32), _EXPONENT, out=power.view(torch.int32))
        step = power.clamp_(min=1.0).mul_(0.5 * _TO_EVEN)
        return torch.add(scaled, step, out=near).sub_(step).clamp_(max=6.0)

    def error(scale: Tensor) -> Tensor:
        off = on_grid(inverse_or_zero(scale)).sub_(scaled)
        terms = torch.mul(off, off, out=power)
        # A scale of 0 leaves everything: counted in the unit of the values themselves.
        lost = sum_blocks(terms if weights is None else terms.mul_(weights)) * scale.square()
        return torch.where(scale > 0, lost, torch.inf)

    centre = (magnitude.amax(0) / 6.0).clamp_(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
    best_code, best_error = centre, error(_e4m3(centre))
    for offset, _ in trials:
        code = (centre + int(offset)).clamp_(0, LARGEST_SCALE)
        lost = error(_e4m3(code))
        best_code = torch.where(lost < best_error, code, best_code)
        best_error = torch.minimum(lost, best_error)
    scale = _e4m3(best_code)
    chosen = on_grid(inverse_or_zero(scale))
    # Twice the value up to 2, then fewer to a unit.
    codes = torch.minimum(torch.minimum(chosen * 2, chosen + 2), chosen * 0.5 + 4).to(torch.uint8)
    off = torch.where(normed < 0, -chosen, chosen).mul_(scale).mul_(tensor_scale).sub_(blocks)
    return codes.add_((normed < 0).to(torch.uint8), alpha=8), best_code.to(torch.uint8), None, sum_blocks(off.mul_(off))


def _e4m3(code: Tensor) -> Tensor:
    """What an E4M3 code stands for, float32."""
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()
