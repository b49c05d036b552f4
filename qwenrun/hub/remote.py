"""Downloads from the hub into the ordinary cache: resumed where they stopped, kept only if the hash is the hub's.

huggingface_hub is asked for what a repository holds, for the token and for connections. The bytes are fetched here: a
download has to go on where a killed one stopped, and a wrong byte has to be noticed. One commit is fetched, however
the branch moves meanwhile. Knows no terminal.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrun.errors import ModelError, QwenrunError, UsageError
from qwenrun.hub.cache import SHA1, SHA256, Download, digest_of, find, is_repo, is_revision, repo_dir

# What a model needs; never what holds a pickle. Names are those of the repository's own folder.
_WANTED = re.compile(r"[\w-][\w.-]*\.(safetensors|json|jinja)|merges\.txt")
WORKERS = 4
# Tries without a byte of progress, the first wait between them in seconds, and the longest a server may ask for.
TRIES, WAIT, LONGEST_WAIT = 6, 1.0, 60.0
# Times that a whole file may come with a wrong hash.
COPIES = 2
TIMEOUT = 30.0
PARTIAL = ".qwenrun-partial"

# progress(done bytes, of how many, the file's name)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class File:
    """A file of a repository. digest: its sha256, or of a small file git's sha1 of it."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """What a commit of a repository holds of a model."""

    repo: str
    commit: str
    files: tuple[File, ...]


def describe(repo: str, revision: str = "main") -> Listing:
    """Ask the hub. Raises ModelError if there is no such model or it may not be read, QwenrunError without a hub."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    if not is_repo(repo):
        raise UsageError(f"{repo!r} is no repository's name: OWNER/NAME", "qwenrun pull Qwen/Qwen3.5-35B-A3B")
    if not is_revision(revision):
        raise UsageError(f"{revision!r} is no revision", "--revision main, a tag, or a commit's 40 digits")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise QwenrunError("HF_HUB_OFFLINE is set, so the hub can't be asked", "unset HF_HUB_OFFLINE")
    try:
        info = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its owner has to let you in first", f"open {_endpoint()}/{repo}, then set HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}", f"qwenrun pull {repo}") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"{_endpoint()} has no model {repo}, or it is private", "check the name; a private one needs HF_TOKEN"
        ) from error
    except (hub.HfHubHTTPError, OSError, ValueError) as error:
        raise QwenrunError(f"{_endpoint()} can't be asked for {repo}: {_said(error)}", "try again later") from error
    except Exception as error:  # whatever the library's connections raise
        raise QwenrunError(f"{_endpoint()} can't be reached: {_said(error)}", "check the network") from error
    files = []
    for sibling in info.siblings or ():
        if _WANTED.fullmatch(sibling.rfilename):
            digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            files.append(_checked(repo, sibling.rfilename, sibling.size, digest))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ModelError(f"{repo} holds no safetensors", "choose a repository with the model's weights")
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise ModelError(f"{repo}: the hub names no commit for {revision!r}")
    return Listing(repo, str(info.sha), tuple(files))


def _checked(repo: str, name: str, size: Any, digest: Any) -> File:
    if not isinstance(size, int) or size < 0 or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", str(digest)):
        raise ModelError(f"{repo}: the hub does not say how long {name} is and what its hash is")
    return File(name, size, str(digest))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _said(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def pull(repo: str, revision: str = "main", progress: Progress | None = None) -> Download:
    """Download what `repo` has at `revision` into the cache; what is there already is not fetched again.

    Raises ModelError, QwenrunError (no network, a full disk); everything fetched so far is kept and used next time.
    """
    listing = describe(repo, revision)
    folder = repo_dir(repo)
    try:
        _fetch_all(listing, folder, progress)
        _link(listing, folder, revision)
    except OSError as error:
        raise QwenrunError(f"{folder} can't be written: {error.strerror or error}", "free some space") from error
    found = find(repo, listing.commit)
    assert found is not None
    return found


def _fetch_all(listing: Listing, folder: Path, progress: Progress | None) -> None:
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    missing = [file for file in _distinct(listing.files) if not _is_there(blobs / file.digest, file)]
    left = sum(file.size - min(file.size, _size(_partial(blobs, file))) for file in missing)
    free = shutil.disk_usage(blobs).free
    if left > free:
        raise QwenrunError(
            f"{listing.repo} needs {left:,} bytes more, and {free:,} are free in {blobs}",
            "free some space, or set HF_HOME to a larger disk",
        )
    total = sum(file.size for file in _distinct(listing.files))
    done, lock, stop = total - left, threading.Lock(), threading.Event()

    def advance(size: int, name: str) -> None:
        nonlocal done
        with lock:
            done += size
            if progress:
                progress(done, total, name)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="pull") as pool:
        work = [pool.submit(fetch, listing, file, blobs, advance, stop) for file in missing]
        try:
            for one in work:
                one.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _distinct(files: Iterable[File]) -> list[File]:
    """Files of the same content are one blob. The largest come first."""
    return sorted({file.digest: file for file in files}.values(), key=lambda file: -file.size)


def _is_there(blob: Path, file: File) -> bool:
    return blob.is_file() and blob.stat().st_size == file.size


def _partial(blobs: Path, file: File) -> Path:
    return blobs / f"{file.digest}{PARTIAL}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def fetch(
    listing: Listing, file: File, blobs: Path, advance: Callable[[int, str], None], stop: threading.Event
) -> None:
    """One file to its place among the blobs, after its hash is the hub's."""
    path = _partial(blobs, file)
    with path.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is downloading {listing.repo}", "wait for it") from error
        for _ in range(COPIES):
            fill(listing, file, out, advance, stop)
            out.flush()
            found = digest_of(path, len(file.digest))
            if found == file.digest:
                os.fsync(out.fileno())
                os.replace(path, blobs / file.digest)
                return
            advance(-file.size, file.name)
            out.truncate(0)
    path.unlink(missing_ok=True)
    raise ModelError(
        f"{file.name} of {listing.repo} came {COPIES} times with the hash {found[:16]}, and the hub says"
        f" {file.digest[:16]}: what was sent is not what the hub has",
        f"try again, or another endpoint than {_endpoint()} (HF_ENDPOINT)",
    )


def fill(
    listing: Listing,
    file: File,
    out: Any,
    advance: Callable[[int, str], None],
    stop: threading.Event,
    beginning: bool = False,
) -> None:
    """Append to `out` until it is as long as `file`; after a broken connection from where it broke.

    beginning: the file on the hub is longer.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repo, file.name, revision=listing.commit, endpoint=_endpoint())
    tries, wait, trouble = 0, WAIT, ""
    while (have := out.seek(0, os.SEEK_END)) < file.size:
        if stop.is_set():
            raise QwenrunError("the download was stopped")
        if tries == TRIES:
            raise QwenrunError(
                f"{file.name} of {listing.repo} can't be fetched beyond {have:,} of {file.size:,} bytes: {trouble}",
                "the same command goes on from there",
            )
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={have}-{file.size - 1}"}
        asked = 0.0
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as answer:
                if answer.status_code in (200, 206):
                    if answer.status_code == 200 or not _begins_at(answer.headers.get("Content-Range", ""), have):
                        # It sends the whole file: what there was is not needed.
                        advance(-have, file.name)
                        out.truncate(0)
                        if answer.status_code == 206:
                            raise OSError(f"the server sent {answer.headers.get('Content-Range')!r} for byte {have}")
                    trouble = "the connection was closed early"
                    for block in answer.iter_raw():
                        room = file.size - out.seek(0, os.SEEK_END)
                        if beginning:
                            block = block[:room]
                        if len(block) > room:
                            raise OSError(f"the server sent more than the {file.size:,} bytes there are")
                        out.write(block)
                        advance(len(block), file.name)
                        tries, wait = 0, WAIT
                        if stop.is_set() or (beginning and len(block) == room):
                            break
                    if out.seek(0, os.SEEK_END) > have:
                        continue
                elif answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                    trouble = f"the server answers {answer.status_code}"
                    told = answer.headers.get("Retry-After", "")
                    asked = float(told) if told.isdigit() else 0.0
                else:
                    raise ModelError(
                        f"{file.name} of {listing.repo}: the server answers {answer.status_code}",
                        "a gated or private model needs HF_TOKEN",
                    )
        except (QwenrunError, MemoryError):
            raise
        except OSError as error:
            if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
                raise  # the disk's
            trouble = _said(error)
        except Exception as error:  # the library's: broken connections, time-outs
            trouble = _said(error)
        tries += 1
        stop.wait(min(max(wait, asked), LONGEST_WAIT))
        wait *= 2


def _begins_at(content_range: str, start: int) -> bool:
    found = re.match(r"bytes (\d+)-", content_range)
    return found is not None and int(found[1]) == start


def _link(listing: Listing, folder: Path, revision: str) -> None:
    """The commit's folder of links, and what the branch was."""
    snapshot = folder / "snapshots" / listing.commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in listing.files:
        link, target = snapshot / file.name, Path("..", "..", "blobs", file.digest)
        if not link.is_symlink() or Path(os.readlink(link)) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    if revision != listing.commit:
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit)


@dataclass(frozen=True)
class Difference:
    """What the hub has now beside what was used. Names of files: other content, gone, and new."""

    repo: str
    was: str
    now: str
    changed: tuple[str, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.changed or self.gone or self.new)


def compare(repo: str, commit: str, used: dict[str, str], revision: str = "main") -> Difference:
    """Files by their sha256 (or git's sha1), as they were used, beside those of `revision` on the hub now.

    Only weights, their index and the config are looked at: the rest may change without the model changing.
    """
    listing = describe(repo, revision)
    there = {file.name: file for file in listing.files}
    changed = [name for name, digest in used.items() if name in there and not _same(listing, there[name], digest)]
    new = [name for name in there if name.endswith(".safetensors") and name not in used]
    gone = [name for name in used if name not in there]
    return Difference(repo, commit, listing.commit, tuple(sorted(changed)), tuple(sorted(gone)), tuple(sorted(new)))


def _same(listing: Listing, file: File, digest: str) -> bool:
    if len(digest) == len(file.digest):
        return digest == file.digest
    # A small file, known here by its sha256 and there by git's name for it: read it.
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repo, file.name, revision=listing.commit, endpoint=_endpoint())
    try:
        answer = get_session().get(url, headers=build_hf_headers(), follow_redirects=True, timeout=TIMEOUT)
        answer.raise_for_status()
    except Exception as error:
        raise QwenrunError(f"{file.name} of {listing.repo} can't be read: {_said(error)}", "try again") from error
    content = answer.content
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.digest:
        raise ModelError(f"{file.name} of {listing.repo} came damaged: its hash is not the hub's", "try again")
    assert (len(digest), len(file.digest)) == (SHA256, SHA1)
    return hashlib.sha256(content).hexdigest() == digest
