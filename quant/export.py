"""A pack in, a Hugging Face folder out: BF16, or the codes as they are in the layout of compressed-tensors.

Routed experts are written one by one, as published per-expert checkpoints have them. Matrices are decoded or unpacked a
few rows at a time, so memory does not grow with the model. Knows no model graph.

Source of the layout: compressed-tensors' `pack-quantized` and `nvfp4-pack-quantized`
(https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenrun.kernels.ops import decode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.quant.errors import RecipeError, StorageError
from qwenrun.quant.packfile.checkpoint import INDEX
from qwenrun.quant.packfile.layout import KINDS, SIDE_FILES
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.packfile.safetensors import SIZES, build_header
from qwenrun.quant.packfile.writer import sync, tensor_bytes, work_folder

BF16, COMPRESSED = "bf16", "compressed-tensors"
TARGETS = (BF16, COMPRESSED)
SHARD_BYTES = 4 << 30
_PIECE_VALUES = 4 << 20

# progress(done bytes, of how many, the tensor's name)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Array:
    """One array of the new folder; pieces: its bytes, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype]


def export(pack: PackReader, out: Path, target: str, progress: Progress | None = None) -> int:
    """Write the folder `out`, which must not be there; how many bytes of tensors it holds.

    target: "bf16", every matrix decoded and rounded to BF16, or "compressed-tensors", where INT4, INT8 and NVFP4
    matrices keep their codes; the embedding and lm_head, which nobody loads quantized, are BF16 there too.
    Raises RecipeError for an unknown target, StorageError; then there is no `out`.
    """
    if target not in TARGETS:
        raise RecipeError(f"unknown target {target!r}", hint=f"one of: {', '.join(TARGETS)}")
    if out.exists() or out.is_symlink():
        raise StorageError(f"{out} exists already", hint="choose another name")
    groups: dict[str, list[str]] = {}
    plain: list[str] = []
    arrays = list(_arrays(pack, target, groups, plain))
    total = sum(array.nbytes for array in arrays)
    work = work_folder(out)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        free = shutil.disk_usage(work).free
        if total > free:
            raise StorageError(
                f"{out} needs {total:,} bytes, and {free:,} are free", hint="choose another disk with -o"
            )
        _write(arrays, work, total, progress)
        config = dict(pack.config)
        if target == COMPRESSED:
            config["quantization_config"] = _quantization(pack, groups, plain)
        (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in SIDE_FILES:
            if name in pack.manifest.files:
                shutil.copyfile(pack.path / name, work / name)
        for path in work.iterdir():
            sync(path)
        sync(work)
        os.rename(work, out)
        sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out} can't be written: {error.strerror or error}", "free some space") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return total


def _write(arrays: list[_Array], folder: Path, total: int, progress: Progress | None) -> None:
    """Files of weights of at most 4 GiB, and their index."""
    shards: list[list[_Array]] = [[]]
    size = 0
    for array in arrays:
        if size and size + array.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(array)
        size += array.nbytes
    weight_map, done = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # The widest first: each begins at a multiple of its width.
        shard = sorted(shard, key=lambda array: -SIZES[array.dtype])
        header, _ = build_header({array.name: (array.dtype, array.shape, array.nbytes) for array in shard})
        with (folder / name).open("wb") as file:
            file.write(header)
            for array in shard:
                weight_map[array.name] = name
                for piece in array.pieces():
                    file.write(tensor_bytes(piece))
                done += array.nbytes
                if progress:
                    progress(done, total, array.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _arrays(pack: PackReader, target: str, groups: dict[str, list[str]], plain: list[str]) -> Iterator[_Array]:
    """Every array in the order of the pack; modules that keep codes go into `groups` by format, others into `plain`."""
    for name, entry in pack.tensors.items():
        if entry.info.is_experts:
            continue
        if entry.assignment.spec is None:
            if name.endswith(".weight") and len(entry.info.shape) == 2:
                plain.append(name.removesuffix(".weight"))
            kept = pack.tensor(name)
            # A scalar or an empty one has no rows to go by.
            yield _Array(name, entry.info.dtype, entry.info.shape, lambda kept=kept: iter([kept]))  # type: ignore[misc]
            continue
        get = lambda name=name: pack.weight(name)  # noqa: E731
        (rows, cols), form = entry.info.shape, entry.assignment.format
        yield from _matrix(name, form, entry.spec, rows, cols, get, target, entry.info.part, groups, plain)
    for prefix in pack.expert_prefixes:
        block = pack.experts(prefix)
        for expert in range(block.down.lead[0]):
            for kind, stack in zip(KINDS, (block.gate_up, block.down)):
                form = pack.tensors[f"{prefix}.{kind}"].assignment.format
                halves = ("down",) if kind == "down_proj" else ("gate", "up")
                rows = stack.rows // len(halves)
                for place, half in enumerate(halves):
                    name = f"{prefix}.{expert}.{half}_proj.weight"

                    def get(
                        stack: Weight = stack, expert: int = expert, place: int = place, rows: int = rows
                    ) -> Weight:
                        one = stack[expert]
                        if one.tensor_scale is not None:
                            one.tensor_scale = one.tensor_scale.clone()
                        return _rows(one.row_major(), place * rows, (place + 1) * rows)

                    yield from _matrix(name, form, stack.spec, rows, stack.cols, get, target, "routed", groups, plain)


def _rows(weight: Weight, start: int, stop: int) -> Weight:
    """Some rows of a row-major matrix that all have one tensor scale."""
    part = weight.row_range(start, stop)
    if part.tensor_scale is not None:
        part.tensor_scale = part.tensor_scale[..., :1]
    return part


def _matrix(
    name: str,
    form: str,
    spec: BlockSpec,
    rows: int,
    cols: int,
    get: Callable[[], Weight],
    target: str,
    part: str,
    groups: dict[str, list[str]],
    plain: list[str],
) -> Iterator[_Array]:
    base = name.removesuffix(".weight")
    coded = target == COMPRESSED and not spec.plain and part not in ("embedding", "lm_head")
    if not coded:
        plain.append(base)

        def decoded() -> Iterator[Tensor]:
            whole = get()
            step = max(16, _PIECE_VALUES // cols // 16 * 16)
            for start in range(0, rows, step):
                yield decode(whole.row_range(start, min(start + step, rows))).to(torch.bfloat16)

        yield _Array(name, "BF16", (rows, cols), decoded)
        return
    groups.setdefault(form, []).append(base)
    lines = lambda: get().row_major()  # noqa: E731
    blocks = cols // spec.block
    if spec.codes == "e2m1":
        yield _Array(f"{base}.weight_packed", "U8", (rows, cols // 2), lambda: iter([lines().codes]))
        yield _Array(f"{base}.weight_scale", "F8_E4M3", (rows, blocks), lambda: iter([_known(lines().scales)]))
        # Its scale of the whole matrix divides where ours multiplies; a matrix of zeros has none.
        yield _Array(f"{base}.weight_global_scale", "F32", (1,), lambda: iter([_inverse(_known(lines().tensor_scale))]))
        return
    bits = 8 if spec.codes == "int8" else 4
    yield _Array(f"{base}.weight_packed", "I32", (rows, -(-cols * bits // 32)), lambda: iter([_words(lines())]))
    yield _Array(f"{base}.weight_scale", "F16", (rows, blocks), lambda: iter([_known(lines().scales)]))
    yield _Array(f"{base}.weight_shape", "I64", (2,), lambda: iter([torch.tensor([rows, cols])]))
    if spec.zero:
        yield _Array(
            f"{base}.weight_zero_point", "I32", (-(-rows // 8), blocks), lambda: iter([_zero_words(lines(), blocks)])
        )


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1.0 / scale, 1.0).reshape(1)


def _words(weight: Weight) -> Tensor:
    """Codes [R, C] as int32, the first in the lowest bits, the last word filled with zeros; int8 with 128 added."""
    if weight.spec.codes == "int4":
        each = weight.codes.contiguous()
    else:
        each = (weight.codes.int() + 128).to(torch.uint8)
    return torch.nn.functional.pad(each, (0, -each.shape[1] % 4)).contiguous().view(torch.int32)


def _zero_words(weight: Weight, blocks: int) -> Tensor:
    """Zero points [R, blocks] packed along the column, as int32 [R / 8, blocks]."""
    zeros = _known(weight.zeros)
    each = torch.stack([zeros & 15, zeros >> 4], -1).flatten(-2)[:, :blocks]
    each = torch.nn.functional.pad(each, (0, 0, 0, -each.shape[0] % 8)).t()
    return (each[:, 0::2] | each[:, 1::2] << 4).contiguous().view(torch.int32).t()


def _quantization(pack: PackReader, groups: dict[str, list[str]], plain: list[str]) -> dict[str, Any]:
    """What tells a reader which modules hold which codes."""
    specs = {entry.assignment.format: entry.spec for entry in pack.tensors.values()}
    found: dict[str, dict[str, Any]] = {}
    for form, modules in groups.items():
        spec = specs[form]
        is_float = spec.codes == "e2m1"
        others = {_kind(name) for kind, names in groups.items() if kind != form for name in names}
        others |= {_kind(name) for name in plain}
        found[f"group_{len(found)}"] = {
            "targets": _patterns(modules, others),
            "weights": {
                "num_bits": 8 if spec.codes == "int8" else 4,
                "type": "float" if is_float else "int",
                "symmetric": not spec.zero,
                "group_size": spec.block,
                "strategy": "tensor_group" if is_float else "group",
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "nvfp4-pack-quantized" if is_float else "pack-quantized",
        }
    formats = {group["format"] for group in found.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": found,
        "ignore": _patterns(plain, {_kind(name) for names in groups.values() for name in names}),
        "kv_cache_scheme": None,
    }


def _kind(name: str) -> str:
    """A module's name as a pattern of those of all layers and experts."""
    return re.sub(r"(?<=\\\.)[0-9]+(?=\\\.|$)", r"\\d+", re.escape(name))


def _patterns(names: list[str], others: set[str]) -> list[str]:
    """Few patterns for many names; where one would take in others too, the names themselves."""
    return list(dict.fromkeys(name if _kind(name) in others else f"re:{_kind(name)}$" for name in names))
