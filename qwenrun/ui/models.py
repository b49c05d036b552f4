"""Which model a person means, found, and planned before anything heavy is imported or opened.

Standard library and cold rooms alone. Opens no weights.
"""

from __future__ import annotations

from pathlib import Path

from qwenrun.demo import model_dir
from qwenrun.errors import ModelError, UsageError
from qwenrun.hub import cache
from qwenrun.model.config import ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run
from qwenrun.plan.device import spare_memory
from qwenrun.plan.planner import Budget, Plan, place, weigh
from qwenrun.quant.packfile.layout import MANIFEST, Manifest, read_manifest
from qwenrun.quant.recipe import KEEP, Assignment, TensorInfo
from qwenrun.ui.console import note, size, tokens

Stored = list[tuple[TensorInfo, Assignment]]


def find_model(name: str | None, quiet: bool = False) -> Path:
    """The folder that `-m NAME` means; without a name the embedded demo model, which a note tells.

    Raises ModelError if there is no such folder, or it is no model.
    """
    if name is None:
        folder = model_dir()
        if not (folder / "config.json").is_file():
            raise ModelError("no model given, and this installation has no embedded demo model", "add -m MODEL")
        if not quiet:
            note("no -m given: using the embedded demo model, a toy that knows qwenrun and little else")
        return folder
    path = Path(name).expanduser()
    if is_pack(path) or (path / "config.json").is_file():
        return path
    if not path.exists() and (download := find_download(name)):
        return download.folder
    if path.exists():
        raise ModelError(
            f"{path} is no model: neither a pack ({MANIFEST}) nor a Hugging Face folder (config.json)", f"ls {path}"
        )
    raise ModelError(f"there is no model at {path}", _how_to_get(name))


def find_download(name: str, revision: str = "main") -> cache.Download | None:
    """The model in Hugging Face's cache that a person calls so: OWNER/NAME, or Qwen's of that short name."""
    if cache.is_repo(name):
        return cache.find(name, revision)
    known = find_zoo(name)
    return cache.find(f"Qwen/{known}", revision) if known else None


def find_zoo(name: str) -> str:
    """The family's member of that name, in whatever case; "" if there is none."""
    return next((zoo for zoo in zoo_names() if zoo.lower() == name.lower()), "")


def _how_to_get(name: str) -> str:
    try:
        known = ModelConfig.from_name(name).name
    except (ModelError, UsageError):
        return "qwenrun chat -m PACK, or leave -m out to try the embedded demo model"
    return f"qwenrun pull Qwen/{known}"


def is_pack(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def manifest_of(path: Path) -> Manifest:
    """The checked manifest of the pack at `path`. Raises PackError, ModelError if there is nothing."""
    if not path.exists():
        raise ModelError(f"there is no pack at {path}", "qwenrun quantize SRC -o PACK makes one")
    return read_manifest(path)


def model_name(config: ModelConfig, path: Path) -> str:
    """What to call an open model: its config's name, or its folder's."""
    return "demo" if path.resolve() == model_dir().resolve() else config.name or path.resolve().name


def stored_in(path: Path) -> tuple[ModelConfig, Stored, str]:
    """(config, how each tensor is stored, the recipe's name) of a pack or, as it is, a Hugging Face folder."""
    if is_pack(path):
        manifest = manifest_of(path)
        config = ModelConfig.from_hf(manifest.config, name=path.resolve().name)
        return config, manifest.stored, str(manifest.recipe.get("name", ""))
    config = ModelConfig.from_folder(path)
    return config, [(info, Assignment(KEEP, None)) for info in inventory(config)], ""


def plan_model(path: Path, *, ctx: int, kv: str, ram: int | None, vram: int | None, quiet: bool = False) -> int | None:
    """Plan a model before it is loaded, and say in one line what lies where; the bytes of RAM planned with.

    ram, vram: bytes that were asked for. Without `ram` it is what is free now. Raises DoesNotFitError.
    """
    config, stored, _ = stored_in(path)
    if ram is None:
        ram = spare_memory()
    run = Run(ctx=ctx, kv=kv, mtp=False, vision=False)
    budget = Budget(ram) if vram is None else Budget(vram, ram, gpu=True)
    plan = place(config, weigh(config, stored, run, is_pack(path)), run, budget)
    if not quiet:
        note(plan_line(plan))
    return ram


def plan_line(plan: Plan) -> str:
    """One line: "RAM 11.9 GiB: weights 5.6, KV@4k 0.1, state 0.4, experts 1,402 of 6,144 (23 %), ..."."""
    parts = plan.parts()
    small = [
        ("weights", parts["dense"] + parts["mtp"] + parts["vision"]),
        (f"KV@{tokens(plan.run.ctx)}", parts["kv"]),
        ("state", parts["state"]),
        ("workspace", parts["workspace"]),
        ("runtime", parts["runtime"]),
    ]
    said = [f"{name} {size(nbytes)}" for name, nbytes in small if nbytes]
    if plan.experts:
        said.append(f"experts {plan.slots:,} of {plan.experts:,} ({plan.resident:.0%}) {size(parts['routed'])}")
    line = f"{'VRAM' if plan.budget.gpu else 'RAM'} {size(plan.total())}: {', '.join(said)}"
    if plan.budget.gpu:
        line += f"; RAM {size(plan.total('host'))}: experts {plan.host_slots:,}"
    beyond = plan.total("disk")
    return f"{line}; {size(beyond)} stay on disk" if beyond else line
