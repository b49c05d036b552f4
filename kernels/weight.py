"""Weight: an encoded matrix, or a stack of equally shaped ones, as the few tensors its BlockSpec names.

Knows no file and no name. Its tensors may be views of a mapped file or of a slot of a cache: the leading
dimensions need not be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qwenrun.kernels.spec import TILE_COLS, TILE_ROWS, BlockSpec

TORCH_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_PLAIN_CODES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(slots=True)
class Weight:
    """A [..., rows, cols] matrix stored as `spec` says.

    Shapes are those of rows side by side; a tiled matrix has rows / 16 of them, each 16 times as long (see spec.py).

    codes: [..., rows, cols] (two 4-bit codes to a byte: [..., rows, cols / 2]).
    scales: [..., rows, cols / block], float16, or uint8 bit patterns of E4M3 or E8M0; None for plain codes.
    zeros: uint8 [..., rows, ceil(blocks / 2)], or None.
    tensor_scale: float32 [..., T], row r using number r * T // rows; or None.
    Its tensors are not exchanged once it has been computed with.
    """

    spec: BlockSpec
    rows: int
    cols: int
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    # How a backend describes these tensors to itself: made at the first use, valid as long as the Weight is.
    handle: object = field(default=None, compare=False, repr=False)

    @classmethod
    def plain(cls, values: Tensor) -> Weight:
        """A matrix [..., rows, cols] of bfloat16, float16 or float32 as it is. Raises ValueError for others."""
        if values.dtype not in _PLAIN_CODES or values.dim() < 2:
            raise ValueError(f"not a plain weight: {values.dtype} of shape {list(values.shape)}")
        return cls(BlockSpec(_PLAIN_CODES[values.dtype]), values.shape[-2], values.shape[-1], values)

    @classmethod
    def from_parts(cls, spec: BlockSpec, rows: int, cols: int, parts: dict[str, Tensor]) -> Weight:
        """The weight of the named tensors; checks dtypes and shapes against the spec (ValueError)."""
        count = parts["tensor_scale"].shape[-1] if "tensor_scale" in parts else 1
        expected = {part.name: part for part in spec.parts(rows, cols, count)}
        if set(expected) != set(parts):
            raise ValueError(f"{spec.codes} needs parts {sorted(expected)}, got {sorted(parts)}")
        for name, part in expected.items():
            tensor = parts[name]
            if tensor.dtype != TORCH_DTYPES[part.dtype] or tuple(tensor.shape[-len(part.shape) :]) != part.shape:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} where {part.dtype} {list(part.shape)} is needed"
                )
        return cls(spec, rows, cols, **parts)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors there are, by name, in the order they are stored in."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "tensor_scale": self.tensor_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions: () for one matrix, (E,) for a stack of E."""
        return tuple(self.codes.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, without the gaps of a strided view."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts.values())

    def __getitem__(self, index: Tensor | int | slice) -> Weight:
        """Select in the leading dimension of a stack; parts are views where torch can make them."""
        if not self.lead:
            raise IndexError("one matrix has no leading dimension to select in")
        return Weight(self.spec, self.rows, self.cols, **{n: t[index] for n, t in self.parts.items()})

    def row_range(self, start: int, stop: int) -> Weight:
        """Rows start..stop of every matrix, as views; the tensor scales become one a row if they differ.

        Raises ValueError if that cuts a tile.
        """
        group = self.spec.group
        if start % group or stop % group:
            raise ValueError(f"rows {start}..{stop} cut tiles of {group}")
        tensor_scale = self.tensor_scale
        if tensor_scale is not None and tensor_scale.shape[-1] > 1:
            owner = torch.arange(start, stop, device=tensor_scale.device) * tensor_scale.shape[-1] // self.rows
            tensor_scale = tensor_scale[..., owner]
        low, high = start // group, stop // group
        parts = {n: t[..., low:high, :] for n, t in self.parts.items() if n != "tensor_scale"}
        return Weight(self.spec, stop - start, self.cols, tensor_scale=tensor_scale, **parts)

    def tiled(self) -> Weight:
        """The same matrix, in tiles. Raises ValueError if its spec or its rows have none."""
        spec = replace(self.spec, tile=True)
        if self.spec.tile:
            return self
        spec.parts(self.rows, self.cols)  # refuses rows that fill no tile
        # [..., R/16, 16, C/8, 4 bytes of 2 columns] -> [..., R/16, C/8, 16 rows, columns j and j + 4]
        pairs = self.codes.unflatten(-1, (-1, TILE_COLS // 2)).unflatten(-3, (-1, TILE_ROWS))
        low, high = pairs & 15, pairs >> 4
        first = torch.stack([low[..., :2], high[..., :2]], -1).flatten(-2)
        second = torch.stack([low[..., 2:], high[..., 2:]], -1).flatten(-2)
        codes = (first | second << 4).transpose(-3, -2).flatten(-3)
        assert self.scales is not None
        scales = self.scales.unflatten(-2, (-1, TILE_ROWS)).transpose(-2, -1).flatten(-2)
        zeros = None
        if self.zeros is not None:
            blocks = self.cols // spec.block
            each = torch.stack([self.zeros & 15, self.zeros >> 4], -1).flatten(-2)[..., :blocks]
            each = each.unflatten(-2, (-1, TILE_ROWS)).transpose(-2, -1)
            zeros = (each[..., : TILE_ROWS // 2] | each[..., TILE_ROWS // 2 :] << 4).flatten(-2)
        return Weight(spec, self.rows, self.cols, codes, scales, zeros, self.tensor_scale)

    def row_major(self) -> Weight:
        """The same matrix, row after row."""
        if not self.spec.tile:
            return self
        runs = self.codes.unflatten(-1, (-1, TILE_ROWS, TILE_COLS // 2)).transpose(-3, -2)
        columns = torch.cat([runs & 15, runs >> 4], -1)  # [..., R/16, 16, C/8, 8]
        codes = (columns[..., 0::2] | columns[..., 1::2] << 4).flatten(-2).flatten(-3, -2)
        assert self.scales is not None
        scales = self.scales.unflatten(-1, (-1, TILE_ROWS)).transpose(-2, -1).flatten(-3, -2)
        zeros = None
        if self.zeros is not None:
            bytes_ = self.zeros.unflatten(-1, (-1, TILE_ROWS // 2))
            each = torch.cat([bytes_ & 15, bytes_ >> 4], -1).transpose(-2, -1).flatten(-3, -2)
            if each.shape[-1] % 2:
                each = torch.nn.functional.pad(each, (0, 1))
            zeros = each[..., 0::2] | each[..., 1::2] << 4
        return Weight(replace(self.spec, tile=False), self.rows, self.cols, codes, scales, zeros, self.tensor_scale)
