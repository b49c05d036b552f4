"""INT8 in groups along the row with a float16 scale, symmetric. 8.125 to 8.5 bits."""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

TRIALS = ((127.0, 1.0), (127.0, 0.985))

FORMATS = [Format(f"int8-g{block}", BlockSpec("int8", block, "f16"), "int8", TRIALS) for block in (128, 64, 32)]
