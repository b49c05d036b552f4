"""Layer: one pre-norm decoder layer, and Rotary: the angles that all its attention layers share.

Knows neither tensor names nor which mixer or feed-forward it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.model.attention import Attention
from qwenrun.model.config import ModelConfig
from qwenrun.model.deltanet import DeltaNet
from qwenrun.model.moe import MoE


class Layer:
    """x += mixer(norm(x)); x += mlp(norm(x)), with zero-centred RMS norms."""

    def __init__(
        self,
        config: ModelConfig,
        input_norm: Tensor,
        mixer: Attention | DeltaNet,
        post_norm: Tensor,
        mlp: Callable[[Tensor], Tensor],
    ) -> None:
        self.input_norm, self.post_norm = input_norm, post_norm
        self.mixer, self.mlp = mixer, mlp
        self.eps = config.rms_norm_eps
        self._rms_norm = bind("rms_norm", input_norm.device.type)
        # Called with the residual stream between the two halves, if somebody wants to look ahead.
        self.between: Callable[[Tensor], None] | None = None

    def preview(self, x: Tensor) -> Tensor | None:
        """The experts i64 [T, k] this layer would choose for a residual stream x f32 [T, H]; None without any."""
        if not isinstance(self.mlp, MoE):
            return None
        return self.mlp.choose(self._rms_norm(x, self.post_norm, self.eps))[0]

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: Any, start: int) -> Tensor:
        """x f32 [T, H] at cache rows start..start+T-1 -> [T, H]. `state` is what the mixer keeps; it moves on."""
        x = x + self.mixer(self._rms_norm(x, self.input_norm, self.eps), rotary, state, start)
        if self.between is not None:
            self.between(x)
        return x + self.mlp(self._rms_norm(x, self.post_norm, self.eps))


class Rotary:
    """cos and sin of the rotary angles of a run of positions, computed once for all attention layers."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.rope = config.rope
        self._rope_tables = bind("rope_tables", device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions i64 [T], or [3, T] for (time, height, width) -> cos, sin f32 [T, rotary_dim / 2]."""
        rope = self.rope
        return self._rope_tables(positions, rope.theta, rope.rotary_dim, rope.mrope_section, rope.yarn)
