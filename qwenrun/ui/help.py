"""How help reads: examples first, then usage, what the command does, and its options, in plain text.

A command's docstring holds its examples under a last line "Examples:". Stands on typer; knows no command.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

EXAMPLES = "Examples:"


def split_examples(docstring: str) -> tuple[str, list[str]]:
    """(what the command does, its example lines) of a docstring."""
    text, _, examples = docstring.partition(EXAMPLES)
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


class _ExamplesFirst:
    """The part that commands and groups share: the order of the sections."""

    help: str | None

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


class Command(_ExamplesFirst, TyperCommand):
    """A command whose help has its examples first."""


class Group(_ExamplesFirst, TyperGroup):
    """The program: as its commands."""
