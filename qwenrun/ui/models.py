"""Which model a person means, found and checked before anything heavy is imported or opened.

Standard library and cold rooms alone. Opens no weights.
"""

from __future__ import annotations

from pathlib import Path

from qwenrun.demo import model_dir
from qwenrun.errors import DoesNotFitError, ModelError, UsageError
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import inventory
from qwenrun.plan.buffers import Run, list_buffers, totals
from qwenrun.quant.errors import PackError
from qwenrun.quant.packfile.layout import MANIFEST, MAX_JSON_BYTES, Manifest, parse_manifest, strict_json
from qwenrun.quant.recipe import KEEP, Assignment
from qwenrun.ui.console import note, size


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
    if path.exists():
        raise ModelError(
            f"{path} is no model: neither a pack ({MANIFEST}) nor a Hugging Face folder (config.json)", f"ls {path}"
        )
    raise ModelError(f"there is no model at {path}", _how_to_get(name))


def _how_to_get(name: str) -> str:
    try:
        known = ModelConfig.from_name(name).name
    except (ModelError, UsageError):
        return "qwenrun chat -m PACK, or leave -m out to try the embedded demo model"
    return f"download Qwen/{known} first: hf download Qwen/{known} --local-dir {known}"


def is_pack(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def manifest_of(path: Path) -> Manifest:
    """The checked manifest of the pack at `path`. Raises PackError, ModelError if there is nothing."""
    if not path.exists():
        raise ModelError(f"there is no pack at {path}", "qwenrun quantize SRC -o PACK makes one")
    file = path / MANIFEST
    if not file.is_file():
        raise PackError(f"{path} is not a pack: it has no {MANIFEST}", "qwenrun quantize SRC -o PACK makes one")
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise PackError(f"{file}: {file.stat().st_size:,} bytes is too large for a manifest")
        text = file.read_bytes()
    except OSError as error:
        raise PackError(f"{file} can't be read: {error.strerror}") from error
    return parse_manifest(strict_json(text, str(file)), str(file))


def model_name(config: ModelConfig, path: Path) -> str:
    """What to call an open model: its config's name, or its folder's."""
    return "demo" if path.resolve() == model_dir().resolve() else config.name or path.resolve().name


def check_memory(path: Path, *, ctx: int, kv: str, budget: int | None, available: int | None) -> None:
    """Refuse, before anything is loaded, a model whose plan exceeds the memory. Raises DoesNotFitError.

    budget: bytes that everything must fit in, if a person said so. available: bytes that are free, if known. A
    pack's weights are mapped, not loaded: if only they exceed what is free that is slow, and a note says so.
    """
    run = Run(ctx=ctx, kv=kv, mtp=False, vision=False)
    mapped = is_pack(path)
    if mapped:
        manifest = manifest_of(path)
        config = ModelConfig.from_hf(manifest.config, name=path.resolve().name)
        stored = [(entry.info, entry.assignment) for entry in manifest.tensors.values()]
    else:
        config = ModelConfig.from_folder(path)
        stored = [(info, Assignment(KEEP, None)) for info in inventory(config)]
    parts = totals(list_buffers(config, stored, run))
    weights = parts["dense"] + parts["routed"]
    own = parts["total"] - (weights if mapped else 0)
    limit, needed, what = (
        (budget, parts["total"], "--budget") if budget is not None else (available, own, "free memory")
    )
    if limit is not None and needed > limit:
        raise DoesNotFitError(
            f"{path} with a context of {ctx:,} tokens needs {size(needed)}, and the {what} is {size(limit)}\n"
            f"  weights {size(weights)}{' (mapped)' if mapped else ''}, KV cache {size(parts['kv'])},"
            f" DeltaNet state {size(parts['state'])}, workspace {size(parts['workspace'])}",
            f"a shorter --ctx, --kv int8 or a smaller recipe; see: qwenrun vram {path} --ctx {ctx}",
        )
    if available is not None and parts["total"] > available:
        note(
            f"note: {path} needs {size(parts['total'])} and {size(available)} are free: weights will be read from"
            " disk again and again, which is slow"
        )
