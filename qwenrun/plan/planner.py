"""The plan of a model for several context lengths: what `qwenrun vram` prints, in exact bytes.

Sums the list of buffers and adds what a reader asks next: does the model have positions for that many tokens,
and how many bytes does a token cost to decode. Knows no table and no unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import Run, list_buffers, read_per_token, totals
from qwenrun.quant.recipe import Assignment, TensorInfo


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """One run. parts: bytes by part, as `totals` names them, with `total`. yarn_factor: the smallest whole YaRN
    factor that gives every token a position; 1 if the model has them as it is."""

    run: Run
    parts: dict[str, int]
    yarn_factor: int

    @property
    def total(self) -> int:
        return self.parts["total"]


@dataclass(frozen=True, slots=True)
class PlanTable:
    """A model under one recipe, for several runs.

    recipe: its name. positions: tokens the model has positions for. kv_layers of layers have a KV cache.
    read_per_token: weight bytes read to decode one token.
    """

    model: str
    recipe: str
    positions: int
    layers: int
    kv_layers: int
    read_per_token: int
    contexts: tuple[ContextPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, bytes as integers. Fields are only ever added under one version of the document."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "max_position": self.positions,
            "layers": self.layers,
            "kv_layers": self.kv_layers,
            "read_per_token_bytes": self.read_per_token,
            "contexts": [
                {"ctx": plan.run.ctx, "kv": plan.run.kv, "yarn_factor": plan.yarn_factor, "bytes": plan.parts}
                for plan in self.contexts
            ],
        }


def plan_table(
    config: ModelConfig, stored: Iterable[tuple[TensorInfo, Assignment]], runs: Sequence[Run], recipe: str = ""
) -> PlanTable:
    """Plan `config` with its tensors stored as `stored` says, once for each run."""
    stored = list(stored)
    return PlanTable(
        model=config.name,
        recipe=recipe,
        positions=config.positions,
        layers=config.num_layers,
        kv_layers=len(config.full_layers),
        read_per_token=read_per_token(config, stored),
        contexts=tuple(
            ContextPlan(run, totals(list_buffers(config, stored, run)), config.yarn_factor(run.ctx)) for run in runs
        ),
    )
