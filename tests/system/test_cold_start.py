"""Commands that need no weights answer at once: no torch, no numpy, nothing that takes long to import."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "rich", "prompt_toolkit", "pydantic")
SCRIPT = """
import sys
from qwenrun.cli import main
sys.argv = ["qwenrun", *{arguments!r}]
code = main()
print(*(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def heavy_imports(*arguments: str) -> list[str]:
    """What qwenrun with these arguments imported of `HEAVY`."""
    script = SCRIPT.format(arguments=list(arguments), heavy=HEAVY)
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    print(f"{time.perf_counter() - begun:.2f} s: qwenrun {' '.join(arguments)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stderr.split()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["chat", "--help"], ["vram"], ["vram", "Qwen3.5-35B-A3B", "--json"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    assert heavy_imports(*arguments) == []


def test_nothing_heavy_is_imported_for_a_pack(demo_pack: Path) -> None:
    assert heavy_imports("vram", str(demo_pack), "--ctx", "1k") == []
    assert heavy_imports("show", str(demo_pack)) == []


def test_the_test_sees_what_is_heavy() -> None:
    assert "torch" in heavy_imports("doctor")
