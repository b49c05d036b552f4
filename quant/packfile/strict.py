"""JSON from outside, parsed with a bound on what that allocates. Standard library alone."""

from __future__ import annotations

import json
from typing import Any

# Lists, objects, and what is in them. What this module's callers read has not half as many in the largest model there
# is; a value takes 80 bytes or so, but for texts.
MOST_VALUES = 2_000_000


def load(text: bytes) -> Any:
    """Parse UTF-8 JSON in which no key appears twice. ValueError says what is wrong with it.

    A few bytes of JSON can be a list or an object of a hundred, so what there may be is counted before.
    """
    values = sum(text.count(mark) for mark in (b"[", b"{", b",", b":"))
    if values > MOST_VALUES:
        raise ValueError(f"it may hold {values:,} values, more than the {MOST_VALUES:,} that are read")
    try:
        return json.loads(text.decode(), object_pairs_hook=_no_twice)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out
