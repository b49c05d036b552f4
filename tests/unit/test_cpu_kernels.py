"""The compiled CPU kernels where the table of cases does not reach: large and odd shapes, poison, threads, order."""

from __future__ import annotations

import math
import os
import platform
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenrun.kernels import cpu, ops, ref
from qwenrun.kernels.cases import SPECS
from qwenrun.kernels.dispatch import refusal
from qwenrun.kernels.weight import Weight
from qwenrun.quant import formats

WHY = refusal("cpu", "linear", "cpu", SPECS["int4-g128"])
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"the CPU backend {WHY}")

STORAGES = [name for name in SPECS if name not in ("mxfp4", "f32")]
# Rows: those of a tiled matrix are the next multiple of 16. Too few numbers may err by more than many do.
SHAPES = [(1, 45, 128), (1, 700, 2048), (2, 33, 1152), (5, 65, 384), (70, 31, 640)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def exact(x: Tensor, w: Weight) -> Tensor:
    return x.double() @ ref.decode(w).double().T


def bound(storage: str) -> float:
    return 1e-6 if storage == "bf16" else 1.5e-2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("tokens", "rows", "cols"), SHAPES)
def test_linear(storage: str, tokens: int, rows: int, cols: int) -> None:
    rows = -(-rows // SPECS[storage].group) * SPECS[storage].group
    w = ref.encode(torch.randn(rows, cols) / cols**0.5, SPECS[storage])
    x = torch.randn(tokens, cols)
    y = cpu.linear(x, w)
    assert error(y, exact(x, w)) < bound(storage)
    assert torch.equal(y, torch.cat([cpu.linear(row[None], w) for row in x]))


@pytest.mark.parametrize("storage", ["int4-g32", "int4-g32-zero", "nvfp4", "int8-g32", "bf16"])
def test_rows_that_are_no_whole_vectors(storage: str) -> None:
    """A row of 96 values is one and a half vectors of codes: the plain loop serves it."""
    w = ref.encode(torch.randn(17, 96), SPECS[storage])
    x = torch.randn(6, 96)
    assert error(cpu.linear(x, w), exact(x, w)) < bound(storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_pairs_computed_apart_are_the_same_bits(storage: str) -> None:
    """Whatever else is in the call, and in whatever order experts arrive: the expert cache stands on this."""
    count, inner, hidden, tokens, k = 9, 128, 256, 5, 3
    gate_up = ref.encode(torch.randn(count, 2 * inner, hidden) / hidden**0.5, SPECS[storage], tensor_scales=2)
    down = ref.encode(torch.randn(count, hidden, inner) / inner**0.5, SPECS[storage])
    x, weight = torch.randn(tokens, hidden), torch.rand(tokens, k)
    index = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    whole = cpu.experts(x, gate_up, down, index, weight)
    rows = torch.full((tokens * k, hidden), math.nan)
    for expert in torch.randperm(count).tolist():
        at = (index.flatten() == expert).nonzero().flatten()
        if len(at):
            rows[at] = cpu.experts(
                x[at // k], gate_up, down, torch.full((len(at), 1), expert), weight.flatten()[at, None]
            )
    parts = rows.view(tokens, k, hidden)
    total = parts[:, 0].clone()
    for j in range(1, k):
        total += parts[:, j]
    assert torch.equal(total, whole)
    assert error(whole, ref.experts(x, gate_up, down, index, weight).double()) < (1e-5 if storage == "bf16" else 4e-2)


def test_only_the_chosen_experts_are_read() -> None:
    spec = SPECS["nvfp4"]
    gate_up = ref.encode(torch.randn(6, 128, 128), spec, tensor_scales=2)
    down = ref.encode(torch.randn(6, 128, 64), spec)
    x, index, weight = torch.randn(2, 128), torch.tensor([[1, 4], [4, 1]]), torch.rand(2, 2)
    clean = cpu.experts(x, gate_up, down, index, weight)
    for w in (gate_up, down):
        for expert in (0, 2, 3, 5):
            w.scales[expert] = 0x7F  # not a number
            w.tensor_scale[expert] = math.nan
    assert torch.equal(cpu.experts(x, gate_up, down, index, weight), clean)


@pytest.mark.parametrize("storage", ["int4-g128", "int8-g128", "nvfp4", "bf16", "int4-g128-tiled", "nvfp4-tiled"])
def test_what_is_not_a_number_stays_none(storage: str) -> None:
    w = ref.encode(torch.randn(48, 256), SPECS[storage])
    for bad in (math.nan, math.inf):
        x = torch.randn(3, 256)
        x[1, 77] = bad
        y = cpu.linear(x, w)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("storage", ["int4-g128", "int4-g32", "int8-g128", "nvfp4", "int4-g128-tiled", "nvfp4-tiled"])
def test_one_large_channel_spoils_its_own_block_alone(storage: str) -> None:
    """1,000 times the others: with one scale a row, everything else would round to zero."""
    w = ref.encode(torch.randn(512, 1024), SPECS[storage])
    x = torch.randn(1, 1024)
    x[0, 5] = 1000.0
    quiet = x.clone()
    quiet[0, 5] = 0.0
    block = SPECS[storage].block
    rest = torch.cat([torch.zeros(1, block), quiet[:, block:]], 1)
    with_outlier = torch.cat([x[:, :block], torch.zeros(1, 1024 - block)], 1)
    assert error(cpu.linear(x, w) - cpu.linear(with_outlier, w), exact(rest, w)) < 2e-2
    assert error(cpu.linear(x, w), exact(x, w)) < 1.5e-2


def test_weights_that_share_an_array_are_told_apart() -> None:
    for storage, name in (("nvfp4", "tensor_scale"), ("int4-g32-zero", "zeros")):
        w = ref.encode(torch.randn(8, 128), SPECS[storage])
        x = torch.randn(1, 128)
        cpu.linear(x, w)
        parts = w.parts | {name: torch.flip(w.parts[name] + 1, [0])}
        other = Weight.from_parts(w.spec, w.rows, w.cols, parts)
        assert error(cpu.linear(x, other), exact(x, other)) < 1.5e-2


def test_zero_blocks_and_zero_rows() -> None:
    w = ref.encode(torch.randn(8, 256), SPECS["int4-g64"])
    assert torch.equal(cpu.linear(torch.zeros(2, 256), w), torch.zeros(2, 8))
    assert cpu.linear(torch.zeros(0, 256), w).shape == (0, 8)


def test_other_dtypes_and_strides() -> None:
    w = ref.encode(torch.randn(8, 128), SPECS["int8-g128"])
    x = torch.randn(128, 3).T
    assert torch.equal(cpu.linear(x, w), cpu.linear(x.contiguous(), w))
    assert cpu.linear(x.bfloat16(), w).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="contiguous"):
        cpu.linear(x, Weight(w.spec, w.rows, w.cols, w.codes.T.contiguous().T, w.scales))


SCRIPT = """
import sys, torch
from qwenrun.kernels import cpu, ref
from qwenrun.kernels.cases import SPECS
torch.manual_seed(0)
w = ref.encode(torch.randn(300, 512), SPECS["int4-g128"])
x = torch.randn(9, 512)
total = sum(cpu.linear(x + i, w) for i in range(50))
print(cpu.library().qwenrun_cpu_threads(), total.double().sum().item(), hash(total.numpy().tobytes()))
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    seen = []
    for threads in ("1", "2", "5"):
        env = {**os.environ, "QWENRUN_THREADS": threads, "PYTHONHASHSEED": "0"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        count, *result = done.stdout.split()
        assert count == threads
        seen.append(result)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too() -> None:
    w = ref.encode(torch.randn(600, 512), SPECS["int4-g128"])
    x = torch.randn(1, 512)
    cpu.linear(x, w)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cpu.linear(x, w), cpu.linear(x, w)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.library.cache_clear()
    try:
        monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
        assert "needs a C++ compiler" in refusal("cpu", "linear", "cpu", SPECS["int4-g128"])
        suffix = cpu.EXTENSION_SUFFIXES[0]
        (tmp_path / f"_kernels{suffix}").write_bytes(b"not a library")
        cpu.library.cache_clear()
        assert refusal("cpu", "linear", "cpu", SPECS["int4-g128"]).startswith("can't be loaded")
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()
    assert not refusal("cpu", "linear", "cpu", SPECS["int4-g128"])


def test_what_it_refuses() -> None:
    said: dict[str, Any] = {name: refusal("cpu", "linear", "cpu", SPECS[name]) for name in ("f32", "mxfp4")}
    assert "f32" in said["f32"]
    assert "e8m0" in said["mxfp4"]


def test_random_cases() -> None:
    """Shapes nobody thought of: QWENRUN_FUZZ=10000 tries that many. Bounds as in the table of cases, where a result
    has numbers enough; alone a token gives the same bits as among others."""
    names = [name for name in SPECS if not refusal("cpu", "linear", "cpu", SPECS[name])]
    for _ in range(int(os.environ.get("QWENRUN_FUZZ", "60"))):
        seed = int(torch.randint(1 << 31, ()))
        pick = random.Random(seed)
        torch.manual_seed(seed)
        name, tokens = pick.choice(names), pick.choice([1, 1, 2, 3, 4, 5, 9, 33])
        spec = SPECS[name]
        rows = pick.randint(1, 6) * 16 if spec.tile else pick.randint(1, 90)
        cols = pick.randint(1, 6) * (spec.block or 16)
        w = ref.encode(torch.randn(rows, cols) * 10 ** pick.uniform(-3, 2), spec)
        x = torch.randn(tokens, cols) * 10 ** pick.uniform(-3, 3)
        y, want = cpu.linear(x, w), exact(x, w)
        # Few products may cancel: the error is measured against what they would sum to at random. Of few results one
        # may be unlucky: each is held to what rounding can do at worst, half a step of its block for every product.
        size = (x.double().square() @ ref.decode(w).double().square().T).sum().sqrt().item()
        most = x.abs().unflatten(1, (-1, spec.block or 1)).amax(2, keepdim=True) / 254
        step = most.expand(-1, -1, spec.block or 1).flatten(1).double()
        worst = step @ ref.decode(w).double().abs().T * 1.01 + 1e-6 * size
        off = (y.double() - want).abs()
        fair = (off <= worst).all() if y.numel() < 64 else off.norm() <= bound(name) * size
        assert fair, (name, tokens, rows, cols, seed)
        alone = pick.randrange(tokens)
        assert torch.equal(cpu.linear(x[alone : alone + 1], w)[0], y[alone]), (name, tokens, rows, cols, seed)


@pytest.mark.parametrize("length", [7, 530, 1200])
def test_a_query_gives_the_same_bits_in_any_company(length: int) -> None:
    """Over one run of the cache and several: a session that was rolled back must not differ from a fresh one."""
    tokens = min(length, 21)
    q, k, v = torch.randn(tokens, 6, 40), torch.randn(length, 2, 40), torch.randn(length, 2, 40)
    whole = cpu.attention(q, k, v, 0.2)
    assert error(whole, ref.attention(q, k, v, 0.2).double()) < 2e-6
    for t in range(tokens):
        seen = length - tokens + t + 1
        assert torch.equal(cpu.attention(q[t : t + 1], k[:seen], v[:seen], 0.2)[0], whole[t])


def test_many_kinds_of_matrices_read_one_token() -> None:
    """Each kind rounds the token in its own way, and none overwrites what another has still to read."""
    names = [
        "int4-g32-tiled",
        "bf16",
        "nvfp4-tiled",
        "int8-g32",
        "int4-g128-zero-tiled",
        "int4-g64-tiled",
        "nvfp4-tiled",
    ]
    weights = [ref.encode(torch.randn(64, 256), SPECS[name]) for name in names]
    x = torch.randn(1, 256)
    for w, y in zip(weights, cpu.linears(weights)(x), strict=True):
        assert torch.equal(y, cpu.linear(x, w))


PRODUCTS = """
import hashlib, torch
from qwenrun.kernels import cpu, ref
from qwenrun.kernels.cases import SPECS
torch.manual_seed(5)
digest = hashlib.sha256()
for name, spec in SPECS.items():
    if spec.tile:
        w = ref.encode(torch.randn(128, 256), spec, tensor_scales=2)
        for tokens in (1, 2, 3, 4, 7):
            x = torch.randn(tokens, 256)
            x[0, :64] = 0
            y = cpu.linear(x, w)
            assert (y - ref.linear(x, w)).norm() < 1.5e-2 * y.norm(), name
            digest.update(y.numpy().tobytes())
            digest.update(cpu.swiglu(w, w, ref.encode(torch.randn(256, 128), spec))(x).numpy().tobytes())
print(cpu.library().qwenrun_cpu_tiles().decode(), digest.hexdigest())
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its other half is AVX2")
def test_avx512_gives_the_bits_of_avx2(tmp_path: Path) -> None:
    """The file for AVX-512 with VNNI, compiled with plain code in the place of its instructions, so that it is run
    where they are not: sums of integers are exact, and the rest is in the same order."""
    source, header = Path(cpu.__file__).parent / "csrc", Path(__file__).parent / "emulated" / "avx512.h"
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{source}"]
    library = tmp_path / "emulated.so"
    command += [f'-DQWENRUN_EMULATED="{header}"', str(source / "tiles_avx512.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    said = {}
    for name, env in {"avx512-vnni": {"LD_PRELOAD": str(library)}, "avx2": {"QWENRUN_CPU": "avx2"}}.items():
        run = [sys.executable, "-c", PRODUCTS]
        out = subprocess.run(run, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout.split()
        assert out[0] == name
        said[name] = out[1]
    assert said["avx512-vnni"] == said["avx2"]


@pytest.mark.parametrize("name", [f.name for f in formats.registry().values() if not f.spec.plain])
@pytest.mark.parametrize("block", [0, 256, 100])  # 0: the format's own; the last is the reference's alone
def test_fit_has_the_references_bits(name: str, block: int) -> None:
    """Packs are the same on every machine: not near, equal. Also where scales overflow or vanish."""
    seed = random.randrange(1 << 31)
    torch.manual_seed(seed)
    form = formats.parse(name)
    spec = replace(form.spec, block=block or form.spec.block)
    cols = spec.block * 3
    for rows, tile in ((1, False), (7, False), (33, False), (48, False), (48, True)):
        values = torch.randn(rows, cols) * 0.02
        values[::5] = 0
        values[1::9] = values[1::9].abs()
        values[2::9] *= 1e-7
        values[3::9] *= 1e-40
        values[4::9] *= 1e9
        if not spec.tensor_scale:
            values[6::9, -1] = 3e38
        stored = replace(spec, tile=tile and spec.codes != "int8" and spec.block % 8 == 0)
        scales = 3 if rows % 3 == 0 else 1
        own = values.view(scales, -1).abs().amax(1) / 2688 if spec.tensor_scale else None
        for importance in (None, torch.rand(cols) + 0.01):
            (got, noise), (want, noise_wanted) = (
                fit(values, stored, form.trials, own, importance) for fit in (ops.fit, ref.fit)
            )
            for part, tensor in want.parts.items():
                assert torch.equal(got.parts[part], tensor), f"seed {seed}, {rows} rows, {part}"
            assert torch.equal(noise, noise_wanted), f"seed {seed}, {rows} rows"
