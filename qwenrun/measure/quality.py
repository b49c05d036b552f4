"""What quantization did to a model: how many questions it answers exactly, and how far its distributions are from
another's.

Exact: greedy decoding, every question alone, the answer compared word for word. Far: the expected answers are fed to
both, and the distributions of their tokens compared. Knows nothing of how figures are shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrun.engine.events import Done
from qwenrun.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qwenrun.engine.engine import Engine
    from qwenrun.engine.session import Session

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


@dataclass(frozen=True)
class Distance:
    """How far a model's distributions are from another's over the tokens of one set's answers, their ends included.

    divergence: mean Kullback-Leibler divergence D(other || model), nats a token; error: standard error of that mean,
    every question counted as one draw. agree: the share of tokens for which both have the same likeliest.
    """

    name: str
    tokens: int
    divergence: float
    error: float
    agree: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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


def distances(
    engine: Engine,
    other: Engine,
    sets: Mapping[str, Sequence[Pair]],
    *,
    think: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Distance]:
    """How far `engine` is from `other` when both are given every question and its expected answer.

    Raises UsageError if the two do not have the same tokens, or a question is longer than the context.
    """
    sessions = engine.session(), other.session()
    done, total = 0, sum(len(pairs) for pairs in sets.values())
    found = []
    for name, pairs in sets.items():
        sums, counts, agreed = [], [], 0
        for question, expected in pairs:
            (prompt, answer), theirs = (_tokens(each, question, expected, think) for each in (engine, other))
            if (prompt, answer) != theirs or engine.vocab_size != other.vocab_size:
                raise UsageError(f"{engine.path} and {other.path} have different tokens, so they can't be compared")
            mine, wanted = (_logits(each, prompt, answer) for each in sessions)
            mine, wanted = mine[:, : engine.vocab_size].log_softmax(-1), wanted[:, : engine.vocab_size].log_softmax(-1)
            sums.append(float((wanted.exp() * (wanted - mine)).sum()))
            counts.append(len(answer))
            agreed += int((mine.argmax(-1) == wanted.argmax(-1)).sum())
            done += 1
            if progress:
                progress(done, total, name)
        tokens = sum(counts)
        mean = sum(sums) / tokens
        # Of a ratio of sums (Cochran 1977, 6.3): tokens of one answer are not independent of each other.
        spread = sum((part - mean * count) ** 2 for part, count in zip(sums, counts))
        error = (spread * len(sums) / max(1, len(sums) - 1)) ** 0.5 / tokens
        found.append(Distance(name, tokens, mean, error, agreed / tokens))
    return found


def _tokens(engine: Engine, question: str, answer: str, think: bool) -> tuple[list[int], list[int]]:
    """The prompt's, and those of the answer with its end."""
    tokenizer = engine.tokenizer
    prompt = engine.encode_chat([{"role": "user", "content": question}], think)
    return prompt, [*tokenizer.encode(answer), tokenizer.control_id("<|im_end|>")]


def _logits(session: Session, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits f32 [n, V] for each of the answer's n tokens."""
    session.reset()
    hidden = session.feed([*prompt, *answer[:-1]], keep_all=True)
    return session.logits(hidden[len(prompt) - 1 :])
