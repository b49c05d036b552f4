"""The CPU backend: products with encoded matrices in C++, behind a plain C interface loaded with ctypes.

int4, int8 and NVFP4 weights are multiplied with activations rounded to int8 block by block (8 bits a value, a scale
a block), bf16 weights with float32 activations. There are `linear`, `experts` and `router`; the reference serves
the rest. Without the library (no compiler when it was installed) the backend refuses, and the reference serves all.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.kernels import ref
from qwenrun.kernels.dispatch import Backend
from qwenrun.kernels.ref.linear import top_k
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

VERSION = 2
_CODES = {"int4": 0, "int8": 1, "e2m1": 2, "bf16": 3}
_SCALES = {"f16": 0, "e4m3": 1, "e8m0": 2, "": 0}
# Columns whose products are summed before they are widened: a tiled matrix's blocks are made of whole ones.
_SLAB = {"int4": 32, "e2m1": 16}


class _Matrix(ctypes.Structure):
    """`struct Matrix` of csrc/kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "tensor_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block", "tensor_scales")),
        *((name, ctypes.c_int64) for name in ("codes_step", "scales_step", "zeros_step", "tensor_step")),
        *((name, ctypes.c_int32) for name in ("kind", "scale", "tile")),
    ]


@cache
def library() -> ctypes.CDLL | str:
    """The compiled library, or a sentence why there is none."""
    here = Path(__file__).parent
    found = [here / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES if (here / f"_kernels{suffix}").is_file()]
    if not found:
        return "was not compiled when qwenrun was installed: it needs a C++ compiler"
    try:
        lib = ctypes.CDLL(str(found[0]))
        version = lib.qwenrun_cpu_version()
    except (OSError, AttributeError) as error:
        return f"can't be loaded: {error}"
    if version != VERSION:
        return f"was compiled from other sources (interface {version}, not {VERSION}): install qwenrun again"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.qwenrun_cpu_linear.argtypes = [pointer, pointer, number, pointer]
    lib.qwenrun_cpu_linear.restype = None
    lib.qwenrun_cpu_experts.argtypes = [pointer, pointer, pointer, number, number, pointer, pointer, pointer]
    lib.qwenrun_cpu_experts.restype = None
    return lib


def _refuses(op: str, spec: BlockSpec | None) -> str:
    lib = library()
    if isinstance(lib, str):
        return lib
    if not lib.qwenrun_cpu_avx2():
        return "needs AVX2, FMA and F16C to be faster than the reference"
    if op == "router":
        return ""
    if spec is None or spec.codes not in _CODES:
        return f"has no {op} for {spec.codes if spec else 'matrices without a format'}"
    if spec.tile:
        whole = spec.block % _SLAB[spec.codes] == 0
        return "" if whole else f"has no tiles with blocks of {spec.block}"
    if spec.scale == "e8m0":
        return "has no e8m0 scales but in tiles"
    return ""


BACKEND = Backend("cpu", priority=10, devices=("cpu",), refuses=_refuses, rounds=("int4", "int8", "e2m1"))


def _matrix(w: Weight) -> _Matrix:
    """Pointers to a weight, or to the first of a stack. Parts are contiguous but for the stack's dimension."""

    def part(tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        inner = tensor[0] if w.lead else tensor
        if not inner.is_contiguous():
            raise ValueError("a weight's rows must be contiguous")
        return tensor.data_ptr(), (tensor.stride(0) * tensor.element_size() if w.lead else 0)

    parts = [part(t) for t in (w.codes, w.scales, w.zeros, w.tensor_scale)]
    count = w.tensor_scale.shape[-1] if w.tensor_scale is not None else 1
    sizes = (w.rows, w.cols, w.spec.block, count)
    return _Matrix(*(p for p, _ in parts), *sizes, *(s for _, s in parts), _CODES[w.spec.codes], _SCALES[w.spec.scale], w.spec.tile)


# Weights live as long as their model, and their structs are asked for at every call.
_known: dict[tuple[object, ...], _Matrix] = {}


def _described(w: Weight) -> _Matrix:
    # All that goes into the struct: where one array has been freed, another's may begin.
    arrays = (w.codes, w.scales, w.zeros, w.tensor_scale)
    key = (w.spec, w.rows, w.cols, *(None if t is None else (t.data_ptr(), t.stride(), t.shape) for t in arrays))
    found = _known.get(key)
    if found is None:
        if len(_known) > 8192:
            _known.clear()
        found = _known[key] = _matrix(w)
    return found


def _float_rows(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def linear(x: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.linear`."""
    rows = _float_rows(x)
    out = torch.empty(rows.shape[0], w.rows, dtype=torch.float32)
    library().qwenrun_cpu_linear(ctypes.byref(_described(w)), rows.data_ptr(), rows.shape[0], out.data_ptr())  # type: ignore[union-attr]
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def router(x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.router`. A gate that is not BF16 is the reference's."""
    if gate.dtype != torch.bfloat16:
        return ref.router(x, gate, k)
    return top_k(linear(_float_rows(x), Weight.plain(gate)), k)


def experts(x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.experts`."""
    if gate_up.spec.tile != down.spec.tile:
        return ref.experts(x, gate_up, down, index, weight)
    rows, chosen, weights = _float_rows(x), index.contiguous(), _float_rows(weight)
    out = torch.empty(rows.shape[0], down.rows, dtype=torch.float32)
    library().qwenrun_cpu_experts(  # type: ignore[union-attr]
        ctypes.byref(_described(gate_up)),
        ctypes.byref(_described(down)),
        rows.data_ptr(),
        rows.shape[0],
        chosen.shape[1],
        chosen.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)
