"""The sampler against a plain-Python reading of its definitions, and its guarantees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qwenrun.engine.sampler import Sampler, SamplingParams
from qwenrun.errors import QwenrunError, UsageError


def random_logits(seed: int, size: int = 50, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def expected(logits: list[float], p: SamplingParams, generated: set[int], prompt: set[int]) -> dict[int, float]:
    """The distribution by the book, token by token."""
    scores = dict(enumerate(logits))
    if p.repetition_penalty != 1:
        for t in generated | prompt:
            scores[t] = scores[t] / p.repetition_penalty if scores[t] > 0 else scores[t] * p.repetition_penalty
    for t in generated:
        scores[t] -= p.presence_penalty
    order = sorted(scores, key=lambda t: -scores[t])
    if p.top_k:
        order = order[: p.top_k]
    weight = {t: math.exp((scores[t] - scores[order[0]]) / p.temperature) for t in order}
    total = sum(weight.values())
    probability = {t: w / total for t, w in weight.items()}
    kept: list[int] = []
    reached = 0.0
    for t in order:
        if p.top_p < 1 and reached >= p.top_p:
            break
        kept.append(t)
        reached += probability[t]
    kept = [t for t in kept if probability[t] >= p.min_p * probability[order[0]]]
    total = sum(probability[t] for t in kept)
    return {t: probability[t] / total for t in kept}


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 7},
    {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.5},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "presence_penalty": 1.5},
    {"repetition_penalty": 1.3},
    {"presence_penalty": -1.0, "repetition_penalty": 0.8, "top_k": 1000},
]


@pytest.mark.parametrize("fields", PARAMS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_distribution(fields: dict[str, Any], seed: int) -> None:
    params = SamplingParams(seed=seed, **fields)
    sampler = Sampler(params, 50, prompt=[1, 2, 3, 3])
    generated: set[int] = set()
    for round_ in range(6):
        logits = random_logits(100 * seed + round_)
        probabilities, ids = sampler.distribution(logits)
        want = expected(logits.tolist(), params, generated, {1, 2, 3})
        got = dict(zip(ids.tolist(), probabilities.tolist()))
        assert got.keys() == want.keys()
        for token, value in want.items():
            assert got[token] == pytest.approx(value, rel=1e-4, abs=1e-7)
        generated.add(sampler(logits))


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(SamplingParams(seed=7), 4)
    counts = [0] * 4
    for _ in range(4000):
        counts[sampler(logits)] += 1
    expected_counts = [2000, 1200, 600, 200]
    chi_square = sum((c - e) ** 2 / e for c, e in zip(counts, expected_counts))
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def test_seed_makes_it_reproducible() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, presence_penalty=0.5), 50)
        return [sampler(random_logits(i)) for i in range(40)]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


def test_temperature_zero_is_greedy_and_penalties_still_count() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert [Sampler(SamplingParams(temperature=0, seed=s), 4)(logits) for s in range(5)] == [1] * 5
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.5), 4)
    assert [sampler(logits) for _ in range(3)] == [1, 2, 1]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), 4, prompt=[1])
    assert sampler(logits) == 2


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = random_logits(5)
    assert Sampler(SamplingParams(temperature=1e-30, seed=0), 50)(logits) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_are_never_drawn(temperature: float) -> None:
    logits = torch.zeros(64)
    logits[60:] = 100.0  # rows of the embedding that are no token
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), vocab_size=60)
    assert all(sampler(logits) < 60 for _ in range(50))


def test_logits_are_left_alone() -> None:
    logits = random_logits(1)
    before = logits.clone()
    sampler = Sampler(SamplingParams(presence_penalty=1, repetition_penalty=1.5, seed=0), 50, prompt=[0, 1])
    for _ in range(3):
        sampler(logits)
    assert torch.equal(logits, before)


def test_many_generated_tokens() -> None:
    """More distinct tokens than the first buffer of the penalty holds."""
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1000.0), 600)
    logits = random_logits(2, size=600)
    assert sorted(sampler(logits) for _ in range(600)) == list(range(600))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(temperature: float, bad: float) -> None:
    logits = random_logits(3)
    logits[17] = bad
    with pytest.raises(QwenrunError, match="not numbers"):
        Sampler(SamplingParams(temperature=temperature, seed=0), 50)(logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"presence_penalty": math.inf},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        SamplingParams(**fields)
