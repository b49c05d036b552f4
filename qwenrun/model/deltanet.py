"""Gated DeltaNet, with the norm before it: linear attention with a short convolution and a recurrent state instead of
a KV cache.

Knows neither tensor names nor where the state lives: a `DeltaLayer` holds it, and it is updated in place.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.linear import Linear, projections


class DeltaLayer(Protocol):
    """State of one sequence in one DeltaNet layer."""

    @property
    def conv(self) -> Tensor:
        """f32 [3, C]: the last rows that went into the convolution."""
        ...

    @property
    def recurrent(self) -> Tensor:
        """f32 [nv, dk, dv]."""
        ...


class DeltaNet:
    """One Gated DeltaNet layer's mixer (Yang et al., Gated Delta Networks, 2024; here as transformers 5.23's
    `Qwen3_5MoeGatedDeltaNet` has it).

    Channels of `in_proj_qkv` are [q | k | v], all heads of each; value head h reads key head h // (nv // nk).
    """

    def __init__(
        self,
        config: ModelConfig,
        input_norm: Tensor,
        in_proj_qkv: Linear,
        in_proj_z: Linear,
        in_proj_b: Linear,
        in_proj_a: Linear,
        out_proj: Linear,
        conv_weight: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
    ) -> None:
        parts = (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a)
        self.in_proj = projections(parts, input_norm, config.rms_norm_eps)
        self.out_proj = out_proj
        self.conv_weight = conv_weight.contiguous()
        self.decay = -torch.exp(A_log.float())
        self.dt_bias = dt_bias
        self.norm = norm
        self.eps = config.rms_norm_eps
        self._delta_net = bind("delta_net", norm.device.type)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: DeltaLayer, start: int) -> Tensor:
        """The residual stream x f32 [T, H], not yet normed -> [T, H]; `state` moves on by T tokens. Positions play no
        part here."""
        mixed = self._delta_net(
            *self.in_proj(x),
            self.conv_weight,
            state.conv,
            self.decay,
            self.dt_bias,
            self.norm,
            self.eps,
            state.recurrent,
        )
        return self.out_proj(mixed)
