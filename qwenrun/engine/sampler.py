"""From logits to the next token: penalties, temperature, top_k, top_p, min_p, and one reproducible draw.

The order is that of Hugging Face's `generate`: repetition penalty, presence penalty, temperature, top_k, top_p
(over what top_k left), min_p. Knows nothing of a model, a tokenizer or a session.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenrun.errors import QwenrunError, UsageError
from qwenrun.kernels.ops import bind


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token. The defaults are neutral: draw from the model's own distribution.

    temperature: 0 is greedy (the likeliest token, ties to the lowest id); the other fields but the penalties
        then change nothing.
    top_k: keep the k likeliest; 0 keeps all.
    top_p: keep the fewest likeliest whose probabilities reach p; 1 keeps all.
    min_p: keep what is at least min_p times as likely as the likeliest; 0 keeps all.
    presence_penalty: subtracted from the logit of every token generated before, once.
    repetition_penalty: divides positive and multiplies negative logits of every token of the prompt and of the
        generated text (Keskar et al., CTRL, 2019); 1 is off.
    seed: same seed, logits and parameters, same tokens. None draws a fresh one.

    Raises UsageError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or more")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        check(0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        check(math.isfinite(self.presence_penalty), "presence_penalty", "a number")
        check(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "above 0 (1 is off)",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Draws the tokens of one generation; remembers them for the penalties.

    vocab_size: rows of the logits from this on are padding of the embedding and are never drawn.
    prompt: token ids before the generation (the repetition penalty counts them). device: where the logits are.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt: Iterable[int] = (), device: str = "cpu"
    ) -> None:
        self.params = params
        self._largest = bind("largest", device)
        self.vocab_size = vocab_size
        self._generator = torch.Generator(device="cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._generated = _TokenSet(vocab_size)
        self._seen = _TokenSet(vocab_size, prompt if params.repetition_penalty != 1 else ())

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V] (any float dtype). Raises QwenrunError if they are NaN."""
        if self.params.greedy:
            scores = self._penalised(logits[: self.vocab_size].float())
            value, place = self._largest(scores, 1)
            if not math.isfinite(float(value)):
                raise _not_finite()
            token = int(place)
        else:
            probabilities, ids = self.distribution(logits)
            cumulative = probabilities.double().cumsum(0)
            point = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
            # right=True: a token of probability 0 can't be hit, not even by a draw of exactly 0.
            place = int(torch.searchsorted(cumulative, point, right=True))
            token = int(ids[min(place, len(ids) - 1)])
        self._generated.add(token)
        if self.params.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What a draw is made from: (probabilities f32 [n] on the CPU, likeliest first, sum 1; token ids [n]).

        Needs a temperature above 0.
        """
        p = self.params
        scores = self._penalised(logits[: self.vocab_size].float())
        if 0 < p.top_k < scores.numel():
            scores, ids = self._largest(scores, p.top_k)
        else:
            scores, ids = torch.sort(scores, descending=True, stable=True)
        scores, ids = scores.cpu(), ids.cpu()
        if not math.isfinite(float(scores[0])):
            raise _not_finite()
        probabilities = torch.softmax((scores - scores[0]) / p.temperature, dim=0)
        keep = len(probabilities)
        if p.top_p < 1:
            # A token stays while those before it have not reached top_p; the first always stays.
            before = probabilities.cumsum(0) - probabilities
            keep = max(1, int((before < p.top_p).sum()))
        if p.min_p > 0:
            keep = min(keep, max(1, int((probabilities >= p.min_p * probabilities[0]).sum())))
        probabilities = probabilities[:keep]
        return probabilities / probabilities.sum(), ids[:keep]

    def _penalised(self, scores: Tensor) -> Tensor:
        p = self.params
        if self._seen and p.repetition_penalty != 1:
            seen = self._seen.index(scores.device)
            old = scores[seen]
            new = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
            scores = scores.index_copy(0, seen, new)
        if self._generated and p.presence_penalty != 0:
            generated = self._generated.index(scores.device)
            scores = scores.index_copy(0, generated, scores[generated] - p.presence_penalty)
        return scores


class _TokenSet:
    """Distinct token ids below `vocab_size`, ready as an index tensor without rebuilding it for every token."""

    def __init__(self, vocab_size: int, tokens: Iterable[int] = ()) -> None:
        self._vocab_size = vocab_size
        self._tokens: set[int] = set()
        self._buffer = torch.empty(256, dtype=torch.long)
        for token in tokens:
            self.add(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, token: int) -> None:
        if token in self._tokens or not 0 <= token < self._vocab_size:
            return
        if len(self._tokens) == len(self._buffer):
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
        self._buffer[len(self._tokens)] = token
        self._tokens.add(token)

    def index(self, device: torch.device) -> Tensor:
        """i64 [n] of the tokens, in the order they came."""
        return self._buffer[: len(self._tokens)].to(device)


def _not_finite() -> QwenrunError:
    return QwenrunError(
        "the model gave logits that are not numbers",
        "check the weights: qwenrun verify PACK",
    )
