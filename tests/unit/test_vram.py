"""`qwenrun vram`: what stands in its table, its document and its last lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from qwenrun.errors import DoesNotFitError, UsageError
from qwenrun.ui import console
from qwenrun.ui.vram import VramOptions, vram

MODEL = "Qwen3.5-122B-A10B"
GIB = 1 << 30


def document(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    vram(MODEL, VramOptions(as_json=True, **options))
    return json.loads(capsys.readouterr().out)


def test_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, ctx="4k,32k", recipe="balanced,int4", kv="bf16,int8")
    assert [(c["recipe"], c["kv"], c["ctx"]) for c in found["contexts"]] == [
        (recipe, kv, ctx) for recipe in ("balanced", "int4") for kv in ("bf16", "int8") for ctx in (4096, 32768)
    ]
    assert found["budget"] is None
    assert all("plan" not in c and c["bytes"]["vision"] == c["bytes"]["mtp"] == 0 for c in found["contexts"])
    vram(MODEL, VramOptions(ctx="4k,32k", recipe="balanced,int4"))
    out = capsys.readouterr().out
    assert "balanced ctx 4k" in out
    assert "int4 ctx 32k" in out
    assert "7.39 GB (balanced), 4.73 GB (int4) of weights" in out
    assert "tok/s" not in out


def test_on_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, ctx="262144,1M", gpu="H100")
    whole, part = found["contexts"]
    assert (whole["plan"]["resident_experts"], whole["plan"]["experts"]) == (12_288, 12_288)
    assert 10_000 < part["plan"]["resident_experts"] < 12_288
    assert sum(v for k, v in part["plan"]["device_bytes"].items() if k != "total") <= found["budget"]["device_bytes"]
    assert part["yarn_factor"] == 4
    speed = part["plan"]["speed"]
    assert speed["predicted"] is True
    assert 0 < speed["low_tokens_per_second"] < speed["high_tokens_per_second"]
    assert "balanced (KV bf16)" in found["whole_on_device"][0]["recipes"]
    assert "balanced (KV bf16)" not in found["whole_on_device"][1]["recipes"]
    vram(MODEL, VramOptions(ctx="262144,1M", gpu="H100"))
    out = capsys.readouterr().out
    assert "budget  VRAM 79.6 GiB (H100), RAM as needed" in out
    assert "at 262,144 tokens VRAM holds everything with: balanced (KV bf16)" in out
    assert "needs YaRN with factor 4" in out


def test_in_ram(capsys: pytest.CaptureFixture[str]) -> None:
    vram(MODEL, VramOptions(ctx="4k", ram=12 * GIB, disk_speed=7e9))
    out = capsys.readouterr().out
    assert "resident experts" in out
    assert "disk 7 GB/s, RAM 60 GB/s assumed" in out
    found = document(capsys, ctx="4k", ram=12 * GIB)
    assert found["contexts"][0]["plan"]["disk_bytes"]["dense"] > 700e6  # the embedding
    slow = document(capsys, ctx="4k", ram=12 * GIB, disk_speed=1e9)
    fast = document(capsys, ctx="4k", ram=12 * GIB, disk_speed=7e9)
    low = [d["contexts"][0]["plan"]["speed"]["low_tokens_per_second"] for d in (slow, fast)]
    assert low[0] < low[1]


def test_what_can_not_run_is_printed_and_then_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DoesNotFitError, match="262,144 tokens needs at least"):
        vram(MODEL, VramOptions(ctx="4k,262144", ram=8 * GIB))
    lines = capsys.readouterr().out.splitlines()
    resident = next(line for line in lines if "resident experts" in line)
    assert resident.split()[-1] == "-"
    assert int(resident.split()[-2].replace(",", "")) > 16


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kv": "bf16,int3"}, "--kv 'int3' is none of"),
        ({"gpu": "Voodoo"}, "'Voodoo' is not in the table"),
        ({"ctx": "4k,,8k"}, "--ctx ''"),
    ],
)
def test_what_is_not_understood(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        vram(MODEL, VramOptions(**{"ctx": "4k"} | options))


def test_bars_are_for_eyes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = VramOptions(ctx="4k,1M", gpu="RTX PRO 6000")
    vram(MODEL, options)
    assert "█" not in capsys.readouterr().out
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    vram(MODEL, options)
    bars = [line for line in capsys.readouterr().out.splitlines() if "█" in line]
    assert [bar.split()[1] for bar in bars[:2]] == ["4k", "1m"]
    assert all("|" in bar for bar in bars[:2])
    # The longest fills the width, the shares are those of the bytes.
    assert bars[1].count("▓") == bars[0].count("▓") > 20
    assert bars[1].count("▒") > 10 > bars[0].count("▒")


def test_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    vram("Qwen3.5-9B", VramOptions(ctx="8k", vram=12 * GIB))
    out = capsys.readouterr().out
    assert "experts" not in out.replace("weights but routed experts", "").replace("experts come from a cache", "")


def test_no_heavy_import() -> None:
    script = (
        "import sys; from qwenrun.ui.vram import VramOptions, vram\n"
        "vram('122b', VramOptions(ctx='4k', gpu='4090', ram=1 << 36))\n"
        "heavy = {'torch', 'numpy', 'rich', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
