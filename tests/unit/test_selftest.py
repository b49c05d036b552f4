"""Selftest: it passes here, and it says what is wrong where something is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qwenrun.errors import QwenrunError, UsageError
from qwenrun.kernels.dispatch import backends, pick
from qwenrun.measure import selftest as module
from qwenrun.measure.selftest import demo_logits, make_golden, read_golden, selftest
from qwenrun.ui import reports


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPEED_SHAPE", {"cpu": (512, 1024)})
    monkeypatch.setattr(module, "read_bandwidth", lambda: (1e9, "not measured"))


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    reports.selftest_report(selftest("cpu"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert len(found["checked"]) == len(module.cases())
    assert all(one["bytes_per_second"] > 0 for one in found["streamed"])


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is off by a little, one that is not a number, one that raises."""
    few = [c for c in module.cases() if c.op in ("conv", "rms_norm", "apply_rope", "gated_rms_norm")]
    monkeypatch.setattr(module, "cases", lambda: few)
    package = next(p for p in backends().values() if getattr(p, "conv", None) is pick("conv"))
    good = package.conv

    def refuses(*_: Any) -> torch.Tensor:
        raise RuntimeError("no image for this card")

    monkeypatch.setattr(package, "conv", lambda u, w, s: good(u, w, s) * 1.01)
    monkeypatch.setattr(package, "rms_norm", lambda x, *_: x * float("nan"))
    monkeypatch.setattr(package, "apply_rope", refuses)
    with pytest.raises(QwenrunError, match="cases failed"):
        reports.selftest_report(selftest("cpu"), as_json=False)
    out = capsys.readouterr().out
    assert "no image for this card" in out
    failed = {line.split()[1].split("-")[0] for line in out.splitlines() if line.startswith("FAILED ")}
    assert failed == {"conv", "rms_norm", "apply_rope"}


def test_other_logits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cases", lambda: ())
    golden = read_golden()
    golden["logits"] = [value + 0.5 for value in golden["logits"]]
    monkeypatch.setattr(module, "read_golden", lambda: golden)
    assert not selftest("cpu").ok


def test_the_shipped_logits_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRUN_BACKEND", "ref")
    golden = read_golden()
    made = make_golden()
    assert made["ids"] == golden["ids"]
    assert made["tokens"] == golden["tokens"]
    assert torch.allclose(torch.tensor(made["logits"]), torch.tensor(golden["logits"]), atol=2e-4)
    assert demo_logits(golden["ids"], "cpu").argmax() in golden["tokens"]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no device"):
        selftest("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no NVIDIA card"):
            selftest("cuda")
