"""The tiles of products with many rows, and of attention: how many of each a program takes, by card, by format and by
how many there are.

Nothing that spills on that card (docs/kernels.md); of the rest, on sm_90, what was the fastest on an H100
(docs/gpu.md), and on the others what is nearest to that. Knows no torch and no Triton.
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


# Products of 4 bits on both sides: the cores of sm_100 take no fewer than 128 rows, and with fewer the compiler makes
# products of 16 bits of them.
FP4_TILE, FP4_TARGETS, FP4_ROWS = Tile(128, 64, 8), (100, 120), 65


def choose(rows: int, spec: BlockSpec, target: int) -> Tile:
    """The tile for `rows` rows a matrix stored as `spec`, on a card of compute capability `target` / 10."""
    card = known(target)
    return _tiled(rows, spec, card) if spec.tile else _plain(rows, spec, card)


def _tiled(rows: int, spec: BlockSpec, card: int) -> Tile:
    # With a block of 128 columns the scales come on a second set of sums.
    sums = spec.block == 128
    if rows <= 32:
        if spec.codes == "e2m1":
            return Tile(32, 64, 2)
        return Tile(32, 128, 4) if sums and not spec.zero else Tile(32, 64, 4)
    if rows <= 64:
        return Tile(64, 64, 8 if card == 120 and spec.zero else 4)
    if card == 90 or (card == 100 and not sums):
        return Tile(128, 64, 4, 2)
    return Tile(128, 32, 4, 2) if card == 120 and sums else Tile(128, 64, 8, 2)


def _plain(rows: int, spec: BlockSpec, card: int) -> Tile:
    if rows <= 32:
        return Tile(32, 64, 4)
    if not spec.scale:
        return Tile(64, 128, 4) if rows <= 64 else Tile(128, 128, 8 if card == 120 else 4)
    return Tile(64, 128, 4) if rows > 64 and card in (90, 100) else Tile(64, 64, 4)


def choose_all(rows: int, specs: Iterable[BlockSpec], target: int) -> Tile:
    """The largest that all of them can have."""
    return min((choose(rows, spec, target) for spec in specs), key=lambda tile: tile.rows * tile.cols)


# Positions from which on attention's tiles are large: before, most of what they compute is behind a token.
FAR = 8192


def attention(rows: int, length: int, int8: bool, target: int) -> Tile:
    """The tile of attention at head size 256 for `rows` pairs of a token and one of the query heads that share a key
    head, over `length` positions: rows of them, cols positions of the cache at a time."""
    card = known(target)
    small = card in (89, 120)  # in shared memory
    if rows <= 16:
        return Tile(16, 64, 8) if int8 and not small else Tile(16, 32 if small else 64, 4)
    if rows <= 64 or length < FAR or small or (int8 and card != 90):
        return Tile(64, 32, 8, 2) if (small and not int8) or (int8 and card == 90) else Tile(64, 64, 8, 2)
    return Tile(128, 64 if int8 else 32, 8, 2 if int8 else 3)


def known(target: int) -> int:
    """The newest of TARGETS that is not newer than `target`."""
    return max((t for t in TARGETS if t <= target), default=TARGETS[0])
