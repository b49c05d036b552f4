"""Telling reasoning from answer while an answer streams in, and tool calls from text when it is finished.

The model's answer begins inside an open think block when thinking is on, so the text up to `</think>` is
reasoning. The same rule that the chat template applies to a history. Knows no token ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "reasoning"]
OPEN, CLOSE = "<think>", "</think>"
_TAGS: dict[str, Kind] = {OPEN: "reasoning", CLOSE: "answer"}


class ThinkSplitter:
    """Push text as it comes; get (kind, text) pieces. The tags and the blank lines around them are left out."""

    def __init__(self, thinking: bool) -> None:
        """thinking: whether the text begins inside a think block."""
        self.kind: Kind = "reasoning" if thinking else "answer"
        self._held = ""
        self._begun = False  # whether this block has printed anything
        self._may_open = not thinking

    def push(self, text: str, control: bool | None = None) -> list[tuple[Kind, str]]:
        """What can be told by now; the blank end of the reasoning is held back.

        control: whether `text` is one control token (after, at most, the U+FFFD of a broken character), so that
        the tags are the tokens alone and a model may quote `</think>`. None if that is not known: then a spelled
        tag counts, and text that may still turn out to be one is held back too.
        """
        if control is None:
            return self._search(text)
        for tag, kind in _TAGS.items():
            if control and text.endswith(tag):
                return self._told(text.removesuffix(tag)) + self._enter(kind)
        return self._told(text)

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        if not self._begun:
            held = held.lstrip("\n")
        return self._piece(held.rstrip() if self.kind == "reasoning" else held)

    def _told(self, text: str, keep: int = 0) -> list[tuple[Kind, str]]:
        """Text without tags; its last `keep` characters are held back."""
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip("\n")
        end = max(len(self._held) - keep, 0)
        if self.kind == "reasoning":
            end = len(self._held[:end].rstrip())
        ready, self._held = self._held[:end], self._held[end:]
        return self._piece(ready)

    def _search(self, text: str) -> list[tuple[Kind, str]]:
        """Text in which a tag may be spelled: one that opens the answer, or one that ends the reasoning."""
        if self.kind == "answer" and self._may_open:
            self._held += text
            start = self._held.lstrip()
            if OPEN.startswith(start):
                return []
            self._may_open = False
            text, self._held = self._held, ""
            if not start.startswith(OPEN):
                return self._told(text)
            self._enter("reasoning")
            text = start.removeprefix(OPEN)
        if self.kind == "answer":
            return self._told(text)
        text, self._held = self._held + text, ""
        before, tag, after = text.partition(CLOSE)
        if not tag:
            return self._told(before, keep=_overlap(before, CLOSE))
        return [*self._told(before), *self._enter("answer"), *self._told(after)]

    def _enter(self, kind: Kind) -> list[tuple[Kind, str]]:
        """A tag was seen; one that changes nothing is left out."""
        self._may_open = False
        if kind == self.kind:
            return []
        out = self.flush()
        self.kind, self._begun = kind, False
        return out

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


_CALL = re.compile(r"<tool_call>\s*<function=([^<>\n]+)>")
_CALL_END = re.compile(r"</function>\s*</tool_call>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?")
_PARAMETER_END = "</parameter>"


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(the text before the first call, the calls) of a finished answer; a call that is cut off stays text. Time is
    linear in the text, whatever it is."""
    calls: list[ToolCall] = []
    content, at = text, 0
    while (begin := _CALL.search(text, at)) and (end := _CALL_END.search(text, begin.end())):
        if not calls:
            content = text[: begin.start()].rstrip()
        calls.append(ToolCall(begin[1].strip(), _arguments(text[begin.end() : end.start()])))
        at = end.end()
    return content, calls


def _arguments(body: str) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    while (begin := _PARAMETER.search(body, at)) and (end := body.find(_PARAMETER_END, begin.end())) >= 0:
        found[begin[1]] = body[begin.end() : end].removesuffix("\n")
        at = end + len(_PARAMETER_END)
    return found
