"""Export: what another program reads from the exported folder is what the pack holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenrun.kernels.ops import decode
from qwenrun.quant import export as module
from qwenrun.quant.errors import RecipeError, StorageError
from qwenrun.quant.export import export
from qwenrun.quant.packfile.reader import PackReader

Maker, Quantize = Callable[..., Path], Callable[..., Any]
RECIPES = {
    "balanced": "",
    "nvfp4": "",
    "zero": '[[rules]]\nmatch = ["*.experts.*", "*.self_attn.*_proj.weight"]\nformat = "int4-g32-zero"\n',
}


def stored(pack: PackReader) -> dict[str, torch.Tensor]:
    """Every matrix and vector of a pack in float32 by the name that an exported folder has for it."""
    out = {}
    for name, entry in pack.tensors.items():
        if not entry.info.is_experts:
            out[name] = pack.tensor(name).float() if entry.assignment.spec is None else decode(pack.weight(name))
            continue
        block = pack.experts(name.rpartition(".")[0])
        values = decode(block.gate_up if name.endswith("gate_up_proj") else block.down)
        halves = ["gate", "up"] if name.endswith("gate_up_proj") else ["down"]
        for expert, both in enumerate(values):
            for half, value in zip(halves, both.chunk(len(halves))):
                out[f"{name.rpartition('.')[0]}.{expert}.{half}_proj.weight"] = value
    return out


@pytest.fixture(params=list(RECIPES))
def made(request: pytest.FixtureRequest, tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> Path:
    recipe = request.param
    if RECIPES[recipe]:
        recipe = str(tmp_path / "r.toml")
        (tmp_path / "r.toml").write_text(RECIPES[request.param])
    source = checkpoint_maker(tmp_path / "m")
    (source / "tokenizer.json").write_text("{}")
    quantize(source, tmp_path / "p", recipe)
    return tmp_path / "p"


def read(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        there = load_file(folder / shard)
        assert {index["weight_map"][name] for name in there} == {shard}
        found |= there
    assert set(found) == set(index["weight_map"])
    assert sum(value.nbytes for value in found.values()) == index["metadata"]["total_size"]
    return found


def test_bf16(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: Quantize) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(module, "_PIECE_VALUES", 1000)
    with PackReader.open(made) as pack:
        export(pack, tmp_path / "out", "bf16")
        want = stored(pack)
        got = read(tmp_path / "out")
        assert set(got) == set(want)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
        for name, value in got.items():
            whole = want[name] if value.dtype == torch.float32 else want[name].to(torch.bfloat16)
            assert torch.equal(value, whole), name
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out/config.json").read_text()) == pack.config
    quantize(tmp_path / "out", tmp_path / "again", "bf16")


def test_compressed_tensors_reads_the_same_numbers(made: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    with PackReader.open(made) as pack:
        export(pack, tmp_path / "out", "compressed-tensors")
        want, got = stored(pack), read(tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)

    def matches(name: str, targets: list[str]) -> bool:
        return any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in targets)

    seen, formats = set(), set()
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        formats.add(scheme.format)
        for name in want:
            base = name.removesuffix(".weight")
            if not (name.endswith(".weight") and matches(base, scheme.targets)):
                continue
            assert name not in seen
            seen.add(name)
            arrays = {n.removeprefix(base + "."): v for n, v in got.items() if n.startswith(base + ".weight_")}
            values = compressor.decompress(arrays, scheme)["weight"].float()
            # The library decodes in the scales' own 16 bits.
            error = (values - want[name]).norm() / want[name].norm()
            assert error < (1e-3 if "nvfp4" not in scheme.format else 5e-3), name
            assert not matches(base, config.ignore)
    for name, value in want.items():
        if name not in seen:
            whole = value if got[name].dtype == torch.float32 else value.to(torch.bfloat16)
            assert torch.equal(got[name], whole), name
            assert (
                value.dim() != 2 or not name.endswith(".weight") or matches(name.removesuffix(".weight"), config.ignore)
            )
    assert len(seen) > 12
    assert raw["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")


def test_codes_survive_a_round_trip(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    """Exported and imported again with the same recipe, an INT4 pack holds the same bytes."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[rules]]\nmatch = "*.experts.*"\nformat = "int4-g64"\n')
    quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p", str(recipe))
    with PackReader.open(tmp_path / "p") as pack:
        export(pack, tmp_path / "out", "compressed-tensors")
    report = quantize(tmp_path / "out", tmp_path / "again", str(recipe))
    assert "carried over bit for bit" in report.notes[-1]
    for name in ("dense.safetensors", "experts-00.bin", "experts-01.bin", "experts-mtp-00.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()


def test_errors(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p")
    with PackReader.open(tmp_path / "p") as pack:
        with pytest.raises(RecipeError, match="unknown target"):
            export(pack, tmp_path / "out", "gguf")
        with pytest.raises(StorageError, match="exists already"):
            export(pack, tmp_path / "m", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "p"]
