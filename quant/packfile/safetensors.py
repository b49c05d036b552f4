"""The header of a safetensors file, read with distrust, and its tensors, read by position.

The file: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors). Nothing is allocated that the file's own size does not bound.
Knows nothing of what the names mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile import strict

MAX_HEADER = 100 << 20
DTYPES = {
    "BF16": (torch.bfloat16, 2),
    "F16": (torch.float16, 2),
    "F32": (torch.float32, 4),
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "I32": (torch.int32, 4),
    "I64": (torch.int64, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
}
# Also the types nobody asks for, so that a file that holds them is still read and named rightly.
SIZES = {name: width for name, (_, width) in DTYPES.items()}
SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
SIZES |= {"F64": 8, "I64": 8, "U64": 8}
_REPAIR = "download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file. start: its first byte, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their data. Raises CheckpointError."""
    return parse_header(*read_header_text(path), str(path))


def read_header_text(path: Path) -> tuple[bytes, int]:
    """The header of a safetensors file, not parsed, and the file's size. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: a header of {length:,} bytes in a file of {size:,}: not safetensors, or truncated",
                    hint=_REPAIR,
                )
            return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def parse_header(text: bytes, file_size: int, where: str) -> dict[str, Entry]:
    """Check a header against the size of its file: every byte of data belongs to exactly one tensor."""

    def fail(why: str) -> CheckpointError:
        return CheckpointError(f"{where}: {why}", hint=_REPAIR)

    try:
        header = strict.load(text)
    except ValueError as error:
        raise fail(f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise fail("the header is not an object")
    base = 8 + len(text)
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise fail(f"{name}: not described")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        width = SIZES.get(dtype) if isinstance(dtype, str) else None
        if not isinstance(dtype, str) or width is None:
            raise fail(f"{name}: unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise fail(f"{name}: shape {shape!r}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise fail(f"{name}: data at {offsets!r}")
        if not 0 <= offsets[0] <= offsets[1] <= file_size - base:
            raise fail(f"{name}: data at {offsets!r} in {max(0, file_size - base):,} bytes of data (truncated?)")
        if len(shape) > 16 or prod(shape) * width != offsets[1] - offsets[0]:
            raise fail(f"{name}: {offsets[1] - offsets[0]:,} bytes for {dtype} {shape}")
        found.append((offsets[0], offsets[1], name, Entry(dtype, tuple(shape), base + offsets[0], prod(shape) * width)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for start, stop, name, _ in found:
        if start != end:
            raise fail(f"{name} begins at byte {start:,} of the data, where byte {end:,} is due (overlap or gap)")
        end = stop
    if base + end != file_size:
        raise fail(
            f"{file_size:,} bytes, and its header accounts for {base + end:,}: truncated, or something was added"
        )
    return {name: entry for _, _, name, entry in found}


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], about: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of tensors {name: (dtype, shape, bytes)}, and where each one's data begins.

    about: the file's metadata. Padded with spaces, so that the data begins at a multiple of 64 bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(about)} if about else {}
    begins, offset = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        begins[name] = offset
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + begin for name, begin in begins.items()}


def read_tensor(descriptor: int, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop (of the first dimension) of a tensor, read into memory of their own."""
    dtype, width = DTYPES[entry.dtype]
    shape = entry.shape
    if start or stop is not None:
        stop = shape[0] if stop is None else stop
        shape = (stop - start, *shape[1:])
    row = prod(entry.shape[1:]) * width
    size, at = prod(shape) * width, entry.start + start * row
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        try:
            count = os.preadv(descriptor, [view[done:]], at + done)
        except OSError as error:
            raise CheckpointError(f"a tensor's file can't be read: {error.strerror}", _REPAIR) from error
        if count == 0:
            raise CheckpointError(f"the file ended {size - done:,} bytes early: it changed while it was read", _REPAIR)
        done += count
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
