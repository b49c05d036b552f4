"""BlockSpec: one description of every stored number format, and how many bytes it takes.

A matrix of R rows and C columns (row-major, C is the input dimension) is stored as a few named parts:

    codes         what each value is, C values a row; 4-bit codes two to a byte, the even column in the low nibble
    scales        one per `block` consecutive values of a row
    zeros         (some formats) one 4-bit zero point per block, two to a byte, the even block in the low nibble
    tensor_scale  (some formats) a few float32 for the whole matrix

`tile` changes the order of the bytes, not the values: the rows are taken in groups of TILE_ROWS = 16, and a group
is one row of each part. Its codes are runs of 64 bytes, one for every 8 columns; byte 4 r + j of a run holds row
r's columns j (low nibble) and j + 4 (high nibble). Its scales are the 16 rows' of the first block, then of the
second; its zeros 8 bytes a block, byte r with row r in the low and row r + 8 in the high nibble.

Every value is `(code - zero) * scale * tensor_scale`. `code` is:

    int4   the nibble q in 0..15; without `zeros` the zero is 8, so the codes run from -8 to 7
    int8   a two's complement byte
    e2m1   a sign bit and one of 0 0.5 1 1.5 2 3 4 6 (OCP Microscaling Formats v1.0, FP4)
    bf16, f16, f32   the value itself; no scale, no block

This module does not know how a scale is chosen (the quant floor's solvers), nor how anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod

CODE_BITS = {"int4": 4, "int8": 8, "e2m1": 4, "bf16": 16, "f16": 16, "f32": 32}
PLAIN_CODES = ("bf16", "f16", "f32")
SCALE_BYTES = {"": 0, "f16": 2, "e4m3": 1, "e8m0": 1}

# Part dtypes, spelled as safetensors spells them. E4M3 and E8M0 scales are kept as their bit patterns.
DTYPE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
# Rows that lie together in a tiled matrix, and the columns of one run of its codes.
TILE_ROWS, TILE_COLS = 16, 8
_CODE_DTYPE = {"int4": "U8", "int8": "I8", "e2m1": "U8", "bf16": "BF16", "f16": "F16", "f32": "F32"}
_SCALE_DTYPE = {"f16": "F16", "e4m3": "U8", "e8m0": "U8"}


@dataclass(frozen=True, slots=True)
class Part:
    """One stored array of an encoded matrix."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """How the values of a matrix are stored. See the module's text for the formula.

    codes: "int4", "int8", "e2m1", "bf16", "f16" or "f32".
    block: values per scale along a row; even, and a divisor of the row length. 0 for plain codes.
    scale: "f16", "e4m3", "e8m0", or "" for plain codes.
    zero: True if every block has a 4-bit zero point (int4 only).
    tensor_scale: True if the matrix has float32 scales of its own: T of them, row r using number r*T//R.
    tile: True if 16 rows lie interleaved, as matrix kernels want them (4-bit codes only).
    """

    codes: str
    block: int = 0
    scale: str = ""
    zero: bool = False
    tensor_scale: bool = False
    tile: bool = False

    def __post_init__(self) -> None:
        if self.codes not in CODE_BITS:
            raise ValueError(f"unknown codes {self.codes!r}; known: {', '.join(CODE_BITS)}")
        if self.scale not in SCALE_BYTES:
            raise ValueError(f"unknown scale type {self.scale!r}; known: {', '.join(s for s in SCALE_BYTES if s)}")
        if self.plain != (self.block == 0) or self.plain != (self.scale == ""):
            raise ValueError(f"{self.codes} with block {self.block} and scale {self.scale!r} is not a format")
        if self.block < 0 or self.block % 2:
            raise ValueError(f"block {self.block} is not a positive even number")
        if self.zero and self.codes != "int4":
            raise ValueError(f"only int4 has zero points, not {self.codes}")
        if self.plain and self.tensor_scale:
            raise ValueError("plain codes have no tensor scale")
        if self.tile and (CODE_BITS[self.codes] != 4 or self.block % TILE_COLS):
            raise ValueError(f"{self.codes} in blocks of {self.block} is not stored in tiles")

    @property
    def plain(self) -> bool:
        """True if values are stored as they are, without scales."""
        return self.codes in PLAIN_CODES

    @property
    def bits_per_weight(self) -> float:
        """Bits per value of a long row; the few bytes of `tensor_scale` are not counted."""
        if self.plain:
            return float(CODE_BITS[self.codes])
        per_block = SCALE_BYTES[self.scale] * 8 + (4 if self.zero else 0)
        return CODE_BITS[self.codes] + per_block / self.block

    def fits(self, cols: int) -> bool:
        """True if rows of `cols` values can be stored."""
        return cols > 0 and (self.plain or cols % self.block == 0)

    def stored(self, rows: int) -> BlockSpec:
        """How a matrix of `rows` rows that is multiplied with is stored: 4-bit codes in tiles, if they fill them."""
        fits = CODE_BITS[self.codes] == 4 and self.block % TILE_COLS == 0 and rows % TILE_ROWS == 0
        return replace(self, tile=fits)

    @property
    def group(self) -> int:
        """Rows of the matrix that are one row of its parts."""
        return TILE_ROWS if self.tile else 1

    def parts(self, rows: int, cols: int, tensor_scales: int = 1) -> tuple[Part, ...]:
        """The arrays that store a [rows, cols] matrix, in their order in a file.

        tensor_scales: how many float32 tensor scales the matrix has (ignored if the format has none).
        Raises ValueError if the block does not divide `cols`, or the tile or `tensor_scales` not `rows`.
        """
        if not self.fits(cols):
            raise ValueError(f"rows of {cols} values can't be cut into blocks of {self.block}")
        if rows % self.group:
            raise ValueError(f"{rows} rows do not fill tiles of {self.group}")
        lines, group = rows // self.group, self.group
        per_byte = 2 if CODE_BITS[self.codes] == 4 else 1
        parts = [Part("codes", _CODE_DTYPE[self.codes], (lines, group * cols // per_byte))]
        if not self.plain:
            blocks = cols // self.block
            parts.append(Part("scales", _SCALE_DTYPE[self.scale], (lines, group * blocks)))
            if self.zero:
                parts.append(Part("zeros", "U8", (lines, blocks * group // 2 if self.tile else (blocks + 1) // 2)))
            if self.tensor_scale:
                if tensor_scales < 1 or rows % tensor_scales:
                    raise ValueError(f"{rows} rows can't share {tensor_scales} tensor scales")
                parts.append(Part("tensor_scale", "F32", (tensor_scales,)))
        return tuple(parts)

    def nbytes(self, rows: int, cols: int, tensor_scales: int = 1) -> int:
        """Bytes of a [rows, cols] matrix, all parts together, without alignment."""
        return sum(part.nbytes for part in self.parts(rows, cols, tensor_scales))

    def to_json(self) -> dict[str, object]:
        """A plain dictionary; fields at their default are left out."""
        out: dict[str, object] = {"codes": self.codes}
        if not self.plain:
            out |= {"block": self.block, "scale": self.scale}
        if self.zero:
            out["zero"] = True
        if self.tensor_scale:
            out["tensor_scale"] = True
        if self.tile:
            out["tile"] = True
        return out

    @classmethod
    def from_json(cls, data: object) -> BlockSpec:
        """The inverse of `to_json`; raises ValueError on anything else."""
        if not isinstance(data, dict) or not set(data) <= {f.name for f in fields(cls)}:
            raise ValueError(f"not a block spec: {data!r}")
        codes, block, scale = data.get("codes"), data.get("block", 0), data.get("scale", "")
        zero, tensor_scale, tile = (data.get(name, False) for name in ("zero", "tensor_scale", "tile"))
        if not (isinstance(codes, str) and isinstance(scale, str) and type(block) is int):
            raise ValueError(f"not a block spec: {data!r}")
        if not (isinstance(zero, bool) and isinstance(tensor_scale, bool) and isinstance(tile, bool)):
            raise ValueError(f"not a block spec: {data!r}")
        return cls(codes, block, scale, zero, tensor_scale, tile)
