"""The feed-forward half of a layer: a dense SwiGLU, or routed experts beside one shared expert.

Knows neither tensor names nor where expert weights live.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwenrun.kernels.ops import bind, swiglu
from qwenrun.kernels.weight import Weight
from qwenrun.model.linear import Linear

# x f32 [T, H], index i64 [T, k], weight f32 [T, k] -> f32 [T, H]
Routed = Callable[[Tensor, Tensor, Tensor], Tensor]


class DenseMLP:
    """down(silu(gate(x)) * up(x)): the MLP of the dense models, and the shared expert of the others."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self._swiglu = swiglu(gate.weight, up.weight, down.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x f32 [T, H] -> [T, H]."""
        return self._swiglu(x)


class StackedExperts:
    """Routed experts that are all in memory: gate_up [E, 2I, H], the gate's rows first, and down [E, H, I]."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        self.gate_up, self.down = gate_up, down
        self._experts = bind("experts", gate_up.codes.device.type, gate_up.spec)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x f32 [T, H], index i64 [T, k], weight f32 [T, k] -> the weighted sum, f32 [T, H]."""
        return self._experts(x, self.gate_up, self.down, index, weight)


class MoE:
    """top_k of E routed experts, weighted by their renormalised router probabilities, plus a gated shared expert.

    router [E, H]; routed: computes the chosen experts, wherever they are (see StackedExperts); shared_gate [1, H].
    """

    def __init__(self, top_k: int, router: Tensor, routed: Routed, shared: DenseMLP, shared_gate: Linear) -> None:
        self.top_k = top_k
        self.router, self.routed = Weight.plain(router), routed
        self.shared, self.shared_gate = shared, shared_gate
        self._router = bind("router", router.device.type)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x f32 [T, H] -> the chosen experts i64 [T, k] and their weights f32 [T, k]."""
        return self._router(x, self.router, self.top_k)

    def __call__(self, x: Tensor) -> Tensor:
        """x f32 [T, H] -> [T, H]."""
        index, weight = self.choose(x)
        routed = self.routed(x, index, weight)
        return routed.addcmul_(torch.sigmoid(self.shared_gate(x)), self.shared(x))
