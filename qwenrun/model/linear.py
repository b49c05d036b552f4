"""Linear: a stored matrix together with the kernel that multiplies by it, picked once when the model is bound.

And several of them at once. What they read can be shown to somebody (`Watch`): they are then computed one by one.
Knows no tensor name and no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from qwenrun.kernels import composed, ops
from qwenrun.kernels.weight import Weight

# Shown what a matrix [N, K] is about to read: f32 [T, K].
See = Callable[[Tensor], None]
# The same of one routed expert: its number, the tokens that chose it f32 [T, H], and what its down reads f32 [T, I].
SeeExpert = Callable[[int, Tensor, Tensor], None]


class Watch(Protocol):
    """Whoever wants to see what the matrices of a model read; asked once for each when it is bound."""

    def linear(self, name: str) -> See:
        """For the matrix that is stored as `name`."""
        ...

    def experts(self, prefix: str) -> SeeExpert:
        """For a layer's routed experts, `prefix`.gate_up_proj and `prefix`.down_proj."""
        ...


class Linear:
    """y = x W^T for W [rows, cols] in any stored format: x [T, cols] -> [T, rows], accumulated in float32."""

    __slots__ = ("_apply", "seen", "weight")

    def __init__(self, weight: Weight, seen: See | None = None) -> None:
        self.weight, self.seen = weight, seen
        self._apply = ops.linears((weight,)) if seen is None else _showing(seen, ops.linears((weight,)))

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)[0]


def projections(parts: Sequence[Linear], norm: Tensor, eps: float) -> Callable[[Tensor], list[Tensor]]:
    """`kernels.ops.linears` of these."""
    if (own := _watched(parts)) is not None:
        return composed.linears(own, parts, norm, eps)  # type: ignore[arg-type]
    return ops.linears([part.weight for part in parts], norm, eps)


def swiglu(gate: Linear, up: Linear, down: Linear) -> Callable[[Tensor], Tensor]:
    """`kernels.ops.swiglu` of these."""
    parts = (gate, up, down)
    if (own := _watched(parts)) is not None:
        return composed.swiglu(own, *parts)  # type: ignore[arg-type]
    return ops.swiglu(*(part.weight for part in parts))


def moe_entry(
    norm: Tensor, eps: float, k: int, router: Linear, gate: Linear, up: Linear, down: Linear, shared_gate: Linear
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """`kernels.ops.moe_entry` of these."""
    shared = (gate, up, down, shared_gate)
    if (own := _watched((router, *shared))) is not None:
        return composed.moe_entry(own, norm, eps, router, k, *shared)  # type: ignore[arg-type]
    return ops.moe_entry(norm, eps, router.weight, k, *(part.weight for part in shared))


def _showing(seen: See, product: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
    def apply(x: Tensor) -> list[Tensor]:
        seen(x)
        return product(x)

    return apply


class _OneByOne:
    """The ops that composed ones call, with a Linear in a Weight's place: it shows what it reads."""

    def __init__(self, device: str) -> None:
        self.rms_norm = ops.bind("rms_norm", device)

    def linear(self, x: Tensor, part: Linear) -> Tensor:
        return part(x)

    def swiglu(self, *parts: Any) -> Callable[[Tensor], Tensor]:
        return composed.swiglu(self, *parts)

    def router(self, x: Tensor, gate: Any, k: int) -> tuple[Tensor, Tensor]:
        return composed.router(self, x, gate, k)


def _watched(parts: Sequence[Linear]) -> _OneByOne | None:
    if all(part.seen is None for part in parts):
        return None
    return _OneByOne(parts[0].weight.codes.device.type)
