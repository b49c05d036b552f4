"""NVFP4: E2M1 in blocks of 16 with an E4M3 scale, and a float32 scale for the matrix. 4.5 bits.

Source of the layout: NVIDIA's description of NVFP4; E2M1 is the OCP Microscaling Formats v1.0 element.
"""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

FORMATS = [Format("nvfp4", BlockSpec("e2m1", 16, "e4m3", tensor_scale=True), solver="nvfp4", family="nvfp4")]
