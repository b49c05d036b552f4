"""The choice of scales by error search: for each block the scale, of those tried, with the least squared error.

`solve` takes a matrix and gives a Weight. It is never worse than the plain rule (largest magnitude to largest
code) on any block, for that rule's result is one of the candidates.

Solvers work on [block, n]: each of n blocks a column. A block's scale is then a row vector, so every step is a
long run over memory, and sums over blocks are additions of halves. Only operations that IEEE 754 rounds
correctly are used, so the result depends on the values alone: not on threads, on how a matrix is cut into rows,
or on the processor. Knows nothing of files and names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwenrun.kernels.ops import decode, encode
from qwenrun.kernels.spec import CODE_BITS, BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant.formats import Format
from qwenrun.quant.solve.blocks import Solved
from qwenrun.quant.solve.floats import solve_nvfp4
from qwenrun.quant.solve.integers import solve_affine, solve_symmetric

# Values worked on at a time: small enough that a candidate's temporaries stay in a core's cache.
CHUNK_VALUES = 1 << 18
_ERROR_VALUES = 1 << 17

SOLVERS: dict[str, Callable[[Tensor, BlockSpec, Tensor | None], Solved]] = {
    "symmetric": solve_symmetric,
    "affine": solve_affine,
    "nvfp4": solve_nvfp4,
}


def tensor_scale_of(spec: BlockSpec, magnitudes: Tensor) -> Tensor | None:
    """The tensor scales of a matrix whose groups of rows have the largest magnitudes `magnitudes` (f32 [T]).

    They put the largest block scale at E4M3's largest value: amax / (448 * 6). None if the format has none.
    """
    return magnitudes / (448.0 * 6.0) if spec.tensor_scale else None


def solve(form: Format, values: Tensor, tensor_scale: Tensor | None = None) -> Weight:
    """Encode `values` (float32 [R, C], finite) with scales chosen by `form`'s solver.

    tensor_scale: float32 [T], T a divisor of R, for formats that have one; row r belongs to number r * T // R.
    """
    spec, (rows, cols) = form.spec, values.shape
    if spec.plain:
        return encode(values, spec)
    per_row = None
    if tensor_scale is not None:
        per_row = tensor_scale.repeat_interleave(rows // len(tensor_scale))
    step, blocks_a_row = max(1, CHUNK_VALUES // cols), cols // spec.block
    parts: dict[str, list[Tensor]] = {"codes": [], "scales": [], "zeros": []}
    for start in range(0, rows, step):
        piece = values[start : start + step]
        scale = None if per_row is None else per_row[start : start + step].repeat_interleave(blocks_a_row)
        solved = SOLVERS[form.solver](piece.reshape(-1, spec.block).t().contiguous(), spec, scale)
        codes = solved.codes
        if CODE_BITS[spec.codes] == 4:
            codes = codes[0::2] | (codes[1::2] << 4)
        parts["codes"].append(codes.t().reshape(len(piece), -1))
        parts["scales"].append(solved.scales.view(len(piece), -1))
        if solved.zeros is not None:
            zeros = solved.zeros.view(len(piece), -1)
            if zeros.shape[1] % 2:
                zeros = torch.nn.functional.pad(zeros, (0, 1))
            parts["zeros"].append(zeros[:, 0::2] | (zeros[:, 1::2] << 4))
    joined = {name: torch.cat(pieces) for name, pieces in parts.items() if pieces}
    return Weight(spec, rows, cols, tensor_scale=tensor_scale, **joined)


def squared_error(values: Tensor, weight: Weight) -> tuple[float, float, int]:
    """(sum of squares of the values, sum of squares of what encoding changed, rows that decode to zeros)."""
    step = max(1, _ERROR_VALUES // weight.cols)
    signal, noise, zero_rows = 0.0, 0.0, 0
    for start in range(0, weight.rows, step):
        part = values[start : start + step]
        stored = decode(weight.row_range(start, min(start + step, weight.rows)))
        zero_rows += int((stored.abs().amax(-1) == 0).sum())
        error = stored.sub_(part) if not weight.spec.plain else stored - part
        # Rows in float32, which is fast, their sums in float64, which is exact enough for billions of values.
        signal += part.square().sum(-1).sum(dtype=torch.float64).item()
        noise += error.square_().sum(-1).sum(dtype=torch.float64).item()
    return signal, noise, zero_rows
