"""BlockSpec: bytes, bits, and refusals."""

from __future__ import annotations

import pytest

from qwenrun.kernels.cases import SPECS
from qwenrun.kernels.ops import encode
from qwenrun.kernels.spec import BlockSpec


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (BlockSpec("int4", 32, "f16"), 4.5),
        (BlockSpec("int4", 64, "f16"), 4.25),
        (BlockSpec("int4", 128, "f16"), 4.125),
        (BlockSpec("int4", 32, "f16", zero=True), 4.625),
        (BlockSpec("int4", 64, "f16", zero=True), 4.3125),
        (BlockSpec("int4", 128, "f16", zero=True), 4.15625),
        (BlockSpec("e2m1", 16, "e4m3", tensor_scale=True), 4.5),
        (BlockSpec("e2m1", 32, "e8m0"), 4.25),
        (BlockSpec("int8", 128, "f16"), 8.125),
        (BlockSpec("bf16"), 16.0),
    ],
)
def test_bits_per_weight(spec: BlockSpec, bits: float) -> None:
    assert spec.bits_per_weight == bits
    extra = 32 if spec.tensor_scale else 0
    assert spec.nbytes(64, 1024) * 8 == bits * 64 * 1024 + extra


@pytest.mark.parametrize("storage", SPECS)
def test_parts_are_what_encode_makes(storage: str) -> None:
    import torch

    from qwenrun.kernels.weight import TORCH_DTYPES

    spec = SPECS[storage]
    weight = encode(torch.randn(48, 384), spec, tensor_scales=2 if spec.tensor_scale else 1)
    parts = {p.name: (TORCH_DTYPES[p.dtype], p.shape) for p in spec.parts(48, 384, 2)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in weight.parts.items()} == parts
    assert weight.nbytes == spec.nbytes(48, 384, 2)


@pytest.mark.parametrize("storage", SPECS)
def test_json_round_trip(storage: str) -> None:
    assert BlockSpec.from_json(SPECS[storage].to_json()) == SPECS[storage]


@pytest.mark.parametrize(
    "arguments",
    [
        ("int5",),
        ("int4",),
        ("int4", 128),
        ("int4", 31, "f16"),
        ("int4", -2, "f16"),
        ("bf16", 32, "f16"),
        ("int8", 32, "f16", True),
        ("int4", 32, "f8"),
        ("bf16", 0, "", False, True),
    ],
)
def test_impossible_specs(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        BlockSpec(*arguments)


@pytest.mark.parametrize(
    "data", [None, 3, {}, {"codes": "int4", "block": "a"}, {"codes": "int4", "block": True, "scale": "f16"}, {"x": 1}]
)
def test_hostile_json(data: object) -> None:
    with pytest.raises(ValueError):
        BlockSpec.from_json(data)


def test_refused_shapes() -> None:
    with pytest.raises(ValueError, match="blocks of 16"):
        SPECS["nvfp4"].parts(4, 24)
    with pytest.raises(ValueError, match="tensor scales"):
        SPECS["nvfp4"].parts(5, 32, 2)
