"""The ordinary cache of Hugging Face downloads as a folder: where it is, which models it has, whether they are whole.

Standard library alone; asks nobody. A repository is `models--OWNER--NAME` with `blobs/` named by their hashes,
`snapshots/COMMIT/` of links to them, and `refs/` that say which commit a branch was. Knows no model's config.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwenrun.errors import ModelError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HASH_BLOCK = 4 << 20
SHA256, SHA1 = 64, 40  # digits: of a large file, and of a small one as git names it


@dataclass(frozen=True)
class Download:
    """One commit of a repository in the cache. files: name -> its blob."""

    repo: str
    commit: str
    folder: Path
    files: dict[str, Path]

    @property
    def nbytes(self) -> int:
        return sum(blob.stat().st_size for blob in self.files.values())


def cache_dir() -> Path:
    """Where Hugging Face's own tools keep downloads: HF_HUB_CACHE, HF_HOME/hub, or under the user's cache."""
    if told := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(told).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def is_repo(name: str) -> bool:
    """Whether it may be the name of a repository, OWNER/NAME."""
    return _REPO.fullmatch(name) is not None and ".." not in name


def is_revision(name: str) -> bool:
    """Whether it may be a branch, a tag or a commit."""
    return re.fullmatch(r"[\w][\w./-]*", name) is not None and ".." not in name and "//" not in name


def repo_dir(repo: str) -> Path:
    """The repository's folder in the cache, there or not."""
    return cache_dir() / ("models--" + repo.replace("/", "--"))


def find(repo: str, revision: str = "main") -> Download | None:
    """The downloaded commit of a branch, tag or hash; None if it is not there or not whole."""
    if not (is_repo(repo) and is_revision(revision)):
        return None
    folder = repo_dir(repo)
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    return _snapshot(repo, folder / "snapshots" / commit)


def downloads() -> Iterator[Download]:
    """Every whole commit of a model in the cache."""
    for folder in sorted(cache_dir().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted((folder / "snapshots").glob("*")):
            if found := _snapshot(repo, snapshot):
                yield found


def _snapshot(repo: str, folder: Path) -> Download | None:
    if not (folder / "config.json").is_file():
        return None
    files = {path.name: path.resolve() for path in sorted(folder.iterdir()) if path.is_file()}
    broken = any(path.is_symlink() and not path.exists() for path in folder.iterdir())
    weights = any(name.endswith(".safetensors") for name in files)
    return Download(repo, folder.name, folder, files) if weights and not broken else None


def digest_of(path: Path, kind: int, progress: Callable[[int], None] | None = None) -> str:
    """The hash of a file as the hub names it: SHA256 digits, or SHA1 with git's header."""
    digest = hashlib.sha256() if kind == SHA256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def verify(download: Download, progress: Callable[[int], None] | None = None) -> int:
    """Hash every file of a download again and compare with its blob's name, the hub's hash; how many there are.

    Raises ModelError naming the files that differ.
    """
    wrong = []
    for name, blob in download.files.items():
        known = re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob.name)
        if not known or digest_of(blob, len(blob.name), progress) != blob.name:
            wrong.append(name)
    if wrong:
        raise ModelError(
            f"{download.repo} at {download.commit[:12]}: {len(wrong)} of {len(download.files)} files are not what"
            f" the hub has: {', '.join(wrong[:4])}",
            f"qwenrun pull {download.repo} --revision {download.commit} fetches them again",
        )
    return len(download.files)
