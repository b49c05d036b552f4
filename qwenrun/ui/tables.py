"""Plain aligned tables: readable on a terminal, in a file and by awk alike.

Standard library alone. Knows rows of text, nothing of what they mean.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from qwenrun.ui.console import printable

GAP = "  "


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lines of columns: the first `left` flush left, the others (numbers) flush right.

    An empty row makes a rule. A last column beyond `left` may be text: name it in `head` with a leading "<".
    """
    body = [tuple(printable(cell).replace("\n", " ") for cell in row) for row in rows]
    flush_left = [i < left or title.startswith("<") for i, title in enumerate(head)]
    lines = [tuple(title.removeprefix("<") for title in head), (), *body]
    widths = [max(_width(line[i]) for line in lines if line) for i in range(len(head))]
    rule = GAP.join("-" * width for width in widths)
    out = []
    for line in lines:
        cells = [
            cell + " " * (width - _width(cell)) if flush else " " * (width - _width(cell)) + cell
            for cell, width, flush in zip(line, widths, flush_left)
        ]
        out.append(GAP.join(cells).rstrip() if line else rule)
    return "\n".join(out)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Lines of "name   value", the values aligned; pairs with an empty value are left out."""
    kept = [(name, printable(value)) for name, value in pairs if value]
    width = max((_width(name) for name, _ in kept), default=0)
    return "\n".join(f"{name}{' ' * (width - _width(name))}{GAP}{value}" for name, value in kept)


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
