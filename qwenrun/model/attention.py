"""Gated full attention, with the norm before it: grouped queries, per-head norms, partial rotary, a sigmoid output
gate.

Knows neither tensor names nor how keys and values are stored: a `KVLayer` keeps them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.linear import Linear, projections


class KVLayer(Protocol):
    """Keys and values of one sequence in one attention layer."""

    def attend(self, start: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k, v [T, Hkv, D] at rows start..start+T-1, then attend with q [T, Hq, D] to all rows up to there,
        causally -> [T, Hq, D]."""
        ...


class Attention:
    """One attention layer's mixer.

    q_proj has 2*Hq*D rows: for each head D rows of the query, then D rows of the gate. The cached keys are
    those after norm and rotary. Formulas as in transformers 5.23's `Qwen3_5MoeAttention`.
    """

    def __init__(
        self,
        config: ModelConfig,
        norm: Tensor,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        q_norm: Tensor,
        k_norm: Tensor,
    ) -> None:
        self.qkv_proj = projections((q_proj, k_proj, v_proj), norm, config.rms_norm_eps)
        self.o_proj = o_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        device = q_norm.device.type
        self._rms_norm = bind("rms_norm", device)
        self._apply_rope = bind("apply_rope", device)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVLayer, start: int) -> Tensor:
        """The residual stream x f32 [T, H], not yet normed, at cache rows start..start+T-1, rotary (cos, sin)
        [T, rotary_dim/2] -> [T, H]."""
        tokens = x.shape[0]
        cos, sin = rotary
        q_gate, k, v = self.qkv_proj(x)
        q, gate = q_gate.view(tokens, self.num_heads, 2, self.head_dim).unbind(2)
        k = k.view(tokens, self.num_kv_heads, self.head_dim)
        v = v.view(tokens, self.num_kv_heads, self.head_dim)
        q = self._apply_rope(self._rms_norm(q, self.q_norm, self.eps), cos, sin)
        k = self._apply_rope(self._rms_norm(k, self.k_norm, self.eps), cos, sin)
        mixed = cache.attend(start, q, k, v, self.scale) * torch.sigmoid(gate)
        return self.o_proj(mixed.reshape(tokens, -1))
