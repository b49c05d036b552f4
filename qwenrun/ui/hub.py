"""`qwenrun pull`, `ls`, `du`, `rm`: models from the hub, and what lies in the cache of downloads.

Knows no weights: packs are known by their manifests, downloads by their hashes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenrun.errors import ModelError, QwenrunError, UsageError
from qwenrun.hub import cache
from qwenrun.model.config import ModelConfig
from qwenrun.ui import console
from qwenrun.ui.models import is_pack, manifest_of
from qwenrun.ui.progress import Progress
from qwenrun.ui.tables import table

# Files whose change is a change of the model.
_WEIGHTS = (".safetensors", ".safetensors.index.json", "config.json")


def repo_of(name: str) -> str:
    """OWNER/NAME of what a person calls a model: the name itself, or Qwen's of that short name. Raises UsageError."""
    return name if cache.is_repo(name) else f"Qwen/{ModelConfig.from_name(name).name}"


def pull(name: str, revision: str, *, as_json: bool, quiet: bool) -> None:
    """Download a model into the cache; its folder there goes to stdout."""
    from qwenrun.hub import remote

    repo = repo_of(name)
    with Progress("pull", quiet=quiet) as progress:
        found = remote.pull(repo, revision, progress)
    if as_json:
        files = {name: {"bytes": blob.stat().st_size, "hash": blob.name} for name, blob in found.files.items()}
        content = {"repo": repo, "revision": revision, "commit": found.commit, "path": str(found.folder)}
        console.document("pull", 1, {**content, "bytes": found.nbytes, "files": files})
    else:
        console.say(str(found.folder))
    if not quiet:
        console.note(
            f"{repo} at {found.commit[:12]}: {len(found.files)} files, {console.size(found.nbytes)}, every hash is the"
            f" hub's; try: qwenrun quantize {repo} -o {repo.rpartition('/')[2]}.pack"
        )


def check(name: str, revision: str, *, as_json: bool) -> None:
    """Whether the hub has other weights now than a pack was made from, or a download is. Raises QwenrunError if so."""
    from qwenrun.hub import remote

    repo, commit, used = _used(name, revision)
    found = remote.compare(repo, commit, used, revision)
    if as_json:
        content: dict[str, Any] = {"repo": repo, "same": found.same, "was": found.was, "now": found.now}
        console.document("pull-check", 1, content | {"changed": found.changed, "gone": found.gone, "new": found.new})
    elif found.same:
        moved = "" if found.was == found.now else f", though the repository moved on from {found.was[:12] or '?'}"
        console.say(f"{repo}: the same {len(used)} files at {found.now[:12]}{moved}")
    else:
        rows = [(kind, file) for kind in ("changed", "gone", "new") for file in getattr(found, kind)]
        console.say(table(("what", "<file"), rows))
    if not found.same:
        count = len(found.changed) + len(found.gone) + len(found.new)
        raise QwenrunError(
            f"{repo} has changed: {count} files differ between {found.was[:12] or name} and {found.now[:12]}",
            f"qwenrun pull {repo}",
        )


def _used(name: str, revision: str) -> tuple[str, str, dict[str, str]]:
    """(repository, commit, files with their hashes) of a pack's source, or of a download."""
    path = Path(name).expanduser()
    if is_pack(path):
        source = manifest_of(path).source
        repo, files = source.get("repo"), source.get("files")
        if not repo or not isinstance(files, dict):
            raise ModelError(f"{path} was made from a folder, not from the hub: its source is {source.get('name')}")
        used = {file: str(said["sha256"]) for file, said in files.items() if file.endswith(_WEIGHTS)}
        return str(repo), str(source.get("revision", "")), used
    repo = repo_of(name)
    found = cache.find(repo, revision)
    if found is None:
        raise ModelError(f"{repo} is neither a pack nor in {cache.cache_dir()}", f"qwenrun pull {repo}")
    return repo, found.commit, {file: blob.name for file, blob in found.files.items() if file.endswith(_WEIGHTS)}


def ls(folders: Iterable[Path], *, as_json: bool) -> None:
    """Packs in `folders`, and models in the cache of downloads."""
    packs = [_pack(path) for folder in folders for path in sorted(folder.expanduser().glob("*")) if is_pack(path)]
    there: list[dict[str, Any]] = [
        {"repo": one.repo, "commit": one.commit, "path": str(one.folder), "bytes": one.nbytes}
        for one in cache.downloads()
        if _is_ours(one)
    ]
    if as_json:
        console.document("ls", 1, {"packs": packs, "downloads": there})
        return
    rows = [(p["path"], console.size(p["bytes"]), p["recipe"], p["source"]) for p in packs]
    rows += [(d["repo"], console.size(d["bytes"]), "as downloaded", d["commit"][:12]) for d in there]
    if rows:
        console.say(table(("model", "size", "<recipe", "<from"), rows))
    else:
        console.note("no pack here and no download; try: qwenrun pull Qwen3.5-0.8B")


def _pack(path: Path) -> dict[str, Any]:
    try:
        manifest = manifest_of(path)
    except Exception as error:  # a damaged one is listed too, with what is wrong
        return {"path": str(path), "bytes": 0, "recipe": f"damaged: {error}", "source": ""}
    source = manifest.source
    nbytes = sum(size for size, _ in manifest.files.values())
    recipe, made_from = str(manifest.recipe.get("name", "")), str(source.get("repo") or source.get("name") or "")
    return {"path": str(path), "bytes": nbytes, "recipe": recipe, "source": made_from}


def _is_ours(download: cache.Download) -> bool:
    try:
        ModelConfig.from_folder(download.folder)
    except (QwenrunError, OSError):
        return False
    return True


def du(*, as_json: bool) -> None:
    """What the downloads of the family take: every blob once, unfinished ones too."""
    rows: list[dict[str, Any]] = []
    for repo in sorted({one.repo for one in cache.downloads() if _is_ours(one)}):
        blobs = cache.repo_dir(repo) / "blobs"
        sizes = {path.name: path.stat().st_size for path in blobs.iterdir() if path.is_file()}
        unfinished = sum(size for name, size in sizes.items() if name.endswith("-partial"))
        rows.append({"repo": repo, "bytes": sum(sizes.values()), "unfinished": unfinished})
    total = sum(row["bytes"] for row in rows)
    if as_json:
        console.document("du", 1, {"cache": str(cache.cache_dir()), "downloads": rows, "bytes": total})
    else:
        shown = [(row["repo"], console.size(row["bytes"]), console.size(row["unfinished"])) for row in rows]
        console.say(table(("download", "size", "unfinished"), [*shown, (), ("total", console.size(total), "")]))


def rm(name: str, *, yes: bool) -> None:
    """Remove a pack's folder, or a model from the cache of downloads, with all its commits.

    Raises UsageError if nobody said yes, ModelError if it is neither.
    """
    path = Path(name).expanduser()
    if is_pack(path):
        if path.is_symlink():
            raise UsageError(f"{path} is a link; its pack is elsewhere", f"qwenrun rm {path.resolve()}")
        target, nbytes = path, sum(size for size, _ in manifest_of(path).files.values())
    else:
        repo = repo_of(name) if not path.exists() else ""
        target = cache.repo_dir(repo) if repo else path
        if not repo or not target.is_dir():
            raise ModelError(f"{name} is neither a pack nor a download", "qwenrun ls")
        nbytes = sum(file.stat().st_size for file in (target / "blobs").iterdir()) if (target / "blobs").is_dir() else 0
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{target} ({console.size(nbytes)}) would be removed", "add --yes")
        console.note(f"remove {target} ({console.size(nbytes)})? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError(f"{target} stays", "")
    try:
        shutil.rmtree(target)
    except OSError as error:
        raise QwenrunError(f"{target} can't be removed: {error.strerror or error}") from error
    console.note(f"removed {target}: {console.size(nbytes)}")
