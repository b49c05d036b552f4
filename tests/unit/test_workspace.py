"""The workspace's estimate beside the real peak of torch's allocator, on the graph and the reference kernels."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from qwenrun.kernels import ops
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight
from qwenrun.model.bind import bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.model.moe import StackedExperts
from qwenrun.model.qwen3_5 import Table
from qwenrun.plan import workspace as plan
from qwenrun.plan.buffers import Run
from qwenrun.quant import formats
from qwenrun.quant.recipe import Assignment, TensorInfo


def medium(name: str, **text: int) -> ModelConfig:
    """A member of the zoo with one layer of each kind; heads as they are, the rest smaller."""
    raw = copy.deepcopy(ModelConfig.from_name(name).raw)
    layers = ["linear_attention", "full_attention"]
    raw["text_config"].update(num_hidden_layers=2, layer_types=layers, vocab_size=4096, hidden_size=512, **text)
    raw["vision_config"]["out_hidden_size"] = 512
    return ModelConfig.from_hf(raw)


MOE = medium("Qwen3.5-35B-A3B", num_experts=16, num_experts_per_tok=4)
DENSE = medium("Qwen3.5-9B", intermediate_size=3072)


class RandomWeights:
    """A WeightSource of random tensors, every matrix stored in one format."""

    where = "random"

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        self.spec = spec
        self.infos = {t.name: t for t in inventory(config) if not t.part.startswith(("mtp", "vision"))}
        self.found: Mapping[str, tuple[tuple[int, ...], str]] = {n: (t.shape, t.dtype) for n, t in self.infos.items()}

    def stored(self) -> list[tuple[TensorInfo, Assignment]]:
        return [
            (t, Assignment("x", self.spec if len(t.shape) == (3 if t.is_experts else 2) else None))
            for t in self.infos.values()
        ]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.randn(self.infos[name].shape) * 0.02

    def weight(self, name: str) -> Weight:
        return ops.encode(self.tensor(name), self.spec)

    def embedding(self, name: str) -> Table:
        return Table(self.weight(name))

    def experts(self, prefix: str) -> StackedExperts:
        return StackedExperts(self.weight(f"{prefix}.gate_up_proj"), self.weight(f"{prefix}.down_proj"))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` had allocated at one time, of what it allocated itself."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


@pytest.mark.parametrize(
    ("config", "form", "tokens", "before", "kv", "step"),
    [
        (MOE, "bf16", 256, 100, "f32", "convolution"),
        (MOE, "int4-g128", 2, 10, "f32", "attention projections"),
        (MOE, "bf16", 1, 300, "bf16", "attention projections"),
        (MOE, "int8-g128", 64, 4032, "bf16", "attention"),
        (DENSE, "int4-g128", 16, 4080, "int8", "attention projections"),
        (DENSE, "nvfp4", 2, 20, "bf16", "attention projections"),
    ],
)
def test_the_estimate_is_near_the_peak(
    monkeypatch: pytest.MonkeyPatch,
    new_state: Callable[..., Any],
    config: ModelConfig,
    form: str,
    tokens: int,
    before: int,
    kv: str,
    step: str,
) -> None:
    monkeypatch.setenv("QWENRUN_BACKEND", "ref")  # the estimate is of the reference; others need less
    torch.manual_seed(tokens)
    source = RandomWeights(config, formats.parse(form).spec)
    model = bind(source, config)
    ctx = before + tokens
    state = new_state(config, Run(ctx, kv=kv, mtp=False, vision=False, snapshots=0))
    state.position = before
    ids = torch.randint(0, config.vocab_size, (tokens,))
    peak = peak_bytes(lambda: model.logits(model.forward(ids, state)[-1]))
    estimate = plan.workspace(config, plan.Codes.of(source.stored()), tokens, ctx)
    assert peak / 1.03 < estimate < peak * 1.1, f"peak {peak:,}, estimate {estimate:,}"
    steps = plan.steps(config, plan.Codes.of(source.stored()), tokens, ctx)
    assert max(steps, key=lambda name: steps[name]) == step


# Peaks of torch's allocator beside the arena on an H100, MiB: prompts of 3,000 tokens, the widest layers of the 122B,
# `int4`; at 512 tokens a step half of the experts were on their way, at 2,048 all were there (2026-11-26).
SEEN_ON_A_CARD = {512: 208, 2048: 417}


def test_the_estimate_for_cards_covers_what_one_took() -> None:
    config = ModelConfig.from_name("122b")
    for chunk, seen in SEEN_ON_A_CARD.items():
        estimate = plan.card_workspace(config, chunk, 4096)
        assert seen << 20 < estimate < 3.3 * (seen << 20)
    # A token needs next to nothing but logits, and a longer context nothing but splits of one prompt's attention.
    assert plan.card_workspace(config, 1, 4096) < plan.CARD_SEGMENTS + (16 << 20)
    assert plan.card_workspace(config, 512, 1 << 20) == plan.card_workspace(config, 512, 8192)


def test_the_sizes_for_cards_are_the_kernels() -> None:
    pytest.importorskip("triton")
    from qwenrun.kernels.gpu import launch, tiles

    assert launch.PROGRAMS == plan.CARD_PROGRAMS
    assert launch.CHUNK == plan.CARD_CHUNK
    rows = [tiles.attention(8192, 1 << 20, int8, target).rows for int8 in (False, True) for target in tiles.TARGETS]
    assert max(rows) == plan.CARD_ROWS


def test_the_block_sizes_are_the_kernels() -> None:
    for module, name, ours in (
        ("attention", "QUERY_BLOCK", plan.QUERY_BLOCK),
        ("attention", "KEY_BLOCK", plan.KEY_BLOCK),
        ("linear", "DECODE_VALUES", plan.DECODE_VALUES),
        ("delta", "CHUNK", plan.DELTA_CHUNK),
    ):
        assert getattr(importlib.import_module(f"qwenrun.kernels.ref.{module}"), name) == ours, name
