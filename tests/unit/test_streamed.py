"""Quantizing from the hub while downloading: the pack of a folder, few files on the disk, and no wrong pack ever."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, drop, ignores_range, longer, status, truncated, wrong

from qwenrun.errors import ModelError, QwenrunError, UsageError
from qwenrun.hub.stream import open_remote
from qwenrun.quant.convert import convert
from qwenrun.quant.errors import QuantError, StorageError
from qwenrun.quant.packfile import journal
from qwenrun.quant.packfile.layout import MANIFEST
from qwenrun.ui.hub import check
from qwenrun.ui.quantize import quantize

REPO = "Qwen/tiny"
Maker = Callable[..., Path]


@pytest.fixture
def hub(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_maker: Maker) -> FakeHub:
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    fake_hub.publish(REPO, published(checkpoint_maker(tmp_path / "m", shards=5)))
    return fake_hub


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "tokenizer.json": b"{}",
        "evil.bin": b"pickle",
    }


def make(out: Path, source: str = REPO, run: Callable[..., Any] = convert, **options: Any) -> None:
    said = {"revision": None, "recipe": "balanced", "force": False, "as_json": True, "quiet": True}
    quantize(run, source, out, **said | options)


def digests(pack: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pack.iterdir()}


def check_same(pack: Path, folder: Path, tmp_path: Path) -> None:
    """What `folder` gives, but for where it says it came from."""
    (folder / "tokenizer.json").write_text("{}")
    wanted = tmp_path / "wanted.pack"
    make(wanted, str(folder), force=True)
    packs = []
    for each in (pack, wanted):
        found = digests(each)
        manifest = json.loads((each / MANIFEST).read_text())
        hashes = {name: said["sha256"] for name, said in manifest.pop("source")["files"].items()}
        del manifest["manifest_sha256"], found[MANIFEST]
        packs.append((found, manifest, hashes))
    assert packs[0] == packs[1]
    assert not (pack.parent / f".{pack.name}.partial").exists()


@pytest.mark.parametrize("form", [{"shards": 5}, {"shards": 1}, {"shards": 3, "per_expert": True}])
def test_the_pack_is_that_of_a_folder(hub: FakeHub, tmp_path: Path, checkpoint_maker: Maker, form: dict) -> None:
    folder = checkpoint_maker(tmp_path / "form", **form)
    commit = hub.publish(REPO, published(folder))
    make(tmp_path / "p")
    check_same(tmp_path / "p", folder, tmp_path)
    source = json.loads((tmp_path / "p" / MANIFEST).read_text())["source"]
    assert (source["repo"], source["revision"]) == (REPO, commit)
    assert set(source["files"]) == {path.name for path in folder.iterdir()}
    assert not (tmp_path / "home").exists()
    check(str(tmp_path / "p"), "main", as_json=False)
    hub.publish(REPO, published(checkpoint_maker(tmp_path / "new", seed=3, **form)))
    with pytest.raises(QwenrunError, match="has changed"):
        check(str(tmp_path / "p"), "main", as_json=False)


def test_two_files_of_weights_are_there_at_most(hub: FakeHub, tmp_path: Path, checkpoint_maker: Maker) -> None:
    folder = checkpoint_maker(tmp_path / "fused", shards=9)
    hub.publish(REPO, published(folder))
    seen = []

    def watched(*arguments: Any, progress: Callable[..., None], **options: Any) -> Any:
        def watch(done: int, total: int, name: str) -> None:
            seen.append(len(list((tmp_path / ".p.partial/source").glob("*.safetensors"))))
            time.sleep(0.01)

        return convert(*arguments, progress=watch, **options)

    make(tmp_path / "p", run=watched)
    assert set(seen) <= {0, 1, 2}
    assert 2 in seen
    check_same(tmp_path / "p", folder, tmp_path)


FAULTS: dict[str, list[Any]] = {
    "dropped": [drop(4), drop(100), drop(0), drop(7000)],
    "truncated": [truncated(3), truncated(5000), truncated(1)],
    "longer": [longer(5)] * 3,
    "busy": [status(429, {"Retry-After": "1"}), status(503), status(500)] * 2,
    "no ranges": [ignores_range] * 2,
}


@pytest.mark.parametrize("fault", [*FAULTS, "wrong"])
def test_a_fault_that_passes(hub: FakeHub, tmp_path: Path, fault: str) -> None:
    for name in hub.repos[REPO][hub.branches[REPO]["main"]]:
        if name.endswith(".safetensors"):
            # The two first answers are of the header alone, which no hash covers.
            hub.faults[name] = list(FAULTS.get(fault, [truncated(8), drop(1), wrong(2000)]))
    with contextlib.suppress(QuantError, QwenrunError):
        make(tmp_path / "p")
    hub.faults.clear()
    if not (tmp_path / "p").exists():
        make(tmp_path / "p")
    check_same(tmp_path / "p", tmp_path / "m", tmp_path)


def test_random_faults_give_the_pack_or_an_error(hub: FakeHub, tmp_path: Path) -> None:
    """Every kind of fault at random places, then a quiet server: never another pack than the right one."""
    rng = random.Random(seed := random.randrange(1 << 31))
    kinds = [
        lambda: drop(rng.randrange(9000)),
        lambda: truncated(rng.randrange(1, 9000)),
        lambda: lambda handler, body: wrong(rng.randrange(len(body)))(handler, body),
        lambda: longer(rng.randrange(1, 99)),
        lambda: status(rng.choice([429, 500, 503, 404, 416])),
        lambda: ignores_range,
    ]
    names = list(hub.repos[REPO][hub.branches[REPO]["main"]])
    for number in range(6):
        out = tmp_path / f"p{number}"
        for name in names:
            hub.faults[name] = [rng.choice(kinds)() for _ in range(rng.randrange(4))]
        for _ in range(3):
            with contextlib.suppress(QuantError, QwenrunError):
                make(out)
                break
        hub.faults.clear()
        if not out.exists():
            make(out)
        check_same(out, tmp_path / "m", tmp_path)
    print(f"seed {seed}")


def test_a_wrong_header_is_noticed(hub: FakeHub, tmp_path: Path) -> None:
    """Only the file as a whole has a hash: a header that came on its own is compared with the file's."""
    name = next(n for n in hub.repos[REPO][hub.branches[REPO]["main"]] if n.endswith(".safetensors"))

    def swapped(handler: Any, body: bytes) -> bytes:
        header = json.loads(body[8:])
        names = [key for key in header if header[key]["shape"] == [128, 64]] or list(header)[:2]
        header["x.weight"] = header.pop(names[0])
        return body[:8] + json.dumps(header).encode().ljust(len(body) - 8)[: len(body) - 8]

    hub.faults[name] = [lambda handler, body: body, swapped]
    with pytest.raises((ModelError, QuantError)):
        make(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_branch_that_moves_between_two_runs(hub: FakeHub, tmp_path: Path, checkpoint_maker: Maker) -> None:
    stopped = [status(503)] * 99
    last = sorted(n for n in hub.repos[REPO][hub.branches[REPO]["main"]] if n.endswith(".safetensors"))[-1]
    hub.faults[last] = [lambda handler, body: body] * 2 + stopped
    with pytest.raises(QwenrunError, match="503"):
        make(tmp_path / "p")
    assert (tmp_path / ".p.partial/journal").stat().st_size > 200
    hub.faults.clear()
    new = checkpoint_maker(tmp_path / "new", shards=5, seed=9)
    hub.publish(REPO, published(new))
    make(tmp_path / "p")
    check_same(tmp_path / "p", new, tmp_path)


def test_a_stopped_run_fetches_only_what_it_needs(hub: FakeHub, tmp_path: Path) -> None:
    names = sorted(n for n in hub.repos[REPO][hub.branches[REPO]["main"]] if n.endswith(".safetensors"))
    hub.faults[names[-1]] = [lambda handler, body: body] * 2 + [status(503)] * 99
    with pytest.raises(QwenrunError, match="503"):
        make(tmp_path / "p")
    hub.faults.clear()
    hub.requests.clear()
    make(tmp_path / "p")
    fetched = [request for request in hub.requests if "/cdn/" in request]
    # Two requests for each header, one for a file that is fetched.
    assert sum(request.endswith(names[0]) for request in fetched) == 2
    assert sum(request.endswith(names[-1]) for request in fetched) == 3
    check_same(tmp_path / "p", tmp_path / "m", tmp_path)


def test_one_process_at_a_time(hub: FakeHub, tmp_path: Path) -> None:
    source = tmp_path / ".p.partial/source"
    with open_remote(REPO, "main", source), pytest.raises(UsageError, match="another process is fetching"):
        make(tmp_path / "p")
    make(tmp_path / "p")
    check_same(tmp_path / "p", tmp_path / "m", tmp_path)


def test_errors_say_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        make(tmp_path / "p", "nothing")
    with pytest.raises(ModelError, match="no model Qwen/other"):
        make(tmp_path / "p", "Qwen/other")
    with pytest.raises(ModelError, match="no revision"):
        make(tmp_path / "p", revision="v9")
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        make(tmp_path / "there")
    assert not [request for request in hub.requests if "/cdn/" in request]


CHILD = """
import sys
from qwenrun.quant.packfile import journal
journal.COMMIT_SECONDS = 0.0
from qwenrun.cli import main
sys.argv = ["qwenrun", *sys.argv[1:]]
sys.exit(main())
"""


def test_killed_at_any_time(hub: FakeHub, tmp_path: Path) -> None:
    """kill -9 as a user's system does it; the command is given again until there is a pack."""
    rng = random.Random(seed := random.randrange(1 << 31))
    out, kills = tmp_path / "p", 0
    # Slow enough for the moment to be anywhere.
    for name in hub.repos[REPO][hub.branches[REPO]["main"]]:
        hub.faults[name] = [lambda handler, body: (time.sleep(0.15), body)[1]] * 40
    command = [sys.executable, "-c", CHILD, "quantize", REPO, "-o", str(out), "--quiet"]
    while not out.exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
        work = out.with_name(".p.partial")
        # The imports take seconds, and nothing can go wrong there.
        while process.poll() is None and kills < 6 and not work.exists():
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * 1.5 if kills < 6 else 120)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        assert kills < 20
    print(f"seed {seed}: {kills} kills")
    check_same(out, tmp_path / "m", tmp_path)
