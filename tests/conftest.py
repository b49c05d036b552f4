"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def real_tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the real Qwen3.5 tokenizer.json, built once and kept in pytest's cache."""
    folder = Path(request.config.cache.mkdir("qwen3_5-tokenizer"))
    if not (folder / "tokenizer.json").is_file():
        spec = importlib.util.spec_from_file_location("build_tokenizer", GOLDEN / "build_tokenizer.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(folder)
    return folder
