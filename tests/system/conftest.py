"""The program as a process: a runner for pipes, a terminal to talk to it, and one pack for all."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenrun.demo import model_dir

# What a script starts in the background ignores Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "qwenrun"]
TIMEOUT = 120
PASTE_OFF, SENT = "\x1b[?2004l", "\N{RETURN SYMBOL}"
ESCAPE = re.compile(r"\x1b(\[[0-9;?<>=]*[A-Za-z]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78])|\x08")


def environment(home: Path, **changes: str | None) -> dict[str, str]:
    """A person's environment with a home of its own and one thread; None removes a variable."""
    drop = ("NO_COLOR", "QWENRUN_DEBUG", "QWENRUN_BACKEND", "XDG_STATE_HOME", "COLUMNS", "LINES", "FORCE_COLOR")
    found = {name: value for name, value in os.environ.items() if name not in drop}
    found |= {"HOME": str(home), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    for name, value in changes.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home folder."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def qwenrun(home: Path) -> Run:
    """qwenrun(*arguments, stdin="", env={}) -> the finished process, its streams as text decoded strictly."""

    def run(*arguments: str | Path, stdin: str | None = "", **changes: str | None) -> subprocess.CompletedProcess[str]:
        begun = time.monotonic()
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=None if stdin is None else stdin.encode(),
            capture_output=True,
            timeout=TIMEOUT,
            env=environment(home, **changes),
        )
        print(f"{time.monotonic() - begun:.2f} s, exit {done.returncode}: qwenrun {' '.join(map(str, arguments))}")
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def demo_report(qwenrun: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The embedded demo model made into a pack: what `quantize --json` printed."""
    pack = tmp_path_factory.mktemp("packs") / "demo.pack"
    done = qwenrun("quantize", model_dir(), "-o", pack, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def demo_pack(demo_report: dict[str, Any]) -> Path:
    """The demo's pack. Not to be changed."""
    return Path(demo_report["pack"])


QUESTION = "What does exit code 4 mean?"


@pytest.fixture(scope="session")
def answer(qwenrun: Run, demo_pack: Path) -> dict[str, Any]:
    """The demo's answer to `question`, greedy and with reasoning: what `chat --json` printed."""
    done = qwenrun("chat", "-m", demo_pack, "-p", QUESTION, "--temperature", "0", "--think", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["answer"]) > 5
    assert len(found["reasoning"]) > 5
    return found


@pytest.fixture(scope="session")
def question() -> str:
    """What is asked."""
    return QUESTION


class Terminal:
    """A program on a terminal of 24 lines and 80 columns, and the hands on its keyboard.

    `output` is what it wrote, as text; a question about the cursor's place is answered, as terminals do.
    """

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self.output = ""
        self._seen = 0
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """Press keys: "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D, "\\x1b\\r" Alt-Enter."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str, timeout: float = TIMEOUT) -> str:
        """Wait until what was written since the last `expect` matches, returns it up to there. Escapes are left
        out, but for a SENT where the program has taken a text and the keyboard is its own no longer."""
        deadline = time.monotonic() + timeout
        while True:
            text = ESCAPE.sub("", self.output.replace(PASTE_OFF, SENT)).replace("\r", "")[self._seen :]
            if match := re.search(pattern, text, re.DOTALL):
                self._seen += match.end()
                return text[: match.end()]
            if time.monotonic() > deadline or not self._more(0.1):
                pytest.fail(f"waited for {pattern!r}; since then the terminal got:\n{text}")

    def _more(self, wait: float) -> bool:
        """Read what there is; False if the program is gone."""
        if not select.select([self._master], [], [], wait)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return False
        if b"\x1b[6n" in data:
            os.write(self._master, b"\x1b[1;1R")
        self.output += data.decode(errors="replace")
        return bool(data)

    def finish(self, timeout: float = 20) -> int:
        """Wait for the program's end; its exit code."""
        deadline = time.monotonic() + timeout
        while self._more(0.1) and time.monotonic() < deadline:
            pass
        return self.process.wait(max(deadline - time.monotonic(), 1))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(home: Path) -> Iterator[Callable[..., Terminal]]:
    """terminal(*arguments, NAME=value...) -> a Terminal that runs qwenrun."""
    opened: list[Terminal] = []

    def start(*arguments: str | Path, **changes: str | None) -> Terminal:
        opened.append(Terminal([str(argument) for argument in arguments], environment(home, **changes)))
        return opened[-1]

    yield start
    for each in opened:
        print(each.output)
        each.close()
