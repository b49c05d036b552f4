"""The peer benchmark's parts: GGUF files that another reader understands, limits that hold, figures read rightly.

llama.cpp itself is not needed here, and is not run.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenrun.errors import UsageError
from qwenrun.measure import peer
from qwenrun.measure.peer import MemoryLimit, Result, Task, parse_limit, run_limited, summary
from qwenrun.measure.synth import synth_config
from qwenrun.model.config import ModelConfig

gguf = pytest.importorskip("gguf")

TASK = Task(prompt_tokens=10, gen_tokens=2, runs=1, threads=2, silence=30, most=60, margin=256 << 20)
SMALL = {"hidden_size": 256, "vocab_size": 640, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4}


def config() -> ModelConfig:
    return ModelConfig.from_hf(synth_config("35b", layers=8, experts=8, changes=SMALL), "tiny")


@pytest.mark.parametrize("variety", peer.GGUF_KINDS)
def test_the_file_reads_as_gguf(tmp_path: Path, variety: str) -> None:
    path = tmp_path / "m.gguf"
    size = peer.write_gguf(path, config(), variety, lambda done, total: None)
    assert size == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "qwen35moe"
    assert keys["qwen35moe.expert_used_count"] == 8
    assert keys["qwen35moe.rope.dimension_sections"] == [11, 11, 10, 0]
    assert keys["qwen35moe.full_attention_interval"] == 4
    wanted = peer.gguf_tensors(config(), variety)
    assert [t.name for t in reader.tensors] == [t.name for t in wanted]
    for found, tensor in zip(reader.tensors, wanted, strict=True):
        assert tuple(found.shape) == tensor.shape[::-1]
        assert found.n_bytes == tensor.nbytes
        values = gguf.dequantize(found.data, found.tensor_type)
        assert np.isfinite(values).all()
        if tensor.value == "random" and values.size > 10_000:
            assert values.std() == pytest.approx(tensor.shape[-1] ** -0.5, rel=0.02)
            assert abs(values.mean()) < 0.02 * values.std()


def test_tensors_are_those_of_ggufs_own_table() -> None:
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN35MOE]}
    named = {re.sub(r"^blk\.\d+", "blk.{bid}", t.name) for t in peer.gguf_tensors(config(), "q4_k_m")}
    named = {re.sub(r"\.(weight|bias)$", "", name) for name in named}
    optional = {name for name in known if "nextn" in name or name.endswith("gate_up_exps")}
    assert named == known - optional


def test_types_are_what_q4_k_m_chooses() -> None:
    kinds = {t.name: t.kind for t in peer.gguf_tensors(config(), "q4_k_m")}
    assert kinds["output.weight"] == peer.Q6_K
    assert kinds["token_embd.weight"] == peer.Q4_K
    high = [layer for layer in range(8) if kinds[f"blk.{layer}.ffn_down_exps.weight"] == peer.Q6_K]
    assert high == [0, 3, 6, 7]
    assert {t.kind for t in peer.gguf_tensors(config(), "q4_0")} == {peer.F32, peer.Q4_0, peer.Q6_K}


def test_bytes_per_token_counts_what_is_read() -> None:
    tensors = peer.gguf_tensors(config(), "q4_0")
    assert peer.bytes_per_token(tensors, config()) < sum(t.nbytes for t in tensors)
    routed = sum(t.nbytes for t in tensors if "_exps." in t.name)
    embedding = next(t.nbytes for t in tensors if t.name == "token_embd.weight")
    rest = sum(t.nbytes for t in tensors) - routed - embedding
    assert peer.bytes_per_token(tensors, config()) == pytest.approx(rest + routed + embedding / 640, abs=1)


def test_an_interrupted_file_is_not_left(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peer.write_gguf(tmp_path / "m.gguf", config(), "q4_0", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000MiB", 1000 << 20), ("1.5 GB", 1_500_000_000), ("2gib", 2 << 30), ("4096", 4096), ("none", None)],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_limit(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1MiB", "2g", "1 2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="no amount"):
        parse_limit(text)


def llama_lines(rounds: int, tokens: int = 2) -> list[str]:
    events: list[dict[str, Any]] = [{"what": "loaded", "seconds": 1.0, "vocab": 640}]
    for number in range(rounds):
        events.append({"what": "prefill", "round": number, "seconds": 2.0 if number == 0 else 1.0})
        events += [{"what": "token", "round": number, "seconds": 1.0 if number == 0 else 0.25}] * tokens
    return [json.dumps(event) for event in events]


def test_figures_of_a_whole_run() -> None:
    lines = [*llama_lines(2), '{"what": "done", "anon": 1048576}']
    assert peer.llama_figures(lines, TASK) == (4.0, 10.0, 2, "1 MiB of its own")


def test_figures_of_a_run_that_was_ended() -> None:
    assert peer.llama_figures([*llama_lines(1, tokens=1), '{"what": "to'], TASK) == (1.0, 5.0, 1, "first round")
    assert peer.llama_figures(llama_lines(0), TASK) == (None, None, 0, "")
    assert peer.llama_figures(["noise", "3"], TASK) == (None, None, 0, "")


def test_figures_of_bench() -> None:
    document = {"bytes_per_token": 5, "decode_tokens_per_second": {"median": 2.0}}
    document["prefill_tokens_per_second"] = {"median": 3.0}
    assert peer.qwenrun_figures(json.dumps(document)) == (2.0, 3.0, 5)


def test_the_budget_is_the_limit_less_the_margin(tmp_path: Path) -> None:
    command = peer.qwenrun_command(tmp_path, 1000 << 20, TASK, takes_ram=True)
    assert command[command.index("--ram") + 1] == "744MiB"
    assert "--ram" not in peer.qwenrun_command(tmp_path, None, TASK, takes_ram=True)
    assert "--ram" not in peer.qwenrun_command(tmp_path, 1000 << 20, TASK, takes_ram=False)


def test_a_silent_process_is_ended() -> None:
    script = "import time; print(1, flush=True); time.sleep(60)"
    outcome = run_limited([sys.executable, "-c", script], None, {}, 0.5)
    assert (outcome.stdout, outcome.trouble) == (["1"], "nothing in 0 s")


def test_a_process_that_takes_too_long_is_ended() -> None:
    script = "import time\nwhile True:\n  print(1, flush=True)\n  time.sleep(0.1)"
    outcome = run_limited([sys.executable, "-c", script], None, {}, 30, 1)
    assert outcome.stdout
    assert outcome.trouble == "not done in 1 s"


def test_what_a_process_says() -> None:
    script = "import os, sys; print(os.environ['A']); print(2, file=sys.stderr); sys.exit(3)"
    outcome = run_limited([sys.executable, "-c", script], None, {"A": "x"}, 30)
    assert (outcome.stdout, outcome.stderr, outcome.trouble) == (["x"], ["2"], "exit code 3")


def test_the_limit_holds() -> None:
    try:
        with MemoryLimit(64 << 20):
            pass
    except UsageError as error:
        pytest.skip(error.message)
    script = "import sys; print('ready', flush=True); bytearray(256 << 20)"
    outcome = run_limited([sys.executable, "-c", script], 64 << 20, {}, 30)
    assert (outcome.stdout, outcome.trouble) == (["ready"], "killed: out of memory")


def test_lines_and_documents() -> None:
    result = Result("qwenrun", "int4.pack", 1000 << 20, 4.0, 8.0, 2, 500_000_000)
    line = peer.shown(result, 2.0)
    assert "4.00 tok/s" in line
    assert "2.00x" in line
    assert "1,000 MiB" in line
    assert result.to_json(2.0)["ratio_to_llama_cpp"] == 2.0
    nothing = Result("llama.cpp", "q4_0.gguf", None, None, None, 0, 1, "nothing in 150 s")
    assert peer.shown(nothing, None).endswith("[nothing in 150 s]")
    assert nothing.to_json(None)["ratio_to_llama_cpp"] is None


def test_the_last_line() -> None:
    results = [
        Result("llama.cpp", "q4_k_m.gguf, repacked", None, 20.0, 90.0, 9, 700_000_000),
        Result("llama.cpp", "q4_k_m.gguf", None, 18.0, 100.0, 9, 700_000_000),
        Result("qwenrun", "int4.pack", None, 30.0, 250.0, 9, 500_000_000),
        Result("qwenrun", "nvfp4.pack", None, 15.0, 100.0, 9, 900_000_000),
        Result("qwenrun", "int4.pack", 1000 << 20, 99.0, 99.0, 9, 500_000_000),
    ]
    line = summary(results, 20e9)
    assert line == "ratio decode=1.50 prefill=2.50 bandwidth_share=0.75 nvfp4_over_int4=0.90"
    assert summary(results[2:3], 20e9) == "ratio decode=- prefill=- bandwidth_share=0.75 nvfp4_over_int4=-"


def test_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peer.main(["run", str(tmp_path), "--only", "int4"]) == 2
    assert "peer make" in capsys.readouterr().err
    assert peer.main(["run", str(tmp_path), "--only", "int5"]) == 2
    assert peer.main(["run", str(tmp_path), "--python", str(tmp_path / "python")]) == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err
    assert peer.main(["run", str(tmp_path), "--limit", "100MiB"]) == 2


def test_the_benchmark_model() -> None:
    """The widths of the 35B, so that a token reads what one of its layers reads; under 8 GB for all four files."""
    parsed = ModelConfig.from_hf(peer.bench_config())
    assert (parsed.hidden_size, parsed.expert_size, parsed.shared_size, parsed.vocab_size) == (2048, 512, 512, 248_320)
    assert (len(parsed.linear_layers), len(parsed.full_layers), parsed.num_experts, parsed.top_k) == (6, 2, 64, 8)
    for variety in peer.GGUF_KINDS:
        total = sum(t.nbytes for t in peer.gguf_tensors(parsed, variety))
        assert math.isclose(total, 1.8e9, rel_tol=0.05)
