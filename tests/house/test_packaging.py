"""What is installed is what is in the tree, however it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {"qwenrun": "qwenrun", "quant": "qwenrun/quant", "kernels": "qwenrun/kernels"}


def tree() -> set[str]:
    """The files a wheel must hold, by their installed names: all but caches and C++ sources, as git would list them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FLOORS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    names = set()
    for name in listed:
        top, _, rest = name.partition("/")
        if rest and (ROOT / name).exists() and "/csrc/" not in name:
            names.add(f"{FLOORS[top]}/{rest}")
    return names


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {name.rpartition("/")[0].replace("/", ".") for name in tree() if name.endswith("/__init__.py")}
    assert found == listed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tree can't be listed")
    out = tmp_path_factory.mktemp("wheel")
    # Build from a copy: setuptools leaves build/ and an egg-info behind, and a stale build/ hides errors.
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_tree(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in held if name.endswith(".so")}
    assert {name.partition(".")[0] for name in compiled} <= {"qwenrun/kernels/cpu/_kernels"}
    assert held - compiled == tree()


def test_wheel_claims_only_our_name(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qwenrun"}


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(target)}
    script = "import qwenrun, qwenrun.quant.recipe as r; print(qwenrun.__file__); print(r.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(target)) for line in where.stdout.split())
    for arguments in (["--version"], ["vram", "--ctx", "4096", "--json"], ["--help"]):
        run = subprocess.run(
            [sys.executable, "-m", "qwenrun", *arguments],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout
