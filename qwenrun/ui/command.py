"""What qwenrun's commands share: help with its examples first, and option values converted without delay.

A command's docstring holds its examples under a last line "Examples:". Stands on typer; knows no command.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

EXAMPLES = "Examples:"
PLAIN = (str, int, float, bool, Path)


def split_examples(docstring: str) -> tuple[str, list[str]]:
    """(what the command does, its example lines) of a docstring."""
    text, _, examples = docstring.partition(EXAMPLES)
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


class _Shared:
    """Help in our order, and values converted by `_Converter`."""

    help: str | None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
            if annotation is not None and (annotation in PLAIN or _is_enum(annotation)):
                converter = _Converter(annotation)
                param.get_runtime_param = lambda found=converter: found
        return super().parse_args(ctx, args)  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _, examples = split_examples(self.help or "")
        if examples:
            formatter.write_heading("Examples")
            for line in examples:
                formatter.write(f"  {line}\n")
            formatter.write("\n")
        self.format_usage(ctx, formatter)  # type: ignore[attr-defined]
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)  # type: ignore[attr-defined]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        text, _ = split_examples(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The docstring's first sentence, whole: cutting it in the middle tells nobody anything."""
        text, _ = split_examples(self.help or "")
        return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


class Group(_Shared, TyperGroup):
    """The program."""


class Command(_Shared, TyperCommand):
    """One command."""


class _Converter:
    """Converts one value of a plain type. Typer (0.29) has pydantic do it, whose import takes longer than all
    of `qwenrun vram`; where typer has no such hook, this is never called."""

    def __init__(self, kind: Callable[[Any], Any]) -> None:
        self._kind = kind

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return None
        try:
            return self._convert(value, param)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param=param) from error

    def _convert(self, value: Any, param: Any) -> Any:
        try:
            found = self._kind(value)
        except ValueError as error:
            if _is_enum(self._kind):
                choices = ", ".join(str(member.value) for member in self._kind)  # type: ignore[attr-defined]
                raise ValueError(f"{value!r} is not one of {choices}") from error
            raise ValueError(f"{value!r} is not a {'whole ' if self._kind is int else ''}number") from error
        if isinstance(found, int | float) and not isinstance(found, bool):
            low, high = getattr(param, "min", None), getattr(param, "max", None)
            if not math.isfinite(found) or (low is not None and found < low) or (high is not None and found > high):
                top = "" if high is None else f" and at most {high}"
                raise ValueError(f"{value} is not" + (f" at least {low}{top}" if low is not None else " finite"))
        return found


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)
