"""Packs: read back as written, by us and from the format's page alone; and every kind of damage found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwenrun.kernels.ops import decode
from qwenrun.quant.errors import PackError
from qwenrun.quant.packfile.layout import (
    DENSE,
    MANIFEST,
    document_sha256,
    expert_file,
    parse_manifest,
    read_manifest,
    strict_json,
)
from qwenrun.quant.packfile.reader import PackReader, verify

RECIPES = ("balanced", "nvfp4", "int4", "bf16")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    from qwenrun.model.config import ModelConfig
    from qwenrun.model.inventory import match
    from qwenrun.quant.convert import convert
    from qwenrun.quant.packfile.checkpoint import Checkpoint
    from qwenrun.quant.recipe import Recipe

    folder = tmp_path_factory.mktemp("packs")
    maker = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    source = maker.write_checkpoint(folder / "source")
    (source / "tokenizer.json").write_text("{}")
    made = {}
    for name in RECIPES:
        with Checkpoint.open(source) as checkpoint:
            found = match(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors, "source")
            convert(checkpoint, folder / name, Recipe.load(name), found.tensors, tool="test")
        made[name] = folder / name
    return made


@pytest.fixture
def pack(packs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    import shutil

    return Path(shutil.copytree(packs["nvfp4"], tmp_path / "pack"))


# A reader written from docs/format.md alone, with numpy and the standard library.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NUMPY = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}


def e4m3_table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(code & 128, -value, value)


def nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)[..., :count]


def array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    out = np.frombuffer(data, NUMPY[dtype]).reshape(shape)
    return (out.astype("<u4") << 16).view("<f4") if dtype == "BF16" else out


def untiled(parts: dict[str, np.ndarray], rows: int, cols: int, blocks: int) -> dict[str, np.ndarray]:
    """The parts of a tiled matrix as if its rows followed each other."""
    r, c, b = np.arange(rows)[:, None], np.arange(cols)[None], np.arange(blocks)[None]
    byte = parts["codes"].ravel()[(r // 16 * (cols // 8) + c // 8) * 64 + 4 * (r % 16) + c % 4]
    code = np.where(c % 8 < 4, byte & 15, byte >> 4)
    out = {"codes": code[:, 0::2] | code[:, 1::2] << 4}
    out["scales"] = parts["scales"].ravel()[(r // 16 * blocks + b) * 16 + r % 16]
    if "zeros" in parts:
        zeros = parts["zeros"].ravel()[(r // 16 * blocks + b) * 8 + r % 8]
        zeros = np.pad(np.where(r % 16 < 8, zeros & 15, zeros >> 4), ((0, 0), (0, blocks % 2)))
        out["zeros"] = zeros[:, 0::2] | zeros[:, 1::2] << 4
    return out


def values(spec: dict, rows: int, cols: int, parts: dict[str, np.ndarray]) -> np.ndarray:
    if "block" not in spec:
        return parts["codes"].astype(float)
    block = spec["block"]
    if spec.get("tile"):
        parts = parts | untiled(parts, rows, cols, cols // block)
    codes = parts["codes"] if spec["codes"] == "int8" else nibbles(parts["codes"], cols)
    zero = 8 if spec["codes"] == "int4" else 0
    if "zeros" in parts:
        zero = np.repeat(nibbles(parts["zeros"], cols // block), block, 1).astype(int)
    number = E2M1[codes] if spec["codes"] == "e2m1" else codes.astype(int) - zero
    scales = e4m3_table()[parts["scales"]] if spec["scale"] == "e4m3" else parts["scales"].astype(float)
    out = number * np.repeat(scales, block, 1)
    if "tensor_scale" in parts:
        out = out * np.repeat(parts["tensor_scale"].astype(float), rows // len(parts["tensor_scale"]))[:, None]
    return out


def part_list(spec: dict, rows: int, cols: int, gate_up: bool) -> list[tuple[str, str, list[int]]]:
    four = spec["codes"] in ("int4", "e2m1")
    kind = {"int8": "I8", "bf16": "BF16", "f32": "F32", "f16": "F16"}.get(spec["codes"], "U8")
    if spec.get("tile"):
        rows, cols = rows // 16, cols * 16
    out = [("codes", kind, [rows, cols // 2 if four else cols])]
    if "block" in spec:
        blocks = cols // spec["block"]
        out.append(("scales", "F16" if spec["scale"] == "f16" else "U8", [rows, blocks]))
        if spec.get("zero"):
            out.append(("zeros", "U8", [rows, blocks // 2 if spec.get("tile") else (blocks + 1) // 2]))
        if spec.get("tensor_scale"):
            out.append(("tensor_scale", "F32", [2 if gate_up else 1]))
    return out


def foreign_read(pack: Path) -> dict[str, np.ndarray]:
    """{name: values} of a pack."""
    manifest = json.loads((pack / "pack.json").read_text())
    assert manifest["format_version"] == 2
    data = (pack / "dense.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, base = json.loads(data[8 : 8 + length]), 8 + length
    dense = {
        name: array(data[base + e["data_offsets"][0] : base + e["data_offsets"][1]], e["dtype"], e["shape"])
        for name, e in header.items()
    }
    out: dict[str, np.ndarray] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in manifest["tensors"].items():
        if tensor["part"] in ("routed", "mtp_routed"):
            prefix, _, kind = name.rpartition(".")
            layers.setdefault(prefix, {})[kind] = tensor
        elif "spec" in tensor:
            rows, cols = tensor["shape"]
            names = [n for n, _, _ in part_list(tensor["spec"], rows, cols, False)]
            out[name] = values(tensor["spec"], rows, cols, {n: dense[f"{name}.{n}"] for n in names})
        else:
            out[name] = dense[name].astype(float)
    for prefix, pair in layers.items():
        slices, offset = [], 0
        for kind in ("gate_up_proj", "down_proj"):
            spec = pair[kind].get("spec", {"codes": pair[kind]["dtype"].lower()})
            for part, dtype, shape in part_list(spec, *pair[kind]["shape"][1:], kind == "gate_up_proj"):
                offset = (offset + 63) // 64 * 64
                size = int(np.prod(shape)) * int(NUMPY[dtype][-1])
                slices.append((kind, part, dtype, shape, offset, size))
                offset += size
        record = (offset + 4095) // 4096 * 4096
        number = int(prefix.split("layers.")[1].split(".")[0])
        file = f"experts-{'mtp-' if prefix.startswith('mtp.') else ''}{number:02d}.bin"
        stored = (pack / file).read_bytes()
        for kind, tensor in pair.items():
            spec = tensor.get("spec", {"codes": tensor["dtype"].lower()})
            experts = []
            for e in range(tensor["shape"][0]):
                parts = {
                    part: array(stored[e * record + at : e * record + at + size], dtype, shape)
                    for k, part, dtype, shape, at, size in slices
                    if k == kind
                }
                experts.append(values(spec, *tensor["shape"][1:], parts))
            out[f"{prefix}.{kind}"] = np.stack(experts)
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_page_alone_suffices_to_read_a_pack(packs: dict[str, Path], recipe: str) -> None:
    foreign = foreign_read(packs[recipe])
    with PackReader.open(packs[recipe]) as pack:
        assert set(foreign) == set(pack.tensors)
        for name, entry in pack.tensors.items():
            if entry.info.is_experts:
                prefix, _, kind = name.rpartition(".")
                block = pack.experts(prefix)
                ours = decode(block.gate_up if kind == "gate_up_proj" else block.down)
            elif len(entry.info.shape) == 2:
                ours = decode(pack.weight(name))
            else:
                ours = pack.tensor(name).float()
            assert np.allclose(ours.numpy(), foreign[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_dense_part_is_ordinary_safetensors(packs: dict[str, Path], recipe: str) -> None:
    with safe_open(packs[recipe] / DENSE, "pt") as file, PackReader.open(packs[recipe]) as pack:
        for name, entry in pack.tensors.items():
            if entry.info.is_experts:
                continue
            if entry.assignment.spec is None:
                assert torch.equal(file.get_tensor(name), pack.tensor(name))
            else:
                for part, tensor in pack.weight(name).parts.items():
                    assert torch.equal(file.get_tensor(f"{name}.{part}"), tensor)


def test_records_are_one_aligned_run_each(packs: dict[str, Path]) -> None:
    for path in packs.values():
        with PackReader.open(path) as pack:
            block = pack.experts("model.language_model.layers.0.mlp.experts")
            assert block.record_size % 4096 == 0
            assert block.path.stat().st_size == 4 * block.record_size
            assert sum(pack.bytes_by_part().values()) <= sum(size for size, _ in pack.manifest.files.values())


def test_verify_passes_and_remembers_nothing(pack: Path) -> None:
    seen = []
    assert verify(pack, seen.append).tool == "test"
    assert sum(seen) == sum(size for size, _ in read_manifest(pack).files.values())
    before = sorted(p.name for p in pack.iterdir())
    verify(pack)
    assert sorted(p.name for p in pack.iterdir()) == before


def test_one_flipped_byte_anywhere(pack: Path) -> None:
    """Every file, the manifest included, at random places."""
    seed = random.randrange(1 << 31)
    chance = random.Random(seed)
    for path in sorted(pack.iterdir()):
        original = path.read_bytes()
        for _ in range(5):
            at = chance.randrange(len(original))
            damaged = bytearray(original)
            damaged[at] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            if path.name == MANIFEST and json_equal(original, bytes(damaged)):
                continue  # white space between the values means nothing
            with pytest.raises(PackError):
                verify(pack)
            path.write_bytes(original)
        path.write_bytes(original)
    verify(pack)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_sizes_are_checked_on_opening(pack: Path) -> None:
    for name in (DENSE, expert_file("model.language_model.layers.1.mlp.experts"), "tokenizer.json"):
        path = pack / name
        original = path.read_bytes()
        path.write_bytes(original[:-1])
        with pytest.raises(PackError, match=name):
            PackReader.open(pack)
        path.unlink()
        with pytest.raises(PackError, match=f"{name} is missing"):
            PackReader.open(pack)
        path.write_bytes(original)


def test_a_stranger_in_the_folder(pack: Path) -> None:
    (pack / "extra.bin").write_bytes(b"x")
    with pytest.raises(PackError, match=r"extra\.bin"):
        verify(pack)


def test_a_link_instead_of_a_file(pack: Path, tmp_path: Path) -> None:
    (pack / DENSE).rename(tmp_path / "elsewhere")
    (pack / DENSE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackError, match=DENSE):
        PackReader.open(pack)


def changed(pack: Path, change: Callable[[dict], object]) -> dict:
    document = json.loads((pack / MANIFEST).read_text())
    change(document)
    document["manifest_sha256"] = document_sha256(document)
    (pack / MANIFEST).write_text(json.dumps(document))
    return document


EXPERTS = "model.language_model.layers.0.mlp.experts.down_proj"


def renamed(document: dict, layer: str, prefix: str = "model.language_model.") -> None:
    """Give the experts of layer 0 another name."""
    for kind in ("gate_up_proj", "down_proj"):
        entry = document["tensors"].pop(f"model.language_model.layers.0.mlp.experts.{kind}")
        document["tensors"][f"{prefix}layers.{layer}.mlp.experts.{kind}"] = entry


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(format_version=1), "format version 1"),
        (lambda d: d.update(format_version="1"), "format version"),
        (lambda d: d.update(format_version=True), "format version"),
        (lambda d: d.update(format_version=2.0), "format version"),
        (lambda d: d.update(format="zip"), "not the manifest"),
        (lambda d: d["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "no name for a file"),
        (lambda d: d["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "no name for a file"),
        (lambda d: d["files"].update({"x": {"bytes": -1, "sha256": "0" * 64}}), "size and sha256"),
        (lambda d: d["files"].pop(DENSE), DENSE),
        (lambda d: d["tensors"].pop("lm_head.weight"), "lm_head"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[320, 256]), "lm_head"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[1 << 45, 1 << 45]), "shape"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[320, 100]), "blocks of 128"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[]), "shape"),
        (lambda d: d["tensors"]["lm_head.weight"].update(dtype="F64"), "dtype"),
        (lambda d: d["tensors"]["lm_head.weight"].update(spec={"codes": "int3"}), "int3|int4"),
        (lambda d: d["tensors"][EXPERTS].update(shape=[8, 128, 64]), "experts"),
        (lambda d: d["tensors"].pop(EXPERTS), "gate_up_proj and down_proj"),
        (lambda d: renamed(d, "1" * 5000), "not the name of a layer's experts"),
        (lambda d: renamed(d, "00"), "not the name of a layer's experts"),
        (lambda d: renamed(d, "1", "twin."), r"share experts-01\.bin"),
        (lambda d: d.pop("config"), "config is missing"),
    ],
)
def test_hostile_manifests(pack: Path, change: Callable[[dict], object], why: str) -> None:
    changed(pack, change)
    with pytest.raises(PackError, match=why):
        PackReader.open(pack)


def test_manifest_checksum_and_duplicates(pack: Path) -> None:
    text = (pack / MANIFEST).read_text()
    (pack / MANIFEST).write_text(text.replace('"tool": "test"', '"tool": "best"'))
    with pytest.raises(PackError, match="checksum"):
        read_manifest(pack)
    with pytest.raises(PackError, match="twice"):
        strict_json(b'{"a": 1, "a": 2}', "x")
    with pytest.raises(PackError, match="not a pack"):
        read_manifest(pack.parent)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_manifest_is_read_or_refused(packs: dict[str, Path], data: st.DataObject) -> None:
    """A valid manifest with one value, anywhere, replaced by anything."""
    document = json.loads((packs["nvfp4"] / MANIFEST).read_text())
    node, path = document, []
    while isinstance(node, dict) and node:
        key = data.draw(st.sampled_from(sorted(node)))
        path.append(key)
        if isinstance(node[key], dict) and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(json_values)
        break
    document["manifest_sha256"] = hashlib.sha256(
        json.dumps(
            {k: v for k, v in document.items() if k != "manifest_sha256"}, sort_keys=True, separators=(",", ":")
        ).encode()
    ).hexdigest()
    with contextlib.suppress(PackError):
        parse_manifest(document, "m")
