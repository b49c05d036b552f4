"""What a checkpoint must hold: every tensor by name, no other, each in its shape; whole groups may be absent."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenrun import Engine
from qwenrun.errors import ModelError
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import match
from qwenrun.quant.convert import convert
from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.recipe import Recipe


@contextmanager
def changed(source: Path, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of `source`, to be changed in the block; stored in `folder` after it."""
    tensors = load_file(source / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())


TRUNK = "model.language_model.layers."


@pytest.mark.parametrize("name", [f"{TRUNK}2.linear_attn.A_log", f"{TRUNK}4.mlp.experts.down_proj", "lm_head.weight"])
def test_a_missing_tensor_is_named(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    with changed(tiny("moe-4x").folder, tmp_path) as tensors:
        del tensors[name]
    with pytest.raises(ModelError, match="missing") as caught:
        Engine.open(tmp_path)
    assert name in caught.value.message


def test_one_missing_expert_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with changed(tiny("moe-2x-per-expert").folder, tmp_path) as tensors:
        del tensors[f"{TRUNK}1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"1\.mlp\.experts\.3\.up_proj\.weight is missing"):
        Engine.open(tmp_path)


@pytest.mark.parametrize("name", [f"{TRUNK}0.linear_attn.in_proj_ba.weight", "mtp.layers.1.mlp.gate.weight"])
def test_a_tensor_too_many_is_named(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    with changed(tiny("moe-4x").folder, tmp_path) as tensors:
        tensors[name] = torch.zeros(4, 48)
    with pytest.raises(ModelError, match="not known") as caught:
        Engine.open(tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize("name", [f"{TRUNK}1.self_attn.q_proj.weight", "model.visual.pos_embed.weight"])
def test_a_tensor_of_another_shape_is_named(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    with changed(tiny("moe-4x").folder, tmp_path) as tensors:
        tensors[name] = tensors[name][:-1].clone()
    with pytest.raises(ModelError, match="another shape") as caught:
        Engine.open(tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize("group", ["mtp.", "model.visual."])
def test_a_group_may_be_absent_as_a_whole(tiny: Callable[..., Any], tmp_path: Path, group: str) -> None:
    model = tiny("moe-4x")
    with changed(model.folder, tmp_path) as tensors:
        names = [n for n in tensors if n.startswith(group)]
        for name in names:
            del tensors[name]
    assert names
    ids = model.ids(20, seed=0)
    with Engine.open(tmp_path, ctx=32, kv="f32", mtp=True) as engine:
        assert (engine.model.mtp is None) == (group == "mtp.")
        got = engine.session().prefill(ids)
    assert float((got - model.logits(ids)[-1]).norm() / got.norm()) < 1e-4


def test_half_a_group_may_not(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with changed(tiny("moe-4x").folder, tmp_path) as tensors:
        del tensors["mtp.norm.weight"]
    with pytest.raises(ModelError, match=r"missing: mtp\.norm\.weight"):
        Engine.open(tmp_path)


def test_an_unknown_architecture(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with changed(tiny("moe-4x").folder, tmp_path):
        pass
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="llama"):
        Engine.open(tmp_path)


@pytest.mark.parametrize("mtp", [False, True])
def test_what_is_not_held_is_not_planned(tiny: Callable[..., Any], mtp: bool) -> None:
    model = tiny("moe-2x-per-expert")
    left_out = ("model.visual.",) if mtp else ("model.visual.", "mtp.")
    # What is no matrix is held in float32, whatever it is stored in.
    held = sum(
        t.numel() * (t.element_size() if t.ndim == 2 else 4)
        for n, t in model.tensors.items()
        if not n.startswith(left_out)
    )
    with Engine.open(model.folder, ctx=32, mtp=mtp) as engine:
        planned = [b for b in engine.plan.device if b.part not in ("workspace", "runtime")]
        state = sum(b.nbytes for b in planned if b.name.startswith("sequence"))
        assert sum(b.nbytes for b in planned) - state == held
        assert engine.allocated_bytes == held + state
        assert engine.session().nbytes == state


def make_pack(folder: Path, out: Path, recipe: str) -> Path:
    with Checkpoint.open(folder) as checkpoint:
        matched = match(ModelConfig.from_folder(folder), checkpoint.tensors, str(folder))
        convert(checkpoint, out, Recipe.load(recipe), matched.tensors, threads=1)
    return out


@pytest.mark.parametrize("name", ["moe-4x", "moe-2x-per-expert", "dense-1x-tied", "dense-3x-text-only"])
def test_a_bf16_pack_is_its_checkpoint(tiny: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Bit for bit: prefill, decode, and the draft module's weights."""
    model = tiny(name, torch.bfloat16)
    pack = make_pack(model.folder, tmp_path / "pack", "bf16")
    ids = model.ids(80, seed=3)
    outputs = []
    for path in (model.folder, pack):
        with Engine.open(path, ctx=128, mtp=True) as engine:
            assert engine.is_pack == (path == pack)
            s = engine.session()
            rows = [s.prefill(ids, all_logits=True), s.step(5)[None], s.step(6)[None]]
            if engine.model.mtp is not None:
                draft_cache = s._state.mtp
                assert draft_cache is not None
                hidden = torch.linspace(-1, 1, 48)[None]
                rows.append(engine.model.logits(engine.model.draft(torch.tensor([5]), hidden, draft_cache, 0)))
            outputs.append(torch.cat(rows))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("recipe", ["balanced", "int4", "nvfp4"])
@pytest.mark.parametrize("name", ["moe-4x", "dense-1x-tied"])
def test_a_quantized_pack_is_its_decoded_weights(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, name: str
) -> None:
    """The pack's logits are those of a float32 checkpoint that holds what the pack's weights decode to: exactly by
    the reference, and nearly by what serves here (8-bit activations; a router may choose another expert)."""
    from qwenrun.kernels.ops import decode

    model = tiny(name, torch.bfloat16)
    pack = make_pack(model.folder, tmp_path / "pack", recipe)
    with PackReader.open(pack) as reader:
        tensors = {}
        for key, entry in reader.tensors.items():
            if entry.info.is_experts:
                block = reader.experts(key.rpartition(".")[0])
                tensors[key] = decode(block.gate_up if key.endswith("gate_up_proj") else block.down)
            else:
                encoded = entry.assignment.spec is not None
                tensors[key] = decode(reader.weight(key)) if encoded else reader.tensor(key).float()
        formats = {entry.assignment.format for entry in reader.tensors.values()}
        assert len(formats) > 1
    decoded = tmp_path / "decoded"
    decoded.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, decoded / "model.safetensors")
    (decoded / "config.json").write_text((model.folder / "config.json").read_text())
    ids = model.ids(100, seed=4)
    outputs = []
    for path, backend in ((pack, "ref"), (decoded, "ref"), (pack, "")):
        monkeypatch.setenv("QWENRUN_BACKEND", backend)
        with Engine.open(path, ctx=128, kv="f32") as engine:
            s = engine.session()
            outputs.append(torch.cat([s.prefill(ids, all_logits=True), s.step(5)[None]]))
    assert float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < 1e-5
    assert float((outputs[2] - outputs[1]).norm() / outputs[1].norm()) < (0.4 if name.startswith("moe") else 0.05)
    # And they are not those of the checkpoint: something was quantized.
    assert float((outputs[0][:-1] - model.logits(ids)).norm()) > 1e-3 * float(outputs[0].norm())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc/self/fd (Linux)")
def test_closing_lets_the_files_go(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Also while a session is still around."""

    def in_use() -> bool:
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        gc.collect()
        return str(pack) in Path("/proc/self/maps").read_text() or any(str(pack) in path for path in opened)

    pack = make_pack(tiny("moe-4x", torch.bfloat16).folder, tmp_path / "pack", "balanced")
    with Engine.open(pack, ctx=16) as engine:
        s = engine.session()
        s.prefill([1, 2])
        assert in_use()
    assert not in_use()
    assert s.tokens == [1, 2]


def _is_open(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()
