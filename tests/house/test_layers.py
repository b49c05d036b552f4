"""The import law of docs/house.md: three floors, arrows only downward, no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {"qwenrun": "qwenrun", "quant": "qwenrun.quant", "kernels": "qwenrun.kernels"}


@dataclass(frozen=True)
class Import:
    """One import statement's target: `module` as installed; `top` if it runs when the file is imported."""

    module: str
    top: bool
    line: int


def modules() -> dict[str, Path]:
    """Every module of the project: its installed name -> its file."""
    found = {}
    for folder, package in FLOORS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([package, *parts])] = path
    return found


def imports(path: Path) -> list[Import]:
    """All imports of a file but those for the type checker alone. Relative imports are not used here."""
    return list(_walk(ast.parse(path.read_text()).body, top=True))


def _walk(body: list[ast.stmt], top: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, top, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            assert node.module
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", top, node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.orelse, top)
        else:
            inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, field, []), inner)
            for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from _walk(handler.body, inner)


def resolve(name: str, known: dict[str, Path]) -> str | None:
    """The project module that `name` (a module, or a name in one) belongs to, or None if it is foreign."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


MODULES = modules()

# Inside qwenrun a room may import only rooms of a lower number, and itself.
RANK = {
    "errors": 0,
    "demo": 0,
    "model": 1,
    "plan": 2,
    "text": 2,
    "hub": 2,
    "engine": 3,
    "ui": 4,
    "measure": 4,
    "serve": 4,
    "cli": 5,
    "__main__": 6,
    "": 6,  # the package itself: it names Engine lazily
}
BACKENDS = ("ref", "cpu", "gpu")
KERNELS_FOR_QUANT = ("spec", "ops", "weight")
KERNELS_FOR_QWENRUN = ("spec", "ops", "weight", "composed", "cases", "dispatch")
QUANT_FOR_QWENRUN = ("packfile", "recipe", "formats", "errors")
QUANT_FOR_CLI = (*QUANT_FOR_QWENRUN, "convert", "export", "report")


def place(module: str) -> tuple[str, str]:
    """(floor, room) of a module: ("qwenrun", "engine"), ("kernels", "ref"), ..."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in ("kernels", "quant"):
        return parts[1], parts[2] if len(parts) > 2 else ""
    return "qwenrun", parts[1] if len(parts) > 1 else ""


def broken(source: str, target: str) -> str | None:
    """Why `source` may not import `target`, or None if it may."""
    (floor, room), (to_floor, to_room) = place(source), place(target)
    if floor == "kernels":
        if to_floor != "kernels":
            return "kernels stands on nothing"
        if room in BACKENDS and to_room in BACKENDS and to_room not in (room, "ref"):
            return "a backend may fall back to ref, never to another"
        if room not in BACKENDS and to_room in BACKENDS:
            return "backends are found by listing the folder, nobody names them"
    elif floor == "quant":
        if to_floor == "qwenrun" or (to_floor == "kernels" and to_room not in KERNELS_FOR_QUANT):
            return f"quant imports kernels' {', '.join(KERNELS_FOR_QUANT)} alone"
    elif to_floor == "kernels":
        if to_room not in KERNELS_FOR_QWENRUN:
            return f"qwenrun imports kernels' {', '.join(KERNELS_FOR_QWENRUN)} alone"
    elif to_floor == "quant":
        allowed = QUANT_FOR_CLI if room == "cli" else QUANT_FOR_QWENRUN
        if to_room not in allowed:
            return f"{room} imports quant's {', '.join(allowed)} alone"
    elif target != "qwenrun" and room != to_room and RANK[to_room] >= RANK[room]:
        return "the order is cli > ui, measure, serve > engine > plan, text, hub > model > errors"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_import_law(module: str) -> None:
    for imported in imports(MODULES[module]):
        target = resolve(imported.module, MODULES)
        if target and (why := broken(module, target)):
            pytest.fail(f"{MODULES[module]}:{imported.line}: {module} imports {target}: {why}")


def test_the_law_can_be_broken() -> None:
    assert broken("qwenrun.kernels.ops", "qwenrun.quant.recipe")
    assert broken("qwenrun.kernels.cpu.linear", "qwenrun.kernels.gpu.linear")
    assert broken("qwenrun.kernels.ops", "qwenrun.kernels.ref.codec")
    assert broken("qwenrun.quant.convert", "qwenrun.errors")
    assert broken("qwenrun.quant.convert", "qwenrun.kernels.dispatch")
    assert broken("qwenrun.model.moe", "qwenrun.engine.session")
    assert broken("qwenrun.engine.engine", "qwenrun.quant.convert")
    assert broken("qwenrun.plan.buffers", "qwenrun.text.tokenizer")
    assert not broken("qwenrun.cli", "qwenrun.quant.convert")
    assert not broken("qwenrun.kernels.cpu.linear", "qwenrun.kernels.ref.linear")


def test_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        targets = {resolve(i.module, MODULES) for i in imports(path) if i.top}
        graph[module] = {t for t in targets if t and t != module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_room_is_unknown() -> None:
    rooms = {place(module)[1] for module in MODULES if place(module)[0] == "qwenrun"}
    assert rooms <= set(RANK)
