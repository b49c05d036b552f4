"""The tiles of products with many rows: how many of each a program takes, by card, by format and by how many there are.

Chosen by what the compiler makes of them (docs/kernels.md): nothing that spills on that card, and of the rest the
largest that is not mostly empty, for a tile's codes are decoded once for all its rows. Which of those is the fastest
has to be measured on a card. Knows no torch and no Triton.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwenrun.kernels.spec import BlockSpec

TARGETS = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Tile:
    """rows of activations, cols: rows of the matrix; warps and pipeline stages of a program."""

    rows: int
    cols: int
    warps: int
    stages: int = 3


SMALL, MIDDLE, WIDE, LARGE = Tile(32, 64, 4), Tile(64, 64, 8), Tile(128, 64, 8), Tile(128, 128, 8)

# Products of 4 bits on both sides: the cores of sm_100 take no fewer than 128 rows, and with fewer the compiler makes
# products of 16 bits of them.
FP4_TILE, FP4_TARGETS, FP4_ROWS = WIDE, (100, 120), MIDDLE.rows + 1


def choose(rows: int, spec: BlockSpec, target: int) -> Tile:
    """The tile for `rows` rows a matrix stored as `spec`, on a card of compute capability `target` / 10."""
    if rows <= SMALL.rows:
        return SMALL
    if rows <= MIDDLE.rows:
        return MIDDLE
    known = max((t for t in TARGETS if t <= target), default=TARGETS[0])
    if spec.tile:
        if spec.zero and known == 120:
            return MIDDLE
        # A block of 128 has its scale on the sum, which takes a second set of sums.
        return LARGE if spec.block < 128 and known in (90, 100) else WIDE
    # With scales there are two sets of sums here too; from sm_90 on they leave less room.
    return WIDE if spec.scale and known in (90, 100) else LARGE


def choose_all(rows: int, specs: Iterable[BlockSpec], target: int) -> Tile:
    """The largest that all of them can have."""
    return min((choose(rows, spec, target) for spec in specs), key=lambda tile: tile.rows * tile.cols)
