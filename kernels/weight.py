"""Weight: an encoded matrix, or a stack of equally shaped ones, as the few tensors its BlockSpec names.

Knows no file and no name. Its tensors may be views of a mapped file or of a slot of a cache: the leading
dimensions need not be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenrun.kernels.spec import BlockSpec

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

    codes: [..., rows, cols] (two 4-bit codes to a byte: [..., rows, cols / 2]).
    scales: [..., rows, cols / block], float16, or uint8 bit patterns of E4M3 or E8M0; None for plain codes.
    zeros: uint8 [..., rows, ceil(blocks / 2)], or None.
    tensor_scale: float32 [..., T], row r using number r * T // rows; or None.
    """

    spec: BlockSpec
    rows: int
    cols: int
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None

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
        """Rows start..stop of every matrix, as views; the tensor scales become one a row if they differ."""
        tensor_scale = self.tensor_scale
        if tensor_scale is not None and tensor_scale.shape[-1] > 1:
            owner = torch.arange(start, stop, device=tensor_scale.device) * tensor_scale.shape[-1] // self.rows
            tensor_scale = tensor_scale[..., owner]
        parts = {n: t[..., start:stop, :] for n, t in self.parts.items() if n != "tensor_scale"}
        return Weight(self.spec, stop - start, self.cols, tensor_scale=tensor_scale, **parts)
