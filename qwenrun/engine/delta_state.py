"""State of one sequence in one DeltaNet layer: views into memory that `state` allocates once. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeltaState:
    """conv f32 [3, C], recurrent f32 [nv, dk, dv]; a layer updates both in place."""

    conv: Tensor
    recurrent: Tensor
