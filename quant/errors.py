"""The quant floor's exceptions, each with a message (what, with the numbers) and a hint (what to type next).

Knows nothing of exit codes: `qwenrun.errors` maps these to them.
"""

from __future__ import annotations


class QuantError(Exception):
    """Base of everything this floor raises on purpose."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(QuantError):
    """A source checkpoint is missing, truncated, inconsistent, hostile, or holds NaN."""


class PackError(QuantError):
    """A pack is missing, truncated, of another version, or does not match its checksums."""


class RecipeError(QuantError):
    """A recipe or format name can't be understood, or does not apply to a tensor."""


class StorageError(QuantError):
    """The output can't be written: it exists already, or the disk is full."""
