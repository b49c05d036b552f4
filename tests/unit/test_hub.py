"""Downloads from a hub with faults: a right file or a clear error, never a wrong file, and nothing fetched twice."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import FakeHub, drop, ignores_range, longer, status, truncated, wrong

from qwenrun.errors import ModelError, QwenrunError, UsageError
from qwenrun.hub import cache, remote

REPO = "Qwen/tiny"
SHARD = "model-00001-of-00002.safetensors"


def files(seed: int = 1) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {
        SHARD: rng.randbytes(50_000),
        "model-00002-of-00002.safetensors": rng.randbytes(30_001),
        "config.json": b"{}" + b" " * seed,
        "model.safetensors.index.json": rng.randbytes(2000),
        "tokenizer.json": b"[]",
        "pytorch_model.bin": b"a pickle",
        "evil/../../x.safetensors": b"no",
        "..\\y.json": b"no",
    }


@pytest.fixture
def hub(fake_hub: FakeHub) -> FakeHub:
    fake_hub.publish(REPO, files())
    return fake_hub


def check(found: cache.Download, seed: int = 1) -> None:
    """The files that a model needs, and nothing else, with the right content."""
    wanted = {
        n: c for n, c in files(seed).items() if n.endswith((".safetensors", ".json")) and "/" not in n and "\\" not in n
    }
    assert {name: path.read_bytes() for name, path in found.files.items()} == wanted
    assert cache.verify(found) == len(wanted)
    assert not list(cache.cache_dir().rglob("*partial"))


def test_a_download_lies_where_other_tools_look(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = remote.pull(REPO, progress=lambda done, total, name: seen.append((done, total)))
    check(found)
    assert found.folder == tmp_path / "home/hub/models--Qwen--tiny/snapshots" / hub.branches[REPO]["main"]
    assert seen[-1][0] == seen[-1][1] == found.nbytes
    assert cache.find(REPO) == found
    assert list(cache.downloads()) == [found]
    sent = hub.sent
    check(remote.pull(REPO))
    assert hub.sent == sent
    from huggingface_hub import snapshot_download

    assert snapshot_download(REPO, local_files_only=True, cache_dir=cache.cache_dir()) == str(found.folder)


FAULTS: dict[str, list[Any]] = {
    "dropped": [drop(10_000), drop(0), drop(7)],
    "truncated": [truncated(20_000), truncated(1)],
    "wrong byte": [wrong(40_000)],
    "longer": [longer(5)],
    "busy": [status(429, {"Retry-After": "1"}), status(503), status(500)],
    "no ranges": [drop(10_000), ignores_range],
    "all of them": [status(503), drop(30_000), truncated(100), wrong(3), drop(9), status(429)],
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_that_passes(hub: FakeHub, fault: str) -> None:
    hub.faults[SHARD] = list(FAULTS[fault])
    check(remote.pull(REPO))
    assert not hub.faults[SHARD]


def test_a_wrong_file_is_never_kept(hub: FakeHub) -> None:
    hub.faults[SHARD] = [wrong(5)] * 10
    with pytest.raises(ModelError, match=rf"{SHARD} of Qwen/tiny came 2 times with the hash \w+, and the hub says"):
        remote.pull(REPO)
    assert cache.find(REPO) is None
    assert not list(cache.cache_dir().rglob("*/" + SHARD))
    hub.faults.clear()
    check(remote.pull(REPO))


def test_a_server_that_stays_away_keeps_what_came(hub: FakeHub) -> None:
    hub.faults[SHARD] = [drop(20_000), *[status(503)] * 20]
    with pytest.raises(QwenrunError, match=r"can't be fetched beyond 20,000 of 50,000 bytes: the server answers 503"):
        remote.pull(REPO)
    hub.faults.clear()
    sent = hub.sent
    check(remote.pull(REPO))
    assert hub.sent - sent <= 30_000 + 30_001 + 2500


def test_killed_and_started_again_fetches_no_byte_twice(hub: FakeHub) -> None:
    """At any place: killed as a process is, with whatever is in the file."""
    whole = remote.pull(REPO)
    blobs = whole.folder.parents[1] / "blobs"
    rng = random.Random(2)
    digest = whole.files[SHARD].name
    for _ in range(12):
        cut = rng.randrange(50_000)
        shutil.rmtree(whole.folder)
        (blobs / digest).rename(blobs / f"{digest}.qwenrun-partial")
        os.truncate(blobs / f"{digest}.qwenrun-partial", cut)
        sent = hub.sent
        check(remote.pull(REPO))
        assert hub.sent - sent == 50_000 - cut


def test_a_partial_file_with_wrong_bytes_is_fetched_anew(hub: FakeHub) -> None:
    whole = remote.pull(REPO)
    blobs = whole.folder.parents[1] / "blobs"
    digest = whole.files[SHARD].name
    (blobs / digest).unlink()
    (blobs / f"{digest}.qwenrun-partial").write_bytes(b"x" * 20_000)
    check(remote.pull(REPO))


def test_a_branch_that_moves_meanwhile(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One commit's files, whatever is pushed."""
    first = hub.branches[REPO]["main"]
    describe = remote.describe

    def moves(repo: str, revision: str) -> remote.Listing:
        listing = describe(repo, revision)
        hub.publish(REPO, files(2))
        return listing

    monkeypatch.setattr(remote, "describe", moves)
    found = remote.pull(REPO)
    assert found.commit == first
    check(found)
    monkeypatch.undo()
    assert found.commit != hub.branches[REPO]["main"]


def test_the_hub_is_asked_whether_weights_changed(hub: FakeHub) -> None:
    import hashlib

    found = remote.pull(REPO)
    used = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.files.items()}
    assert remote.compare(REPO, found.commit, used).same
    changed = files() | {SHARD: b"y" * 50_000, "config.json": b"{ }", "model-00003-of-00003.safetensors": b"z" * 2000}
    del changed["tokenizer.json"]
    now = hub.publish(REPO, changed)
    difference = remote.compare(REPO, found.commit, used)
    assert (difference.was, difference.now) == (found.commit, now)
    assert difference.changed == ("config.json", SHARD)
    assert difference.gone == ("tokenizer.json",)
    assert difference.new == ("model-00003-of-00003.safetensors",)


def test_what_the_hub_refuses(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="has no model Qwen/none"):
        remote.pull("Qwen/none")
    with pytest.raises(ModelError, match="has no revision 'v2'"):
        remote.pull(REPO, "v2")
    hub.gated.add(REPO)
    hub.token = "secret"
    with pytest.raises(ModelError, match="is gated"):
        remote.pull(REPO)
    monkeypatch.setenv("HF_TOKEN", "secret")
    check(remote.pull(REPO))
    for name in ("../x", "a/b/c", "Qwen/..", "/etc/passwd", ""):
        with pytest.raises(UsageError, match="is no repository's name"):
            remote.pull(name)
    with pytest.raises(UsageError, match="is no revision"):
        remote.pull(REPO, "../../x")


def test_a_hub_that_names_no_hash_is_not_believed(hub: FakeHub) -> None:
    for said in ({"size": None}, {"size": -5}, {"lfs": {"sha256": "../../x", "size": 1, "pointerSize": 1}}):
        hub.listed = {SHARD: said}
        with pytest.raises((ModelError, QwenrunError)):
            remote.pull(REPO)
    assert not list(cache.cache_dir().rglob("*.safetensors"))


def test_offline_and_without_room(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000))
    with pytest.raises(QwenrunError, match=r"needs 82,0\d\d bytes more, and 70,000 are free"):
        remote.pull(REPO)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QwenrunError, match="HF_HUB_OFFLINE is set"):
        remote.pull(REPO)


def test_a_damaged_blob_is_told(hub: FakeHub) -> None:
    found = remote.pull(REPO)
    blob = found.files[SHARD]
    data = bytearray(blob.read_bytes())
    data[17] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ModelError, match=rf"1 of 5 files are not what the hub has: {SHARD}"):
        cache.verify(found)
    blob.unlink()
    assert cache.find(REPO) is None  # a link into nothing is no download


# -- as a person uses it ---------------------------------------------------------------------------------------


@pytest.fixture
def published(hub: FakeHub) -> FakeHub:
    """The embedded demo model as a repository."""
    from qwenrun.demo import model_dir

    hub.publish("Qwen/demo", {path.name: path.read_bytes() for path in model_dir().iterdir() if path.is_file()})
    return hub


def test_pulled_quantized_checked_and_removed(
    published: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwenrun.quant.convert import convert
    from qwenrun.ui import hub as ui
    from qwenrun.ui.models import find_model
    from qwenrun.ui.pack import verify
    from qwenrun.ui.quantize import quantize

    with pytest.raises(ModelError, match="there is no model at Qwen/demo"):
        find_model("Qwen/demo")
    ui.pull("Qwen/demo", "main", as_json=False, quiet=False)
    said = capsys.readouterr()
    found = cache.find("Qwen/demo")
    assert found is not None
    assert said.out == f"{found.folder}\n"
    assert "every hash is the hub's" in said.err
    assert find_model("Qwen/demo") == found.folder
    verify("Qwen/demo", as_json=False, quiet=True)
    pack = tmp_path / "demo.pack"
    quantize(convert, "Qwen/demo", pack, revision=None, recipe="int4", force=False, as_json=True, quiet=True)
    capsys.readouterr()
    ui.ls([tmp_path], as_json=False)
    listed = capsys.readouterr().out
    assert str(pack) in listed
    assert found.commit[:12] in listed
    ui.check(str(pack), "main", as_json=False)
    ui.check("Qwen/demo", "main", as_json=False)
    assert capsys.readouterr().out.count("the same") == 2
    changed = dict(published.repos["Qwen/demo"][found.commit])
    name = next(name for name in changed if name.endswith(".safetensors"))
    changed[name] = changed[name][:-1] + bytes([changed[name][-1] ^ 1])
    published.publish("Qwen/demo", changed)
    for model in (str(pack), "Qwen/demo"):
        with pytest.raises(QwenrunError, match="has changed: 1 files differ"):
            ui.check(model, "main", as_json=True)
    assert capsys.readouterr().out.count(name) == 2
    ui.du(as_json=True)
    assert '"unfinished": 0' in capsys.readouterr().out
    for model in (str(pack), "Qwen/demo"):
        with pytest.raises(UsageError, match="would be removed"):
            ui.rm(model, yes=False)
        ui.rm(model, yes=True)
    assert not pack.exists()
    assert cache.find("Qwen/demo") is None
    for model in (str(tmp_path), "Qwen/demo", "/"):
        with pytest.raises(ModelError, match="is neither a pack nor a download"):
            ui.rm(model, yes=True)


def test_a_killed_process_goes_on(published: FakeHub, tmp_path: Path) -> None:
    """As a command, killed while bytes come; what came is not asked for again."""
    import contextlib
    import signal
    import subprocess
    import sys
    import threading
    import time

    over = threading.Event()

    def slow(handler: Any, body: bytes) -> None:
        handler.start(206, body, len(body))
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(body), 1 << 18):
                handler.wfile.write(body[at : at + (1 << 18)])
                published.sent += 1 << 18
                time.sleep(0.02)
        over.set()

    name = next(n for n in published.repos["Qwen/demo"][published.branches["Qwen/demo"]["main"]] if "safetensors" in n)
    command = [sys.executable, "-m", "qwenrun", "pull", "Qwen/demo", "--quiet"]
    published.faults[name] = [slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while published.sent < 4 << 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert over.wait(10)
    partial = next(cache.cache_dir().rglob("*partial"))
    assert partial.stat().st_size > 1 << 20
    had, published.sent = partial.stat().st_size, 0
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = cache.find("Qwen/demo")
    assert found is not None
    cache.verify(found)
    assert run.stdout.strip() == str(found.folder)
    assert published.sent <= found.nbytes - had
