"""Configs: the family's real files, and every way a file can be wrong."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import ModelError, UsageError
from qwenrun.model.config import ZOO, ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run, list_buffers, totals

# name: (layers, full-attention layers, hidden, heads, KV heads, value heads, experts, top k, tied)
FAMILY = {
    "Qwen3.5-0.8B": (24, 6, 1024, 8, 2, 16, 0, 0, True),
    "Qwen3.5-2B": (24, 6, 2048, 8, 2, 16, 0, 0, True),
    "Qwen3.5-4B": (32, 8, 2560, 16, 4, 32, 0, 0, True),
    "Qwen3.5-9B": (32, 8, 4096, 16, 4, 32, 0, 0, False),
    "Qwen3.5-27B": (64, 16, 5120, 24, 4, 48, 0, 0, False),
    "Qwen3.5-35B-A3B": (40, 10, 2048, 16, 2, 32, 256, 8, False),
    "Qwen3.5-122B-A10B": (48, 12, 3072, 32, 2, 64, 256, 8, False),
    "Qwen3.5-397B-A17B": (60, 15, 4096, 32, 2, 64, 512, 10, False),
    "Qwen3.6-27B": (64, 16, 5120, 24, 4, 48, 0, 0, False),
    "Qwen3.6-35B-A3B": (40, 10, 2048, 16, 2, 32, 256, 8, False),
}


def test_the_family_is_complete() -> None:
    assert set(zoo_names()) == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name: str) -> None:
    c = ModelConfig.from_name(name)
    assert FAMILY[name] == (
        c.num_layers,
        len(c.full_layers),
        c.hidden_size,
        c.num_heads,
        c.num_kv_heads,
        c.linear_value_heads,
        c.num_experts,
        c.top_k,
        c.tie_embeddings,
    )
    assert c.full_layers == tuple(range(3, c.num_layers, 4))
    assert (c.head_dim, c.rope.rotary_dim, c.rope.mrope_section, c.rope.theta) == (256, 64, (11, 11, 10), 1e7)
    assert (c.vocab_size, c.max_position, c.mtp_layers, c.eos_ids) == (248320, 262144, 1, (248044,))
    assert c.vision is not None
    assert c.vision.out_size == c.hidden_size


@pytest.mark.parametrize("name", ["qwen3.5-122b-a10b", "Qwen/Qwen3.5-122B-A10B", "122b", "122B-A10B"])
def test_names_are_forgiving(name: str) -> None:
    assert ModelConfig.from_name(name).name == "Qwen3.5-122B-A10B"


@pytest.mark.parametrize("name", ["35B", "llama-3", "", "Qwen3.5-123B-A10B"])
def test_unknown_names_suggest(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        ModelConfig.from_name(name)
    assert "Qwen3" in caught.value.hint


def broken(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model_type", "llama", "llama.*qwen3_5_moe"),
        ("model_type", ..., "model_type: is missing"),
        ("text_config", ..., "text_config: is missing"),
        ("text_config", 3, "not a JSON object"),
        ("text_config.hidden_size", ..., "hidden_size: is missing"),
        ("text_config.hidden_size", "128", "hidden_size: '128'"),
        ("text_config.hidden_size", True, "hidden_size: True"),
        ("text_config.hidden_size", 0, "hidden_size: 0"),
        ("text_config.hidden_size", 10**12, "hidden_size: 1000000000000"),
        ("text_config.num_hidden_layers", 3, "layer_types: has 2 entries for 3"),
        ("text_config.layer_types", ["linear_attention", "mamba"], r"layer_types: 'mamba' \(layer 1\)"),
        ("text_config.layer_types", "full_attention", "layer_types"),
        ("text_config.num_attention_heads", 3, "3 is no multiple of 2"),
        ("text_config.linear_num_value_heads", 5, "5 is no multiple of 2"),
        ("text_config.num_experts_per_tok", 9, "9 of 4 experts"),
        ("text_config.mlp_only_layers", [1], r"mlp_only_layers: \[1\]"),
        ("text_config.hidden_act", "gelu", "hidden_act: 'gelu': only 'silu'"),
        ("text_config.attention_bias", True, "attention_bias: True"),
        ("text_config.attn_output_gate", False, "attn_output_gate: False"),
        ("text_config.output_gate_type", "tanh", "output_gate_type: 'tanh'"),
        ("text_config.mtp_use_dedicated_embeddings", True, "mtp_use_dedicated_embeddings"),
        ("text_config.head_dim", 33, "33 is odd"),
        ("text_config.dtype", "float8_e4m3fn", "dtype: 'float8_e4m3fn' is none of bfloat16"),
        ("text_config.hidden_size", "1" * 10_000, r"hidden_size: '1{79}\.\.\. is not"),
        ("text_config.mtp_num_hidden_layers", 2, "mtp_num_hidden_layers"),
        ("text_config.eos_token_id", "x", "eos_token_id"),
        ("text_config.rms_norm_eps", -1, "rms_norm_eps"),
        ("text_config.rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("text_config.rope_parameters", ..., "rope_parameters: is missing"),
        ("text_config.rope_parameters.rope_type", "linear", "rope_type"),
        ("text_config.rope_parameters.mrope_section", [3, 3, 3], "does not sum to 8"),
        ("text_config.rope_parameters.mrope_section", [1, 2], "not three numbers"),
        ("text_config.rope_parameters.mrope_interleaved", False, "mrope_interleaved"),
        ("text_config.rope_parameters.partial_rotary_factor", 1.5, "partial_rotary_factor"),
        ("tie_word_embeddings", "no", "tie_word_embeddings"),
        ("vision_config.deepstack_visual_indexes", [1], "deepstack"),
        ("vision_config.depth", None, "depth: is missing"),
        ("vision_config.out_hidden_size", 256, "out_hidden_size: 256.*128"),
        ("vision_config.num_position_embeddings", 17, "num_position_embeddings: 17 is no square"),
        ("vision_config.hidden_act", "gelu", "hidden_act: 'gelu'"),
    ],
)
def test_what_is_wrong_is_named(tiny_config: dict, path: str, value: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ModelConfig.from_hf(broken(tiny_config, path, value), "tiny")


def test_flat_text_config(tiny_config: dict) -> None:
    nested = ModelConfig.from_hf(tiny_config)
    flat = ModelConfig.from_hf({**tiny_config["text_config"], "tie_word_embeddings": False})
    assert flat.vision is None
    assert flat.num_experts == nested.num_experts


def test_interval_in_place_of_layer_types(tiny_config: dict) -> None:
    text = tiny_config["text_config"]
    del text["layer_types"]
    with pytest.raises(ModelError, match="full_attention_interval"):
        ModelConfig.from_hf(tiny_config)
    text["full_attention_interval"] = 2
    assert ModelConfig.from_hf(tiny_config).full_layers == (1,)


def test_yarn(tiny_config: dict) -> None:
    rope = tiny_config["text_config"]["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert ModelConfig.from_hf(tiny_config).rope.yarn == (4.0, 512)
    rope |= {"beta_fast": 32.0, "beta_slow": 1, "truncate": True, "attention_factor": None}
    assert ModelConfig.from_hf(tiny_config).rope.yarn == (4.0, 512)
    for key, value in (
        ("beta_fast", 64),
        ("attention_factor", 1.2),
        ("mscale", 0.7),
        ("truncate", False),
        ("factor", 0.5),
        ("factor", 1e9),
    ):
        with pytest.raises(ModelError, match=f"{key}: {value}"):
            ModelConfig.from_hf(changed(tiny_config, rope_parameters={**rope, key: value}))
    del rope["original_max_position_embeddings"]
    with pytest.raises(ModelError, match="original_max_position_embeddings"):
        ModelConfig.from_hf(tiny_config)


def changed(config: dict[str, Any], **text: Any) -> dict[str, Any]:
    """The config with keys of its text part replaced."""
    return {**config, "text_config": {**config["text_config"], **text}}


def test_positions(tiny_config: dict) -> None:
    """512 as they are; YaRN stretches the original length, whatever max_position_embeddings was set to."""
    plain = ModelConfig.from_hf(tiny_config)
    assert plain.positions == 512
    assert [plain.yarn_factor(ctx) for ctx in (1, 512, 513, 1024, 1025, 2048)] == [1, 1, 2, 2, 3, 4]
    rope = tiny_config["text_config"]["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for written in (512, 2048):
        stretched = ModelConfig.from_hf(changed(tiny_config, max_position_embeddings=written))
        assert stretched.positions == 2048
        assert [stretched.yarn_factor(ctx) for ctx in (2048, 2049)] == [1, 5]
    assert ModelConfig.from_hf(changed(tiny_config, max_position_embeddings=4096)).positions == 4096
    # The factors that are published for these lengths.
    real = ModelConfig.from_name("122b")
    assert [real.yarn_factor(ctx) for ctx in (262_144, 524_288, 1_010_000)] == [1, 2, 4]


def test_the_older_spelling_of_rope(tiny_config: dict) -> None:
    new = tiny_config["text_config"]["rope_parameters"]
    old = {key: new[key] for key in ("mrope_interleaved", "mrope_section")}
    beside = {key: new[key] for key in ("rope_theta", "partial_rotary_factor")}
    text = {k: v for k, v in tiny_config["text_config"].items() if k != "rope_parameters"}
    for kind in ({"rope_type": "default"}, {"type": "default"}):
        spelled = {**tiny_config, "text_config": {**text, **beside, "rope_scaling": {**old, **kind}}}
        assert ModelConfig.from_hf(spelled).rope == ModelConfig.from_hf(tiny_config).rope
    with pytest.raises(ModelError, match="rope_scaling: partial_rotary_factor: is missing"):
        ModelConfig.from_hf({**tiny_config, "text_config": {**text, "rope_scaling": {**old, "type": "default"}}})


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-122B-A10B", "Qwen3.6-27B"])
def test_what_transformers_saves_is_read_alike(name: str, tmp_path: Path) -> None:
    """Whole models and text-only ones, as `save_pretrained` writes their configs."""
    import transformers

    ours = ModelConfig.from_name(name)
    theirs = getattr(transformers, ours.raw["architectures"][0]).config_class(**ours.raw)
    theirs.save_pretrained(tmp_path)
    whole = ModelConfig.from_folder(tmp_path)
    assert replace(whole, name=name) == ours
    theirs.text_config.save_pretrained(tmp_path)
    text = ModelConfig.from_folder(tmp_path)
    assert text.model_type == f"{ours.model_type}_text"
    assert replace(text, name=name, model_type=ours.model_type, vision=ours.vision) == ours


def test_a_value_nested_beyond_reason(tiny_config: dict, tmp_path: Path) -> None:
    for depth in (500, 900, 990, 100_000):
        deep = "[" * depth + "]" * depth
        text = json.dumps(tiny_config).replace('"hidden_size": 128', f'"hidden_size": {deep}')
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError):
            ModelConfig.from_folder(tmp_path)


def test_folders(tmp_path: Path, tiny_config: dict) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    assert ModelConfig.from_folder(tmp_path).name == tmp_path.name


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_file_is_a_config_or_refused(data: st.DataObject) -> None:
    """A real config with any one value replaced by anything, at any depth."""
    config = json.loads((ZOO / "Qwen3.5-35B-A3B.json").read_text())
    node = config
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if isinstance(node[key], dict) and data.draw(st.booleans()):
            node = node[key]
        else:
            node[key] = data.draw(anything)
            break
    with contextlib.suppress(ModelError):
        accepted = ModelConfig.from_hf(config)
        # What is accepted can be used: every tensor and state has a size, and so has the plan.
        assert all(min(info.shape) > 0 for info in inventory(accepted))
        assert totals(list_buffers(accepted, [], Run(1)))["total"] > 0


@given(anything)
def test_any_json_is_refused(data: object) -> None:
    with pytest.raises(ModelError):
        ModelConfig.from_hf(data)
