"""Recipes: which tensor is stored in which format. Globs of tensor names, the first match wins.

A recipe is a TOML file:

    name = "mine"
    description = "what it is for"
    [[rules]]
    match = "*.mlp.experts.*"        # fnmatch glob(s) over Hugging Face's names, experts in their fused form
    format = "int4-g128"             # a format's name, or "keep": as the checkpoint has it

Tensors no rule matches are kept. Knows names, shapes and formats; reads no weights.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from qwenrun.kernels.spec import BlockSpec
from qwenrun.quant import formats
from qwenrun.quant.errors import RecipeError

FOLDER = Path(__file__).parent / "recipes"
DEFAULT = "balanced"
KEEP = "keep"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_RECIPE_BYTES = 1 << 20

# Where E2M1 (NVFP4, MXFP4) has been measured to do great harm: half of q_proj is the attention's output gate
# (NVIDIA/Model-Optimizer issue 2091), and the delta rule's inputs.
E2M1_HARMS = re.compile(r"(self_attn\.q_proj|linear_attn\.in_proj_(qkv|z))\.weight$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, by its Hugging Face name; routed experts in their fused 3-D form.

    dtype: "BF16", "F16" or "F32" as stored there. part: routed, gdn, attention, shared, router, embedding,
    lm_head, mlp, norm, vision, mtp_routed or mtp.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str

    @property
    def is_experts(self) -> bool:
        return self.part in ("routed", "mtp_routed")

    @property
    def tensor_scales(self) -> int:
        """Tensor scales of one matrix: a fused gate_up has one for the gate's rows and one for the up rows."""
        return 2 if self.is_experts and self.name.endswith("gate_up_proj") else 1


@dataclass(frozen=True, slots=True)
class Rule:
    """A glob over tensor names and the name of a format, or "keep"."""

    match: str
    format: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """How one tensor is stored. `spec` None: verbatim. `note`: what a person should know of it, or ""."""

    format: str
    spec: BlockSpec | None
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named list of rules."""

    name: str
    rules: tuple[Rule, ...]
    description: str = ""

    @cached_property
    def _compiled(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((re.compile(translate(rule.match)), rule.format) for rule in self.rules)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """A shipped recipe by its name, or the TOML file at a path. Raises RecipeError."""
        path = FOLDER / f"{name}.toml"
        if not re.fullmatch(r"\w+", name) or not path.is_file():
            path = Path(name)
        if not path.is_file():
            raise RecipeError(
                f"no recipe {name!r}: it is neither a file nor one of {', '.join(recipe_names())}",
                hint=f"qwenrun quantize --recipe {DEFAULT} ...",
            )
        try:
            if path.stat().st_size > _MAX_RECIPE_BYTES:
                raise RecipeError(f"{path} is too large for a recipe ({path.stat().st_size:,} bytes)")
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{path} is not a TOML file: {error}", hint=f"compare with {FOLDER}/balanced.toml"
            ) from error
        return cls.from_dict(data, str(path), path.stem)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str, default_name: str = "") -> Recipe:
        """Check a parsed recipe; every format must exist. Raises RecipeError."""
        unknown = set(data) - {"name", "description", "rules"}
        if unknown:
            raise RecipeError(f"{where}: unknown keys {', '.join(sorted(unknown))}")
        rules = data.get("rules")
        if not isinstance(rules, list) or not rules:
            raise RecipeError(f"{where}: no [[rules]]")
        made = []
        for number, rule in enumerate(rules, 1):
            good = isinstance(rule, dict) and set(rule) == {"match", "format"}
            matches = [rule["match"]] if good and isinstance(rule["match"], str) else rule["match"] if good else []
            if not (good and isinstance(rule["format"], str) and isinstance(matches, list) and matches):
                raise RecipeError(f"{where}: rule {number} needs `match` (a glob or several) and `format`")
            if rule["format"] != KEEP:
                formats.parse(rule["format"])
            for match in matches:
                if not isinstance(match, str):
                    raise RecipeError(f"{where}: rule {number}: {match!r} is not a glob")
                made.append(Rule(match, rule["format"]))
        name, description = data.get("name", default_name), data.get("description", "")
        if not isinstance(name, str) or not isinstance(description, str):
            raise RecipeError(f"{where}: name and description are strings")
        return cls(name, tuple(made), description)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "rules": [{"match": rule.match, "format": rule.format} for rule in self.rules],
        }

    def assign(self, info: TensorInfo) -> Assignment:
        """How `info` is stored.

        A row length the format's block does not divide falls back to the largest block of that format that
        does, then to INT8, then to BF16; the note says so. A rule that names a tensor which is no matrix is a
        RecipeError, for nothing but a matrix can be cut into blocks.
        """
        wanted = next((form for pattern, form in self._compiled if pattern.match(info.name)), KEEP)
        if wanted == KEEP:
            return Assignment(KEEP, None)
        form = formats.parse(wanted)
        matrix_dims = 3 if info.is_experts else 2
        if len(info.shape) != matrix_dims:
            raise RecipeError(
                f"recipe {self.name!r} stores {info.name} as {wanted}, but its shape {list(info.shape)} is no matrix",
                hint='give such tensors a rule with format = "keep" before that one',
            )
        note = ""
        if not form.spec.fits(info.shape[-1]):
            fallback = next(f for f in formats.fallbacks(form) if f.spec.fits(info.shape[-1]))
            note = (
                f"rows of {info.shape[-1]} do not divide by {form.spec.block}: {fallback.name} instead of {form.name}"
            )
            form = fallback
        if form.spec.plain and form.spec.codes == info.dtype.lower():
            return Assignment(KEEP, None, note)
        if form.spec.codes == "e2m1" and E2M1_HARMS.search(info.name):
            note = "; ".join(filter(None, [note, "4-bit floats are known to do harm here: use int8 or keep"]))
        # The embedding's rows are read one by one; every other matrix is multiplied with.
        spec = form.spec if info.part == "embedding" else form.spec.stored(info.shape[-2])
        return Assignment(form.name, spec, note)


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes, the default first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return tuple(sorted(names, key=lambda name: name != DEFAULT))


def stored_bytes(info: TensorInfo, assignment: Assignment) -> int:
    """Exact bytes of all parts of a tensor, without the padding of expert records."""
    if assignment.spec is None:
        return prod(info.shape) * DTYPE_BYTES[info.dtype]
    *lead, rows, cols = info.shape
    return prod(lead) * assignment.spec.nbytes(rows, cols, info.tensor_scales)


def total_bytes(recipe: Recipe, inventory: Iterable[TensorInfo]) -> int:
    """Bytes of everything in `inventory` under `recipe`."""
    return sum(stored_bytes(info, recipe.assign(info)) for info in inventory)
