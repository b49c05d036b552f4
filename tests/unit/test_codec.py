"""Encoding and decoding against independent codecs: the gguf package's, torch's float8, and plain definitions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from qwenrun.kernels import ops
from qwenrun.kernels.cases import SPECS
from qwenrun.kernels.ref import codec
from qwenrun.kernels.spec import BlockSpec

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_e4m3_decode_is_torchs() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    ours, theirs = codec.e4m3_decode(bits), bits.view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = ~theirs.isnan()
    assert torch.equal(ours[finite].view(torch.int32), theirs[finite].view(torch.int32))  # -0 included


def test_e4m3_encode_is_nearest_even_and_saturates() -> None:
    """Against a search over all codes, on values between, beside and beyond them."""
    codes = torch.arange(127, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    middle = (table[1:] + table[:-1]) / 2
    seed = random.randrange(1 << 31)
    noise = torch.rand(2000, generator=torch.Generator().manual_seed(seed)).double() * 500
    tiny = torch.tensor([2.0**-10, 2.0**-10 * 1.0001, 2.0**-11, 3 * 2.0**-10, 448.0, 464.0, 464.1, 1e9, math.inf])
    values = torch.cat([table, middle, torch.nextafter(middle, middle * 2), noise, tiny.double()]).float()
    distance = (values.double()[:, None] - table).abs()
    best = distance.min(1, keepdim=True).values
    # Of two equally near codes the even one.
    expected = torch.where(distance == best, codes.int() % 2 * 1000 + codes.int(), 1 << 20).argmin(1)
    expected = torch.where(values >= 448, 126, expected)
    assert torch.equal(codec.e4m3_encode(values).long(), expected), f"seed {seed}"
    negative = codec.e4m3_encode(-values).long()
    assert torch.equal(negative, expected + 128)
    assert codec.e4m3_encode(torch.tensor([math.nan])).item() & 127 == 127


def test_e2m1_rounds_to_even_codes() -> None:
    one = BlockSpec("e2m1", 2, "f16")
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    values = torch.cat([E2M1, middle, torch.nextafter(middle, torch.tensor(9.0)), torch.tensor([6.1, 600.0])])
    distance = (values[:, None] - E2M1).abs()
    order = torch.arange(8) % 2 * 100 + torch.arange(8)
    expected = torch.where(distance == distance.min(1, keepdim=True).values, order, 1000).argmin(1)
    assert torch.equal(codec.quantize_codes(one, values).long(), expected)
    signed = codec.quantize_codes(one, -values).long()
    assert torch.equal(signed & 7, expected)
    assert torch.equal(codec.dequantize_codes(one, codec.quantize_codes(one, -values)), -E2M1[expected])


def test_nvfp4_decodes_like_gguf() -> None:
    """gguf's block: 64 values, 4 scales of E4M3 without sign, then 4 x 8 bytes; a group's byte j holds value j in
    its low and value j + 8 in its high nibble."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    seed = random.randrange(1 << 31)
    rng = np.random.default_rng(seed)
    rows, cols = 8, 256
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    scales = rng.integers(0, 127, (rows, cols // 16), dtype=np.uint8)
    grouped = codes.reshape(rows, cols // 64, 4, 2, 8)
    packed = grouped[..., 0, :] | grouped[..., 1, :] << 4
    blocks = np.concatenate([scales.reshape(rows, cols // 64, 4), packed.reshape(rows, cols // 64, 32)], axis=-1)
    theirs = quants.dequantize(blocks.reshape(rows, -1), GGMLQuantizationType.NVFP4)
    ours = codec.decode(
        ops.Weight(
            BlockSpec("e2m1", 16, "e4m3"),
            rows,
            cols,
            torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4),
            torch.from_numpy(scales),
        )
    )
    assert np.array_equal(ours.numpy(), theirs.reshape(rows, cols)), f"seed {seed}"


def test_mxfp4_decodes_like_gguf() -> None:
    """gguf's block: an E8M0 byte, then 16 bytes; byte j holds value j in its low and j + 16 in its high nibble."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    seed = random.randrange(1 << 31)
    rng = np.random.default_rng(seed)
    rows, cols = 8, 128
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    scales = rng.integers(2, 250, (rows, cols // 32), dtype=np.uint8)
    grouped = codes.reshape(rows, cols // 32, 2, 16)
    packed = grouped[:, :, 0] | grouped[:, :, 1] << 4
    blocks = np.concatenate([scales[..., None], packed], axis=-1)
    theirs = quants.dequantize(blocks.reshape(rows, -1), GGMLQuantizationType.MXFP4)
    spec = SPECS["mxfp4"]
    weight = ops.Weight(
        spec, rows, cols, torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), torch.from_numpy(scales)
    )
    assert np.array_equal(codec.decode(weight).numpy(), theirs.reshape(rows, cols)), f"seed {seed}"


@pytest.mark.parametrize("storage", [s for s, spec in SPECS.items() if not spec.plain])
def test_encode_is_the_nearest_code(storage: str) -> None:
    """No other code of a block's scale is nearer to any value."""
    spec = SPECS[storage]
    seed = random.randrange(1 << 31)
    values = (
        torch.randn(16 if spec.tile else 5, 3 * spec.block * 2, generator=torch.Generator().manual_seed(seed)) * 0.02
    )
    weight = ops.encode(values, spec).row_major()
    decoded = ops.decode(weight)
    step = codec.decode_scales(spec, weight.scales).double()
    if weight.tensor_scale is not None:
        step = step * weight.tensor_scale.double()
    codes = torch.arange(16, dtype=torch.uint8) if spec.codes != "int8" else torch.arange(-127, 128, dtype=torch.int8)
    if weight.zeros is not None:
        zeros = codec.unpack_nibbles(weight.zeros, step.shape[1]).double()
        table = (codes.double() - zeros[..., None]) * step[..., None]
    else:
        table = codec.dequantize_codes(spec, codes).double() * step[..., None]
    blocks = values.double().unflatten(1, (-1, spec.block))
    best = (blocks[..., None] - table[:, :, None]).abs().min(-1).values
    got = (decoded.double() - values.double()).abs().unflatten(1, (-1, spec.block))
    # Equal but for float32's own rounding of the quotient at a midpoint.
    assert bool((got <= best + step[..., None].abs() * 1e-5).all()), f"seed {seed}"


@pytest.mark.parametrize("storage", SPECS)
def test_zero_blocks_and_extremes(storage: str) -> None:
    spec = SPECS[storage]
    width = 4 * max(spec.block, 32)
    values = torch.zeros(16 if spec.tile else 3, width)
    values[1, : width // 2] = torch.linspace(-2.0, 3.0, width // 2)
    decoded = ops.decode(ops.encode(values, spec))
    assert torch.equal(decoded[0], torch.zeros(width))
    assert torch.equal(decoded[1, width // 2 :], torch.zeros(width // 2))
    assert bool(decoded.isfinite().all())
    # A block scale of one magnitude keeps the largest value within a step of what it was.
    assert decoded[1].abs().max().item() == pytest.approx(3.0, rel=0.35)


def test_saturation_onto_given_scales() -> None:
    spec = SPECS["int4-g32"]
    values = torch.tensor([[100.0, -100.0] * 16])
    decoded = ops.decode(ops.encode(values, spec, scales=torch.ones(1, 1, dtype=torch.float16)))
    assert decoded[0, 0] == 7
    assert decoded[0, 1] == -8
    decoded = ops.decode(ops.encode(values, SPECS["int8-g32"], scales=torch.full((1, 1), 0.5, dtype=torch.float16)))
    assert decoded[0, 0] == 63.5
    assert decoded[0, 1] == -63.5


def test_odd_number_of_zero_points() -> None:
    spec = BlockSpec("int4", 32, "f16", zero=True)
    values = torch.rand(7, 96)  # three blocks: half a byte of zeros is padding
    weight = ops.encode(values, spec)
    assert weight.zeros.shape == (7, 2)
    assert (ops.decode(weight) - values).abs().max() < 0.05


def test_two_tensor_scales() -> None:
    """The gate's rows and the up rows of a fused matrix differ a thousandfold in size: each keeps its own scale."""
    spec = SPECS["nvfp4"]
    values = torch.cat([torch.randn(4, 64), 1000 * torch.randn(4, 64)])
    weight = ops.encode(values, spec, tensor_scales=2)
    assert weight.tensor_scale.shape == (2,)
    error = (ops.decode(weight) - values).norm(dim=1) / values.norm(dim=1)
    assert error.max() < 0.2


def test_block_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="blocks of 128"):
        ops.encode(torch.zeros(2, 96), SPECS["int4-g128"])
