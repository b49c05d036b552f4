"""The choice of scales by error search: for each block the scale, of those tried, with the least squared error.

`solve` takes a matrix and gives a Weight. It is never worse than the plain rule (largest magnitude to largest
code) on any block, for that rule's result is one of the candidates. Results depend on the values alone, not on
threads or on how a matrix is cut into rows. Knows nothing of files and names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwenrun.kernels.ops import encode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant.formats import Format
from qwenrun.quant.solve.floats import solve_nvfp4
from qwenrun.quant.solve.integers import solve_affine, solve_symmetric

# Values worked on at a time: small enough that a candidate's temporaries stay in a core's cache.
CHUNK_VALUES = 1 << 17


def _plain(values: Tensor, spec: BlockSpec, tensor_scale: Tensor | None) -> Weight:
    return encode(values, spec)


SOLVERS: dict[str, Callable[[Tensor, BlockSpec, Tensor | None], Weight]] = {
    "plain": _plain,
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
    rows, cols = values.shape
    per_row = None
    if tensor_scale is not None:
        per_row = tensor_scale.repeat_interleave(rows // len(tensor_scale))
    step = max(1, CHUNK_VALUES // cols)
    pieces = [
        SOLVERS[form.solver](
            values[start : start + step],
            form.spec,
            None if per_row is None else per_row[start : start + step],
        )
        for start in range(0, rows, step)
    ]
    names = [name for name in pieces[0].parts if name != "tensor_scale"]
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in names}
    return Weight(form.spec, rows, cols, tensor_scale=tensor_scale, **parts)


def squared_error(values: Tensor, weight: Weight) -> tuple[float, float]:
    """(sum of squares of the values, sum of squares of what encoding changed), both in float64."""
    from qwenrun.kernels.ops import decode

    step = max(1, CHUNK_VALUES // weight.cols)
    signal = noise = 0.0
    for start in range(0, weight.rows, step):
        part = values[start : start + step]
        error = decode(weight.row_range(start, min(start + step, weight.rows))) - part
        signal += part.square().sum(dtype=torch.float64).item()
        noise += error.square().sum(dtype=torch.float64).item()
    return signal, noise
