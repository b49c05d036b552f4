"""Telling reasoning from answer, and tool calls from text, while an answer streams in.

The model's answer begins inside an open think block when thinking is on, so the text up to `</think>` is
reasoning. The same rule that the chat template applies to a history. Knows no tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "reasoning"]
OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Push text as it comes; get (kind, text) pieces. The tags and the blank lines around them are left out."""

    def __init__(self, thinking: bool) -> None:
        """thinking: whether the text begins inside a think block."""
        self.kind: Kind = "reasoning" if thinking else "answer"
        self._held = ""
        self._begun = False  # whether this block has printed anything
        self._may_open = not thinking

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """What can be told by now. Text that may still turn out to be a tag, or the blank end of the reasoning,
        is held back."""
        self._held += text
        out: list[tuple[Kind, str]] = []
        while True:
            if not self._begun:
                self._held = self._held.lstrip("\n")
            tag = CLOSE if self.kind == "reasoning" else OPEN if self._may_open and not self._begun else ""
            if tag == OPEN:
                stripped = self._held.lstrip()
                if stripped.startswith(OPEN):
                    self._enter("reasoning", stripped[len(OPEN) :])
                    self._may_open = False
                    continue
                if OPEN.startswith(stripped):
                    return out
            elif tag == CLOSE and CLOSE in self._held:
                before, _, after = self._held.partition(CLOSE)
                out += self._piece(before.rstrip())
                self._enter("answer", after)
                self._may_open = False
                continue
            keep = _overlap(self._held, CLOSE) if tag == CLOSE else 0
            if tag == CLOSE:
                body = self._held[: len(self._held) - keep]
                keep += len(body) - len(body.rstrip())
            ready = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            return out + self._piece(ready)

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return self._piece(held.rstrip() if self.kind == "reasoning" else held)

    def _enter(self, kind: Kind, rest: str) -> None:
        self.kind, self._held, self._begun = kind, rest, False

    def _piece(self, text: str) -> list[tuple[Kind, str]]:
        if not text:
            return []
        self._begun = True
        return [(self.kind, text)]


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`, short of the whole tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an answer; values are the texts between the tags."""

    name: str
    arguments: dict[str, str]


_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\n?(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(the text before the first call, the calls) of a finished answer; calls that are cut off stay text."""
    calls = [
        ToolCall(name.strip(), dict(_PARAMETER.findall(body))) for name, body in _CALL.findall(text)
    ]
    if not calls:
        return text, []
    first = _CALL.search(text)
    assert first
    return text[: first.start()].rstrip(), calls
