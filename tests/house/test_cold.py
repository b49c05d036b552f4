"""Cold files: standard library only at import, so that --help, vram and ls answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

COLD = [
    "qwenrun",
    "qwenrun.errors",
    "qwenrun.demo",
    "qwenrun.demo.dataset",
    "qwenrun.engine.events",
    "qwenrun.hub.cache",
    "qwenrun.hub.remote",
    "qwenrun.kernels",
    "qwenrun.kernels.spec",
    "qwenrun.model.config",
    "qwenrun.model.inventory",
    "qwenrun.plan.buffers",
    "qwenrun.plan.planner",
    "qwenrun.plan.workspace",
    "qwenrun.quant",
    "qwenrun.quant.errors",
    "qwenrun.quant.formats",
    "qwenrun.quant.packfile.layout",
    "qwenrun.quant.recipe",
    "qwenrun.text.stream",
    "qwenrun.text.template",
    "qwenrun.text.tokenizer",
]
# What a cold import may bring in besides the standard library and ourselves: nothing. The command line
# itself stands on typer alone.
SCRIPT = """
import importlib, sys
before = set(sys.modules)
importlib.import_module({module!r})
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
foreign = sorted(t for t in tops if t not in sys.stdlib_module_names and t != "qwenrun" and not t.startswith("_"))
print(" ".join(foreign))
"""


def foreign(module: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(module=module)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("module", COLD)
def test_cold(module: str) -> None:
    assert foreign(module) == []


def test_the_command_line_is_cold() -> None:
    assert not {"torch", "numpy", "triton", "transformers", "tokenizers"} & set(foreign("qwenrun.cli"))


def test_the_test_sees_a_warm_module() -> None:
    assert "torch" in foreign("qwenrun.kernels.ops")
