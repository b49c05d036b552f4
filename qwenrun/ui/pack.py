"""`qwenrun show`, `verify` and `export`: what is in a pack, whether it is what was written, and what others can load.

`show` reads the manifest alone. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

from qwenrun.hub import cache
from qwenrun.model.config import ModelConfig
from qwenrun.quant.packfile.layout import PACK_VERSION, Manifest, TensorEntry, expert_layout
from qwenrun.quant.recipe import stored_bytes
from qwenrun.ui import console
from qwenrun.ui.models import find_download, manifest_of, model_name
from qwenrun.ui.progress import Progress
from qwenrun.ui.tables import fields, table


def show(path: Path, *, tensors: bool, as_json: bool) -> None:
    """Print what the manifest of the pack at `path` says, every tensor if `tensors`."""
    manifest = manifest_of(path)
    content = contents(path, manifest)
    if tensors:
        content["tensors"] = [_tensor(name, entry) for name, entry in manifest.tensors.items()]
    if as_json:
        console.document("show", 1, content)
    else:
        console.say(_render(content))


def contents(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What `show --json` prints, but for the list of tensors."""
    config = ModelConfig.from_hf(manifest.config)
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in manifest.tensors.values():
        form = _format(entry)
        part = parts.setdefault(
            (entry.info.part, form),
            {"part": entry.info.part, "format": form, "tensors": 0, "parameters": 0, "bytes": 0},
        )
        part["tensors"] += 1
        part["parameters"] += prod(entry.info.shape)
        part["bytes"] += stored_bytes(entry.info, entry.assignment)
    parameters = sum(part["parameters"] for part in parts.values())
    nbytes = sum(part["bytes"] for part in parts.values())
    return {
        "pack": str(path),
        "format_version": PACK_VERSION,
        "tool": manifest.tool,
        "model": model_name(config, path),
        "model_type": config.model_type,
        "architecture": _architecture(config),
        "source": manifest.source,
        "recipe": manifest.recipe,
        "notes": list(manifest.notes),
        "parameters": parameters,
        "weight_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters if parameters else None,
        "expert_record_bytes": _record(manifest.tensors.values()),
        "file_bytes": sum(size for size, _ in manifest.files.values()),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in manifest.files.items()},
        "parts": list(parts.values()),
    }


def _architecture(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "attention_layers": len(config.full_layers),
        "deltanet_layers": len(config.linear_layers),
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "experts_per_token": config.top_k,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
    }


def _format(entry: TensorEntry) -> str:
    return entry.info.dtype.lower() if entry.assignment.spec is None else entry.assignment.format


def _tensor(name: str, entry: TensorEntry) -> dict[str, Any]:
    nbytes = stored_bytes(entry.info, entry.assignment)
    return {
        "name": name,
        "part": entry.info.part,
        "shape": list(entry.info.shape),
        "format": _format(entry),
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / prod(entry.info.shape),
        "note": entry.assignment.note,
    }


def _record(entries: Iterable[TensorEntry]) -> int | None:
    """Bytes of one routed expert's record, padding included; None in a dense model."""
    pair = {}
    for entry in entries:
        if entry.info.part == "routed":
            pair[entry.info] = entry.assignment
            if len(pair) == 2:
                return expert_layout(pair).record_size
    return None


def _source(source: dict[str, Any]) -> str:
    files = source.get("files")
    name = source.get("repo") or source.get("name") or ""
    revision = f" at {source['revision']}" if source.get("revision") else ""
    return f"{name}{revision}" + (f", {len(files)} files with their sha256" if isinstance(files, dict) else "")


def _importance(said: Any) -> str:
    """What the search for scales went by; "" if it was the weights alone."""
    if not isinstance(said, dict):
        return ""
    return f"{said.get('name')}: {said.get('tokens')} tokens of {said.get('text')}, read by {said.get('model')}"


def _render(content: dict[str, Any]) -> str:
    shape = content["architecture"]
    experts = f", {shape['experts_per_token']} of {shape['experts']} experts a token" if shape["experts"] else ""
    record = content["expert_record_bytes"]
    head = fields(
        [
            ("pack", f"{content['pack']}, format version {content['format_version']}, by {content['tool']}"),
            ("made from", _source(content["source"])),
            ("importance", _importance(content["source"].get("importance"))),
            (
                "model",
                f"{content['model_type']}, {shape['layers']} layers ({shape['deltanet_layers']} DeltaNet,"
                f" {shape['attention_layers']} attention), hidden {shape['hidden_size']:,}{experts}",
            ),
            ("context", f"{shape['max_position']:,} positions"),
            ("recipe", ": ".join(filter(None, (content["recipe"].get("name"), content["recipe"].get("description"))))),
            (
                "weights",
                f"{content['parameters']:,} parameters, {console.size(content['weight_bytes'])},"
                f" {content['bits_per_weight'] or 0:.3f} bits a weight",
            ),
            ("expert", f"{console.size(record)} a record" if record else ""),
            ("files", f"{len(content['files'])}, {console.size(content['file_bytes'])}"),
            *(("note", text) for text in content["notes"]),
        ]
    )
    rows = [
        (
            part["part"],
            part["format"],
            f"{part['tensors']:,}",
            f"{part['parameters']:,}",
            console.size(part["bytes"]),
            f"{8 * part['bytes'] / part['parameters']:.3f}",
        )
        for part in sorted(content["parts"], key=lambda part: -part["bytes"])
    ]
    parts = table(("part", "<format", "tensors", "parameters", "size", "bits/weight"), rows, left=2)
    blocks = [head, parts]
    if "tensors" in content:
        listing = [
            (t["name"], t["format"], "x".join(map(str, t["shape"])), console.size(t["bytes"]), t["note"])
            for t in content["tensors"]
        ]
        blocks.append(table(("tensor", "<format", "shape", "size", "<note"), listing, left=2))
    return "\n\n".join(blocks)


def verify(name: str, *, as_json: bool, quiet: bool) -> None:
    """Hash every file of a pack, or of a download, again. Raises PackError or ModelError naming what differs."""
    path = Path(name).expanduser()
    if not path.exists() and (download := find_download(name)):
        _verify_download(download, as_json=as_json, quiet=quiet)
        return
    manifest = manifest_of(path)
    total = sum(size for size, _ in manifest.files.values())
    done = 0
    with Progress("verify", quiet=quiet) as progress:
        from qwenrun.quant.packfile import reader

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        reader.verify(path, advance)
    if as_json:
        console.document("verify", 1, {"pack": str(path), "ok": True, "files": len(manifest.files), "bytes": total})
    else:
        console.say(f"{path}: {len(manifest.files)} files, {console.size(total)}, every sha256 as written")


def export(run: Callable[..., int], path: Path, out: Path, target: str, *, as_json: bool, quiet: bool) -> None:
    """Write a pack as a Hugging Face folder; its path goes to stdout."""
    manifest_of(path)
    out = out.expanduser()
    from qwenrun.quant.packfile.reader import PackReader

    with PackReader.open(path) as pack, Progress("export", quiet=quiet) as progress:
        nbytes = run(pack, out, target, progress)
    if as_json:
        console.document("export", 1, {"pack": str(path), "path": str(out), "to": target, "bytes": nbytes})
    else:
        console.say(str(out))
    if not quiet:
        console.note(f"wrote {out}: {console.size(nbytes)} as {target}")


def _verify_download(download: cache.Download, *, as_json: bool, quiet: bool) -> None:
    total, done = download.nbytes, 0
    with Progress("verify", quiet=quiet) as progress:

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        count = cache.verify(download, advance)
    if as_json:
        content = {"download": download.repo, "commit": download.commit, "ok": True, "files": count, "bytes": total}
        console.document("verify", 1, content)
    else:
        console.say(f"{download.repo}: {count} files, {console.size(total)}, every hash is the hub's")
