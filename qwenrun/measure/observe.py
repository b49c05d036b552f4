"""What a text makes a model's matrices read: the mean square of every column, for the search for scales.

The text is cut into pieces of the context's length, each a sequence of its own, and fed to the model as it is; nothing
is generated. Memory: 4 bytes for every column of every matrix, of every expert's too. Only on the CPU. Knows no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenrun.errors import UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.model.linear import See, SeeExpert
from qwenrun.quant.packfile.importance import Observed

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine


class Sums:
    """A `model.linear.Watch` that adds up squares: float32 sums by column, and how many tokens they are of."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    @staticmethod
    def nbytes(config: ModelConfig) -> int:
        """How much memory the experts' sums take; the others are a few MB."""
        return 4 * config.num_layers * config.num_experts * (config.hidden_size + config.expert_size)

    def linear(self, name: str) -> See:
        def see(x: Tensor) -> None:
            if name not in self._sums:
                self._sums[name] = torch.zeros(x.shape[1])
                self._tokens[name] = torch.zeros(1, dtype=torch.long)
            self._sums[name] += x.square().sum(0)
            self._tokens[name] += len(x)

        return see

    def experts(self, prefix: str) -> SeeExpert:
        config = self._config
        tokens = torch.zeros(config.num_experts, dtype=torch.long)
        sums = [torch.zeros(config.num_experts, width) for width in (config.hidden_size, config.expert_size)]
        for kind, each in zip(("gate_up_proj", "down_proj"), sums):
            self._sums[f"{prefix}.{kind}"], self._tokens[f"{prefix}.{kind}"] = each, tokens

        def see(expert: int, x: Tensor, hidden: Tensor) -> None:
            tokens[expert] += len(x)
            sums[0][expert] += x.square().sum(0)
            sums[1][expert] += hidden.square().sum(0)

        return see

    def expert_tokens(self) -> list[Tensor]:
        """For each layer's experts, how many tokens chose each of them, i64 [E]."""
        return [tokens for name, tokens in self._tokens.items() if name.endswith(".down_proj")]

    @torch.inference_mode()  # in place, on tensors that were made in it
    def observed(self) -> dict[str, Observed]:
        """The mean squares so far, by the matrix's name; this object is of no use afterwards."""
        for name, sums in self._sums.items():
            counts = self._tokens[name].clamp(min=1)
            sums /= counts[:, None] if sums.dim() == 2 else counts
        return {name: Observed(sums, self._tokens[name]) for name, sums in self._sums.items()}


@dataclass(frozen=True)
class Seen:
    """What was read: tokens, in how many pieces, in how many seconds; how many experts no token chose, of how many.

    stopped: before the text's end.
    """

    tokens: int
    pieces: int
    seconds: float
    unseen_experts: int
    experts: int
    stopped: bool


def observe(
    engine: Engine, sums: Sums, ids: Sequence[int], progress: Callable[[int, int, str], None] | None = None
) -> Seen:
    """Feed `ids` to an engine that was opened with `sums` as its watch.

    Ctrl-C ends it early: the chunks before it count, if there was one. Raises UsageError without a token.
    """
    if not ids:
        raise UsageError("there is nothing to observe: the text is empty", "qwenrun observe TEXT -m MODEL -o FILE")
    begun, fed, pieces = time.perf_counter(), 0, 0
    session = engine.session()
    head = engine.model.lm_head.seen
    stopped = False
    try:
        for piece, fresh in _pieces(ids, session.ctx, engine.run.chunk):
            if fresh:
                session.reset()
                pieces += 1
            hidden = session.feed(piece)
            if head is not None:
                head(hidden)
            fed += len(piece)
            if progress:
                progress(fed, len(ids), "")
    except KeyboardInterrupt:
        if not fed:
            raise
        stopped = True
    counts = torch.cat([torch.empty(0, dtype=torch.long), *sums.expert_tokens()])
    return Seen(fed, pieces, time.perf_counter() - begun, int((counts == 0).sum()), counts.numel(), stopped)


def _pieces(ids: Sequence[int], ctx: int, chunk: int) -> Iterator[tuple[Sequence[int], bool]]:
    """Chunks of the text, and whether one begins a sequence."""
    for start in range(0, len(ids), ctx):
        stop = min(start + ctx, len(ids))
        for at in range(start, stop, chunk):
            yield ids[at : min(at + chunk, stop)], at == start
