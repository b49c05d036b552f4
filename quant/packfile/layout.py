"""The layout of a pack: file names, the manifest and its checks, and where an expert's parts lie in a record.

docs/format.md says the same in prose. Knows sizes and names; opens no weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from qwenrun.kernels.spec import DTYPE_BYTES, BlockSpec
from qwenrun.quant.errors import PackError
from qwenrun.quant.packfile import strict
from qwenrun.quant.recipe import Assignment, TensorInfo

PACK_VERSION = 2
MANIFEST = "pack.json"
DENSE = "dense.safetensors"
RECORD_ALIGN = 4096
PART_ALIGN = 64
MAX_JSON_BYTES = 100 << 20
# Taken over from the checkpoint's folder where they are there.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.mlp\.experts$")
KINDS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Slice:
    """Where one part of one matrix lies in an expert's record. kind: "gate_up_proj" or "down_proj"."""

    kind: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """An expert's record: `record_size` bytes (a multiple of 4096) that hold all parts of both its matrices."""

    slices: tuple[Slice, ...]
    record_size: int


def expert_layout(pair: Mapping[TensorInfo, Assignment]) -> ExpertLayout:
    """The record of a layer's experts from its two fused tensors: gate_up's parts, then down's, each aligned
    to 64 bytes."""
    by_kind = {info.name.rpartition(".")[2]: (info, how) for info, how in pair.items()}
    if set(by_kind) != set(KINDS):
        raise PackError(f"experts need gate_up_proj and down_proj, not {', '.join(sorted(by_kind))}")
    slices, offset = [], 0
    for kind in KINDS:
        info, how = by_kind[kind]
        spec = how.spec or BlockSpec(info.dtype.lower())
        for part in spec.parts(info.shape[1], info.shape[2], info.tensor_scales):
            offset = -(-offset // PART_ALIGN) * PART_ALIGN
            slices.append(Slice(kind, part.name, part.dtype, part.shape, offset))
            offset += part.nbytes
    return ExpertLayout(tuple(slices), -(-offset // RECORD_ALIGN) * RECORD_ALIGN)


def expert_pairs(stored: Iterable[tuple[TensorInfo, Assignment]]) -> dict[str, dict[TensorInfo, Assignment]]:
    """The fused tensors of each layer's routed experts, by the layer's prefix, in the order they come in."""
    pairs: dict[str, dict[TensorInfo, Assignment]] = {}
    for info, how in stored:
        if info.is_experts:
            pairs.setdefault(info.name.rpartition(".")[0], {})[info] = how
    return pairs


def expert_file(prefix: str) -> str:
    """The file of a layer's experts: `...layers.7.mlp.experts` -> experts-07.bin, in `mtp.` experts-mtp-00.bin."""
    found = _LAYER.search(prefix)
    if not found:
        raise PackError(f"{prefix} is not the name of a layer's experts")
    return f"experts-{'mtp-' if prefix.startswith('mtp.') else ''}{int(found.group(1)):02d}.bin"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a pack: as the recipe's TensorInfo, with the format it is stored in."""

    info: TensorInfo
    assignment: Assignment

    @property
    def spec(self) -> BlockSpec:
        """Also for tensors kept as they were: their plain codes."""
        return self.assignment.spec or BlockSpec(self.info.dtype.lower())


@dataclass(frozen=True)
class Manifest:
    """pack.json, checked. `files`: name -> (bytes, sha256) of every other file of the pack. `records`: name of an
    expert file -> CRC-32 of each of its records (older packs have none)."""

    config: dict[str, Any]
    recipe: dict[str, Any]
    source: dict[str, Any]
    tool: str
    notes: tuple[str, ...]
    tensors: dict[str, TensorEntry]
    files: dict[str, tuple[int, str]]
    records: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def stored(self) -> list[tuple[TensorInfo, Assignment]]:
        """Every tensor, and how it is stored."""
        return [(entry.info, entry.assignment) for entry in self.tensors.values()]

    def to_json(self) -> dict[str, Any]:
        """The document, with its own checksum in `manifest_sha256`."""
        document: dict[str, Any] = {
            "format": "qwenrun-pack",
            "format_version": PACK_VERSION,
            "tool": self.tool,
            "config": self.config,
            "recipe": self.recipe,
            "source": self.source,
            "notes": list(self.notes),
            "tensors": {
                name: {
                    "shape": list(entry.info.shape),
                    "dtype": entry.info.dtype,
                    "part": entry.info.part,
                    "format": entry.assignment.format,
                    **({"spec": entry.assignment.spec.to_json()} if entry.assignment.spec else {}),
                    **({"note": entry.assignment.note} if entry.assignment.note else {}),
                }
                for name, entry in self.tensors.items()
            },
            "files": {
                name: {"bytes": size, "sha256": digest}
                | ({"crc32": list(self.records[name])} if name in self.records else {})
                for name, (size, digest) in self.files.items()
            },
        }
        return document | {"manifest_sha256": document_sha256(document)}


def document_sha256(document: dict[str, Any]) -> str:
    """sha256 of a JSON document without its `manifest_sha256`: keys sorted, no spaces, ASCII."""
    bare = {key: value for key, value in document.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def strict_json(text: bytes, where: str) -> Any:
    """Parse JSON that must have no key twice; PackError names the file."""
    try:
        return strict.load(text)
    except ValueError as error:
        raise PackError(f"{where} is not valid JSON: {error}", hint="make or copy the pack again") from error


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the pack at `path`; opens no weights. Raises PackError."""
    file = path / MANIFEST
    if not file.is_file():
        raise PackError(f"{path} is not a pack: it has no {MANIFEST}", hint="qwenrun quantize SRC -o PACK makes one")
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise PackError(f"{file}: {file.stat().st_size:,} bytes is too large for a manifest")
        text = file.read_bytes()
    except OSError as error:
        raise PackError(f"{file} can't be read: {error.strerror}") from error
    return parse_manifest(strict_json(text, str(file)), str(file))


def parse_manifest(data: object, where: str) -> Manifest:
    """Check a parsed pack.json, itself hostile until shown otherwise. Raises PackError."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise PackError(f"{where}: {what}", hint="make or copy the pack again")

    if not isinstance(data, dict) or data.get("format") != "qwenrun-pack":
        raise PackError(f"{where} is not the manifest of a qwenrun pack")
    version = data.get("format_version")
    if version != PACK_VERSION or type(version) is not int:
        raise PackError(
            f"{where}: format version {version!r}, and this qwenrun reads version {PACK_VERSION}",
            hint="make the pack again with this version: qwenrun quantize SRC -o PACK",
        )
    need(data.get("manifest_sha256") == document_sha256(data), "does not match its own checksum")
    for key in ("config", "recipe", "source", "tensors", "files"):
        need(isinstance(data.get(key), dict), f"{key} is missing")
    need(isinstance(data.get("tool"), str), "tool is missing")
    notes = data.get("notes", [])
    need(isinstance(notes, list) and all(isinstance(n, str) for n in notes), "notes is not a list of texts")
    files, records = {}, {}
    for name, entry in data["files"].items():
        need(
            _SAFE_NAME.fullmatch(name) is not None and name != MANIFEST,
            f"{name!r} is no name for a file of a pack",
        )
        entry = entry if isinstance(entry, dict) else {}
        size, digest = entry.get("bytes", -1), entry.get("sha256", "")
        good = type(size) is int and size >= 0 and isinstance(digest, str)
        need(good and re.fullmatch("[0-9a-f]{64}", digest) is not None, f"{name}: no size and sha256")
        files[name] = (size, digest)
        if "crc32" in entry:
            sums = entry["crc32"]
            whole = isinstance(sums, list) and all(type(n) is int and 0 <= n < 1 << 32 for n in sums)
            need(whole, f"{name}: crc32 is no list of 32-bit numbers")
            records[name] = tuple(sums)
    tensors = {name: _entry(name, entry, need) for name, entry in data["tensors"].items()}
    return Manifest(data["config"], data["recipe"], data["source"], data["tool"], tuple(notes), tensors, files, records)


def _entry(name: str, entry: Any, need: Any) -> TensorEntry:
    need(isinstance(entry, dict), f"tensor {name} is not described")
    shape, dtype = entry.get("shape"), entry.get("dtype")
    good = isinstance(shape, list) and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    need(good and 0 < len(shape) <= 5, f"tensor {name}: shape {shape!r}")
    need(prod(shape) < 1 << 48, f"tensor {name}: shape {shape!r} is too large")
    need(dtype in ("BF16", "F16", "F32"), f"tensor {name}: dtype {dtype!r}")
    part, form, note = entry.get("part"), entry.get("format"), entry.get("note", "")
    need(all(isinstance(x, str) for x in (part, form, note)), f"tensor {name}: part, format or note is no text")
    info = TensorInfo(name, tuple(shape), dtype, part)
    need(
        not info.is_experts or (len(shape) == 3 and name.endswith(KINDS)),
        f"tensor {name}: not an expert tensor",
    )
    spec = None
    if "spec" in entry:
        try:
            spec = BlockSpec.from_json(entry["spec"])
            spec.parts(shape[-2] if len(shape) > 1 else 0, shape[-1], info.tensor_scales)
        except ValueError as error:
            need(False, f"tensor {name}: {error}")
        need(len(shape) == (3 if info.is_experts else 2), f"tensor {name}: shape {shape} is no matrix")
    return TensorEntry(info, Assignment(form, spec, note))
