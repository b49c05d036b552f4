"""Checkpoints that others quantized: written here by hand from the published layouts, read back to the same numbers.

The writers below go number by number and share nothing with `quant.foreign`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenrun.kernels.ops import decode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.convert import convert
from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.layout import read_manifest
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.ui.quantize import quantize as quantize_command

Arrays = dict[str, Tensor]
# Config, arrays of one matrix by their endings, and what it means f32.
Written = tuple[dict[str, Any], Arrays, Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4, INT4_ZERO = BlockSpec("int4", 128, "f16", tile=True), BlockSpec("int4", 128, "f16", zero=True, tile=True)
NVFP4 = BlockSpec("e2m1", 16, "e4m3", tensor_scale=True, tile=True)


def words(codes: list[int]) -> list[int]:
    """int32 of eight codes each, the first in the lowest bits."""
    out = []
    for start in range(0, len(codes), 8):
        word = sum(code << 4 * j for j, code in enumerate(codes[start : start + 8]))
        out.append(word - (1 << 32) if word >= 1 << 31 else word)
    return out


def write_gptq(rows: int, cols: int, *, zeros: bool = False, version: int = 1, scale: Any = torch.float16) -> Written:
    """AutoGPTQ: eight codes of a column's input to a word, downwards; zero points less one in the first version."""
    blocks = cols // 128
    codes = torch.randint(0, 16, (rows, cols))
    zero = torch.randint(1, 16, (rows, blocks)) if zeros else torch.full((rows, blocks), 8)
    scales = (torch.rand(rows, blocks) * 0.02 + 0.001).to(scale)
    values = (codes - zero.repeat_interleave(128, 1)) * scales.float().repeat_interleave(128, 1)
    qweight = torch.tensor([words(codes[r].tolist()) for r in range(rows)], dtype=torch.int32).T.contiguous()
    less = 1 if version == 1 else 0
    qzeros = torch.tensor([words((zero[:, b] - less).tolist()) for b in range(blocks)], dtype=torch.int32)
    arrays = {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous()}
    arrays["g_idx"] = torch.tensor([c // 128 for c in range(cols)], dtype=torch.int32)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), arrays, values


def write_fp8(rows: int, cols: int) -> Written:
    codes = (torch.randn(rows, cols) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-cols // 128)) * 1e-3
    values = torch.empty(rows, cols)
    for r in range(rows):
        for b in range(scales.shape[1]):
            values[r, b * 128 : b * 128 + 128] = codes[r, b * 128 : b * 128 + 128].float() * scales[r // 128, b]
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return config, {"weight": codes, "weight_scale_inv": scales}, values


def fp4_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [R, C] times a scale for every 16 of them."""
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    return table[codes] * scales.float().repeat_interleave(16, 1)


def write_modelopt(rows: int, cols: int) -> Written:
    codes = torch.randint(0, 16, (rows, cols))
    scales = (torch.rand(rows, cols // 16) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.rand(()) * 1e-4
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    arrays = {"weight": packed, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.ones(())}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return config, arrays, fp4_values(codes, scales) * whole


def write_ct_nvfp4(rows: int, cols: int) -> Written:
    """compressed-tensors, nvfp4-pack-quantized: the whole matrix's scale divides."""
    codes = torch.randint(0, 16, (rows, cols))
    scales = (torch.rand(rows, cols // 16) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor([2.0 ** torch.randint(10, 16, ()).item()])
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    arrays = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return config, arrays, fp4_values(codes, scales) / whole


def write_ct_int4(rows: int, cols: int, *, zeros: bool = False, group: int = 128) -> Written:
    """compressed-tensors, pack-quantized: codes plus 8, along a row; zero points along a column."""
    blocks = cols // group
    codes = torch.randint(0, 16, (rows, cols))
    zero = torch.randint(0, 16, (rows, blocks)) if zeros else torch.full((rows, blocks), 8)
    scales = (torch.rand(rows, blocks) * 0.02 + 0.001).half()
    values = (codes - zero.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    arrays = {
        "weight_packed": torch.tensor([words(row) for row in codes.tolist()], dtype=torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, cols]),
    }
    if zeros:
        columns = [words(zero[:, b].tolist()) for b in range(blocks)]
        arrays["weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"}, arrays, values


def folder_of(folder: Path, written: Written, rename: Callable[[str], str] = lambda name: name) -> Path:
    """A checkpoint of one matrix, layer.weight."""
    config, arrays, _ = written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({rename(f"layer.{part}"): value for part, value in arrays.items()}, folder / "model.safetensors")
    return folder


LOSSLESS = [
    (lambda: write_gptq(32, 256), INT4),
    (lambda: write_gptq(32, 256, version=2), INT4),
    (lambda: write_gptq(48, 256, zeros=True), INT4_ZERO),
    (lambda: write_gptq(48, 256, zeros=True, version=2), INT4_ZERO),
    (lambda: write_modelopt(32, 96), NVFP4),
    (lambda: write_ct_nvfp4(48, 64), NVFP4),
    (lambda: write_ct_int4(16, 384), INT4),
    (lambda: write_ct_int4(16, 96, group=32), BlockSpec("int4", 32, "f16", tile=True)),
    (lambda: write_ct_int4(32, 256, zeros=True), INT4_ZERO),
]


@pytest.mark.parametrize(("write", "spec"), LOSSLESS)
def test_the_same_codes_in_our_formats(tmp_path: Path, write: Callable[[], Written], spec: BlockSpec) -> None:
    """Read as numbers, and carried over: both are what the layout says, to the last bit."""
    written = write()
    values = written[2]
    with Checkpoint.open(folder_of(tmp_path / "m", written)) as checkpoint:
        assert checkpoint.tensors == {"layer.weight": (tuple(values.shape), "BF16")}
        assert torch.equal(checkpoint.read("layer.weight"), values)
        assert torch.equal(checkpoint.read("layer.weight", 3, 9), values[3:9])
        made = checkpoint.encoded("layer.weight", spec)
        assert made is not None
        assert made.spec == spec
        assert torch.equal(decode(made), values)
        assert checkpoint.encoded("layer.weight", BlockSpec("int8", 128, "f16")) is None


def test_fp8_is_read_as_numbers(tmp_path: Path) -> None:
    """Blocks that end with the matrix; no format of ours is the same."""
    written = write_fp8(200, 300)
    with Checkpoint.open(folder_of(tmp_path / "m", written)) as checkpoint:
        assert torch.equal(checkpoint.read("layer.weight"), written[2])
        assert checkpoint.encoded("layer.weight", INT4) is None
        assert checkpoint.imported == "FP8"


def test_scales_that_no_float16_is_are_not_carried_over(tmp_path: Path) -> None:
    """bfloat16 has a wider range: such a matrix is decoded, and quantized anew."""
    config, arrays, values = write_gptq(16, 128, scale=torch.bfloat16)
    arrays["scales"][0, 3] = 1e-12
    codes = torch.tensor([[word >> 4 * j & 15 for word in arrays["qweight"][:, 3].tolist() for j in range(8)]])
    values[3] = (codes[0] - 8) * arrays["scales"][0, 3].float()
    with Checkpoint.open(folder_of(tmp_path / "m", (config, arrays, values))) as checkpoint:
        assert torch.equal(checkpoint.read("layer.weight"), values)
        assert checkpoint.encoded("layer.weight", INT4) is None


def damaged(part: str, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        if value is None:
            del arrays[part]
        else:
            arrays[part] = value(arrays[part]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("write", "change", "why"),
    [
        (lambda: write_gptq(16, 128), damaged("qzeros", None), r"has no qzeros"),
        (lambda: write_gptq(16, 128), damaged("scales", lambda s: s[:, :8].contiguous()), r"do not fit each other"),
        (lambda: write_gptq(16, 128), damaged("qweight", lambda q: q.to(torch.int64)), r"is I64, not I32"),
        (lambda: write_gptq(16, 256), damaged("g_idx", lambda g: g.flip(0).contiguous()), r"another order"),
        (lambda: write_gptq(16, 128), damaged("scales", lambda s: s * float("nan")), r"no numbers"),
        (lambda: write_fp8(130, 130), damaged("weight_scale_inv", lambda s: s[:1].contiguous()), r"do not fit"),
        (lambda: write_modelopt(16, 32), damaged("weight_scale", None), r"has no weight_scale"),
        (
            lambda: write_modelopt(16, 32),
            damaged("weight_scale", lambda s: torch.full_like(s.view(torch.uint8), 127).view(torch.float8_e4m3fn)),
            r"no numbers",
        ),
        (lambda: write_ct_nvfp4(16, 32), damaged("weight_global_scale", torch.zeros(1)), r"not above zero"),
        (lambda: write_ct_nvfp4(16, 32), damaged("weight_scale", None), r"no scales beside it"),
        (lambda: write_ct_int4(16, 128), damaged("weight_shape", torch.tensor([16, 120])), r"says it is \[16, 120\]"),
    ],
)
def test_damage_is_told(
    tmp_path: Path, write: Callable[[], Written], change: Callable[[Arrays], None], why: str
) -> None:
    config, arrays, values = write()
    change(arrays)
    folder = folder_of(tmp_path / "m", (config, arrays, values))
    with pytest.raises(CheckpointError, match=why), Checkpoint.open(folder) as checkpoint:
        checkpoint.read("layer.weight")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "does not say"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"\[64, 64\]"),
        (["gptq"], "no object"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path: Path, config: Any, why: str) -> None:
    folder = folder_of(tmp_path / "m", (config, {"weight": torch.ones(2, 2)}, torch.ones(2, 2)))
    with pytest.raises(CheckpointError, match=why):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("write", "recipe"), [(write_gptq, "balanced"), (write_ct_nvfp4, "nvfp4")])
def test_a_checkpoint_of_quantized_experts(
    tmp_path: Path,
    checkpoint_maker: Callable[..., Path],
    quantize: Callable[..., Any],
    tiny_config: dict[str, Any],
    write: Callable[[int, int], Written],
    recipe: str,
) -> None:
    """Its experts come one by one, as all such checkpoints have them: the pack has their codes, and says so."""
    tiny_config["text_config"]["moe_intermediate_size"] = 128
    source = checkpoint_maker(tmp_path / "m", config=tiny_config, per_expert=True, shards=1)
    stored, meant, config = load_file(source / "model.safetensors"), {}, {}
    for name in [n for n in stored if ".mlp.experts." in n]:
        config, arrays, values = write(*stored.pop(name).shape)
        meant[name] = values
        stored |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in arrays.items()}
    save_file(stored, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(tiny_config | {"quantization_config": config}))
    report = quantize(source, tmp_path / "pack", recipe)
    assert any("carried over bit for bit" in note for note in report.notes)
    with PackReader.open(tmp_path / "pack") as pack:
        assert "quantization_config" not in pack.config
        prefix = "model.language_model.layers.1.mlp.experts"
        block = pack.experts(prefix)
        gate_up, down = decode(block.gate_up), decode(block.down)
        for number in range(4):
            halves = [meant[f"{prefix}.{number}.{half}_proj.weight"] for half in ("gate", "up")]
            assert torch.equal(gate_up[number], torch.cat(halves))
            assert torch.equal(down[number], meant[f"{prefix}.{number}.down_proj.weight"])
    # The recipe that a person gets who names none.
    options: dict[str, Any] = {"revision": None, "recipe": None, "force": False, "as_json": True, "quiet": True}
    quantize_command(convert, str(source), tmp_path / "default", **options)
    assert read_manifest(tmp_path / "default").recipe["name"] == recipe


@pytest.mark.parametrize(
    ("form", "kind", "group", "symmetric"),
    [("int", "pack-quantized", 128, True), ("int", "pack-quantized", 128, False), ("float", "nvfp4", 16, True)],
)
def test_as_the_library_itself_reads_it(tmp_path: Path, form: str, kind: str, group: int, symmetric: bool) -> None:
    """compressed-tensors compresses a matrix and gives it back: the numbers are those that we read."""
    from compressed_tensors.compressors import NVFP4PackedCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rows, cols = 32, 512
    weight = torch.randn(rows, cols) / 30
    blocks = weight.unflatten(1, (-1, group))
    args: dict[str, Any] = {"num_bits": 4, "type": form, "strategy": "group", "group_size": group}
    if form == "int":
        compressor: Any = PackedQuantizationCompressor
        scale = (blocks.abs().amax(2) / 7.5 if symmetric else (blocks.amax(2) - blocks.amin(2)) / 15).half().float()
        state = {"weight": weight, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = (-8 - blocks.amin(2) / scale).round().clamp(-8, 7).to(torch.int8)
    else:
        compressor = NVFP4PackedCompressor
        args |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
        whole = 448 * 6 / weight.abs().max()
        state = {"weight": weight, "weight_global_scale": whole.reshape(1)}
        state["weight_scale"] = (blocks.abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn).float()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=symmetric, **args))
    made = compressor.compress(state, scheme)
    want = compressor.decompress(made, scheme)["weight"].float()
    arrays = {name: value.detach().contiguous() for name, value in made.items() if name != "weight"}
    written = ({"quant_method": "compressed-tensors", "format": kind}, arrays, want)
    with Checkpoint.open(folder_of(tmp_path / "m", written)) as checkpoint:
        got = checkpoint.read("layer.weight")
        # The library decodes NVFP4 in bfloat16.
        assert float((got - want).norm() / want.norm()) < (1e-6 if form == "int" else 4e-3)
        assert float((got - weight).norm() / weight.norm()) < 0.2


SHAPES = st.lists(st.integers(0, 4).map(lambda n: (0, 1, 8, 16, 128)[n]), max_size=3).map(tuple)
PARTS = {
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "modelopt": {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32},
    "compressed-tensors": {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    },
    "compressed-tensors fp4": {
        "weight_packed": torch.uint8,
        "weight_scale": torch.float8_e4m3fn,
        "weight_global_scale": torch.float32,
    },
}


@given(st.sampled_from(sorted(PARTS)), st.data())
@settings(max_examples=400, deadline=None)
def test_arrays_of_any_shape_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, method: str, data: st.DataObject
) -> None:
    arrays = {}
    for part, dtype in PARTS[method].items():
        shape = data.draw(SHAPES)
        arrays[part] = torch.ones(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    name = method.partition(" ")[0]
    config = {"quant_method": name, "bits": 4, "weight_block_size": [128, 128]}
    folder = folder_of(tmp_path_factory.mktemp("any"), (config, arrays, torch.ones(1)))
    try:
        with Checkpoint.open(folder) as checkpoint:
            ((matrix, (shape, _)),) = checkpoint.tensors.items()
            assert tuple(checkpoint.read(matrix).shape) == shape
            for spec in (INT4, INT4_ZERO, NVFP4):
                made = checkpoint.encoded(matrix, spec)
                assert made is None or (made.rows, made.cols) == shape
    except CheckpointError:
        pass
