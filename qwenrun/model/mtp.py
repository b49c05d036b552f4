"""The multi-token-prediction module: one more layer that guesses the token after the next.

Shares the trunk's embedding and head. Knows neither tensor names nor how a draft is verified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.model.attention import KVLayer
from qwenrun.model.config import ModelConfig
from qwenrun.model.layer import Layer
from qwenrun.model.linear import Linear


class MTP:
    """fc([norm(embedding of token t+1); norm(hidden state of t)]) -> one full-attention layer -> norm.

    As in transformers 5.23's `MtpLayer`, with fc = eh_proj and the embedding's half first.
    """

    def __init__(
        self, config: ModelConfig, fc: Linear, norm_embedding: Tensor, norm_hidden: Tensor, layer: Layer, norm: Tensor
    ) -> None:
        self.fc, self.layer = fc, layer
        self.norm_embedding, self.norm_hidden, self.norm = norm_embedding, norm_hidden, norm
        self.eps = config.rms_norm_eps
        self._rms_norm = bind("rms_norm", norm.device.type)

    def __call__(
        self, embedding: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: KVLayer, start: int
    ) -> Tensor:
        """embedding, hidden f32 [T, H] (the trunk's hidden state after its final norm) -> f32 [T, H]."""
        halves = (
            self._rms_norm(embedding, self.norm_embedding, self.eps),
            self._rms_norm(hidden, self.norm_hidden, self.eps),
        )
        x = self.layer(self.fc(torch.cat(halves, dim=-1)), rotary, cache, start)
        return self._rms_norm(x, self.norm, self.eps)
