"""Observing: out of core as in memory, stopped early, any text; the file it makes, and what the search makes of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenrun import Engine
from qwenrun.demo import model_dir
from qwenrun.demo.dataset import text_of
from qwenrun.errors import UsageError
from qwenrun.kernels.ops import decode
from qwenrun.measure.observe import Sums, observe
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run
from qwenrun.plan.planner import least_budget, weigh
from qwenrun.quant import formats
from qwenrun.quant.errors import CheckpointError, StorageError
from qwenrun.quant.packfile import importance as module
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.importance import FLOOR, Importance, Observed, write_importance
from qwenrun.quant.packfile.layout import MANIFEST, read_manifest
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.solve import solve, tensor_scale_of
from qwenrun.ui import observe as ui
from qwenrun.ui.models import stored_in
from qwenrun.ui.observe import _encoded
from qwenrun.ui.quantize import kind

Maker, Quantize = Callable[..., Path], Callable[..., Any]
HEAD = "lm_head.weight"


def observed(path: Path, ids: list[int], **options: Any) -> dict[str, Observed]:
    sums = Sums(stored_in(path)[0])
    with Engine.open(path, ctx=64, chunk=20, watch=sums, **options) as engine:
        observe(engine, sums, ids)
    return sums.observed()


def some_ids(count: int) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def uneven(folder: Path, seed: int = 5) -> dict[str, Observed]:
    """Made-up mean squares for every matrix of a checkpoint's trunk, some columns a thousand times as large."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for info in inventory(ModelConfig.from_folder(folder)):
        if info.name.startswith(("mtp", "model.visual")) or len(info.shape) < 2 or "conv1d" in info.name:
            continue
        shape = (*info.shape[:-2], info.shape[-1])
        means = 10 ** (3 * torch.rand(shape, generator=generator))
        made[info.name] = Observed(means, torch.full(shape[:-1] or (1,), 1000))
    return made


@pytest.fixture
def pack(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> Path:
    quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p", "int4")
    return tmp_path / "p"


def test_out_of_core_as_in_memory(pack: Path) -> None:
    """With so few slots that experts come and go within a call."""
    config, stored, _ = stored_in(pack)
    run = Run(64, chunk=20, mtp=False, vision=False)
    least = least_budget(config, weigh(config, stored, run), run)
    ids = some_ids(150)
    whole, few = observed(pack, ids), observed(pack, ids, ram=least)
    assert set(whole) == set(few)
    for name, each in whole.items():
        assert torch.equal(each.tokens, few[name].tokens)
        assert torch.equal(each.mean_squares, few[name].mean_squares), name


def test_stopped_early_it_gives_what_it_saw(pack: Path) -> None:
    ids = some_ids(150)
    sums = Sums(stored_in(pack)[0])

    def stop(done: int, total: int, what: str) -> None:
        assert total == 150
        if done == 84:
            raise KeyboardInterrupt

    with Engine.open(pack, ctx=64, chunk=20, watch=sums) as engine:
        seen = observe(engine, sums, ids, stop)
    assert (seen.tokens, seen.pieces, seen.stopped) == (84, 2, True)
    found = sums.observed()
    for name, each in observed(pack, ids[:84]).items():
        assert torch.equal(each.mean_squares, found[name].mean_squares), name


def test_nothing_to_observe(pack: Path) -> None:
    sums = Sums(stored_in(pack)[0])
    with Engine.open(pack, ctx=64, watch=sums) as engine, pytest.raises(UsageError, match="empty"):
        observe(engine, sums, [])


@given(st.text(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_text_is_read_whole_or_to_the_limit(text: str, most: int) -> None:
    """Whatever lines it has, cut in the middle of a character too; the hash is of what was read."""
    data = text.encode("utf-8", "surrogatepass")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(UsageError, match="not UTF-8"):
            _encoded(io.BytesIO(data), lambda piece: [ord(c) for c in piece], None, "t")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ui, "LINE", 3)
        ids, digest = _encoded(io.BytesIO(data), lambda piece: [ord(c) for c in piece], None, "t")
        assert ids.tolist() == [ord(c) for c in text]
        assert digest == hashlib.sha256(data).hexdigest()
        assert _encoded(io.BytesIO(data), lambda piece: [ord(c) for c in piece], most, "t")[0] == ids[:most]


def test_the_file_gives_back_what_was_written(tmp_path: Path, checkpoint_maker: Maker) -> None:
    source = checkpoint_maker(tmp_path / "m")
    made = uneven(source)
    write_importance(tmp_path / "i", made, {"text": "t.txt", "tokens": "1000"})
    assert [path.name for path in tmp_path.iterdir() if "i" in path.name] == ["i"]
    with Importance(tmp_path / "i") as found:
        assert found.about == {"text": "t.txt", "tokens": "1000"}
        assert found.sha256 == hashlib.sha256((tmp_path / "i").read_bytes()).hexdigest()
        assert sorted(found.names) == sorted(made)
        found.check(inventory(ModelConfig.from_folder(source)))
        for name, each in made.items():
            if each.mean_squares.dim() == 1:
                want = each.mean_squares / each.mean_squares.mean()
                assert torch.allclose(found.of(name), want.clamp(min=FLOOR))
    assert load_file(tmp_path / "i").keys() == {*made, *(f"{name}.tokens" for name in made)}


def test_an_expert_that_saw_little_leans_on_the_others(tmp_path: Path) -> None:
    means = torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 1.0], [2.0, 1.0]])
    tokens = torch.tensor([100_000, 0, 32, 300_000])
    write_importance(tmp_path / "i", {"e": Observed(means, tokens)}, {})
    pooled = (tokens[:, None] * means).sum(0) / tokens.sum()
    with Importance(tmp_path / "i") as found:
        assert torch.allclose(found.of("e", 0), means[0] / means[0].mean(), rtol=1e-2)
        assert torch.allclose(found.of("e", 1), pooled / pooled.mean())
        half = (means[2] + pooled) / 2
        assert torch.allclose(found.of("e", 2), half / half.mean())
        assert found.of("nobody") is None
    write_importance(tmp_path / "i", {"e": Observed(0 * means, 0 * tokens), "l": Observed(means[1], tokens[:1])}, {})
    with Importance(tmp_path / "i") as found:
        assert found.of("e", 0) is None
        assert found.of("l") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.update(stranger=Observed(torch.ones(8), torch.ones(1))), "stranger"),
        (lambda made: made.update({HEAD: Observed(torch.ones(64), torch.ones(1))}), "columns"),
        (lambda made: made.update({HEAD: Observed(torch.ones(128), torch.ones(2))}), "columns"),
        (lambda made: made[HEAD].mean_squares.fill_(float("nan")), "no mean squares"),
        (lambda made: made[HEAD].mean_squares[3:4].fill_(-1.0), "no mean squares"),
        (lambda made: made[HEAD].tokens.fill_(-1), "no mean squares"),
    ],
)
def test_importance_of_another_model_or_damaged(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, change: Callable[[Any], None], said: str
) -> None:
    source = checkpoint_maker(tmp_path / "m")
    made = uneven(source)
    change(made)
    write_importance(tmp_path / "i", made, {})
    with Importance(tmp_path / "i") as importance, pytest.raises(CheckpointError, match=said) as caught:
        quantize(source, tmp_path / "p", importance=importance)
    assert "observe" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "m"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(4)},
        {"a.tokens": torch.ones(1, dtype=torch.int64)},
        {"a": torch.ones(4, dtype=torch.float16), "a.tokens": torch.ones(1, dtype=torch.int64)},
        {"a": torch.ones(4), "a.tokens": torch.ones(1, dtype=torch.int32)},
        {"a": torch.ones(2, 2, 2), "a.tokens": torch.ones(1, dtype=torch.int64)},
    ],
)
def test_a_file_of_other_arrays_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "i", {"format": "qwenrun-importance"})
    with pytest.raises(CheckpointError, match="half is missing"):
        Importance(tmp_path / "i")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut or added: an error of ours, or numbers."""
    folder = tmp_path_factory.mktemp("any")
    write_importance(folder / "i", {"a": Observed(torch.ones(4), torch.ones(1))}, {"tokens": "7"})
    held = bytearray((folder / "i").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(held) - 1))
        held[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (folder / "i").write_bytes(held)
    with contextlib.suppress(CheckpointError), Importance(folder / "i") as importance:
        for name in importance.names:
            importance.of(name)


def test_no_file_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        Importance(tmp_path / "i")
    save_file({"a": torch.ones(4)}, tmp_path / "i")
    with pytest.raises(CheckpointError, match="no file of importance"):
        Importance(tmp_path / "i")
    (tmp_path / "i").write_text("The quick brown fox jumps over the lazy dog")
    with pytest.raises(CheckpointError, match="not safetensors") as caught:
        Importance(tmp_path / "i")
    assert "observe" in caught.value.hint


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_importance(tmp_path / "i", {"a": Observed(torch.ones(4), torch.ones(1))}, {})
    before = (tmp_path / "i").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_importance(tmp_path / "i", {"a": Observed(torch.zeros(4), torch.ones(1))}, {})
    assert (tmp_path / "i").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


@pytest.mark.parametrize("recipe", ["int4", "nvfp4", "balanced"])
def test_quantizing_by_importance(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, recipe: str) -> None:
    """What counts is nearer than without, of every tensor that the file knows; the others are what they were."""
    source = checkpoint_maker(tmp_path / "m")
    made = uneven(source)
    del made[HEAD]
    write_importance(tmp_path / "i", made, {"text": "t.txt", "sha256": "0", "name": "/etc/passwd"})
    quantize(source, tmp_path / "even", recipe)
    with Importance(tmp_path / "i") as importance:
        report = quantize(source, tmp_path / "aimed", recipe, importance=importance)
        source_said = read_manifest(tmp_path / "aimed").source["importance"]
        assert source_said == {"text": "t.txt", "name": "i", "sha256": importance.sha256}
    assert any("tensors by i" in note for note in report.notes)
    with Checkpoint.open(source) as checkpoint:
        even, aimed = (values_of(tmp_path / name) for name in ("even", "aimed"))
        better = 0
        for name, value in even.items():
            if name not in made or torch.equal(value, aimed[name]):
                assert torch.equal(value, aimed[name]), name
                continue
            original = checkpoint.read(name).float()
            counts = made[name].mean_squares.unsqueeze(-2)
            errors = [float(((each - original).square() * counts).sum()) for each in (value, aimed[name])]
            assert errors[1] < errors[0], name
            better += 1
    assert better >= 4


def test_a_run_with_other_importance_is_begun_anew(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    """Half a pack made without importance is not gone on with, nor one made with another file's."""
    source = checkpoint_maker(tmp_path / "m")

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    write_importance(tmp_path / "i", uneven(source), {})
    with Importance(tmp_path / "i") as importance:
        quantize(source, tmp_path / "want", importance=importance)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "got", progress=stop)
        quantize(source, tmp_path / "got", importance=importance)
    assert (tmp_path / "got" / MANIFEST).read_bytes() == (tmp_path / "want" / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", ["int4-g128", "nvfp4"])
def test_products_of_the_demo_come_out_nearer(tmp_path: Path, name: str) -> None:
    """On a text that was not observed: the error of each matrix's products, with importance over without (-s)."""
    read: dict[tuple[str, int], list[torch.Tensor]] = {}

    class Keep:
        def linear(self, name: str) -> Any:
            return lambda x: read.setdefault((name, -1), []).append(x.clone())

        def experts(self, prefix: str) -> Any:
            def see(expert: int, x: torch.Tensor, hidden: torch.Tensor) -> None:
                read.setdefault((f"{prefix}.gate_up_proj", expert), []).append(x.clone())
                read.setdefault((f"{prefix}.down_proj", expert), []).append(hidden.clone())

            return see

    def feed(watch: Any, seed: int, count: int) -> None:
        text = text_of(seed, count)
        with Engine.open(model_dir(), ctx=2048, watch=watch) as engine:
            engine.session().feed(engine.tokenizer.encode_with_controls(text)[:2048])

    sums = Sums(ModelConfig.from_folder(model_dir()))
    feed(sums, seed=7, count=60)
    feed(Keep(), seed=99, count=60)
    write_importance(tmp_path / "i", sums.observed(), {})
    form = formats.parse(name)
    ratios: dict[str, list[float]] = {}
    with Importance(tmp_path / "i") as importance, Checkpoint.open(model_dir()) as checkpoint:
        for (matrix, expert), inputs in read.items():
            at, one = (expert, expert) if expert >= 0 else (0, None)
            w = (checkpoint.read(matrix, at, at + 1)[0] if expert >= 0 else checkpoint.read(matrix)).float()
            if w.shape[0] < 16:
                continue
            x = torch.cat(inputs)
            scale = tensor_scale_of(form.spec, w.abs().max()[None])
            errors = []
            for counts in (None, importance.of(matrix, one)):
                off = decode(solve(form, w, scale, counts).weight) - w
                errors.append(float((x @ off.T).square().sum()))
            ratios.setdefault(kind(matrix), []).append(errors[1] / errors[0])
    means = {each: sum(found) / len(found) for each, found in ratios.items()}
    print("\n", name, {each: round(mean, 3) for each, mean in means.items()})
    assert means["mlp.experts.down_proj"] < 0.95
    assert means["mlp.shared_expert.down_proj"] < 0.97
    assert all(mean < 1.03 for mean in means.values())
    assert sum(means.values()) / len(means) < 0.99


def values_of(pack: Path) -> dict[str, torch.Tensor]:
    """Every encoded tensor, decoded."""
    found = {}
    with PackReader.open(pack) as reader:
        for name, entry in reader.tensors.items():
            if entry.assignment.spec is None:
                continue
            if entry.info.is_experts:
                prefix, _, kind = name.rpartition(".")
                block = reader.experts(prefix)
                found[name] = decode(getattr(block, kind.removesuffix("_proj")))
            else:
                found[name] = decode(reader.weight(name))
    return found
