"""A file of importance: how strongly a text drives each column of each matrix, for the search for scales.

safetensors, as docs/format.md says: for a matrix `NAME` the mean squares of what it read, F32 [K] (of a layer's routed
experts [E, K]), and in `NAME.tokens`, I64 [1] or [E], how many tokens that is the mean of. Knows no model and no text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.quant.errors import CheckpointError, StorageError
from qwenrun.quant.packfile import strict
from qwenrun.quant.packfile.safetensors import build_header, parse_header, read_header_text, read_tensor
from qwenrun.quant.packfile.writer import file_sha256, sync, tensor_bytes
from qwenrun.quant.recipe import TensorInfo

TOKENS = ".tokens"
FORM = "qwenrun-importance"
_REPAIR = "make the file again: qwenrun observe TEXT -m MODEL -o FILE"
# An expert is taken to have seen this many tokens more than it did, like those that all of its layer's have seen.
PRIOR = 32.0
# No column counts less than this share of the mean one: the text is not all that will ever be read.
FLOOR = 0.02


@dataclass(frozen=True, slots=True)
class Observed:
    """What a matrix read, or each of a layer's E experts: mean squares f32 [K] or [E, K] of tokens i64 [1] or [E]."""

    mean_squares: Tensor
    tokens: Tensor


def write_importance(path: Path, observed: Mapping[str, Observed], about: Mapping[str, str]) -> None:
    """Write the file, whole or not at all. about: what the reader is told beside it. Raises StorageError."""
    arrays = {}
    for name, each in observed.items():
        arrays[name] = each.mean_squares.float()
        arrays[name + TOKENS] = each.tokens.long()
    described = {
        name: ("I64" if name.endswith(TOKENS) else "F32", tuple(array.shape), array.numel() * array.element_size())
        for name, array in arrays.items()
    }
    header, _ = build_header(described, {"format": FORM, **about})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for array in arrays.values():
                file.write(tensor_bytes(array))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error


class Importance:
    """An open file of importance. about: what its writer said of it; sha256: of the file."""

    def __init__(self, path: Path) -> None:
        """Read the header, and check it. Raises CheckpointError."""
        self.path = path
        self._pooled = lru_cache(maxsize=4)(self._read_pooled)  # experts of a layer come one after another
        try:
            text, size = read_header_text(path)
            self._entries = parse_header(text, size, str(path))
            about = strict.load(text).get("__metadata__")
            if not isinstance(about, dict) or about.get("format") != FORM:
                raise CheckpointError(f"{path} is safetensors, but no file of importance")
            self.about = {str(key): str(value) for key, value in about.items() if key != "format"}
            self.sha256 = file_sha256(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except CheckpointError as error:
            raise CheckpointError(error.message, hint=_REPAIR) from error
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
        for name, entry in self._entries.items():
            pair = self._entries.get(name.removesuffix(TOKENS) if name.endswith(TOKENS) else name + TOKENS)
            wanted = "I64" if name.endswith(TOKENS) else "F32"
            if pair is None or entry.dtype != wanted or len(entry.shape) not in (1, 2):
                raise CheckpointError(
                    f"{path}: {name} is {entry.dtype} {list(entry.shape)}, or half is missing", _REPAIR
                )

    @property
    def names(self) -> list[str]:
        """The matrices that were observed."""
        return [name for name in self._entries if not name.endswith(TOKENS)]

    def check(self, inventory: Iterable[TensorInfo]) -> None:
        """Raise CheckpointError unless every matrix observed is one of these, of the same width, and all is numbers."""
        known = {info.name: info for info in inventory}
        for name in self.names:
            info, shape = known.get(name), self._entries[name].shape
            counts = self._entries[name + TOKENS].shape
            if info is None:
                raise CheckpointError(
                    f"{self.path} is of another model: it has {name}, and this checkpoint does not", hint=_REPAIR
                )
            wanted = (*info.shape[:-2], info.shape[-1])
            if shape != wanted or counts != (wanted[0] if len(wanted) > 1 else 1,):
                raise CheckpointError(
                    f"{self.path} is of another model: {name} has {list(shape)} columns, and {list(wanted)} here",
                    hint=_REPAIR,
                )
            for each in (name, name + TOKENS):
                values = self._read(each)
                if not torch.isfinite(values).all() or values.min() < 0:
                    raise CheckpointError(f"{self.path}: {each} holds numbers that are no mean squares", hint=_REPAIR)

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """What an error in each column of a matrix counts: float32 [K], mean 1 or a little more; None if it was never
        seen. An expert that few tokens chose leans on what all of its layer's experts have seen.
        The file was checked before.
        """
        if name not in self._entries:
            return None
        if expert is None:
            means = self._read(name)
        else:
            tokens, pooled = self._pooled(name)
            own = tokens[expert] / (tokens[expert] + PRIOR)
            means = own * self._read(name, expert)[0] + (1 - own) * pooled
        mean = means.mean()
        return (means / mean).clamp_(min=FLOOR).float() if mean > 0 else None

    def _read(self, name: str, row: int | None = None) -> Tensor:
        """float64, all of it or one row."""
        return read_tensor(self._descriptor, self._entries[name], row or 0, None if row is None else row + 1).double()

    def _read_pooled(self, name: str) -> tuple[Tensor, Tensor]:
        """How many tokens each expert saw, and the mean squares of all that their layer's experts read."""
        tokens = self._read(name + TOKENS)
        return tokens, tokens @ self._read(name) / tokens.sum().clamp_(min=1)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Importance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
