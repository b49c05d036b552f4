"""The feed-forward half of a layer, with the norm before it: a dense SwiGLU, or routed experts beside a shared one.

Both are given the residual stream and what the mixer made of it, and give the stream with all added. Knows neither
tensor names nor where expert weights live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.ops import bind, linear
from qwenrun.kernels.weight import Weight
from qwenrun.model.config import ModelConfig
from qwenrun.model.linear import Linear, SeeExpert, moe_entry, swiglu


class Routed(Protocol):
    """A layer's routed experts."""

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, base: Tensor, /) -> Tensor:
        """x f32 [T, H], index i64 [T, k], weight f32 [T, k], base f32 [T, H] -> base plus the weighted sum, [T, H]."""
        ...

    def watch(self, see: SeeExpert) -> None:
        """Show from now on what each expert reads."""
        ...


class DenseMLP:
    """s + down(silu(gate n) * up n), n the norm of s = x + y: the MLP of the dense models."""

    def __init__(self, config: ModelConfig, norm: Tensor, gate: Linear, up: Linear, down: Linear) -> None:
        self.norm, self.eps = norm, config.rms_norm_eps
        self._rms_norm = bind("rms_norm", norm.device.type)
        self._swiglu = swiglu(gate, up, down)

    def __call__(self, x: Tensor, y: Tensor, between: Callable[[Tensor], None] | None = None) -> Tensor:
        """x, y f32 [T, H] -> [T, H]."""
        stream = x + y
        if between is not None:
            between(stream)
        return self._swiglu(self._rms_norm(stream, self.norm, self.eps)).add_(stream)


class StackedExperts:
    """Routed experts that are all in memory: gate_up [E, 2I, H], the gate's rows first, and down [E, H, I]."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        self.gate_up, self.down = gate_up, down
        self._experts = bind("experts", gate_up.codes.device.type, gate_up.spec)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """x f32 [T, H], index i64 [T, k], weight f32 [T, k], base f32 [T, H] -> base plus the weighted sum."""
        return self._experts(x, self.gate_up, self.down, index, weight, base)

    def watch(self, see: SeeExpert) -> None:
        self._experts = showing(see, self._experts)


def showing(
    see: SeeExpert, experts: Callable[..., Tensor], number: Callable[[int], int] = lambda place: place
) -> Callable[..., Tensor]:
    """The op `experts`, that first shows what each expert's two matrices read.

    number: the expert at a place of the stack.
    """

    def apply(x: Tensor, gate_up: Weight, down: Weight, index: Tensor, *others: Any) -> Tensor:
        for place in index.unique().tolist():
            read = x[(index == place).any(-1)]
            gate, up = linear(read, gate_up[place]).chunk(2, dim=-1)
            see(number(place), read, F.silu(gate).mul_(up))
        return experts(x, gate_up, down, index, *others)

    return apply


class MoE:
    """top_k of E routed experts, weighted by their renormalised router probabilities, plus a gated shared expert.

    router [E, H]; routed: computes the chosen experts, wherever they are (see StackedExperts); gate, up and down: the
    shared expert's; shared_gate [1, H]. `entry`: all that comes before the routed experts (`kernels.ops.moe_entry`).
    """

    def __init__(
        self,
        config: ModelConfig,
        norm: Tensor,
        router: Linear,
        routed: Routed,
        gate: Linear,
        up: Linear,
        down: Linear,
        shared_gate: Linear,
    ) -> None:
        self.top_k, self.eps = config.top_k, config.rms_norm_eps
        self.norm, self.router, self.routed = norm, router.weight, routed
        self._rms_norm, self._router = bind("rms_norm", norm.device.type), bind("router", norm.device.type)
        self.entry = moe_entry(norm, self.eps, self.top_k, router, gate, up, down, shared_gate)

    def choose(self, x: Tensor) -> Tensor:
        """The experts i64 [T, k] for a residual stream x f32 [T, H]."""
        return self._router(self._rms_norm(x, self.norm, self.eps), self.router, self.top_k)[0]

    def __call__(self, x: Tensor, y: Tensor, between: Callable[[Tensor], None] | None = None) -> Tensor:
        """x, y f32 [T, H] -> [T, H]."""
        stream, normed, index, weight, base = self.entry(x, y)
        if between is not None:
            between(stream)
        return self.routed(normed, index, weight, base)
