"""The text model of the Qwen3.5 family: token ids to hidden states to logits, for one sequence.

Activations are float32 (a CPU gains nothing from BF16 arithmetic, and float32 follows the checkpoint more
closely than the usual BF16 run); weights stay in the format they are stored in.
Knows neither tensor names (`bind` does) nor where a sequence's state lives (the engine does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.kernels.weight import Weight
from qwenrun.model.attention import KVLayer
from qwenrun.model.config import ModelConfig
from qwenrun.model.deltanet import DeltaLayer
from qwenrun.model.layer import Layer, Rotary
from qwenrun.model.linear import Linear
from qwenrun.model.mtp import MTP

Embedding = Callable[[Tensor], Tensor]


class Table:
    """An embedding table [V, H] in memory, in any stored format."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self._embedding = bind("embedding", weight.codes.device.type, weight.spec)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids i64 [T] -> f32 [T, H]."""
        return self._embedding(ids, self.weight)


class State(Protocol):
    """What a sequence keeps between calls: how many tokens it holds, and one state for each layer."""

    position: int

    @property
    def layers(self) -> Sequence[KVLayer | DeltaLayer]: ...


class Model:
    """A bound model. Nothing here is looked up by name: every layer holds its weights and its kernels.

    embed: ids i64 [T] -> their rows of the embedding table, f32 [T, H], wherever the table is. mtp is None if the
    checkpoint has no such tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: Embedding,
        layers: Sequence[Layer],
        norm: Tensor,
        lm_head: Linear,
        mtp: MTP | None = None,
    ) -> None:
        self.config = config
        self.embed = embed
        self.layers = tuple(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.mtp = mtp
        self.device = norm.device
        self.rms_norm = bind("rms_norm", norm.device.type)
        self.rotary = Rotary(config, norm.device.type)

    @torch.inference_mode()
    def forward(self, ids: Tensor, state: State, positions: Tensor | None = None) -> Tensor:
        """Feed ids i64 [T] to the sequence of `state`, which moves on by T; any T, in any chunking.

        positions: i64 [T] or [3, T] (time, height, width) rotary positions; by default the tokens' places in
            the sequence.
        Returns the hidden states after the final norm, f32 [T, H].
        """
        start = state.position
        if positions is None:
            positions = torch.arange(start, start + len(ids), device=self.device)
        rotary = self.rotary(positions)
        x = self.embed(ids)
        for layer, layer_state in zip(self.layers, state.layers):
            x = layer(x, rotary, layer_state, start)
        state.position = start + len(ids)
        return self.rms_norm(x, self.norm, self.config.rms_norm_eps)

    # Not in inference mode: logits leave the engine, and a caller may want to change them in place.
    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states f32 [T, H] or [H] after the final norm -> f32 [T, V] or [V]."""
        return self.lm_head(hidden) if hidden.ndim == 2 else self.lm_head(hidden[None])[0]

    @torch.inference_mode()
    def draft(self, ids: Tensor, hidden: Tensor, cache: KVLayer, start: int) -> Tensor:
        """The multi-token-prediction module on the pairs (hidden state of token t, token t+1).

        ids i64 [T]: the tokens t+1; hidden f32 [T, H]: the trunk's (or, for deeper drafts, this function's)
        output at t. cache: the module's own keys and values; the first pair goes to row `start`, and pair
        `t` sits at rotary position t + 1.
        Returns f32 [T, H], whose `logits` predict token t + 2.
        """
        if self.mtp is None:
            raise ValueError("this model has no multi-token-prediction module")
        rotary = self.rotary(torch.arange(start + 1, start + 1 + len(ids), device=self.device))
        return self.mtp(self.embed(ids), hidden, rotary, cache, start)
