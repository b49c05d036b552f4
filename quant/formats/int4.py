"""INT4 in groups along the row with a float16 scale, symmetric or with a 4-bit zero point. 4.125 to 4.625 bits."""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

FORMATS = [
    Format(
        name=f"int4-g{block}" + ("-zero" if zero else ""),
        spec=BlockSpec("int4", block, "f16", zero=zero),
        solver="affine" if zero else "symmetric",
        family="int4",
    )
    for zero in (False, True)
    for block in (128, 64, 32)
]
