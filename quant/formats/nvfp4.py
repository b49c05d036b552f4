"""NVFP4: E2M1 in blocks of 16 with an E4M3 scale, and a float32 scale for the matrix. 4.5 bits.

Source of the layout: NVIDIA's description of NVFP4; E2M1 is the OCP Microscaling Formats v1.0 element.

A block's largest magnitude may be put at 6, the largest code, or at 4 (4 or 5 scale codes more): that wins where the
rest of the block lies where E2M1's grid is fine.
"""

from __future__ import annotations

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.formats import Format

# Scale codes to try, counted from the plain rule's: a later one must be strictly better to take its place. With +2, the
# least often chosen of -2..6 (0.2 % of the blocks of a Gaussian matrix), 0.002 dB would be gained.
TRIALS = tuple((steps, 0.0) for steps in (-1, 1, -2, 3, 4, 5, 6))

FORMATS = [Format("nvfp4", BlockSpec("e2m1", 16, "e4m3", tensor_scale=True), "nvfp4", TRIALS)]
