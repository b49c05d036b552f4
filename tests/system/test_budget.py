"""A memory budget, held by the process itself: resident memory, exit codes, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenrun.measure.budget import whole
from qwenrun.measure.synth import synth_config, synthesize
from qwenrun.plan.buffers import RUNTIME
from qwenrun.quant.recipe import Recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
WIDTHS = {"hidden_size": 1024, "vocab_size": 8192, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
WIDTHS |= {"num_experts_per_tok": 4, "linear_num_value_heads": 16, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of some 450 MB, nearly all of it routed experts."""
    config = synth_config("35b", layers=8, experts=64, changes=WIDTHS)
    return synthesize(tmp_path_factory.mktemp("large") / "large.pack", config, Recipe.load("int4")).path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs VmHWM (Linux)")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_resident_memory_stays_inside_the_plan(large: Path, share: float) -> None:
    """The pack is larger than the budget by several times; the prompt asks for every expert of every layer."""
    most = whole(large, 2 * (600 + 8))
    fixed = RUNTIME + (200 << 20)
    ram = fixed + int(share * (most - fixed))
    command = [sys.executable, "-m", "qwenrun.measure.budget", str(large), "--one", str(ram)]
    done = subprocess.run([*command, "--prompt-tokens", "600", "--gen-tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    plan = found["plan_bytes"]
    assert plan["total"] <= ram
    if share == 0.0:
        experts = found["experts"] * (plan["routed"] / found["resident_experts"])
        assert experts > 5 * plan["routed"]
    planned = plan["total"] - plan["runtime"]
    over = found["peak_rss_bytes"] - found["baseline_rss_bytes"] - planned
    assert over <= max(0.03 * planned, 64 << 20), f"{over:,} bytes over a plan of {planned:,}"
    # And what is there before the model is no more than the plan says.
    assert found["baseline_rss_bytes"] <= RUNTIME


def test_what_bench_says_of_the_cache(qwenrun: Run, large: Path) -> None:
    ram = (RUNTIME >> 20) + 200
    options = ("--prompt-tokens", "8", "--gen-tokens", "4", "--runs", "1", "--json")
    done = qwenrun("bench", "-m", large, "--ram", f"{ram}MiB", *options)
    assert done.returncode == 0, done.stderr
    assert "stay on disk" in done.stderr
    document = json.loads(done.stdout)
    plan, use = document["plan"], document["decode_experts"]
    assert 0 < plan["resident_experts"] < plan["experts"] == 8 * 64
    assert use["lookups"] == 4 * 8 * 4
    assert 0 <= use["hit_rate"] < 1
    assert use["disk_bytes_per_token"] > 0
    assert document["disk_read_bytes_per_second"] > 0
    assert document["peak_rss_bytes"] < (ram + 32) << 20


def test_a_budget_that_is_too_small(qwenrun: Run, large: Path) -> None:
    done = qwenrun("bench", "-m", large, "--ram", "340MiB", "--json")
    assert (done.returncode, done.stdout) == (4, "")
    hint = done.stderr.splitlines()[-1]
    assert hint.startswith("hint: --ram ")
    # What it proposes is enough.
    options = ("--prompt-tokens", "2", "--gen-tokens", "1", "--runs", "1", "--json", "--ctx", "288")
    assert qwenrun("bench", "-m", large, "--ram", hint.split()[-1], *options).returncode == 0
    assert qwenrun("chat", "-m", large, "-p", "x", "--vram", "8GiB").returncode == 2


def test_a_pack_damaged_inside_an_expert(qwenrun: Run, large: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pack"
    copy.mkdir()
    for path in large.iterdir():
        (copy / path.name).hardlink_to(path)
    file = copy / "experts-03.bin"
    data = bytearray(file.read_bytes())
    data[:: len(data) // 64] = bytes(x ^ 1 for x in data[:: len(data) // 64])
    file.unlink()
    file.write_bytes(data)
    done = qwenrun("bench", "-m", copy, "--prompt-tokens", "64", "--gen-tokens", "1", "--runs", "1", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert "experts-03.bin: expert" in done.stderr
    assert "hint: qwenrun verify" in done.stderr
