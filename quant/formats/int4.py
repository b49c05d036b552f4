"""INT4 in groups along the row with a float16 scale, symmetric or with a 4-bit zero point. 4.125 to 4.625 bits."""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

# What the largest magnitude's scale is shrunk by: below 1 it is clipped, and the rest is finer.
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
SYMMETRIC = (*((-8.0, s) for s in SHRINK), *((7.0, s) for s in SHRINK[:3]))
# The symmetric trials are among those of zero points, so a zero point is never a loss.
AFFINE = (*SYMMETRIC, *((15.0, s) for s in (*SHRINK, 0.7)))

FORMATS = [
    Format(
        f"int4-g{block}" + ("-zero" if zero else ""),
        BlockSpec("int4", block, "f16", zero=zero),
        "int4",
        AFFINE if zero else SYMMETRIC,
    )
    for zero in (False, True)
    for block in (128, 64, 32)
]
