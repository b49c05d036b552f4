"""Recipes: the shipped ones on the real models, files of one's own, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.model.config import ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.quant.errors import RecipeError
from qwenrun.quant.recipe import FOLDER, Recipe, TensorInfo, recipe_names, stored_bytes, total_bytes

UNTOUCHED = (
    "norm.weight",
    "mlp.gate.weight",
    "conv1d.weight",
    "A_log",
    "dt_bias",
    "in_proj_a.weight",
    "in_proj_b.weight",
    "shared_expert_gate.weight",
)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("model", zoo_names())
def test_untouchables(name: str, model: str) -> None:
    recipe = Recipe.load(name)
    for info in inventory(ModelConfig.from_name(model)):
        how = recipe.assign(info)
        assert not how.note, f"{info.name}: {how.note}"  # every dimension of the family is a multiple of 128
        if info.name.endswith(UNTOUCHED) or info.part == "vision" or len(info.shape) == 1:
            assert how.spec is None, info.name
        elif name != "bf16":
            assert how.spec is not None, info.name
        if info.name.endswith(("q_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")):
            assert how.spec is None or how.spec.codes != "e2m1"


def test_balanced_formats() -> None:
    recipe, config = Recipe.load("balanced"), ModelConfig.from_name("Qwen3.5-122B-A10B")
    formats = {}
    for info in inventory(config):
        formats.setdefault(info.part, set()).add(recipe.assign(info).format)
    assert formats["routed"] == formats["mtp_routed"] == {"int4-g128"}
    assert formats["embedding"] == formats["lm_head"] == formats["shared"] == {"int8-g128"}
    assert formats["attention"] == {"int8-g128"}
    assert formats["gdn"] == {"int8-g128", "keep"}
    assert formats["mtp"] == {"int4-g128", "keep"}


# Weight bytes of the 122B with vision and MTP, in GB, from a calculation independent of this code. That one
# counts in_proj_a/b and the small vectors of DeltaNet at the row's precision; here they are kept (under 0.03 GB).
@pytest.mark.parametrize(
    ("rules", "gigabytes"),
    [
        ("bf16", 250.17),
        ("balanced", 68.28),
        ("int4", 65.61),
        ([("*.layers.*.mlp.experts.*", "int4-g128")], 78.04),  # the shape of the official GPTQ checkpoint
        ([("*.layers.*.mlp.experts.*", "int4-g64")], 79.85),
        ([("*.layers.*.mlp.experts.*", "int4-g32")], 83.47),
        ([("*.layers.*.mlp.experts.*", "nvfp4")], 83.47),
    ],
)
def test_sizes_of_the_122b(rules: str | list, gigabytes: float) -> None:
    if isinstance(rules, str):
        recipe = Recipe.load(rules)
    else:
        kept = [{"match": "mtp.*", "format": "keep"}]
        data = {"rules": kept + [{"match": m, "format": f} for m, f in rules]}
        recipe = Recipe.from_dict(data, "test", "test")
    size = total_bytes(recipe, inventory(ModelConfig.from_name("122b")))
    assert size / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_own_recipe(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_text((FOLDER / "balanced.toml").read_text().replace('"int4-g128"', '"int4-g32-zero"'))
    recipe = Recipe.load(str(copy))
    info = TensorInfo("model.language_model.layers.0.mlp.experts.down_proj", (4, 128, 64), "BF16", "routed")
    assert recipe.assign(info).format == "int4-g32-zero"
    assert stored_bytes(info, recipe.assign(info)) == 4 * 128 * (32 + 4 + 1)


@pytest.mark.parametrize(
    ("cols", "wanted", "given"),
    [
        (192, "int4-g128", "int4-g64"),
        (96, "int4-g128-zero", "int4-g32-zero"),
        (40, "int4-g128", "bf16"),
        (24, "nvfp4", "bf16"),
        (32, "nvfp4", "nvfp4"),
        (160, "int8-g128", "int8-g32"),
    ],
)
def test_fallback_and_its_note(cols: int, wanted: str, given: str) -> None:
    recipe = Recipe.from_dict({"rules": [{"match": "*", "format": wanted}]}, "test")
    how = recipe.assign(TensorInfo("a.weight", (8, cols), "F32", "mlp"))
    assert how.format == given
    assert bool(how.note) == (wanted != given)
    if how.note:
        assert str(cols) in how.note
        assert wanted in how.note


def test_warned_tensors_get_a_note() -> None:
    recipe = Recipe.from_dict({"rules": [{"match": "*", "format": "nvfp4"}]}, "test")
    info = TensorInfo("model.language_model.layers.3.self_attn.q_proj.weight", (8, 32), "BF16", "attention")
    assert "harm" in recipe.assign(info).note


def test_first_match_wins() -> None:
    rules = [{"match": ["x.*", "y.*"], "format": "keep"}, {"match": "*", "format": "int8-g32"}]
    recipe = Recipe.from_dict({"rules": rules}, "test")
    assert recipe.assign(TensorInfo("y.w", (2, 32), "BF16", "mlp")).spec is None
    assert recipe.assign(TensorInfo("z.w", (2, 32), "BF16", "mlp")).format == "int8-g32"
    assert Recipe.from_dict(recipe.to_json(), "again").rules == recipe.rules


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rules = 3",
        "[[rules]]",
        '[[rules]]\nmatch = "*"',
        '[[rules]]\nmatch = "*"\nformat = "int5"',
        '[[rules]]\nmatch = []\nformat = "keep"',
        '[[rules]]\nmatch = [1]\nformat = "keep"',
        '[[rules]]\nmatch = "*"\nformat = "keep"\nextra = 1',
        'colour = "red"\n[[rules]]\nmatch = "*"\nformat = "keep"',
        "not toml",
    ],
)
def test_broken_recipes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        Recipe.load(str(path))


def test_unknown_recipe_names_the_known() -> None:
    with pytest.raises(RecipeError, match="balanced"):
        Recipe.load("q4_k_m")
    with pytest.raises(RecipeError):
        Recipe.load("../recipes/balanced")


def test_a_vector_is_no_matrix() -> None:
    recipe = Recipe.from_dict({"rules": [{"match": "*", "format": "int4-g32"}]}, "test")
    with pytest.raises(RecipeError, match=r"a\.norm"):
        recipe.assign(TensorInfo("a.norm", (32,), "BF16", "norm"))


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
RULE = st.dictionaries(
    st.sampled_from(["match", "format", "why"]),
    st.one_of(ANYTHING, st.sampled_from(["*", "*.weight", "[", "int4-g128", "nvfp4", "int4-g0", "int9-g-1"])),
    max_size=3,
)


@given(st.dictionaries(st.sampled_from(["name", "description", "rules", "x"]), st.one_of(ANYTHING, st.lists(RULE))))
@settings(max_examples=300, deadline=None)
def test_any_table_is_a_recipe_or_refused(table: dict) -> None:
    with contextlib.suppress(RecipeError):
        recipe = Recipe.from_dict(table, "test")
        recipe.assign(TensorInfo("model.layers.0.mlp.up_proj.weight", (64, 256), "BF16", "mlp"))
