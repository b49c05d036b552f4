"""Conversion: same input, same bytes; nothing half-written; nothing dropped in silence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import ModelError
from qwenrun.kernels.ops import decode
from qwenrun.quant.errors import CheckpointError, RecipeError, StorageError
from qwenrun.quant.packfile import journal
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.layout import MANIFEST, read_manifest
from qwenrun.quant.packfile.reader import PackReader, verify
from qwenrun.ui.quantize import render

Maker, Quantize = Callable[..., Path], Callable[..., Any]


def contents(pack: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(pack.iterdir())}


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("recipe", ["balanced", "nvfp4", "int4"])
def test_twice_gives_the_same_bytes(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, recipe: str) -> None:
    source = checkpoint_maker(tmp_path / "m")
    quantize(source, tmp_path / "a", recipe, threads=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        quantize(source, tmp_path / "b", recipe, threads=3)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_form_of_the_checkpoint_leaves_no_trace(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize
) -> None:
    """Fused or per expert, in one file or five: the same pack, but for where it says it came from."""
    packs = []
    for number, form in enumerate(({"shards": 1}, {"shards": 5}, {"per_expert": True})):
        source = checkpoint_maker(tmp_path / str(number) / "m", **form)
        quantize(source, tmp_path / f"pack{number}")
        found = contents(tmp_path / f"pack{number}")
        manifest = json.loads((tmp_path / f"pack{number}" / MANIFEST).read_text())
        del manifest["source"], manifest["manifest_sha256"], found[MANIFEST]
        packs.append((found, manifest))
    assert packs[0] == packs[1] == packs[2]


@pytest.mark.parametrize("recipe", ["balanced", "nvfp4", "int4", "bf16"])
def test_every_tensor_is_there_and_near(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, recipe: str
) -> None:
    source = checkpoint_maker(tmp_path / "m", per_expert=True)
    report = quantize(source, tmp_path / "p", recipe)
    rows = {row.name: row for row in report.rows}
    with Checkpoint.open(source) as checkpoint, PackReader.open(tmp_path / "p") as pack:
        assert set(pack.tensors) == set(checkpoint.tensors) == set(rows)
        for name, entry in pack.tensors.items():
            original = checkpoint.read(name).float()
            if entry.info.is_experts:
                block = pack.experts(name.rpartition(".")[0])
                stored = decode(block.gate_up if name.endswith("gate_up_proj") else block.down)
            else:
                stored = pack.tensor(name).float() if entry.assignment.spec is None else decode(pack.weight(name))
            error = ((stored - original).norm() / original.norm()).item()
            if entry.assignment.spec is None:
                assert error == 0
                assert rows[name].sqnr_db is None
            else:
                bound = {"int8": 0.01, "int4": 0.12, "e2m1": 0.12}[entry.spec.codes]
                assert 0 < error < bound, name
                assert rows[name].nmse == pytest.approx(error**2, rel=1e-3)
    if recipe != "bf16":
        assert "int4-g64 instead of int4-g128" in rows["mtp.layers.0.mlp.experts.down_proj"].note or recipe == "nvfp4"
    assert report.pack_bytes == sum(p.stat().st_size for p in (tmp_path / "p").iterdir())
    json.dumps(report.to_json())


def test_provenance(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    source = checkpoint_maker(tmp_path / "models--Qwen--Tiny-1B" / "snapshots" / "0123abc")
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not ours to copy")
    quantize(source, tmp_path / "p", tool="qwenrun 9")
    manifest = read_manifest(tmp_path / "p")
    assert manifest.tool == "qwenrun 9"
    assert manifest.source["repo"] == "Qwen/Tiny-1B"
    assert manifest.source["revision"] == "0123abc"
    for name, entry in manifest.source["files"].items():
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == entry["sha256"]
    assert (tmp_path / "p" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "p" / "notes.txt").exists()


@pytest.mark.parametrize("where", ["lm_head.weight", "layers.0.mlp.experts.down_proj", "norm.weight", "mtp.fc.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_and_nothing_left(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, where: str, bad: float
) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith(where):
            value.view(-1)[-1] = bad
        return value

    source = checkpoint_maker(tmp_path / "m", change=change)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        quantize(source, tmp_path / "p")
    assert where in caught.value.message
    assert left_behind(tmp_path) == ["m"]


def test_zero_rows_are_a_warning(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith("layers.1.mlp.experts.down_proj"):
            value[2, :5] = 0
        return value

    report = quantize(checkpoint_maker(tmp_path / "m", change=change), tmp_path / "p")
    zero = [row for row in report.rows if row.zero_rows]
    assert [(row.name.split(".")[3], row.zero_rows) for row in zero] == [("1", 5)]
    assert any("5 rows of zeros" in warning for warning in report.warnings)


def test_outliers_are_told(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith("layers.1.mlp.experts.down_proj"):
            value[2, 5, 7] = -3.0
        return value

    report = quantize(checkpoint_maker(tmp_path / "m", change=change), tmp_path / "p")
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        for row in report.rows:
            values = checkpoint.read(row.name).float()
            if row.sqnr_db is None:
                assert row.peak_to_rms is None
            else:
                want = values.abs().max() / values.square().mean().sqrt()
                assert row.peak_to_rms == pytest.approx(want.item(), rel=1e-4)
    worst = max((row for row in report.rows if row.peak_to_rms), key=lambda row: row.peak_to_rms)
    assert worst.name.endswith("layers.1.mlp.experts.down_proj")
    shown = render(report).partition("outliers:")[2]
    assert worst.name in shown.splitlines()[3]


def test_rows_that_become_zeros_are_a_warning(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "lm_head.weight":
            value[:3] = 1e-8  # below half of float16's smallest number, times 127
            value[3] = 0
        return value

    report = quantize(checkpoint_maker(tmp_path / "m", change=change), tmp_path / "p")
    assert [(row.name, row.lost_rows, row.zero_rows) for row in report.rows if row.lost_rows] == [
        ("lm_head.weight", 3, 1)
    ]
    assert "lm_head.weight: 3 rows became zeros in int8-g128" in report.warnings


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (lambda n: n == "lm_head.weight", "lm_head.weight"),
        (lambda n: n == "mtp.norm.weight", "mtp.norm.weight"),
        (lambda n: n.endswith("blocks.0.norm1.bias"), "blocks.0.norm1.bias"),
        (lambda n: ".layers.1.mlp.experts." in n, "layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_missing_tensors_are_named(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, drop: Callable[[str], bool], missing: str
) -> None:
    with pytest.raises(ModelError, match="missing") as caught:
        quantize(checkpoint_maker(tmp_path / "m", drop=drop), tmp_path / "p")
    assert missing in caught.value.message


def test_left_over_tensors_are_named(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, tiny_config: dict
) -> None:
    source = checkpoint_maker(tmp_path / "m")
    tiny_config["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(ModelError, match=r"1 not known: lm_head\.weight"):
        quantize(source, tmp_path / "p")
    tiny_config["tie_word_embeddings"] = False
    tiny_config["text_config"]["vocab_size"] = 321
    (source / "config.json").write_text(json.dumps(tiny_config))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is \[320, 128\], not \[321, 128\]"):
        quantize(source, tmp_path / "p")


def test_whole_groups_may_be_absent_and_it_is_said(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    source = checkpoint_maker(tmp_path / "m", drop=lambda n: n.startswith(("mtp.", "model.visual.")))
    report = quantize(source, tmp_path / "p")
    assert len(report.notes) == 2
    assert read_manifest(tmp_path / "p").notes == report.notes


def test_existing_output(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    source, out = checkpoint_maker(tmp_path / "m"), tmp_path / "p"
    quantize(source, out)
    before = contents(out)
    with pytest.raises(StorageError, match="exists already"):
        quantize(source, out, "int4")
    assert contents(out) == before
    quantize(source, out, "int4", force=True)
    assert read_manifest(out).recipe["name"] == "int4"
    verify(out)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(StorageError, match="not a pack"):
        quantize(source, precious, force=True)
    assert (precious / "thesis.txt").read_text() == "years"
    (out / "thesis.txt").write_text("years")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        quantize(source, out, force=True)
    assert (out / "thesis.txt").read_text() == "years"
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(StorageError, match="not a folder"):
        quantize(source, tmp_path / "link", force=True)
    assert left_behind(tmp_path) == ["link", "m", "p", "precious"]


def test_force_keeps_the_old_pack_when_it_fails(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * float("nan") if name == "lm_head.weight" else value

    out = tmp_path / "p"
    quantize(checkpoint_maker(tmp_path / "m"), out)
    with pytest.raises(CheckpointError):
        quantize(checkpoint_maker(tmp_path / "bad", change=spoil), out, force=True)
    verify(out)
    assert left_behind(tmp_path) == ["bad", "m", "p"]


def test_disk_too_small_is_known_beforehand(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_maker(tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="1,000 are free"):
        quantize(source, tmp_path / "p")
    assert left_behind(tmp_path) == ["m"]


@pytest.mark.parametrize("recipe", ["balanced", "nvfp4"])
def test_disk_that_fills_up_meanwhile(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Wherever it happens, the same command goes on when there is room, and nobody can tell afterwards."""
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    source = checkpoint_maker(tmp_path / "m")
    whole = quantize(source, tmp_path / "whole", recipe)
    rng, seed = random.Random(), random.randrange(1 << 31)
    rng.seed(seed)
    left, calls = [0], []

    def full(real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            calls.append(1)
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        return call

    for name in ("pwrite", "write", "fdatasync"):
        monkeypatch.setattr(os, name, full(getattr(os, name)))
    stops = 0
    while not (tmp_path / "p").exists():
        left[0] = rng.randrange(5, 60)
        with contextlib.suppress(StorageError):
            report = quantize(source, tmp_path / "p", recipe)
            break
        stops += 1
        assert stops < 100, f"seed {seed}"
    left[0] = 1 << 30
    assert stops > 1
    assert contents(tmp_path / "p") == contents(tmp_path / "whole"), f"seed {seed}"
    assert report.rows == whole.rows
    assert left_behind(tmp_path) == ["m", "p", "whole"]


def test_a_journal_of_something_else_is_not_gone_on_with(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)

    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    source = checkpoint_maker(tmp_path / "m")
    quantize(source, tmp_path / "whole")
    for change in ("recipe", "source", "version"):
        if change == "source":
            checkpoint_maker(source, seed=1)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "p", "int4" if change == "recipe" else "balanced", progress=stop)
        assert (tmp_path / ".p.partial/journal").stat().st_size > 100
        if change == "source":
            checkpoint_maker(source)
        quantize(source, tmp_path / "p", tool="other" if change == "version" else "")
        found, wanted = contents(tmp_path / "p"), contents(tmp_path / "whole")
        if change == "version":
            del found[MANIFEST], wanted[MANIFEST]
        assert found == wanted, change
        shutil.rmtree(tmp_path / "p")
    assert left_behind(tmp_path) == ["m", "whole"]


def test_a_torn_journal_loses_its_last_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = journal.Journal(path, "this")
    first.add("a", [1, 0.1])
    first.commit(lambda: None)
    first.add("b", 2)
    first.commit(lambda: None)
    first.add("c", 3)
    first.close()
    text = path.read_bytes()
    for cut in range(len(text) + 1):
        for tail in (b"", b"\0" * 9, b'["c"'):
            path.write_bytes(text[:cut] + tail)
            again = journal.Journal(path, "this")
            assert again.pieces in ({}, {"a": [1, 0.1]}, {"a": [1, 0.1], "b": 2})
            assert len(again.pieces) == max(0, text[:cut].count(b"\n") - 1)
            again.add("d", 4)
            again.commit(lambda: None)
            again.close()
            assert journal.Journal(path, "this").pieces == again.pieces
    assert journal.Journal(path, "other").pieces == {}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_journal_says_nothing_wrong(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut or put in anywhere: what it still says, it said before, in the same order."""
    path = tmp_path_factory.mktemp("journal") / "j"
    first = journal.Journal(path, "this")
    said = {f"layers.{number}.experts:{number}": {"signal": number / 3, "peak": 1e-9} for number in range(4)}
    for key, known in said.items():
        first.add(key, known)
    first.commit(lambda: None)
    first.close()
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(held) - 1))
        held[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(held)
    again = journal.Journal(path, "this")
    again.close()
    assert list(again.pieces.items()) == list(said.items())[: len(again.pieces)]


def test_disk_that_is_full_from_the_start(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_maker(tmp_path / "m")
    before = len(os.listdir("/proc/self/fd"))

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(StorageError, match="No space left"):
        quantize(source, tmp_path / "p")
    assert left_behind(tmp_path) == ["m"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_holds_the_lock_of_what_it_writes(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    seen = []

    def other_run(done: int, total: int, name: str) -> None:
        if done < total:
            (folder,) = tmp_path.glob(".p.partial")
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                seen.append(name)
            finally:
                os.close(descriptor)

    quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p", progress=other_run)
    assert seen


def test_files_taken_over_may_not_lead_out_of_the_checkpoint(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize
) -> None:
    source = checkpoint_maker(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link out"):
        quantize(source, tmp_path / "p")
    assert left_behind(tmp_path) == ["m", "secret"]


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    source = checkpoint_maker(tmp_path / "m")

    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "p", progress=stop)
    assert left_behind(tmp_path) == [".p.partial", "m"]
    lock = os.open(tmp_path / ".p.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match="another process is making"):
        quantize(source, tmp_path / "p")
    os.close(lock)
    quantize(source, tmp_path / "p")
    quantize(source, tmp_path / "whole")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert left_behind(tmp_path) == ["m", "p", "whole"]


def test_a_rule_on_a_vector_stops_before_work(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[rules]]\nmatch = "*"\nformat = "int8-g32"\n')
    with pytest.raises(RecipeError, match="no matrix"):
        quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p", str(recipe))
    assert left_behind(tmp_path) == ["m", "r.toml"]


def test_large_tensors_are_cut_without_a_trace(
    tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenrun.quant import convert

    recipe = tmp_path / "r.toml"
    recipe.write_text('[[rules]]\nmatch = ["*_proj.weight", "lm_head.weight", "*.experts.*"]\nformat = "nvfp4"\n')
    source = checkpoint_maker(tmp_path / "m")
    quantize(source, tmp_path / "a", str(recipe))
    monkeypatch.setattr(convert, "PIECE_VALUES", 128 * 13)
    quantize(source, tmp_path / "b", str(recipe))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_reaches_the_end(tmp_path: Path, checkpoint_maker: Maker, quantize: Quantize) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize(checkpoint_maker(tmp_path / "m"), tmp_path / "p", progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][1]
    assert seen[-1][2] == "checksums of the pack, 100%"
