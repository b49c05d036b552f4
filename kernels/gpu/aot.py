"""Compiles every kernel for every card ahead of time, and reads what the compiler made of it. No card is needed.

    python -m qwenrun.kernels.gpu.aot [--json] [--page docs/kernels.md] [--only NAME]

Registers, memory and instructions come from the cubins, by the tools inside the triton wheel. They show what can't be
fast (spills, narrow loads, no tensor cores); they say nothing of how fast the rest is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qwenrun.kernels.cases import SPECS
from qwenrun.kernels.gpu.tiles import FAR, FP4_TARGETS, FP4_TILE, TARGETS, Tile, attention, choose
from qwenrun.kernels.spec import BlockSpec

# Bytes of shared memory a block may use (CUDA C programming guide, table of compute capabilities).
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
BF16_CORES, FP4_CORES = ("HMMA", "HGMMA", "UTCHMMA"), ("OMMA", "UTCOMMA")


@dataclass(frozen=True)
class Variant:
    """A kernel at the sizes it is launched with: the types of its arguments, and its constants by name.

    A type among the constants is named as Triton's language names types. cores: it has to use one of these instructions
    of tensor cores. targets: the cards it is launched on.
    """

    name: str
    kernel: str
    types: tuple[str, ...]
    constants: Mapping[str, int | bool | str] = field(default_factory=dict)
    cores: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    targets: tuple[int, ...] = TARGETS


@dataclass(frozen=True)
class Compiled:
    """What one variant became for one card. shared, spills in bytes; loads by their width in bits."""

    name: str
    target: int
    registers: int
    shared: int
    spills: int
    instructions: int
    tensor_cores: dict[str, int]
    loads: dict[str, int]

    @property
    def trouble(self) -> str:
        """Why it must not be launched, or ""."""
        if self.spills:
            return f"spills {self.spills} bytes"
        if self.shared > SHARED[self.target]:
            return f"needs {self.shared} bytes of shared memory, the card has {SHARED[self.target]}"
        return ""


def variants() -> Iterator[Variant]:
    """Every kernel in every form that the packs' recipes have."""
    from qwenrun.kernels.gpu import launch

    for form in ("int4-g128", "int4-g32", "int4-g128-zero", "nvfp4", "mxfp4"):
        spec = SPECS[f"{form}-tiled"]
        constants: dict[str, int | bool | str] = dict(launch.format_of(spec, 2 if spec.tensor_scale else 0))
        parts = ("*i32", "*u16" if constants["SCALE"] == 0 else "*u8", "*u8" if constants["ZERO"] else "*i32")
        scales = "*fp32" if constants["TENSOR"] else "*i32"
        weights = (*parts, scales)
        rounded, made = ("*i32", "*fp32"), ("*i8", "*fp32")
        constants["ASSEMBLY"] = True
        stepped = {**constants, "STEPS": launch.STEPS}
        yield Variant(
            f"gemv_tiled {form}", "matmul.gemv_tiled", (*rounded, *weights, "*fp32", "i32", "i32", "i32"),
            {**stepped, "ROWS": launch.ROWS}, warps=launch.WARPS,
        )  # fmt: skip
        kind = constants["KIND"]
        for to, written in ((kind, made), (-1, ("*fp32", "*fp32"))):
            yield Variant(
                f"swiglu_tiled {form}{' plain' if to == -1 else ''}", "moe.swiglu_tiled",
                (*rounded, *weights, *weights, *written, "i32", "i32"), {**stepped, "FOR": to}, warps=launch.WARPS,
            )  # fmt: skip
        strides = ("i32",) * 4
        yield Variant(
            f"experts gate_up {form}", "moe.gate_up_tiled",
            (*rounded, "*i64", *weights, *made, "i32", "i32", *strides), {"K_CHOSEN": 8, **stepped, "FOR": kind},
            warps=launch.WARPS,
        )  # fmt: skip
        yield Variant(
            f"experts down {form}", "moe.down_tiled",
            (*rounded, "*i64", "*fp32", *weights, "*fp32", "*fp32", "i32", "i32", *strides),
            {"K_CHOSEN": 8, "HAS_BASE": True, **constants, "STEPS": launch.down_steps(spec), "ROWS": launch.DOWN_ROWS},
            warps=launch.DOWN_WARPS,
        )  # fmt: skip
        for tile, targets in _tiles(spec):
            yield Variant(
                f"gemm_tiled {form} {tile.rows}x{tile.cols} w{tile.warps}",
                "matmul.gemm_tiled",
                ("*bf16", *weights, "*fp32", *["*i64"] * 5, "i32", "i32", "i32", *strides),
                {**constants, "BM": tile.rows, "BN": tile.cols},
                cores=BF16_CORES,
                warps=tile.warps,
                stages=tile.stages,
                targets=targets,
            )
    yield Variant("encode_rows fp4", "fp4.encode_rows", ("*fp32", "*u8", "*u8", "*fp32", "i32"), {"BLOCK": 1024})
    tile = FP4_TILE
    yield Variant(
        f"gemm_fp4 {tile.rows}x{tile.cols} w{tile.warps}",
        "fp4.gemm_fp4",
        ("*u8", "*u8", "*fp32", "*i32", "*u8", "*fp32", "*fp32", *["*i64"] * 5, *["i32"] * 5),
        {"TENSOR": 2, "BM": tile.rows, "BN": tile.cols},
        cores=FP4_CORES,
        warps=tile.warps,
        stages=tile.stages,
        targets=FP4_TARGETS,
    )
    for form, codes, scaled, block in (("int8-g128", "*i8", True, 128), ("bf16", "*bf16", False, 2048)):
        scales = "*u16" if scaled else codes
        constants = {"BLOCK": block, "SCALED": scaled}
        for size in (1, 1024):
            rows_, warps = launch.plain_shape(size, scaled)
            sizes = {"BN": rows_, "BK": launch.PLAIN_COLS, "RUN": launch.PLAIN_RUN // (1 if scaled else 2)}
            yield Variant(
                f"gemv_plain {form} {rows_}", "matmul.gemv_plain", ("*fp32", codes, scales, "*fp32", "i32", "i32"),
                {**constants, **sizes}, warps=warps,
            )  # fmt: skip
            yield Variant(
                f"gemv_plain_pairs {form} {rows_}", "matmul.gemv_plain_pairs",
                ("*fp32", "*i64", codes, scales, "*fp32", *["i32"] * 5), {**constants, **sizes}, warps=warps,
            )  # fmt: skip
        for tile, targets in _tiles(SPECS[form]):
            yield Variant(
                f"gemm_plain {form} {tile.rows}x{tile.cols} w{tile.warps}",
                "matmul.gemm_plain",
                ("*bf16", codes, scales, "*fp32", "i32", "i32", "i32"),
                {**constants, "BM": tile.rows, "BN": tile.cols, "BK": launch.plain_columns(block if scaled else 0)},
                cores=BF16_CORES,
                warps=tile.warps,
                stages=tile.stages,
                targets=targets,
            )
    floats = ("*fp32", "*fp32", "*fp32")
    for kind, form in ((0, "int4"), (2, "e2m1")):
        yield Variant(
            f"round_rows {form}", "rounded.round_rows", ("*fp32", "*i8", "*fp32", "i32"),
            {"KIND": kind, "BLOCKS": launch.ROUNDED_BLOCKS},
        )  # fmt: skip
    for onto in (False, True):
        yield Variant(
            "add_shares onto" if onto else "add_shares", "matmul.add_shares", (*floats, "*fp32", "i32"),
            {"SHARES": 2, "ONTO": onto, "BLOCK": 256},
        )  # fmt: skip
    for form, to in (("", "*fp32"), (" bf16", "*bf16")):
        yield Variant(f"silu_times{form}", "moe.silu_times", ("*fp32", to, "i32", "i32"), {"BLOCK": 256})
    yield Variant(
        "weighted_sum", "moe.weighted_sum", (*floats, "*fp32", "i32"),
        {"K_CHOSEN": 8, "HAS_BASE": True, "BLOCK": 256},
    )  # fmt: skip
    for rows, stored in (("bf16", "*bf16"), ("int8", "*i8")):
        scales, kind = ("*u16", 2) if rows == "int8" else ("*fp32", 1)
        for form, least, tile, targets in _attention_tiles(rows == "int8"):
            yield Variant(
                f"attend_part {rows} D256 16:1{form} {tile.rows}x{tile.cols} w{tile.warps}",
                "attend.attend_part",
                ("*bf16", stored, stored, scales, scales, "*fp32", "*fp32", "*i64", "fp32", *["i32"] * 4),
                {
                    "SHARED": 16,
                    "INT8": rows == "int8",
                    "LEAST": least,
                    "D": 256,
                    "OPERAND": "bfloat16",
                    "BM": tile.rows,
                    "BS": tile.cols,
                },
                cores=BF16_CORES,
                warps=tile.warps,
                stages=tile.stages,
                targets=targets,
            )
        bits = "*u16" if kind == 1 else stored
        yield Variant(
            f"store_row {rows} D256", "attend.store_row",
            ("*fp32", "*fp32", bits, bits, scales, scales, "*i64", "i32"), {"D": 256, "KIND": kind},
        )  # fmt: skip
    for form, least in (("", 0), (" step", launch.STEP_SPLIT)):
        most, slice_ = (128, launch.JOIN_SLICE) if least else (2, 256)
        sizes = {"MOST": most, "D": 256, "SLICE": slice_, "BLOCK": min(most, launch.JOIN_BLOCK)}
        yield Variant(
            f"join_parts D256{form}", "attend.join_parts", (*floats, "*i64", "i32", "i32"), {"LEAST": least, **sizes}
        )
    yield Variant(
        "rope_tables", "rotary.rope_tables", ("*i64", "*fp32", "*i32", "*fp32", "*fp32", "fp32", "i32"),
        {"HALF": 32, "SIZE": 32},
    )  # fmt: skip
    yield Variant("apply_rope", "rotary.apply_rope", (*floats, "*fp32", "i32", "i32"), {"HALF": 32, "SIZE": 256})
    yield Variant("choose 8 of 256", "choice.choose", ("*fp32", "*i64", "*fp32", "i32"), {"CHOSEN": 8, "SIZE": 256})
    for count in (1, 20):
        for form, first, last in (("first", True, False), ("middle", False, False), ("last", False, True)):
            yield Variant(
                f"largest {count} {form}", "choice.largest", ("*fp32", "*i64", "*fp32", "*i64", "i32"),
                {"COUNT": count, "FIRST": first, "LAST": last, "BLOCK": launch.SORTED},
            )  # fmt: skip
    yield Variant("conv", "delta.conv", (*floats, "*fp32", "i32", "i32"), {"TAPS": 4, "BLOCK": 256})
    yield Variant(
        "delta_rule 128x128", "delta.delta_rule", ("*fp32",) * 7 + ("i32",) * 6 + ("fp32",),
        {"DK": 128, "DV": 128, "KEYS": 128, "BV": launch.VALUES},
    )  # fmt: skip
    chunked: dict[str, int | bool | str] = {"DK": 128, "KEYS": 128, "OPERAND": "bfloat16", "C": launch.CHUNK}
    yield Variant(
        "chunk_inside 128", "chunk.chunk_inside", ("*fp32",) * 6 + ("i32",) * 5 + ("fp32",), chunked,
        cores=BF16_CORES, stages=1,
    )  # fmt: skip
    yield Variant(
        "chunk_states 128x128", "chunk.chunk_states", ("*fp32",) * 9 + ("i32",) * 6 + ("fp32",),
        {**chunked, "DV": 128, "BV": launch.CHUNK_VALUES}, cores=BF16_CORES, warps=launch.CHUNK_WARPS, stages=1,
    )  # fmt: skip
    yield Variant("conv_step", "delta.conv_step", (*floats, "*fp32", "i32"), {"TAPS": 4, "BLOCK": 256})
    yield Variant(
        "delta_step 128x128", "delta.delta_step", ("*fp32",) * 7 + ("i32", "i32", "fp32"),
        {"DK": 128, "DV": 128, "KEYS": 128, "BV": launch.STEP_VALUES},
    )  # fmt: skip
    for adds in (False, True):
        for kind, form in ((-1, ""), (0, " for int4"), (2, " for e2m1")):
            written = ("*fp32", "*fp32") if kind < 0 else ("*i8", "*fp32")
            yield Variant(
                f"{'add_norm' if adds else 'norm'}{form}", "norms.add_norm",
                ("*fp32",) * 5 + (*written, "fp32", "i32"), {"ADDS": adds, "FOR": kind, "WHOLE": 4096},
                warps=launch.NORM_WARPS,
            )  # fmt: skip
    for gated in (False, True):
        yield Variant(
            "gated_rms_norm" if gated else "rms_norm", "norms.rms_norm", (*floats, "*fp32", "fp32", "fp32", "i32"),
            {"GATED": gated, "BLOCK": 256 if gated else 1024},
        )  # fmt: skip


def _attention_tiles(int8: bool) -> Iterator[tuple[str, int, Tile, tuple[int, ...]]]:
    """(form, LEAST, tile, cards) of a decoded token's attention and of a prompt's."""
    from qwenrun.kernels.gpu.launch import STEP_SPLIT

    for form, least, sizes in ((" step", STEP_SPLIT, ((16, FAR),)), ("", 0, ((16, FAR), (8192, 512), (8192, FAR)))):
        used = [(target, attention(*size, int8, target)) for size in sizes for target in TARGETS]
        for tile in dict.fromkeys(tile for _, tile in used):
            yield form, least, tile, tuple(t for t in TARGETS if (t, tile) in used)


def _tiles(spec: BlockSpec) -> Iterator[tuple[Tile, tuple[int, ...]]]:
    """The tiles that products of many rows have with matrices stored so, and the cards on which they do."""
    used = {target: {choose(rows, spec, target) for rows in (1, 33, 65)} for target in TARGETS}
    for tile in dict.fromkeys(tile for target in TARGETS for tile in sorted(used[target], key=lambda t: t.rows)):
        yield tile, tuple(target for target in TARGETS if tile in used[target])


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_variant(variant: Variant, target: int) -> Compiled:
    """Compile for compute capability `target` / 10. Not in a process with TRITON_INTERPRET."""
    from importlib import import_module

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(".")
    function: Any = getattr(import_module(f"qwenrun.kernels.gpu.{module}"), name)
    types = iter(variant.types)
    signature = {n: "constexpr" if n in variant.constants else next(types) for n in function.arg_names}
    left = list(types)
    assert not left, f"{variant.name}: {left} are no arguments"
    # Torch's memory, and the sizes of this model's matrices, are multiples of 16.
    whole = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    constants = {
        (function.arg_names.index(n),): getattr(tl, value) if isinstance(value, str) else value
        for n, value in variant.constants.items()
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=whole)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout))
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    loads: dict[str, int] = {}
    for line in lines:
        if line.startswith(("LDG", "LDGSTS")):
            width = next((w for w in ("128", "64") if f".{w}" in line), "32" if ".U" not in line else "8-16")
            loads[width] = loads.get(width, 0) + 1
    # ptxas reserves a few bytes of stack for some kernels that have no instruction to reach them.
    names = [line.split(".")[0] for line in lines]
    local = "LDL" in names or "STL" in names
    return Compiled(
        variant.name,
        target,
        int(found["REG"]),
        made.metadata.shared,
        int(found["STACK"]) + int(found["LOCAL"]) if local else 0,
        len(lines),
        {
            core: count
            for core in (*BF16_CORES, *FP4_CORES)
            if (count := sum(line.split(".")[0] == core for line in lines))
        },
        loads,
    )


def _compile(work: tuple[Variant, int]) -> Compiled:
    return compile_variant(*work)


def page(found: Sequence[Compiled]) -> str:
    """docs/kernels.md."""
    lines = [
        "# Kernels for NVIDIA cards, as compiled",
        "",
        "Written by `make gpu-aot` from the cubins that Triton's compiler makes ahead of time, without a card, at the",
        "sizes that are launched. Registers a thread; spills and shared memory in bytes; tensor-core instructions;",
        "loads from memory by their width in bits. Nothing here is a speed.",
        "",
        "| kernel | target | registers | shared | spills | instructions | tensor cores | loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        cores = ", ".join(f"{count} {name}" for name, count in one.tensor_cores.items()) or "-"
        loads = ", ".join(f"{count} x {width}" for width, count in sorted(one.loads.items(), reverse=True)) or "-"
        lines.append(
            f"| {one.name} | sm_{one.target} | {one.registers} | {one.shared:,} | {one.spills} | {one.instructions:,} "
            f"| {cores} | {loads} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a kernel must not be launched."""
    parser = argparse.ArgumentParser("python -m qwenrun.kernels.gpu.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name has this in it")
    options = parser.parse_args(arguments)
    chosen = [v for v in variants() if options.only in v.name]
    work = [(variant, target) for variant in chosen for target in variant.targets]
    found = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for one in pool.map(_compile, work):
            found.append(one)
            print(f"{one.name} sm_{one.target}: {one.registers} registers {one.trouble}", file=sys.stderr)
    cores = {variant.name: variant.cores for variant in chosen}
    idle = [one for one in found if cores[one.name] and not set(cores[one.name]) & set(one.tensor_cores)]
    bad = [one for one in found if one.trouble or one in idle]
    for one in bad:
        print(f"{one.name} sm_{one.target}: {one.trouble or 'uses none of the cores it has to'}", file=sys.stderr)
    if options.page:
        options.page.write_text(page(found))
    if options.json:
        print(json.dumps({"schema": "qwenrun-gpu-aot/1", "kernels": [asdict(one) for one in found]}, indent=1))
    else:
        spills = sum(bool(one.spills) for one in found)
        print(f"kernels={len(chosen)} targets={len(TARGETS)} spills={spills}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
