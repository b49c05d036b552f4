"""Formats by name, and what takes over where a block does not divide a row."""

from __future__ import annotations

import pytest

from qwenrun.quant import formats
from qwenrun.quant.errors import RecipeError


def test_every_format_is_what_its_name_says() -> None:
    for name, form in formats.registry().items():
        assert form.name == name
        if "-g" in name:
            assert form.spec.block == int(name.split("-g")[1].split("-")[0])
        assert form.spec.zero == name.endswith("-zero")
        assert form.spec.codes == {"nvfp4": "e2m1"}.get(form.family, form.family)
    assert {"int4-g32", "int4-g64", "int4-g128", "int4-g128-zero", "nvfp4", "int8-g128", "bf16"} <= set(
        formats.registry()
    )


def test_fallbacks_go_from_large_to_small_and_end_with_something_that_fits() -> None:
    for form in formats.registry().values():
        chain = formats.fallbacks(form)
        assert chain[-1].name == "bf16"
        assert all(f.spec.zero == form.spec.zero for f in chain if f.family == form.family)
        assert form not in chain or form.name == "bf16"
    assert [f.name for f in formats.fallbacks(formats.parse("int4-g128-zero"))][:2] == [
        "int4-g64-zero",
        "int4-g32-zero",
    ]


def test_unknown_name() -> None:
    with pytest.raises(RecipeError, match="int5") as caught:
        formats.parse("int5")
    assert "int4-g128" in caught.value.hint
