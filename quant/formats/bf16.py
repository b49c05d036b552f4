"""BF16: the value's upper 16 bits, no scale. What checkpoints are published in."""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

FORMATS = [Format("bf16", BlockSpec("bf16"), family="bf16")]
