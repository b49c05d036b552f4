"""Exported folders in transformers: they load, and their logits are those of the pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrun import Engine
from qwenrun.quant.export import export
from qwenrun.quant.packfile.reader import PackReader


def made(tiny: Callable[..., Any], quantize: Callable[..., Any], folder: Path, name: str, target: str) -> Any:
    model = tiny(name, torch.bfloat16)
    quantize(model.folder, folder / "p", "int4")
    with PackReader.open(folder / "p") as pack:
        export(pack, folder / "out", target)
    return model


@torch.no_grad()
def compare(model: Any, folder: Path) -> tuple[float, float]:
    """(how far transformers' logits of the export are from ours of the pack, and ours from the checkpoint's)."""
    from transformers import AutoModelForImageTextToText

    ids = model.ids(60, seed=3)
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "out", dtype=torch.float32).eval()
    theirs = loaded(input_ids=torch.tensor([ids])).logits[0].float()
    with Engine.open(folder / "p", ctx=64, kv="f32") as engine:
        ours = engine.session().prefill(ids, all_logits=True)
    original = model.logits(ids)
    # The median token: a router's choice between two nearly equal experts may fall otherwise.
    off = ((theirs - ours).norm(dim=1) / ours.norm(dim=1)).median()
    return float(off), float(((ours - original).norm(dim=1) / original.norm(dim=1)).median())


@pytest.mark.parametrize("target", ["bf16", "compressed-tensors"])
@pytest.mark.parametrize("name", ["dense-blocks", "moe-blocks"])
def test_transformers_gives_our_logits(
    tiny: Callable[..., Any],
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    target: str,
) -> None:
    # The CPU's kernels round activations to 8 bits, which transformers does not.
    monkeypatch.setenv("QWENRUN_BACKEND", "ref")
    model = made(tiny, quantize, tmp_path, name, target)
    off, lost = compare(model, tmp_path)
    print(f"{name} {target}: {off:.4f} from the pack, which is {lost:.4f} from the checkpoint")
    # Codes are exact, and what is left is the rounding of embedding and lm_head to BF16. Decoded, every weight is
    # rounded: still an order less than quantizing did.
    assert off < (0.02 if target == "compressed-tensors" else lost / 10)
    assert lost > 10 * off
