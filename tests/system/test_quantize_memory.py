"""Quantizing takes little memory, however large the checkpoint is.

The checkpoint here is a quarter of a gigabyte, so that the suite stays fast, and the bound is on what the
process takes beyond its start. QWENRUN_TEST_QUANTIZE_GB=4.2 makes a larger one; the bound stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

GIGABYTES = float(os.environ.get("QWENRUN_TEST_QUANTIZE_GB", "0.4"))
# Beyond what importing torch takes: pieces of 32 MiB in float32 with their temporaries, for two threads.
BOUND = 1 << 29

CHILD = """
import resource, sys
import torch
import qwenrun.quant.convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from qwenrun.cli import main
sys.argv = ["qwenrun", "quantize", sys.argv[1], "-o", sys.argv[2], "--quiet", "--json"]
code = main()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before * 1024, after * 1024, code, file=sys.stderr)
"""


def big_checkpoint(folder: Path, config: dict) -> int:
    """Write a checkpoint of about GIGABYTES in one shard, its experts random, straight to disk; returns bytes.

    The bytes are written here rather than by a library, so that making it takes no memory either.
    """
    from qwenrun.model.config import ModelConfig
    from qwenrun.model.inventory import inventory

    text = config["text_config"]
    text |= {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 32768}
    config["vision_config"]["out_hidden_size"] = 1024
    expert = 3 * 1024 * 512 * 2
    text["num_experts"] = max(4, round((GIGABYTES * 1e9 - 0.2e9) / expert / 3))
    tensors = inventory(ModelConfig.from_hf(config))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for info in tensors:
        size = int(np.prod(info.shape)) * (4 if info.dtype == "F32" else 2)
        header[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, offset + size]}
        offset += size
    packed = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    # Random BF16 values around 0.02: a piece repeated, at another place in each tensor.
    values = (rng.standard_normal(1 << 22) * 0.02).astype("<f4").view("<u4") >> 16
    piece = values.astype("<u2").tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for info in tensors:
            left = int(np.prod(info.shape)) * (4 if info.dtype == "F32" else 2)
            start = 2 * int(rng.integers(0, 1000))
            while left:
                part = np.ones(left // 4, "<f4").tobytes() if info.dtype == "F32" else piece[start : start + left]
                file.write(part)
                left -= len(part)
    return offset


def test_peak_memory(tmp_path: Path, tiny_config: dict) -> None:
    size = big_checkpoint(tmp_path / "m", tiny_config)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(tmp_path / "p")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after, code = map(int, run.stderr.split()[-3:])
    print(f"checkpoint {size / 1e9:.2f} GB, peak RSS {after / 1e9:.2f} GB, of which {before / 1e9:.2f} GB at start")
    assert code == 0, run.stderr
    report = json.loads(run.stdout)
    assert report
    assert after < 2 << 30
    if size < 2 * BOUND:
        assert after - before < min(BOUND, size), "more was held than the checkpoint itself"
    else:
        assert after - before < BOUND
