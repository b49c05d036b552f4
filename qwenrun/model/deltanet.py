"""Gated DeltaNet: linear attention with a short convolution and a recurrent state instead of a KV cache.

Knows neither tensor names nor where the state lives: a `DeltaLayer` holds it, and it is updated in place.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.linear import Linear


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
        self.in_proj_qkv, self.in_proj_z = in_proj_qkv, in_proj_z
        self.in_proj_b, self.in_proj_a = in_proj_b, in_proj_a
        self.out_proj = out_proj
        self.conv_weight = conv_weight
        self.decay = -torch.exp(A_log.float())
        self.dt_bias = dt_bias
        self.norm = norm
        self.eps = config.rms_norm_eps
        self.key_heads, self.key_dim = config.linear_key_heads, config.linear_key_dim
        self.value_heads, self.value_dim = config.linear_value_heads, config.linear_value_dim
        keys = self.key_heads * self.key_dim
        self._split = [keys, keys, self.value_heads * self.value_dim]
        device = norm.device.type
        self._conv = bind("conv", device)
        self._delta_rule = bind("delta_rule", device)
        self._gated_rms_norm = bind("gated_rms_norm", device)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: DeltaLayer, start: int) -> Tensor:
        """x f32 [T, H] -> [T, H]; `state` moves on by T tokens. Positions play no part here."""
        tokens = x.shape[0]
        mixed = self._conv(self.in_proj_qkv(x), self.conv_weight, state.conv)
        q, k, v = mixed.split(self._split, dim=1)
        z = self.in_proj_z(x).view(tokens, self.value_heads, self.value_dim)
        beta = torch.sigmoid(self.in_proj_b(x))
        g = self.decay * F.softplus(self.in_proj_a(x) + self.dt_bias)
        out = self._delta_rule(
            q.view(tokens, self.key_heads, self.key_dim),
            k.view(tokens, self.key_heads, self.key_dim),
            v.view(tokens, self.value_heads, self.value_dim),
            g,
            beta,
            state.recurrent,
        )
        return self.out_proj(self._gated_rms_norm(out, self.norm, z, self.eps).reshape(tokens, -1))
