"""The inventory against the published counts of the family, and against transformers' own state dict."""

from __future__ import annotations

import pytest

from qwenrun.errors import ModelError
from qwenrun.model.config import ModelConfig, zoo_names
from qwenrun.model.inventory import HUB_PREFIX, TEXT_PREFIX, inventory, match, parameters

# Parameters of (text, vision, MTP). Source: the hub's file indices and an independent count.
TOTALS = {
    "Qwen3.5-0.8B": (752_393_024, 100_592_896, 20_452_864),
    "Qwen3.5-2B": (1_881_825_088, 331_416_576, 60_828_160),
    "Qwen3.5-4B": (4_205_751_296, 333_514_240, 120_599_552),
    "Qwen3.5-9B": (8_953_803_264, 456_010_480, 243_290_624),
    "Qwen3.5-27B": (26_895_998_464, 460_730_096, 424_699_392),
    "Qwen3.5-35B-A3B": (34_660_610_688, 446_571_248, 844_640_768),
    "Qwen3.5-122B-A10B": (122_111_526_912, 451_290_864, 2_523_679_232),
    "Qwen3.5-397B-A17B": (396_346_350_336, 456_010_480, 6_595_568_128),
}
# Tensors in the hub's files, MTP experts one by one and trunk experts fused.
COUNTS = {
    "0.8B": 488,
    "2B": 632,
    "4B": 738,
    "9B": 775,
    "27B": 1199,
    "35B-A3B": 1811,
    "122B-A10B": 1949,
    "397B-A17B": 2924,
}
PARTS_122B = {
    "routed": 115_964_116_992,
    "gdn": 3_186_828_288,
    "attention": 943_718_400,
    "embedding": 762_839_040,
    "lm_head": 762_839_040,
    "shared": 452_984_832,
    "router": 37_748_736 + 147_456,
    "norm": 304_128,
    "vision": 451_290_864,
    "mtp_routed": 2_415_919_104,
    "mtp": 78_643_200 + 18_874_368 + 9_437_184 + 786_432 + 15_872 + 3_072,
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    counts = parameters(inventory(ModelConfig.from_name(name)))
    mtp = counts.pop("mtp") + counts.pop("mtp_routed", 0)
    vision = counts.pop("vision")
    assert (sum(counts.values()), vision, mtp) == TOTALS[name]


def test_parts_of_the_122b() -> None:
    assert parameters(inventory(ModelConfig.from_name("122b"))) == PARTS_122B


@pytest.mark.parametrize("name", COUNTS)
def test_published_tensor_counts(name: str) -> None:
    config = ModelConfig.from_name(f"Qwen3.5-{name}")
    tensors = inventory(config)
    split = [t for t in tensors if t.part == "mtp_routed"]
    one_by_one = config.num_experts * 3 if split else 0
    assert len(tensors) - len(split) + one_by_one == COUNTS[name]
    assert len({t.name for t in tensors}) == len(tensors)


def test_float32_tensors_of_the_122b() -> None:
    """The hub's index counts 6,912 float32 parameters."""
    tensors = inventory(ModelConfig.from_name("122b"))
    assert parameters(t for t in tensors if t.dtype == "F32") == {"gdn": 6_912}


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-35B-A3B", "Qwen3.6-27B"])
def test_names_and_shapes_are_transformers(name: str) -> None:
    import json

    import torch
    import transformers

    from qwenrun.model.config import ZOO

    raw = json.loads((ZOO / f"{name}.json").read_text())
    architecture = getattr(transformers, raw["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class(**raw))
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    config = ModelConfig.from_name(name)
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    ours = {t.name: t.shape for t in inventory(config) if not t.name.startswith("mtp.")}
    assert ours == theirs


def found(config: ModelConfig, prefix: str = HUB_PREFIX) -> dict[str, tuple[tuple[int, ...], str]]:
    return {t.name: (t.shape, t.dtype) for t in inventory(config, prefix)}


@pytest.mark.parametrize("prefix", [HUB_PREFIX, TEXT_PREFIX])
def test_match_takes_both_prefixes_and_real_dtypes(prefix: str) -> None:
    config = ModelConfig.from_name("Qwen3.5-35B-A3B")
    there = {name: (shape, "F32") for name, (shape, _) in found(config, prefix).items()}
    result = match(config, there, "x")
    assert {t.dtype for t in result.tensors} == {"F32"}
    assert {t.name for t in result.tensors} == set(there)
    assert result.notes == ()


def test_match_names_at_most_a_few() -> None:
    config = ModelConfig.from_name("Qwen3.5-0.8B")
    there = {n: v for n, v in found(config).items() if "layers.1" not in n}
    with pytest.raises(ModelError, match=r"and \d+ more") as caught:
        match(config, there, "x")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("name", zoo_names())
def test_one_missing_mtp_tensor_is_not_forgiven(name: str) -> None:
    config = ModelConfig.from_name(name)
    there = found(config)
    del there["mtp.norm.weight"]
    with pytest.raises(ModelError, match=r"1 missing: mtp\.norm\.weight"):
        match(config, there, "x")
