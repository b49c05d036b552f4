"""What every command says and where: the answer on stdout, all else on stderr; plain text, colour only for eyes.

Standard library alone (the chat's markdown is `repl`'s business). Knows no model and no command.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from qwenrun.errors import UsageError

# Control characters but newline and tab: a terminal would obey them. C1 (0x80-0x9f) included.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


def prepare_streams() -> None:
    """UTF-8 with plain newlines into pipes and files, whatever the locale; on a terminal what it can show. A
    stream that was closed swallows what is written to it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if is_terminal(stream):
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")


def is_terminal(stream: TextIO | None) -> bool:
    """True if `stream` is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def can_move(stream: TextIO | None) -> bool:
    """True if a line on `stream` can be written over: a terminal, and not a dumb one."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb")


def has_colour(stream: TextIO | None) -> bool:
    """True if `stream` may be styled: a terminal that can, and NO_COLOR (https://no-color.org) is not set."""
    return can_move(stream) and not os.environ.get("NO_COLOR")


def styled(text: str, code: str, stream: TextIO | None) -> str:
    """`text` in the SGR style `code` ("2" dim, "31" red, ...) if `stream` may be styled."""
    return f"\x1b[{code}m{text}\x1b[0m" if text and has_colour(stream) else text


def dim(text: str, stream: TextIO | None) -> str:
    return styled(text, "2", stream)


def printable(text: str) -> str:
    """`text` with control characters made visible, so that no model and no file drives the terminal."""
    return _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else "\N{REPLACEMENT CHARACTER}", text)


def well_formed(text: str) -> str:
    """`text` from the command line, where bytes that are no UTF-8 come as lone surrogates, as text that encodes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def say(text: str = "") -> None:
    """A line of the answer, on stdout."""
    print(text)


def note(text: str) -> None:
    """A line for the person, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def fail(message: str, hint: str = "") -> None:
    """The three parts of an error, on stderr: what happened, the numbers under it, what to type next."""
    first, _, rest = printable(message).partition("\n")
    print(f"{styled('error:', '1;31', sys.stderr)} {first}", file=sys.stderr)
    if rest:
        print(rest, file=sys.stderr)
    if hint:
        print(f"{styled('hint:', '1;36', sys.stderr)} {printable(hint)}", file=sys.stderr)
    sys.stderr.flush()


def document(kind: str, version: int, content: Mapping[str, Any]) -> None:
    """One JSON document on stdout; `schema` says which, and changes when a field's meaning does."""
    print(json.dumps({"schema": f"qwenrun.{kind}/{version}", **_finite(content)}, indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1024: "63.6 GiB"."""
    unit, one = size_unit(nbytes)
    return f"{nbytes:.0f} B" if one == 1 else f"{nbytes / one:,.1f} {unit}"


def size_unit(nbytes: float) -> tuple[str, int]:
    """The unit in which a column whose largest number is `nbytes` reads best, and its bytes."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return unit, 1024**power
    return "B", 1


def decimal_size(nbytes: float) -> str:
    """Bytes in powers of 1000, as bandwidths are given: "7.39 GB"."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.2f} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float) -> str:
    """A duration for people: "0.42 s", "12 s", "3:05", "1:02:03"."""
    if value < 10:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def tokens(count: int) -> str:
    """A number of tokens as one types it: 4096 -> "4k", 1048576 -> "1m", 5000 -> "5,000"."""
    if count >= 1 << 20 and count % (1 << 20) == 0:
        return f"{count >> 20}m"
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def parse_tokens(text: str, option: str = "--ctx") -> int:
    """ "4096", "4k" (4,096) or "1m" (1,048,576). Raises UsageError."""
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]) if match else 0
    if not 0 < count <= 1 << 40:
        raise UsageError(f"{option} {text!r} is not a number of tokens", hint=f"{option} 4096, {option} 32k")
    return count


def parse_size(text: str, option: str) -> int:
    """ "24GiB" and "24g" (2^30), "24GB" (10^9), or bytes. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip().replace("_", ""))
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{option} {text!r} is not a size", hint=f"{option} 24GiB")
    power = " kmgt".index((match[2] or " ").lower())
    decimal = bool(match[2]) and not match[3] and text.strip().lower().endswith("b")
    return round(float(match[1]) * (1000 if decimal else 1024) ** power)
