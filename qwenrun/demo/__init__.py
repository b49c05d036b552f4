"""The embedded demo model: where its folder is. What it learned and how is in the other modules here.

The folder is an ordinary Hugging Face checkpoint (config, safetensors, tokenizer) of the Qwen3.5-MoE
architecture in miniature, so every command that takes a checkpoint takes it too. Knows nothing of the engine.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["data_dir", "model_dir"]


def model_dir() -> Path:
    """The folder of the shipped checkpoint."""
    return Path(__file__).resolve().parent / "model"


def data_dir() -> Path:
    """The folder of the question-answer files that the demo was trained on."""
    return Path(__file__).resolve().parent / "data"
