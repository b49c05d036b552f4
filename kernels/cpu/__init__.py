"""The CPU backend: products with encoded matrices in C++, behind a plain C interface loaded with ctypes.

int4, int8 and NVFP4 weights are multiplied with activations rounded to int8 block by block (8 bits a value, a scale
a block), bf16 weights with float32 activations. What a layer has beside products is here too; the reference serves
what is not. Without the library (no compiler when it was installed) the backend refuses, and the reference serves all.
QWENRUN_CPU=avx2 keeps to AVX2 on a machine that has more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.kernels import ref
from qwenrun.kernels.dispatch import Backend
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import TORCH_DTYPES, Weight

VERSION = 5
# A library to load in place of the installed one: one with sanitizers, say.
LIBRARY_ENV = "QWENRUN_CPU_LIBRARY"
_CODES = {"int4": 0, "int8": 1, "e2m1": 2, "bf16": 3}
_SCALES = {"f16": 0, "e4m3": 1, "e8m0": 2, "": 0}
# Columns whose products are summed before they are widened: a tiled matrix's blocks are made of whole ones.
_SLAB = {"int4": 32, "e2m1": 16}
# Values of a block that the search for scales has room for.
LARGEST_BLOCK = 256


class _Matrix(ctypes.Structure):
    """`struct Matrix` of csrc/kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "tensor_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block", "tensor_scales")),
        *((name, ctypes.c_int64) for name in ("codes_step", "scales_step", "zeros_step", "tensor_step")),
        *((name, ctypes.c_int32) for name in ("kind", "scale", "tile")),
    ]


class _Search(ctypes.Structure):
    """`struct Search` of csrc/fit.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "trials", "tensor_scale", "importance")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "noise")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block", "count", "tensor_scales")),
        *((name, ctypes.c_int32) for name in ("kind", "tile")),
    ]


_WITHOUT_FORMAT = (
    "linears",
    "swiglu",
    "moe_entry",
    "delta_net",
    "router",
    "attention",
    "apply_rope",
    "conv",
    "delta_rule",
    "rms_norm",
    "gated_rms_norm",
)
# Taps of a convolution that the kernel has room for.
MOST_TAPS = 8
_KV = {torch.float32: 0, torch.bfloat16: 1}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled library, or a sentence why there is none."""
    here, other = Path(__file__).parent, os.environ.get(LIBRARY_ENV)
    found = [here / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = [Path(other)] if other else [path for path in found if path.is_file()]
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
    lib.qwenrun_cpu_experts.argtypes = [pointer, pointer, pointer, number, number, *[pointer] * 4]
    lib.qwenrun_cpu_experts.restype = None
    lib.qwenrun_cpu_tiles.restype = ctypes.c_char_p
    real = ctypes.c_float
    for name, types in {
        "linears": [pointer, number, pointer, number, pointer, real, pointer],
        "moe_entry": [*[pointer] * 6, real, number, pointer, pointer, number, *[pointer] * 5],
        "swiglu": [*[pointer] * 4, number, pointer],
        "delta_net": [*[pointer] * 9, real, pointer, *[number] * 6, pointer],
        "rms_norm": [pointer, pointer, real, real, number, number, pointer],
        "gated_rms_norm": [pointer, pointer, pointer, real, number, number, pointer],
        "rope": [pointer, pointer, pointer, *[number] * 4, pointer],
        "conv": [pointer, pointer, pointer, *[number] * 3, pointer],
        "delta_rule": [*[pointer] * 6, *[number] * 8, pointer],
        "attention": [*[pointer] * 5, ctypes.c_int32, *[number] * 5, real, pointer],
        "fit": [pointer],
        "top_k": [pointer, *[number] * 3, pointer, pointer],
    }.items():
        function = getattr(lib, f"qwenrun_cpu_{name}")
        function.argtypes, function.restype = types, None
    return lib


@cache
def _lib() -> ctypes.CDLL:
    """The library where it is known to be there: a backend that refuses is not called."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL), lib
    return lib


def _refuses(op: str, spec: BlockSpec | None) -> str:
    lib = library()
    if isinstance(lib, str):
        return lib
    if not lib.qwenrun_cpu_avx2():
        return "needs AVX2, FMA and F16C to be faster than the reference"
    if op in _WITHOUT_FORMAT:
        return ""
    if op == "fit" and spec is not None and (spec.block % 8 or spec.block > LARGEST_BLOCK):
        return f"has no fit for blocks of {spec.block}"
    if spec is None or spec.codes not in _CODES:
        return f"has no {op} for {spec.codes if spec else 'matrices without a format'}"
    if spec.tile:
        whole = spec.block % _SLAB[spec.codes] == 0
        return "" if whole else f"has no tiles with blocks of {spec.block}"
    if spec.scale == "e8m0":
        return "has no e8m0 scales but in tiles"
    return ""


def _detail() -> str:
    lib = library()
    if isinstance(lib, str) or not lib.qwenrun_cpu_avx2():
        return ""
    return f"{lib.qwenrun_cpu_tiles().decode()}, {lib.qwenrun_cpu_threads()} threads"


BACKEND = Backend(
    "cpu", priority=10, devices=("cpu",), refuses=_refuses, rounds=("int4", "int8", "e2m1"), detail=_detail
)


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
    return _Matrix(
        *(p for p, _ in parts), *sizes, *(s for _, s in parts), _CODES[w.spec.codes], _SCALES[w.spec.scale], w.spec.tile
    )


def _described(w: Weight) -> _Matrix:
    if not isinstance(w.handle, _Matrix):
        w.handle = _matrix(w)
    return w.handle


def _float_rows(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def fit(
    values: Tensor,
    spec: BlockSpec,
    trials: Sequence[tuple[float, float]],
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Weight, Tensor]:
    """See `qwenrun.kernels.ops.fit`."""
    (rows, cols), own = values.shape, tensor_scale
    count = 1 if own is None else len(own)
    made = {
        part.name: torch.zeros(part.shape, dtype=TORCH_DTYPES[part.dtype])
        for part in spec.parts(rows, cols, count)
        if part.name != "tensor_scale"
    }
    if own is not None:
        own = made["tensor_scale"] = _float_rows(own)
    noise, tried = torch.empty(rows), torch.tensor(trials, dtype=torch.float32)
    given = [_float_rows(values), tried, own, None if importance is None else _float_rows(importance)]
    tensors = [*given, made["codes"], made["scales"], made.get("zeros"), noise]
    search = _Search(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(rows, cols, spec.block, len(trials), count, _CODES[spec.codes], spec.tile),
    )
    _lib().qwenrun_cpu_fit(ctypes.byref(search))
    return Weight(spec, rows, cols, **made), noise


def linear(x: Tensor, w: Weight) -> Tensor:
    """See `qwenrun.kernels.ops.linear`."""
    rows = _float_rows(x)
    out = torch.empty(rows.shape[0], w.rows, dtype=torch.float32)
    _lib().qwenrun_cpu_linear(ctypes.byref(_described(w)), rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def linears(
    weights: Sequence[Weight], norm: Tensor | None = None, eps: float = 1e-6
) -> Callable[[Tensor], list[Tensor]]:
    """See `qwenrun.kernels.ops.linears`."""
    if any(_refuses("linear", w.spec) for w in weights):
        return ref.linears(weights, norm, eps)
    count, lib = len(weights), _lib().qwenrun_cpu_linears
    matrices = [_described(w) for w in weights]
    pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, matrices))
    rows = [w.rows for w in weights]
    total = sum(rows)
    before = None if norm is None else _float_rows(norm)
    scale = None if before is None else before.data_ptr()

    def apply(x: Tensor, kept: object = (weights, matrices, before)) -> list[Tensor]:
        values, tokens = _float_rows(x), x.shape[0]
        out = torch.empty(tokens * total, dtype=torch.float32)
        lib(pointers, count, values.data_ptr(), tokens, scale, eps, out.data_ptr())
        if count == 1:
            made = [out.view(tokens, total)]
        else:
            made = [y.view(tokens, -1) for y in out.split([tokens * n for n in rows])]
        return made if x.dtype == torch.float32 else [y.to(x.dtype) for y in made]

    return apply


def swiglu(gate: Weight, up: Weight, down: Weight) -> Callable[[Tensor], Tensor]:
    """See `qwenrun.kernels.ops.swiglu`."""
    if any(_refuses("linear", w.spec) for w in (gate, up, down)):
        return ref.swiglu(gate, up, down)
    lib = _lib().qwenrun_cpu_swiglu
    matrices = [_described(w) for w in (gate, up, down)]
    pointers = [ctypes.addressof(m) for m in matrices]

    def apply(x: Tensor, kept: object = (gate, up, down, matrices)) -> Tensor:
        values = _float_rows(x)
        out = torch.empty(x.shape[0], down.rows, dtype=torch.float32)
        lib(*pointers, values.data_ptr(), x.shape[0], out.data_ptr())
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    return apply


def moe_entry(
    norm: Tensor, eps: float, router: Weight, k: int, gate: Weight, up: Weight, down: Weight, shared_gate: Weight
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See `qwenrun.kernels.ops.moe_entry`."""
    weights = (router, gate, up, down, shared_gate)
    if any(_refuses("linear", w.spec) for w in weights):
        return ref.moe_entry(norm, eps, router, k, gate, up, down, shared_gate)
    lib, before, hidden = _lib().qwenrun_cpu_moe_entry, _float_rows(norm), router.cols
    matrices = [_described(w) for w in weights]
    pointers = [ctypes.addressof(m) for m in matrices]
    scale = before.data_ptr()

    def apply(
        x: Tensor, y: Tensor, kept: object = (weights, matrices, before)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b, tokens = _float_rows(x), _float_rows(y), x.shape[0]
        stream, normed, base = torch.empty(3, tokens, hidden, dtype=torch.float32).unbind()
        index = torch.empty(tokens, k, dtype=torch.int64)
        weight = torch.empty(tokens, k, dtype=torch.float32)
        at = stream.data_ptr()
        step = 4 * tokens * hidden
        lib(
            *pointers, scale, eps, k, a.data_ptr(), b.data_ptr(), tokens,
            at, at + step, at + 2 * step, index.data_ptr(), weight.data_ptr(),
        )  # fmt: skip
        return stream, normed, index, weight, base

    return apply


def router(x: Tensor, gate: Weight, k: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.router`. A gate this backend does not multiply with is the reference's."""
    if gate.spec.codes != "bf16" and _refuses("linear", gate.spec):
        return ref.router(x, gate, k)
    logits = linear(_float_rows(x), gate)
    tokens, experts = logits.shape
    index = torch.empty(tokens, k, dtype=torch.int64)
    weight = torch.empty(tokens, k, dtype=torch.float32)
    _lib().qwenrun_cpu_top_k(logits.data_ptr(), tokens, experts, k, index.data_ptr(), weight.data_ptr())
    return index, weight


def experts(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    index: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    distinct: int = 0,
) -> Tensor:
    """See `qwenrun.kernels.ops.experts`."""
    if gate_up.spec.tile != down.spec.tile:
        return ref.experts(x, gate_up, down, index, weight, base)
    added = None if base is None else _float_rows(base)
    rows, chosen, weights = _float_rows(x), index.contiguous(), _float_rows(weight)
    out = torch.empty(rows.shape[0], down.rows, dtype=torch.float32)
    _lib().qwenrun_cpu_experts(
        ctypes.byref(_described(gate_up)),
        ctypes.byref(_described(down)),
        rows.data_ptr(),
        rows.shape[0],
        chosen.shape[1],
        chosen.data_ptr(),
        weights.data_ptr(),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6, zero_centred: bool = True) -> Tensor:
    """See `qwenrun.kernels.ops.rms_norm`."""
    rows, size = _float_rows(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32)
    shift = 1.0 if zero_centred else 0.0
    _lib().qwenrun_cpu_rms_norm(
        rows.data_ptr(), _float_rows(w).data_ptr(), shift, eps, rows.numel() // size, size, out.data_ptr()
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def gated_rms_norm(o: Tensor, w: Tensor, z: Tensor, eps: float = 1e-6) -> Tensor:
    """See `qwenrun.kernels.ops.gated_rms_norm`."""
    rows, gate, size = _float_rows(o), _float_rows(z), o.shape[-1]
    out = torch.empty(o.shape, dtype=torch.float32)
    _lib().qwenrun_cpu_gated_rms_norm(
        rows.data_ptr(), _float_rows(w).data_ptr(), gate.data_ptr(), eps, rows.numel() // size, size, out.data_ptr()
    )
    return out if o.dtype == torch.float32 else out.to(o.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.apply_rope`."""
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=torch.float32)
    rows, c, s = _float_rows(x), _float_rows(cos), _float_rows(sin)
    _lib().qwenrun_cpu_rope(
        rows.data_ptr(), c.data_ptr(), s.data_ptr(), tokens, heads, size, c.shape[-1], out.data_ptr()
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def conv(u: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.conv`."""
    channels, taps = weight.shape
    if taps > MOST_TAPS or state.dtype != torch.float32 or not state.is_contiguous():
        return ref.conv(u, weight, state)
    rows, w = _float_rows(u), _float_rows(weight)
    out = torch.empty(rows.shape, dtype=torch.float32)
    _lib().qwenrun_cpu_conv(
        rows.data_ptr(), w.data_ptr(), state.data_ptr(), rows.shape[0], channels, taps, out.data_ptr()
    )
    return out if u.dtype == torch.float32 else out.to(u.dtype)


def _strided_rows(x: Tensor) -> Tensor:
    """x [T, heads, d] in float32 with each token's heads contiguous; tokens may lie apart."""
    good = x.dtype == torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if good else x.float().contiguous()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.delta_rule`."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        return ref.delta_rule(q, k, v, g, beta, state)
    (tokens, key_heads, dk), (value_heads, dv) = q.shape, v.shape[1:]
    queries, keys, values = _strided_rows(q), _strided_rows(k), _strided_rows(v)
    decay, strength = _float_rows(g), _float_rows(beta)
    out = torch.empty(tokens, value_heads, dv, dtype=torch.float32)
    _lib().qwenrun_cpu_delta_rule(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), decay.data_ptr(), strength.data_ptr(),
        state.data_ptr(), tokens, key_heads, value_heads, dk, dv,
        queries.stride(0), keys.stride(0), values.stride(0), out.data_ptr(),
    )  # fmt: skip
    return out if v.dtype == torch.float32 else out.to(v.dtype)


def delta_net(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    eps: float,
    state: Tensor,
) -> Tensor:
    """See `qwenrun.kernels.ops.delta_net`."""
    (value_heads, dk, dv), (tokens, channels) = state.shape, qkv.shape
    key_heads, taps = (channels - value_heads * dv) // (2 * dk), conv_weight.shape[1]
    given = (qkv, z, b, a, conv_weight, conv_state, decay, dt_bias, norm, state)
    if taps > MOST_TAPS or any(t.dtype != torch.float32 or not t.is_contiguous() for t in given):
        return ref.delta_net(qkv, z, b, a, conv_weight, conv_state, decay, dt_bias, norm, eps, state)
    out = torch.empty(tokens, value_heads * dv, dtype=torch.float32)
    pointers = [t.data_ptr() for t in given]
    _lib().qwenrun_cpu_delta_net(
        *pointers[:9], eps, pointers[9], tokens, key_heads, value_heads, dk, dv, taps, out.data_ptr()
    )
    return out


def attention(q: Tensor, k: Tensor | Weight, v: Tensor | Weight, scale: float) -> Tensor:
    """See `qwenrun.kernels.ops.attention`."""
    tokens, heads, size = q.shape
    if isinstance(k, Weight) and isinstance(v, Weight):
        served = (
            k.spec == v.spec and k.spec.codes == "int8" and k.spec.scale == "f16" and k.spec.block == size == v.cols
        )
        keys, values, k_scales, v_scales, kind = k.codes, v.codes, k.scales, v.scales, 2
    else:
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        served = k.dtype == v.dtype and k.dtype in _KV and v.shape[-1] == size
        keys, values, k_scales, v_scales, kind = k, v, None, None, _KV.get(k.dtype, 0)
    arrays = (keys, values, k_scales, v_scales)
    if not served or size % 8 or not all(a is None or a.is_contiguous() for a in arrays):
        return ref.attention(q, k, v, scale)
    rows = _float_rows(q)
    out = torch.empty(q.shape, dtype=torch.float32)
    _lib().qwenrun_cpu_attention(
        rows.data_ptr(), *(None if a is None else a.data_ptr() for a in arrays), kind,
        tokens, keys.shape[0], heads, keys.shape[1], size, scale, out.data_ptr(),
    )  # fmt: skip
    return out if q.dtype == torch.float32 else out.to(q.dtype)
