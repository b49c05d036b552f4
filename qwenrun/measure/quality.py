"""How many questions a model answers exactly: the plainest measure of what quantization did to a small model.

Greedy decoding, every question alone, the answer compared word for word. Knows nothing of how figures are shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrun.engine.events import Done
from qwenrun.errors import UsageError

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine

Pair = tuple[str, str]
MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Answered:
    """One question and what came of it."""

    question: str
    expected: str
    answer: str
    exact: bool

    def to_json(self) -> dict[str, Any]:
        return {"question": self.question, "expected": self.expected, "answer": self.answer, "exact": self.exact}


@dataclass(frozen=True)
class Figures:
    """The answers of one set of questions."""

    name: str
    answers: tuple[Answered, ...]

    @property
    def exact(self) -> int:
        return sum(answer.exact for answer in self.answers)

    @property
    def rate(self) -> float:
        return self.exact / len(self.answers)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "questions": len(self.answers),
            "exact": self.exact,
            "rate": self.rate,
            "answers": [answer.to_json() for answer in self.answers],
        }


def question_sets(path: Path | None) -> dict[str, list[Pair]]:
    """The pairs of a JSON-lines file as one set; without one the demo's questions, `heldin` (trained on) and
    `heldout` (other wordings, never trained on). Raises UsageError for a line that is no pair."""
    if path is None:
        from qwenrun.demo.dataset import pairs

        return {split: [(qa.question, qa.answer) for qa in pairs(split)] for split in ("heldin", "heldout")}
    found: list[Pair] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_pair(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise UsageError(f"{path} holds no questions", 'a line of it: {"question": "...", "answer": "..."}')
    return {path.stem: found}


def _pair(line: str, where: str) -> Pair:
    try:
        data = json.loads(line[:MAX_LINE])
        question, answer = data["question"], data["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{where} is not a question and an answer", '{"question": "...", "answer": "..."}') from error
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
        raise UsageError(f"{where}: question and answer must be texts", '{"question": "...", "answer": "..."}')
    return question, answer


def exact_answers(
    engine: Engine,
    sets: Mapping[str, Sequence[Pair]],
    *,
    think: bool = False,
    max_tokens: int = 128,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Figures]:
    """Ask every question of every set. Spaces at the ends of an answer do not count; all else does."""
    params = replace(engine.sampling(think), temperature=0.0, presence_penalty=0.0, repetition_penalty=1.0)
    session = engine.session()
    done, total = 0, sum(len(pairs) for pairs in sets.values())
    figures = []
    for name, pairs in sets.items():
        answers = []
        for question, expected in pairs:
            messages = [{"role": "user", "content": question}]
            answer = ""
            for event in session.chat(messages, think=think, params=params, max_tokens=max_tokens):
                if isinstance(event, Done):
                    answer = event.text.strip()
            answers.append(Answered(question, expected, answer, answer == expected.strip()))
            done += 1
            if progress:
                progress(done, total, name)
        figures.append(Figures(name, tuple(answers)))
    return figures
