"""Which backend computes an op: backends are the sub-folders of this one, asked once when a model is bound.

A backend is a package here that defines `BACKEND = Backend(...)` and, as attributes, the ops it has (named
as in `qwenrun.kernels.ops`). Knows no backend by name but the fallback, and nothing of what an op does.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from qwenrun.kernels.spec import BlockSpec

FALLBACK = "ref"
ENV = "QWENRUN_BACKEND"


@dataclass(frozen=True, slots=True)
class Backend:
    """What a backend says of itself.

    priority: where two can serve, the higher one does; the reference has 0.
    devices: the torch device types it computes on; empty means any.
    refuses: (op, spec or None) -> "" if it can serve on this machine, else a sentence why not.
    rounds: codes of weights whose products it makes with activations rounded to rounded_bits bits, block by block.
    detail: what it runs with on this machine, in a few words, where it runs.
    """

    name: str
    priority: int
    devices: tuple[str, ...]
    refuses: Callable[[str, BlockSpec | None], str]
    rounds: tuple[str, ...] = ()
    rounded_bits: int = 8
    detail: Callable[[], str] = lambda: ""


@cache
def backends() -> dict[str, ModuleType]:
    """The packages of this folder that are backends, the highest priority first."""
    found = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            package = importlib.import_module(f"qwenrun.kernels.{module.name}")
            if hasattr(package, "BACKEND"):
                found.append(package)
    return {p.BACKEND.name: p for p in sorted(found, key=lambda p: -p.BACKEND.priority)}


def refusal(name: str, op: str, device: str, spec: BlockSpec | None) -> str:
    """Why backend `name` does not serve `op` there, or "" if it does."""
    package = backends()[name]
    backend: Backend = package.BACKEND
    if not callable(getattr(package, op, None)):  # a submodule may have an op's name
        return f"has no {op}"
    if backend.devices and device not in backend.devices:
        return f"computes on {', '.join(backend.devices)}, not on {device}"
    return backend.refuses(op, spec)


def pick(op: str, device: str = "cpu", spec: BlockSpec | None = None) -> Callable:
    """The callable that computes `op` on `device` for weights stored as `spec`.

    QWENRUN_BACKEND forces one backend; where that one lacks the op, the reference serves. Raises ValueError
    for an unknown backend or op.
    """
    forced = os.environ.get(ENV)
    if forced and forced not in backends():
        raise ValueError(f"{ENV}={forced}: no such backend; there are {', '.join(backends())}")
    names = [forced, FALLBACK] if forced else list(backends())
    for name in names:
        if not refusal(name, op, device, spec):
            return getattr(backends()[name], op)
    raise ValueError(f"no backend computes {op} on {device}")


def explain(ops: tuple[str, ...], device: str = "cpu", spec: BlockSpec | None = None) -> list[dict[str, str]]:
    """For each op the backend that serves it, and why those before it do not."""
    rows = []
    for op in ops:
        refused = {name: refusal(name, op, device, spec) for name in backends()}
        chosen = next((n for n in backends() if getattr(backends()[n], op, None) is pick(op, device, spec)), "")
        passed = "; ".join(f"{name} {why}" for name, why in refused.items() if why)
        rows.append({"op": op, "backend": chosen, "refused": passed})
    return rows
