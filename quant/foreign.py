"""Matrices that others have quantized, as a Hugging Face checkpoint holds them: what they mean, and the same codes
in our formats.

A layout is known by the arrays that stand in the place of a matrix `X.weight`. Its codes are carried over where our
format has the same blocks, zero points and scales; else the values are decoded, and quantized anew. Knows no model and
no file: a matrix is given as its arrays.

Sources of the layouts: AutoGPTQ's and GPTQModel's packing, NVIDIA modelopt's and vLLM's compressed-tensors' exports,
DeepSeek-V3's blocks of FP8, which Qwen's FP8 repositories follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qwenrun.kernels.ops import decode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant.errors import CheckpointError

FP8_BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """A way to store a matrix. arrays: the endings of its arrays' names after `X.` with the types they may have; the
    first tells the layout. others: the same of those that may be there too. shape: of the matrix, from the arrays'
    shapes, ValueError if they do not fit each other. values: f32 [rows, cols]. codes: those of ours that it may have,
    if any; weight: the matrix with them, or None if its blocks or scales do not fit."""

    name: str
    arrays: Mapping[str, str]
    others: Mapping[str, str]
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, int]]
    values: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]
    codes: str = ""
    weight: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Weight | None] = lambda arrays, config: None


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts that a checkpoint with this quantization_config may hold. Raises CheckpointError for others."""
    method = config.get("quant_method")
    if method == "fp8":
        block = config.get("weight_block_size")
        if block != [FP8_BLOCK, FP8_BLOCK]:
            raise CheckpointError(f"FP8 in blocks of {block} can't be imported, only 128 x 128")
        return (_FP8,)
    if method == "gptq":
        if config.get("bits") != 4:
            raise CheckpointError(f"GPTQ with {config.get('bits')} bits can't be imported, only 4")
        return (_GPTQ,)
    if method == "modelopt" or "NVFP4" in str(config.get("quant_algo")):
        return (_MODELOPT,)
    if method == "compressed-tensors":
        return (_CT_NVFP4, _CT_INT4)
    raise CheckpointError(
        f"the checkpoint is already quantized ({method or 'by what, it does not say'}), which can't be imported",
        hint="quantize from the BF16 checkpoint",
    )


def find(names: Iterable[str], known: tuple[Layout, ...]) -> dict[str, tuple[Layout, dict[str, str]]]:
    """`X.weight` -> its layout, and its arrays' names by their endings, for every matrix in a known layout.

    Raises CheckpointError if an array of one is missing.
    """
    there = set(names)
    found: dict[str, tuple[Layout, dict[str, str]]] = {}
    for layout in known:
        first = next(iter(layout.arrays))
        mark = "." + first
        for name in there:
            base = name.removesuffix(mark)
            if base == name:
                continue
            if missing := [part for part in layout.arrays if f"{base}.{part}" not in there]:
                if first == "weight_packed":
                    continue  # the other layout of compressed-tensors
                raise CheckpointError(
                    f"{base} is stored as {layout.name} and has no {', '.join(missing)}",
                    hint="download the model again",
                )
            arrays = {p: f"{base}.{p}" for p in (*layout.arrays, *layout.others) if f"{base}.{p}" in there}
            found[f"{base}.weight"] = (layout, arrays)
    for name in there:
        if name.endswith(".weight_packed") and name.removesuffix("_packed") not in found:
            raise CheckpointError(f"{name} has no scales beside it", hint="download the model again")
    return found


def fitting(made: Weight | None, spec: BlockSpec) -> Weight | None:
    """The matrix's own codes as `spec` stores them, if that takes no rounding: row by row, or in tiles."""
    if made is None or made.spec != BlockSpec(spec.codes, spec.block, spec.scale, spec.zero, spec.tensor_scale):
        return None
    return made.tiled() if spec.tile else made


def joined(parts: list[Weight | None]) -> Weight | None:
    """Matrices of one spec and as many columns, one above the other: each keeps its own tensor scale."""
    first = parts[0]
    if first is None or any(part is None or part.spec != first.spec for part in parts):
        return None
    whole = [part for part in parts if part is not None]
    stacked = {name: torch.cat([part.parts[name] for part in whole]) for name in first.parts}
    return Weight.from_parts(first.spec, sum(part.rows for part in whole), first.cols, stacked)


# -- one layout after the other ----------------------------------------------------------------------------------


def _nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8 n], the low ones first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _packed(codes: Tensor) -> Tensor:
    """uint8 codes [R, C] -> bytes [R, C / 2], the even column in the low half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _finite(scales: Tensor, where: str) -> Tensor:
    values = scales.float()
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{where} holds scales that are no numbers: the checkpoint is damaged")
    return values


def _halves(scales: Tensor) -> Tensor | None:
    """The same scales as float16, if each is one."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.float(), scales) else None


def _int4(codes: Tensor, zeros: Tensor, scales: Tensor) -> Weight | None:
    """codes uint8 [R, C], zeros uint8 and scales f32 [R, C / block]: ours, if scales and zero points fit."""
    (rows, cols), blocks = codes.shape, scales.shape[1]
    half, symmetric = _halves(scales), bool((zeros == 8).all())
    if half is None or cols % blocks or cols // blocks not in (32, 64, 128) or (not symmetric and blocks % 2):
        return None
    spec = BlockSpec("int4", cols // blocks, "f16", zero=not symmetric)
    return Weight(spec, rows, cols, _packed(codes), half, None if symmetric else _packed(zeros))


def _int4_values(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    block = codes.shape[1] // scales.shape[1]
    return ((codes.unflatten(1, (-1, block)).float() - zeros[..., None].float()) * scales[..., None]).flatten(1)


def _gptq_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    (words, rows), scales, zeros = shapes["qweight"], shapes["scales"], shapes["qzeros"]
    if scales[1:] != (rows,) or rows % 8 or zeros != (scales[0], rows // 8) or (8 * words) % scales[0]:
        raise ValueError
    if shapes.get("g_idx", (8 * words,)) != (8 * words,):
        raise ValueError
    return _some(rows, 8 * words)


def _gptq(arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, C], zero points and scales [R, blocks]."""
    codes = _nibbles(arrays["qweight"].T.contiguous())
    scales = _finite(arrays["scales"], "a GPTQ matrix").T.contiguous()
    # The first version of the format stores a zero point less one.
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    zeros = ((_nibbles(arrays["qzeros"]) + less) & 15).T.contiguous()
    if "g_idx" in arrays:
        block = codes.shape[1] // scales.shape[1]
        if not torch.equal(arrays["g_idx"].long(), torch.arange(codes.shape[1]) // block):
            raise CheckpointError(
                "a GPTQ matrix has its columns in another order (desc_act), which can't be imported",
                hint="quantize from the BF16 checkpoint",
            )
    return codes, zeros, scales


def _some(rows: int, cols: int) -> tuple[int, int]:
    if not rows or not cols:
        raise ValueError
    return rows, cols


def _nvfp4_shape(packed: str, whole: str) -> Callable[[Mapping[str, tuple[int, ...]]], tuple[int, int]]:
    def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, half = shapes[packed]
        if shapes["weight_scale"] != (rows, half // 8) or half % 8 or prod(shapes[whole]) != 1:
            raise ValueError
        return _some(rows, 2 * half)

    return shape


def _nvfp4(codes: Tensor, scales: Tensor, whole: Tensor) -> Weight:
    """As ours: a byte's low half is the even column, and a block's scale is for 16 columns."""
    tensor_scale = _finite(whole, "an NVFP4 matrix").reshape(1)
    bits = scales.view(torch.uint8)
    if ((bits & 127) == 127).any():
        raise CheckpointError("an NVFP4 matrix holds scales that are no numbers: the checkpoint is damaged")
    spec = BlockSpec("e2m1", 16, "e4m3", tensor_scale=True)
    return Weight(spec, codes.shape[0], 2 * codes.shape[1], codes, bits, None, tensor_scale)


def _modelopt(arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weight:
    return _nvfp4(arrays["weight"], arrays["weight_scale"], arrays["weight_scale_2"])


def _ct_nvfp4(arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weight:
    """Its scale of the whole matrix is the inverse of ours."""
    whole = _finite(arrays["weight_global_scale"], "an NVFP4 matrix")
    if not (whole > 0).all():
        raise CheckpointError("an NVFP4 matrix has a global scale that is not above zero: the checkpoint is damaged")
    return _nvfp4(arrays["weight_packed"], arrays["weight_scale"], 1.0 / whole)


def _ct_int4_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    (rows, words), scales = shapes["weight_packed"], shapes["weight_scale"]
    if scales[0] != rows or not scales[1] or (8 * words) % scales[1] or shapes["weight_shape"] != (2,):
        raise ValueError
    if shapes.get("weight_zero_point", (-(-rows // 8), scales[1])) != (-(-rows // 8), scales[1]):
        raise ValueError
    return _some(rows, 8 * words)


def _ct_int4(arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = _nibbles(arrays["weight_packed"]), _finite(arrays["weight_scale"], "an INT4 matrix")
    if arrays["weight_shape"].tolist() != list(codes.shape):
        raise CheckpointError(f"an INT4 matrix of {list(codes.shape)} says it is {arrays['weight_shape'].tolist()}")
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    if "weight_zero_point" in arrays:
        zeros = _nibbles(arrays["weight_zero_point"].T.contiguous()).T.contiguous()[: codes.shape[0]]
    return codes, zeros, scales


def _fp8_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    rows, cols = shapes["weight"]
    if shapes["weight_scale_inv"] != (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)):
        raise ValueError
    return _some(rows, cols)


def _fp8(arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Code times scale in float32, where both are exact."""
    codes = arrays["weight"].view(torch.float8_e4m3fn).float()
    scales = _finite(arrays["weight_scale_inv"], "an FP8 matrix")
    wide = scales.repeat_interleave(FP8_BLOCK, 0)[: codes.shape[0]].repeat_interleave(FP8_BLOCK, 1)
    return codes * wide[:, : codes.shape[1]]


_FLOAT = "BF16 F16 F32"
_FP8 = Layout("FP8", {"weight_scale_inv": _FLOAT, "weight": "F8_E4M3"}, {}, _fp8_shape, _fp8)
_GPTQ = Layout(
    "GPTQ", {"qweight": "I32", "qzeros": "I32", "scales": _FLOAT}, {"g_idx": "I32 I64"}, _gptq_shape,
    lambda arrays, config: _int4_values(*_gptq(arrays, config)),
    "int4", lambda arrays, config: _int4(*_gptq(arrays, config)),
)  # fmt: skip
_MODELOPT = Layout(
    "NVFP4", {"weight_scale_2": "F32", "weight": "U8", "weight_scale": "F8_E4M3"}, {"input_scale": _FLOAT},
    _nvfp4_shape("weight", "weight_scale_2"), lambda arrays, config: decode(_modelopt(arrays, config)),
    "e2m1", _modelopt,
)  # fmt: skip
_CT_NVFP4 = Layout(
    "NVFP4", {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
    {"input_global_scale": _FLOAT}, _nvfp4_shape("weight_packed", "weight_global_scale"),
    lambda arrays, config: decode(_ct_nvfp4(arrays, config)), "e2m1", _ct_nvfp4,
)  # fmt: skip
_CT_INT4 = Layout(
    "INT4", {"weight_packed": "I32", "weight_scale": _FLOAT, "weight_shape": "I64 I32"}, {"weight_zero_point": "I32"},
    _ct_int4_shape, lambda arrays, config: _int4_values(*_ct_int4(arrays, config)),
    "int4", lambda arrays, config: _int4(*_ct_int4(arrays, config)),
)  # fmt: skip
