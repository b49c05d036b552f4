"""`make torture`: quantize is killed, and its disk filled, at random moments; each time the same command goes on.

Rounds take turns: a checkpoint in a folder, and one on a hub with broken connections. A round ends when there is a
pack, which has to be that of an undisturbed run, byte for byte. The last line counts; the exit code is 1 if one
differed. What a kill can't show is a power cut: for that the journal syncs before it speaks.

    python tests/torture.py --kills 50 --enospc 10 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import TINY_CONFIG, write_checkpoint
from fake_hub import FakeHub, drop, status

REPO = "Qwen/torture"
# The program with a journal written after every piece, so that there are as many states to be killed in as can be.
CHILD = """
import sys
from qwenrun.hub import remote
from qwenrun.quant.packfile import journal
journal.COMMIT_SECONDS = 0.0
remote.WAIT = 0.01
from qwenrun.cli import main
sys.argv = ["qwenrun", *sys.argv[1:]]
sys.exit(main())
"""
# Out of disk while writing, or known beforehand.
FULL_DISK = ("No space left on device", "are free")


def checkpoint(folder: Path) -> Path:
    """Some 90 MB in BF16: 4 layers of 16 experts, in 6 files."""
    config = copy.deepcopy(TINY_CONFIG)
    config["text_config"] |= {
        "hidden_size": 512,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_hidden_layers": 4,
        "vocab_size": 8192,
    }
    config["vision_config"]["out_hidden_size"] = 512
    write_checkpoint(folder, config, shards=6)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def digests(pack: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(pack.iterdir())}


def start(source: str, out: Path, recipe: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, "quantize", source, "-o", str(out), "--recipe", recipe, "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until_begun(process: subprocess.Popen[bytes], out: Path) -> None:
    """The seconds of importing are not what is to be disturbed: until it has its journal open."""
    journal = str(out.with_name(f".{out.name}.partial") / "journal")
    files = Path(f"/proc/{process.pid}/fd")
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if any(os.readlink(link) == journal for link in files.iterdir()):
                return
        time.sleep(0.002)


def finished(process: subprocess.Popen[bytes], expected: tuple[str, ...] = ()) -> bool:
    """Whether it ended well; SystemExit if it ended in any other way than `expected`, or a kill."""
    said = process.communicate()[1].decode(errors="replace")
    if process.returncode == 0 or process.returncode == -9:
        return process.returncode == 0
    if any(text in said for text in expected):
        return False
    sys.exit(f"quantize ended with {process.returncode}:\n{said}")


def until_killed(source: str, out: Path, recipe: str, rng: random.Random, seconds: float) -> int:
    """Make the pack `out`, killed as often as it takes; how often."""
    kills = 0
    while not out.exists():
        process = start(source, out, recipe)
        until_begun(process, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * seconds)
        if process.poll() is None:
            process.kill()
            kills += 1
        finished(process)
    return kills


def until_full(source: str, out: Path, recipe: str, rng: random.Random, seconds: float) -> int:
    """Make the pack `out` on a disk that is filled at random moments; how often that was too much."""
    full, ballast = 0, out.with_name("ballast")
    while not out.exists():
        process = start(source, out, recipe)
        until_begun(process, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * seconds)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"\0" * (1 << 20)):
                pass
        ended = finished(process, FULL_DISK)
        ballast.unlink(missing_ok=True)
        full += not ended
    return full


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes at `folder`; None where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        print(f"no small disk: {done.stderr.decode().strip()}", file=sys.stderr)
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--enospc", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print(f"seed {options.seed}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)
    os.environ["HF_HOME"] = str(folder / "home")
    kills = full = packs = identical = 0
    try:
        with FakeHub() as hub:
            os.environ["HF_ENDPOINT"] = hub.url
            source = checkpoint(folder / "source")
            content = {path.name: path.read_bytes() for path in source.iterdir()}
            hub.publish(REPO, content)
            wanted, seconds = {}, 0.0
            kinds = [(where, recipe) for where in (str(source), REPO) for recipe in ("balanced", "nvfp4")]
            for number, kind in enumerate(kinds):
                out = folder / f"whole-{number}.pack"
                process = start(kind[0], out, kind[1])
                until_begun(process, out)
                begun = time.monotonic()
                finished(process)
                seconds = max(seconds, time.monotonic() - begun)
                wanted[kind] = digests(out)
                shutil.rmtree(out)

            def rounds(make: Callable[..., int], where: Path, count: int, label: str) -> int:
                nonlocal packs, identical
                done = 0
                while done < count:
                    kind = kinds[packs % len(kinds)]
                    for name in content:
                        faults = [drop(rng.randrange(1 << 20)), status(503)]
                        hub.faults[name] = rng.choices(faults, k=rng.randrange(3)) if name.endswith("tensors") else []
                    out = where / "made.pack"
                    done += make(kind[0], out, kind[1], rng, seconds)
                    packs += 1
                    same = digests(out) == wanted[kind] and not list(where.glob(".made*"))
                    identical += same
                    print(f"{label} {done}, pack {packs}: {'identical' if same else 'DIFFERS'}", file=sys.stderr)
                    shutil.rmtree(out)
                return done

            kills = rounds(until_killed, folder, options.kills, "kills")
            size = sum(map(len, content.values()))
            with small_disk(folder / "small", 2 * size) as small:
                if small:
                    full = rounds(until_full, small, options.enospc, "full disks")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"kills={kills} enospc={full} identical={identical}/{packs}")
    return 0 if identical == packs else 1


if __name__ == "__main__":
    sys.exit(main())
