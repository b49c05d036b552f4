"""Write the generated pages of docs/, or (--check) say which are out of date.

docs/cli.md comes from the command line's own declarations, docs/ops.md from the table of op cases, docs/roofline.md
from the planner, so none can drift from the program. Run by `make docs` and `make lint`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Kernels for cards can be asked about where there is none.
os.environ["TRITON_INTERPRET"] = "1"

from qwenrun.cli import cli_markdown
from qwenrun.kernels.cases import ops_markdown
from qwenrun.ui.roofline import roofline_markdown

DOCS = Path(__file__).resolve().parent
PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_markdown, "ops.md": ops_markdown, "roofline.md": roofline_markdown}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, generate in PAGES.items():
        path, text = DOCS / name, generate()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
            print(f"wrote docs/{name}", file=sys.stderr)
    if check and stale:
        print(f"error: out of date: {', '.join(f'docs/{name}' for name in stale)}", file=sys.stderr)
        print("hint: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
