"""Hugging Face folders, whole and hostile: every error is one clear sentence that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile.checkpoint import INDEX, Checkpoint
from qwenrun.quant.packfile.safetensors import build_header, parse_header

Maker = Callable[..., Path]


def test_reads_what_safetensors_reads(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m", shards=3)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(weight_map)
        for name, shard in weight_map.items():
            with safe_open(folder / shard, "pt") as file:
                expected = file.get_tensor(name)
            assert checkpoint.tensors[name][0] == tuple(expected.shape)
            assert torch.equal(checkpoint.read(name), expected)
            if expected.shape[0] > 2:
                assert torch.equal(checkpoint.read(name, 1, 3), expected[1:3])


def test_per_expert_tensors_read_as_fused(tmp_path: Path, checkpoint_maker: Maker) -> None:
    fused = checkpoint_maker(tmp_path / "a", shards=1)
    split = checkpoint_maker(tmp_path / "b", per_expert=True)
    with Checkpoint.open(fused) as a, Checkpoint.open(split) as b:
        assert dict(a.tensors) == dict(b.tensors)
        for name in a.tensors:
            assert torch.equal(a.read(name), b.read(name)), name
            if ".experts." in name:
                assert torch.equal(a.read(name, 1, 3), b.read(name, 1, 3))


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_truncated_shard(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m")
    shard = shard_of(folder)
    whole = shard.read_bytes()
    for keep in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=shard.name) as caught:
            Checkpoint.open(folder)
        assert "again" in caught.value.hint
    shard.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="something was added"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", "..", 3, None])
def test_index_that_points_elsewhere(tmp_path: Path, checkpoint_maker: Maker, name: object) -> None:
    folder = checkpoint_maker(tmp_path / "m")
    (tmp_path / "x.safetensors").write_bytes(shard_of(folder).read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no name of a shard"):
        Checkpoint.open(folder)


def test_link_out_of_the_folder(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m")
    shard = shard_of(folder)
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="link out"):
        Checkpoint.open(folder)


def test_the_hubs_cache_may_link_to_its_blobs(tmp_path: Path, checkpoint_maker: Maker) -> None:
    repo = tmp_path / "models--Qwen--Tiny"
    folder = checkpoint_maker(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for number, shard in enumerate(folder.glob("*.safetensors")):
        blob = repo / "blobs" / str(number)
        shard.rename(blob)
        shard.symlink_to(blob)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.read("lm_head.weight").shape == (320, 128)


def test_missing_files(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m")
    shard = shard_of(folder)
    shard.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        Checkpoint.open(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_index_and_shards_that_disagree(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m")
    original = json.loads((folder / INDEX).read_text())
    for change, why in (
        (lambda m: m.pop("lm_head.weight"), "does not place"),
        (lambda m: m.update(x=shard_of(folder).name), "does not hold"),
    ):
        index = json.loads(json.dumps(original))
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=why):
            Checkpoint.open(folder)
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX):
            Checkpoint.open(folder)


def test_a_missing_expert(tmp_path: Path, checkpoint_maker: Maker) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint_maker(tmp_path / "m", per_expert=True, shards=1)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight is missing"):
        Checkpoint.open(folder)


def test_an_experts_number_has_one_spelling(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    prefix = "model.language_model.layers.0.mlp.experts"
    names = [f"{prefix}.{number}.down_proj.weight" for number in ("0", "00", "\u0661", "1" * 5000)]
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.pop(f"{prefix}.down_proj") == ((1, 2, 2), "F32")
        assert set(checkpoint.tensors) == set(names[1:])


def test_many_readers_open_each_file_once(tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "m", shards=4)
    for _ in range(5):
        with Checkpoint.open(folder) as checkpoint, ThreadPoolExecutor(8) as pool:
            before = len(os.listdir("/proc/self/fd"))
            list(pool.map(checkpoint.read, checkpoint.tensors))
            assert len(os.listdir("/proc/self/fd")) == before + 4


def test_files_a_tensor_is_in(tmp_path: Path, checkpoint_maker: Maker) -> None:
    weight_map = json.loads((checkpoint_maker(tmp_path / "a", shards=3) / INDEX).read_text())["weight_map"]
    with Checkpoint.open(tmp_path / "a") as checkpoint:
        assert {name: checkpoint.shards_of(name) for name in weight_map} == {n: [s] for n, s in weight_map.items()}
    folder = checkpoint_maker(tmp_path / "b", shards=3, per_expert=True)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    with Checkpoint.open(folder) as checkpoint:
        for kind, projections in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            prefix = "model.language_model.layers.1.mlp.experts"
            needed = {weight_map[f"{prefix}.{e}.{p}_proj.weight"] for e in range(4) for p in projections}
            assert checkpoint.shards_of(f"{prefix}.{kind}") == sorted(needed)


def header(entries: object, data: int = 16) -> tuple[bytes, int]:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return text, 8 + len(text) + data


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"a": {**GOOD, "data_offsets": [0, 20]}}, "truncated"),
        ({"a": {**GOOD, "data_offsets": [-4, 12]}}, "data at"),
        ({"a": {**GOOD, "data_offsets": [16, 0]}}, "data at"),
        ({"a": {**GOOD, "shape": [1 << 40, 1 << 40]}}, "bytes for"),
        ({"a": {**GOOD, "shape": [-4]}}, "shape"),
        ({"a": {**GOOD, "shape": [True, 4]}}, "shape"),
        ({"a": {**GOOD, "shape": 4}}, "shape"),
        ({"a": {**GOOD, "shape": [1 << 70]}}, "shape"),
        ({"a": {**GOOD, "dtype": "F33"}}, "dtype"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "dtype"),
        ({"a": 3}, "not described"),
        ({"a": {**GOOD, "shape": [2], "data_offsets": [8, 16]}}, "gap"),
        ({"a": GOOD, "b": {**GOOD, "shape": [2], "data_offsets": [8, 16]}}, "overlap"),
        ({}, "accounts for"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", "more than the 2,000,000"),
        (b"[" * 100_000, "nested"),
        (b"[]", "not an object"),
        (json.dumps({"a": GOOD}).encode("utf-16"), "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_hostile_headers(entries: object, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        parse_header(*header(entries), "f")


numbers = st.one_of(st.integers(-10, 300), st.sampled_from([1 << 31, 1 << 63, 1 << 64]), st.floats(), st.none())
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "X"]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


@given(st.dictionaries(st.text(max_size=3), st.one_of(entry, numbers)), st.integers(0, 300))
@example({"a": GOOD}, 16)
@settings(max_examples=500, deadline=None)
def test_any_header_is_read_or_refused(entries: dict, data: int) -> None:
    text, size = header(entries, data)
    try:
        found = parse_header(text, size, "f")
    except CheckpointError:
        return
    taken = sorted((e.start, e.start + e.nbytes) for e in found.values())
    assert sum(stop - start for start, stop in taken) == data
    assert all(8 + len(text) <= start <= stop <= size for start, stop in taken)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    from qwenrun.quant.packfile.safetensors import read_header

    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(path)
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with contextlib.suppress(CheckpointError):
        assert read_header(path) == {}


def test_built_header_is_read_back() -> None:
    text, starts = build_header({"a": ("F32", (2, 3), 24), "b": ("U8", (5,), 5)})
    found = parse_header(text[8:], len(text) + 29, "f")
    assert {n: e.start for n, e in found.items()} == starts
    assert len(text) % 64 == 0


SHARD = "model-00001-of-00001.safetensors"


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "model.layers.0.mlp.experts.0.up_proj.weight", "", "a/../b"]),
        st.one_of(
            st.sampled_from([SHARD, "secret.safetensors", "../outside.safetensors", "/etc/passwd", ".", ""]),
            st.text(max_size=8),
            st.integers(),
            st.none(),
            st.lists(st.text(max_size=2), max_size=2),
        ),
        max_size=3,
    )
)
@example({"a": SHARD})
@settings(max_examples=200, deadline=None)
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, weight_map: dict) -> None:
    """Nothing outside of the folder is opened, whatever the index says, links included."""
    top = tmp_path_factory.mktemp("index")
    (top / "m").mkdir()
    save_file({"a": torch.ones(2)}, top / "m" / SHARD)
    save_file({"b": torch.ones(2)}, top / "outside.safetensors")
    (top / "m/secret.safetensors").symlink_to(top / "outside.safetensors")
    (top / "m/config.json").write_text("{}")
    (top / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    try:
        with Checkpoint.open(top / "m") as checkpoint:
            assert checkpoint.shards == [SHARD]
            assert set(checkpoint.tensors) == {"a"}
            assert torch.equal(checkpoint.read("a"), torch.ones(2))
            assert weight_map == {"a": SHARD}
    except CheckpointError:
        assert weight_map != {"a": SHARD}
