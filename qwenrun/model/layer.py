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
from qwenrun.model.moe import DenseMLP, MoE


class Layer:
    """x += mixer(norm(x)); x += mlp(norm(x)), with zero-centred RMS norms that the halves hold."""

    def __init__(self, mixer: Attention | DeltaNet, mlp: DenseMLP | MoE) -> None:
        self.mixer, self.mlp = mixer, mlp
        # Called with the residual stream before the routed experts, if somebody wants to look ahead.
        self.between: Callable[[Tensor], None] | None = None

    def preview(self, x: Tensor) -> Tensor | None:
        """The experts i64 [T, k] this layer would choose for a residual stream x f32 [T, H]; None without any."""
        return self.mlp.choose(x) if isinstance(self.mlp, MoE) else None

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: Any, start: int) -> Tensor:
        """x f32 [T, H] at cache rows start..start+T-1 -> [T, H]. `state` is what the mixer keeps; it moves on."""
        return self.mlp(x, self.mixer(x, rotary, state, start), self.between)

    def until_routed(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: Any, start: int) -> tuple[Tensor, ...]:
        """As far as its routed experts: what `kernels.ops.moe_entry` gives. Only of a layer that has such."""
        assert isinstance(self.mlp, MoE)
        return self.mlp.entry(x, self.mixer(x, rotary, state, start))


class Rotary:
    """cos and sin of the rotary angles of a run of positions, computed once for all attention layers."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.rope = config.rope
        self._rope_tables = bind("rope_tables", device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions i64 [T], or [3, T] for (time, height, width) -> cos, sin f32 [T, rotary_dim / 2]."""
        rope = self.rope
        return self._rope_tables(positions, rope.theta, rope.rotary_dim, rope.mrope_section, rope.yarn)
