"""Backends are found by listing the folder, asked in order, and say why not in a sentence."""

from __future__ import annotations

import pkgutil
import types

import pytest

from qwenrun.kernels import dispatch, ops
from qwenrun.kernels.dispatch import Backend
from qwenrun.kernels.spec import BlockSpec

INT4, BF16 = BlockSpec("int4", 128, "f16"), BlockSpec("bf16")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A faster backend that has only linear, only for int4, only on the CPU."""

    def refuses(op: str, spec: BlockSpec | None) -> str:
        return "" if spec == INT4 else "multiplies int4 alone"

    module = types.ModuleType("fake")
    module.BACKEND = Backend("fake", priority=9, devices=("cpu",), refuses=refuses)  # type: ignore[attr-defined]
    module.linear = lambda x, w: "fake"  # type: ignore[attr-defined]
    found = {"fake": module, "ref": dispatch.backends()["ref"]}
    monkeypatch.setattr(dispatch, "backends", lambda: found)
    return module


def test_the_reference_is_found_and_has_every_op() -> None:
    reference = dispatch.backends()[dispatch.FALLBACK]
    for op in ops.OPS:
        assert callable(getattr(reference, op))
        assert ops.bind(op) is dispatch.pick(op)
    assert dispatch.backends()[dispatch.FALLBACK].BACKEND.priority == 0


def test_no_submodule_hides_an_op() -> None:
    """Importing a submodule sets an attribute of its package, which may have an op's name."""
    for name, package in dispatch.backends().items():
        taken = {module.name for module in pkgutil.iter_modules(package.__path__)} & set(ops.OPS)
        assert all(callable(getattr(package, op)) for op in taken), name
        assert name == "ref" or not taken, name


def test_a_submodule_is_no_op(fake: types.ModuleType) -> None:
    fake.decode = types.ModuleType("fake.decode")  # type: ignore[attr-defined]
    assert dispatch.pick("decode", "cpu", INT4) is dispatch.backends()["ref"].decode


def test_the_faster_one_serves_what_it_can(fake: types.ModuleType) -> None:
    reference = dispatch.backends()["ref"]
    assert dispatch.pick("linear", "cpu", INT4) is fake.linear
    assert dispatch.pick("linear", "cpu", BF16) is reference.linear
    assert dispatch.pick("linear", "cuda", INT4) is reference.linear
    assert dispatch.pick("conv", "cpu") is reference.conv


def test_a_backend_can_be_forced(fake: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "ref")
    assert dispatch.pick("linear", "cpu", INT4) is dispatch.backends()["ref"].linear
    monkeypatch.setenv(dispatch.ENV, "fake")
    assert dispatch.pick("conv") is dispatch.backends()["ref"].conv
    monkeypatch.setenv(dispatch.ENV, "warp")
    with pytest.raises(ValueError, match=r"warp.*there are fake, ref"):
        dispatch.pick("linear")


def test_explain_says_why(fake: types.ModuleType) -> None:
    rows = {row["op"]: row for row in dispatch.explain(("linear", "conv"), "cpu", BF16)}
    assert rows["linear"] == {"op": "linear", "backend": "ref", "refused": "fake multiplies int4 alone"}
    assert rows["conv"] == {"op": "conv", "backend": "ref", "refused": "fake has no conv"}


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="unknown op 'fly'"):
        ops.bind("fly")
