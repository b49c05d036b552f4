"""The pages agree with the tree and with the program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_up_to_date() -> None:
    run = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_map_names_real_files() -> None:
    """Every path in docs/house.md's map exists, but those under its heading of rooms not built yet."""
    built = (ROOT / "docs" / "house.md").read_text().partition("## Rooms not built yet")[0]
    named = re.findall(r"`((?:kernels|quant|qwenrun|tests|docs)/[\w./*-]+)`", built)
    assert len(named) > 20
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), f"docs/house.md names {name}, which does not exist"


def test_no_pickle_and_no_remote_code() -> None:
    """Weights are read as safetensors or our own packs; nothing that can run code is ever loaded."""
    forbidden = re.compile(r"\b(torch\.load|import pickle|from pickle|trust_remote_code|marshal\.load|eval\(|exec\()")
    for floor in ("qwenrun", "quant", "kernels"):
        for path in (ROOT / floor).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                # `.eval(` is torch's evaluation mode, not the builtin.
                if found := forbidden.search(line.replace(".eval(", "")):
                    pytest.fail(f"{path}:{number}: {found.group()}")
