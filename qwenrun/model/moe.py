"""The feed-forward half of a layer: a dense SwiGLU, or routed experts beside one shared expert.

Knows neither tensor names nor where expert weights live.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenrun.kernels.ops import bind
from qwenrun.kernels.weight import Weight
from qwenrun.model.linear import Linear


class DenseMLP:
    """down(silu(gate(x)) * up(x)): the MLP of the dense models, and the shared expert of the others."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: Tensor) -> Tensor:
        """x f32 [T, H] -> [T, H]."""
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class MoE:
    """top_k of E routed experts, weighted by their renormalised router probabilities, plus a gated shared expert.

    gate_up: [E, 2I, H], the gate's rows first; down: [E, H, I]; router [E, H]; shared_gate [1, H].
    """

    def __init__(
        self,
        top_k: int,
        router: Tensor,
        gate_up: Weight,
        down: Weight,
        shared: DenseMLP,
        shared_gate: Linear,
    ) -> None:
        self.top_k = top_k
        self.router, self.gate_up, self.down = router, gate_up, down
        self.shared, self.shared_gate = shared, shared_gate
        device = router.device.type
        self._router = bind("router", device)
        self._experts = bind("experts", device, gate_up.spec)

    def __call__(self, x: Tensor) -> Tensor:
        """x f32 [T, H] -> [T, H]."""
        index, weight = self._router(x, self.router, self.top_k)
        routed = self._experts(x, self.gate_up, self.down, index, weight)
        return routed.addcmul_(torch.sigmoid(self.shared_gate(x)), self.shared(x))
