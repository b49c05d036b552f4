"""One table of op cases: sizes, storage, error bound, bytes and flops. Parity tests and docs/ops.md read it.

A case is made of sizes alone; `inputs` draws fresh random tensors for it. Sizes are odd on purpose: one token,
rows that fill no tile, lengths across a chunk's edge. Knows what an op needs, not what it gives: that is for an
oracle elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenrun.kernels.dispatch import Backend, backends, refusal
from qwenrun.kernels.ops import OPS, encode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

INT4 = BlockSpec("int4", 128, "f16")
NVFP4 = BlockSpec("e2m1", 16, "e4m3", tensor_scale=True)
SPECS = {
    "int4-g128": INT4,
    "int4-g64": BlockSpec("int4", 64, "f16"),
    "int4-g32": BlockSpec("int4", 32, "f16"),
    "int4-g128-zero": BlockSpec("int4", 128, "f16", zero=True),
    "int4-g32-zero": BlockSpec("int4", 32, "f16", zero=True),
    "nvfp4": NVFP4,
    "mxfp4": BlockSpec("e2m1", 32, "e8m0"),
    "int8-g128": BlockSpec("int8", 128, "f16"),
    "int8-g32": BlockSpec("int8", 32, "f16"),
    "bf16": BlockSpec("bf16"),
    "f32": BlockSpec("f32"),
    "int4-g128-tiled": BlockSpec("int4", 128, "f16", tile=True),
    "int4-g64-tiled": BlockSpec("int4", 64, "f16", tile=True),
    "int4-g32-tiled": BlockSpec("int4", 32, "f16", tile=True),
    "int4-g128-zero-tiled": BlockSpec("int4", 128, "f16", zero=True, tile=True),
    "nvfp4-tiled": BlockSpec("e2m1", 16, "e4m3", tensor_scale=True, tile=True),
    "mxfp4-tiled": BlockSpec("e2m1", 32, "e8m0", tile=True),
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    dims: the sizes by the letters of `ops`. bound: the largest allowed |y - y64| / |y64| against float64; see
    `bound_of` for backends that round activations.
    read_bytes: what must be read at least once; flops: multiplications and additions of the plain formula.
    """

    op: str
    dims: dict[str, int]
    bound: float
    read_bytes: int
    flops: int
    storage: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> BlockSpec | None:
        return SPECS[self.storage] if self.storage else None

    def bound_of(self, backend: Backend) -> float:
        """The bound for what this backend says of itself."""
        rounds = self.spec is not None and self.spec.codes in backend.rounds and self.op in ROUNDED
        return max(self.bound, ROUNDED[self.op] * 2 ** (8 - backend.rounded_bits)) if rounds else self.bound

    @property
    def name(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in self.dims.items())
        return "-".join(filter(None, [self.op, self.storage, sizes, *map(str, self.options.values())]))


def on_device(value: Any, device: str) -> Any:
    """Tensors and weights, in lists too, copied to a device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Weight):
        parts = {name: part.to(device, copy=True) for name, part in value.parts.items()}
        return Weight.from_parts(value.spec, value.rows, value.cols, parts)
    return [on_device(one, device) for one in value] if isinstance(value, list) else value


# Activations rounded to 8 bits with a scale a block err by 1/254 of the block's largest value at most, by 0.3 to 0.6 %
# of the result on random ones; an expert rounds twice, and multiplies two such results.
ROUNDED = {"linear": 1.5e-2, "linears": 1.5e-2, "experts": 4e-2, "swiglu": 4e-2, "moe_entry": 4e-2}
# Float32 sums of a few thousand products err by some 1e-6; an error of structure is larger than 1e-2.
FLOAT32 = 1e-5


def cases() -> tuple[Case, ...]:
    """The table."""
    return tuple(_all())


def _all() -> Iterator[Case]:
    for storage, spec in SPECS.items():
        cols = 384
        # A row more and one less than a power of two; one token and several.
        for tokens, rows in ((1, 65), (3, 31), (17, 64)):
            rows = -(-rows // spec.group) * spec.group
            size = spec.nbytes(rows, cols)
            dims = {"T": tokens, "N": rows, "K": cols}
            yield Case("linear", dims, FLOAT32, size + 4 * tokens * cols, 2 * tokens * rows * cols, storage)
        vocabulary = 64 if spec.tile else 67
        read = spec.nbytes(5 * spec.group, 256)
        yield Case("embedding", {"T": 5, "V": vocabulary, "H": 256}, FLOAT32, read, 0, storage)
        for tokens, experts, k in ((1, 5, 3), (2, 7, 2), (9, 4, 2)):
            dims = {"T": tokens, "E": experts, "k": k, "H": 128, "I": 128}
            touched = min(experts, tokens * k)
            size = touched * (spec.nbytes(256, 128, 2) + spec.nbytes(128, 128))
            yield Case("experts", dims, FLOAT32, size, 2 * tokens * k * 3 * 128 * 128, storage)
    for storage in ("int4-g32-tiled", "nvfp4-tiled", "int8-g32", "bf16"):
        spec = SPECS[storage]
        for tokens in (1, 2, 6):
            # The matrix in the named format, one in bf16 and one more, as a layer's projections may be.
            sizes = spec.nbytes(80, 128) + SPECS["bf16"].nbytes(3, 128) + _third(storage).nbytes(33, 128)
            dims = {"T": tokens, "N": 80, "K": 128}
            for norm in (False, True):
                yield Case("linears", dims, FLOAT32, sizes, 2 * tokens * 116 * 128, storage, {"norm": norm})
            dims = {"T": tokens, "I": 64, "H": 128}
            size = 2 * spec.nbytes(64, 128) + spec.nbytes(128, 64)
            yield Case("swiglu", dims, FLOAT32, size, 6 * tokens * 64 * 128, storage)
            dims = {"T": tokens, "I": 64, "H": 128, "E": 9, "k": 4}
            size += SPECS["bf16"].nbytes(10, 128)
            yield Case("moe_entry", dims, FLOAT32, size, 6 * tokens * 64 * 128 + 20 * tokens * 128, storage)
    for storage in ("bf16", "f32"):
        for tokens, experts, k in ((1, 16, 3), (7, 5, 5)):
            dims = {"T": tokens, "E": experts, "k": k, "H": 96}
            read = SPECS[storage].nbytes(experts, 96)
            yield Case("router", dims, FLOAT32, read, 2 * tokens * experts * 96, storage)
    for tokens, length, heads, groups, dim in (
        (1, 1, 4, 2, 32),
        (1, 2500, 3, 1, 64),
        (300, 300, 2, 2, 32),
        (7, 2100, 6, 2, 32),
    ):
        dims = {"T": tokens, "S": length, "Hq": heads, "Hkv": groups, "D": dim}
        yield Case("attention", dims, FLOAT32, 8 * length * groups * dim, 4 * tokens * length * heads * dim)
    for place, length, heads, groups, dim in ((0, 70, 4, 2, 32), (600, 700, 3, 1, 64), (69, 70, 2, 2, 32)):
        for kept in ("bf16", "f32"):
            dims = {"S": length, "p": place, "Hq": heads, "Hkv": groups, "D": dim}
            size = 2 * (place + 1) * groups * dim * (2 if kept == "bf16" else 4)
            flops = 4 * (place + 1) * heads * dim
            yield Case("decode_attention", dims, FLOAT32, size, flops, options={"kept": kept})
    for size, count in ((3000, 1), (300, 20), (40, 64)):
        yield Case("largest", {"V": size, "k": count}, FLOAT32, 4 * size, 0)
    for tokens, key_heads, value_heads in ((1, 2, 8), (5, 3, 3), (64, 2, 4), (150, 1, 4)):
        dims = {"T": tokens, "nk": key_heads, "nv": value_heads, "dk": 16, "dv": 24}
        state = value_heads * 16 * 24
        # Chunks of 64 decays multiply up to 64 roundings.
        yield Case("delta_rule", dims, 1e-4, 4 * state, 7 * tokens * state)
    for tokens in (1, 3, 70):
        dims = {"T": tokens, "nk": 2, "nv": 4, "dk": 16, "dv": 24}
        yield Case("delta_net", dims, 1e-4, 4 * (4 * 16 * 24 + 160 * 7), 7 * tokens * 4 * 16 * 24 + 8 * tokens * 160)
    for tokens in (1, 2, 3, 70):
        yield Case("conv", {"T": tokens, "C": 37}, FLOAT32, 4 * 37 * 7, 8 * tokens * 37)
    for zero_centred in (True, False):
        yield Case(
            "rms_norm", {"T": 3, "H": 97}, FLOAT32, 4 * 97 * 4, 4 * 3 * 97, options={"zero_centred": zero_centred}
        )
    yield Case("gated_rms_norm", {"T": 3, "nv": 5, "dv": 24}, FLOAT32, 8 * 3 * 5 * 24, 8 * 3 * 5 * 24)
    for heads in (1, 5):
        yield Case(
            "apply_rope", {"T": 4, "heads": heads, "D": 40, "R": 16}, FLOAT32, 4 * 4 * heads * 40, 6 * 4 * heads * 16
        )


def _third(storage: str) -> BlockSpec:
    """One more format beside `storage` and bf16; plain beside a plain one, whose bound is that of exact products."""
    return SPECS["bf16" if SPECS[storage].plain else "int8-g32"]


def inputs(case: Case, generator: torch.Generator) -> tuple[Any, ...]:
    """Fresh random arguments for `case`, in the order of its op; state tensors among them are the op's to change.

    One of `ops.FACTORIES` takes as many as it says there, and what it gives takes the others.
    """
    d = case.dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    if case.op == "linear":
        return normal(d["T"], d["K"]), encode(normal(d["N"], d["K"]), SPECS[case.storage])
    if case.op == "embedding":
        return integers(d["V"], d["T"]), encode(normal(d["V"], d["H"]), SPECS[case.storage])
    if case.op == "experts":
        gate_up = encode(normal(d["E"], 2 * d["I"], d["H"]), SPECS[case.storage], tensor_scales=2)
        down = encode(normal(d["E"], d["H"], d["I"]), SPECS[case.storage])
        index = torch.stack([torch.randperm(d["E"], generator=generator)[: d["k"]] for _ in range(d["T"])])
        return normal(d["T"], d["H"]) / 16, gate_up, down, index, normal(d["T"], d["k"]).softmax(-1)
    if case.op == "linears":
        specs = {d["N"]: SPECS[case.storage], 3: SPECS["bf16"], 33: _third(case.storage)}
        weights = [encode(normal(rows, d["K"]), spec) for rows, spec in specs.items()]
        return weights, normal(d["K"]) if case.options["norm"] else None, 1e-6, normal(d["T"], d["K"])
    if case.op == "swiglu":
        shapes = [(d["I"], d["H"]), (d["I"], d["H"]), (d["H"], d["I"])]
        return *(encode(normal(*shape) / 8, SPECS[case.storage]) for shape in shapes), normal(d["T"], d["H"])
    if case.op == "moe_entry":
        shapes = [(d["I"], d["H"]), (d["I"], d["H"]), (d["H"], d["I"])]
        router, shared_gate = (encode(normal(rows, d["H"]) / 8, SPECS["bf16"]) for rows in (d["E"], 1))
        shared = (encode(normal(*shape) / 8, SPECS[case.storage]) for shape in shapes)
        stream = (normal(d["T"], d["H"]), normal(d["T"], d["H"]))
        return normal(d["H"]), 1e-6, router, d["k"], *shared, shared_gate, *stream
    if case.op == "router":
        return normal(d["T"], d["H"]), encode(normal(d["E"], d["H"]) / 4, SPECS[case.storage]), d["k"]
    if case.op == "attention":
        key, value = (normal(d["S"], d["Hkv"], d["D"]) for _ in range(2))
        return normal(d["T"], d["Hq"], d["D"]), key, value, d["D"] ** -0.5
    if case.op == "decode_attention":
        query, key, value = (normal(1, d[heads], d["D"]) for heads in ("Hq", "Hkv", "Hkv"))
        kept = torch.bfloat16 if case.options["kept"] == "bf16" else torch.float32
        caches = [normal(d["S"], d["Hkv"], d["D"]).to(kept) for _ in range(2)]
        return query, key, value, *caches, torch.tensor([d["p"]]), d["D"] ** -0.5
    if case.op == "largest":
        return normal(d["V"]).mul(50).round(), d["k"]  # many equal ones
    if case.op == "delta_rule":
        q, k = (normal(d["T"], d["nk"], d["dk"]) for _ in range(2))
        decay = -torch.rand(d["T"], d["nv"], generator=generator).square() * 3
        beta = torch.rand(d["T"], d["nv"], generator=generator)
        return q, k, normal(d["T"], d["nv"], d["dv"]), decay, beta, normal(d["nv"], d["dk"], d["dv"])
    if case.op == "delta_net":
        values = d["nv"] * d["dv"]
        channels = 2 * d["nk"] * d["dk"] + values
        return (
            normal(d["T"], channels),
            normal(d["T"], values),
            normal(d["T"], d["nv"]),
            normal(d["T"], d["nv"]) * 3,
            normal(channels, 4),
            normal(3, channels),
            -torch.rand(d["nv"], generator=generator),
            normal(d["nv"]),
            normal(d["dv"]),
            1e-6,
            normal(d["nv"], d["dk"], d["dv"]),
        )
    if case.op == "conv":
        return normal(d["T"], d["C"]), normal(d["C"], 4), normal(3, d["C"])
    if case.op == "rms_norm":
        return normal(d["T"], d["H"]) * 3, normal(d["H"]), 1e-6, case.options["zero_centred"]
    if case.op == "gated_rms_norm":
        return normal(d["T"], d["nv"], d["dv"]), normal(d["dv"]), normal(d["T"], d["nv"], d["dv"]), 1e-6
    if case.op == "apply_rope":
        angle = normal(d["T"], d["R"] // 2)
        return normal(d["T"], d["heads"], d["D"]), angle.cos(), angle.sin()
    raise ValueError(f"no inputs are known for {case.op}")


def ops_markdown() -> str:
    """docs/ops.md: which backend computes which op on which storage, and what the table's cases cost."""
    names = list(backends())
    lines = [
        "# Ops",
        "",
        "Written by `make docs` from the table of cases in `kernels/cases.py` and from what the backends say of",
        "themselves. Shapes and formulas: the docstrings of `kernels/ops.py`.",
        "",
        "## Who computes what",
        "",
        "| op | storage | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    table = cases()
    for op in OPS:
        storages = list(dict.fromkeys(case.storage for case in table if case.op == op)) or [""]
        served = {s: ["no: " + why if (why := _static_refusal(n, op, s)) else "yes" for n in names] for s in storages}
        if len({tuple(row) for row in served.values()}) == 1:
            shown = ", ".join(filter(None, storages)) or "-"
            lines.append(f"| `{op}` | {shown} | " + " | ".join(served[storages[0]]) + " |")
        else:
            lines += [f"| `{op}` | {s or '-'} | " + " | ".join(row) + " |" for s, row in served.items()]
    lines += [
        "",
        "## The cases",
        "",
        "Every backend is compared with an independent float64 formula on each; the bound is on",
        "|y - y64| / |y64|. Bytes are what must be read at least once.",
        "",
        "| case | bound | bytes | flops |",
        "|---|---|---|---|",
    ]
    lines += [f"| {case.name} | {case.bound:g} | {case.read_bytes:,} | {case.flops:,} |" for case in table]
    return "\n".join(lines) + "\n"


def _static_refusal(name: str, op: str, storage: str) -> str:
    """A backend's refusal on its own device; machine-dependent ones would make the page differ by machine."""
    backend = backends()[name].BACKEND
    device = backend.devices[0] if backend.devices else "cpu"
    return refusal(name, op, device, SPECS[storage] if storage else None)
