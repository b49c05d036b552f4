"""Formats: a name, a BlockSpec and the scales that are tried for it. One file a family of formats.

`parse("int4-g64-zero")` finds a format by name; the families are the modules of this folder, each with
`FORMATS` from the most to the least compact block. Knows nothing of tensors.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Format:
    """A format by name. family: the module it is declared in. trials: those of `kernels.ops.fit`; none if plain."""

    name: str
    spec: BlockSpec
    family: str
    trials: tuple[tuple[float, float], ...] = ()


@cache
def registry() -> dict[str, Format]:
    """Every format by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for form in importlib.import_module(f"{__name__}.{module.name}").FORMATS:
            found[form.name] = form
    return found


def parse(name: str) -> Format:
    """The format of that name; RecipeError with the list of names if there is none."""
    known = registry()
    if name not in known:
        raise RecipeError(f"unknown format {name!r}", hint=f"one of: {', '.join(known)}, keep")
    return known[name]


def fallbacks(form: Format) -> list[Format]:
    """What to try, in this order, where `form`'s block does not divide a row."""
    known = registry()
    same = [f for f in known.values() if f.family == form.family and f.spec.zero == form.spec.zero]
    smaller = sorted((f for f in same if f.spec.block < form.spec.block), key=lambda f: -f.spec.block)
    eight = sorted((f for f in known.values() if f.family == "int8"), key=lambda f: -f.spec.block)
    return [*smaller, *(f for f in eight if f not in smaller and f != form), known["bf16"]]
