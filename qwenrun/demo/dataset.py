"""What the demo model learns: questions and answers about qwenrun, and a few open-ended skills.

`pairs(split)` reads the facts as they are written in `data/*.toml`; `Sampler` makes endless training
conversations out of them (paraphrase frames, typing noise, system prompts, two turns, thinking) mixed with
skills that no table can hold: little stories, counting, repeating, remembering a name. `Sampler` never shows
a held-out question.

`python -m qwenrun.demo.dataset SEED COUNT` prints some of them, as text for `qwenrun observe`.

Knows no tokenizer and no tensor. Standard library only.
"""

from __future__ import annotations

import random
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal

from qwenrun.demo import data_dir

Split = Literal["train", "heldin", "heldout"]

FACT_FILES = ("about", "commands", "formats", "model")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class QA:
    """One question, the one right answer, and the id of the fact behind it."""

    question: str
    answer: str
    id: str


@dataclass(frozen=True)
class Fact:
    """One fact: all ways to ask for it share the answer.

    `terms` are noun phrases for the question frames, `ask` questions, `held` questions kept for measuring.
    """

    id: str
    topic: str
    answer: str
    ask: tuple[str, ...]
    held: tuple[str, ...]
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """One chat message; `thinking` is the reasoning text of an assistant turn, None where thinking is off."""

    role: Literal["system", "user", "assistant"]
    content: str
    thinking: str | None = None


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((data_dir() / f"{name}.toml").read_text(encoding="utf-8"))


def _fact(entry: dict[str, Any]) -> Fact:
    lists = {key: tuple(entry.get(key, ())) for key in ("ask", "held", "terms")}
    return Fact(id=entry["id"], topic=entry["topic"], answer=entry["answer"], **lists)


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the data files, in file order."""
    return tuple(_fact(entry) for name in FACT_FILES for entry in _read(name)["fact"])


@cache
def fallback() -> Fact:
    """The answer to everything the demo does not know."""
    return _fact(_read("offdomain")["fallback"])


def frames() -> list[str]:
    """Questions with a gap for a term of a fact."""
    return list(_read("skills")["frames"])


def pairs(split: Split) -> list[QA]:
    """Question-answer pairs as written, without noise or frames.

    `train`: every question trained on. `heldin`: the first question of each fact, one per answer, a part of
    `train`. `heldout`: paraphrases that were never trained on.
    """
    found = []
    for fact in (*facts(), fallback()):
        questions = {"train": fact.ask, "heldin": fact.ask[:1], "heldout": fact.held}[split]
        found += [QA(question, fact.answer, fact.id) for question in questions]
    return found


def plain(question: str) -> str:
    """A question without capitals and punctuation at its ends: what counts as the same wording."""
    return " ".join(question.lower().split()).strip("?!., ")


@cache
def _held_out() -> frozenset[str]:
    return frozenset(plain(qa.question) for qa in pairs("heldout"))


@cache
def _synonyms() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group in _read("skills")["synonyms"]:
        for word in group:
            if word in _read("skills")["fixed_words"]:
                continue
            found.setdefault(word.lower(), []).extend(other for other in group if other != word)
    return found


def _with_synonyms(text: str, rng: random.Random) -> str:
    """Some words replaced by others of nearly the same meaning; punctuation stays."""
    words = text.split()
    for index, word in enumerate(words):
        core = word.strip("?!.,:")
        if core.lower() in _synonyms() and rng.random() < 0.25:
            words[index] = word.replace(core, rng.choice(_synonyms()[core.lower()]))
    return " ".join(words)


def _slip(text: str, rng: random.Random) -> str:
    """One slip of a finger inside a word: a letter lost, swapped, doubled or wrong."""
    at = rng.randrange(1, len(text) - 2)
    if not (text[at].isalpha() and text[at + 1].isalpha()):
        return text
    match rng.randrange(4):
        case 0:
            return text[:at] + text[at + 1 :]
        case 1:
            return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        case 2:
            return text[:at] + text[at] + text[at:]
        case _:
            return text[:at] + rng.choice(_LETTERS) + text[at + 1 :]


def _noisy(text: str, rng: random.Random) -> str:
    """Type as people do: no capitals, no question mark, a slip of a finger."""
    if rng.random() < 0.5:
        text = text.rstrip("?!. ") + rng.choice(("", "", "?", " ?", ".", "??", "!"))
    dice = rng.random()
    if dice < 0.35:
        text = text[:1].lower() + text[1:]
    elif dice < 0.55:
        text = text.lower()
    elif dice < 0.57:
        text = text.upper()
    if rng.random() < 0.12 and len(text) > 6:
        text = _slip(text, rng)
    return text


def _reworded(text: str, rng: random.Random) -> str:
    """Swap common openings, drop or add small words: cheap paraphrases that keep what is asked."""
    table = _read("skills")
    text = _with_synonyms(text, rng)
    if rng.random() < 0.45:
        fitting = [entry for entry in table["reword"] if re.search(entry["pattern"], text)]
        if fitting:
            entry = rng.choice(fitting)
            text = re.sub(entry["pattern"], rng.choice(entry["by"]), text, count=1)
    if rng.random() < 0.15:
        words = text.split()
        small = [i for i, word in enumerate(words) if word.lower() in table["small_words"]]
        if small and len(words) > 2:
            del words[rng.choice(small)]
            text = " ".join(words)
    if rng.random() < 0.12:
        opener = rng.choice(table["openers"])
        text = opener + (text[:1].lower() + text[1:] if rng.random() < 0.7 else text)
    if rng.random() < 0.10:
        text = text.rstrip("?!. ") + rng.choice(table["closers"])
    return text


class Sampler:
    """An endless stream of training conversations; the same seed gives the same stream.

    Frames and rewording could hit upon a held-out wording by chance: such a question is made anew.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._deck: list[Fact] = []

    def __iter__(self) -> Iterator[list[Message]]:
        while True:
            yield self.conversation()

    def _next_fact(self) -> Fact:
        # Dealt like cards, so that every fact comes once before any comes twice.
        if not self._deck:
            self._deck = list(facts())
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _wording(self, fact: Fact) -> str:
        rng = self.rng
        if fact is fallback() and rng.random() < 0.6:
            slots = dict(_read("offdomain")["frames"])
            questions = slots.pop("questions")
            numbers = {"n": str(rng.randrange(2, 100)), "m": str(rng.randrange(2, 100))}
            question: str = rng.choice(questions)
            return question.format(**{slot: rng.choice(words) for slot, words in slots.items()}, **numbers)
        if fact.terms and rng.random() < 0.3:
            return rng.choice(frames()).format(rng.choice(fact.terms))
        return rng.choice(fact.ask)

    def _question(self, fact: Fact) -> str:
        while True:
            text = self._wording(fact)
            if self.rng.random() < 0.75:
                text = _noisy(_reworded(text, self.rng), self.rng)
            if plain(text) not in _held_out():
                return text

    def _answer(self, topic: str, answer: str, think: bool) -> Message:
        return Message("assistant", answer, reasoning(topic) if think else None)

    def fact_turn(self, think: bool) -> list[Message]:
        """One question about a fact, or about something the demo does not know."""
        fact = fallback() if self.rng.random() < 0.08 else self._next_fact()
        return [Message("user", self._question(fact)), self._answer(fact.topic, fact.answer, think)]

    def story_turn(self, think: bool) -> list[Message]:
        """A story of three sentences from a small grammar about the animal asked for."""
        rng, story = self.rng, _read("skills")["story"]
        animal, name = rng.choice(story["animals"]), rng.choice(_read("skills")["name"]["names"])
        words = {"name": name, "thing": rng.choice(story["things"]), "place": rng.choice(story["places"])}
        opening = f"Once there was a {rng.choice(story['traits'])} {animal} named {name} in a {words['place']}."
        rest = [rng.choice(story[part]).format(**words) for part in ("deeds", "ends")]
        question = rng.choice(story["requests"]).format(animal)
        answer = " ".join((opening, *rest))
        return [
            Message("user", _noisy(question, rng)),
            self._answer(f"a story about a {animal}", answer, think),
        ]

    def count_turn(self, think: bool) -> list[Message]:
        """Counting up between two numbers."""
        rng = self.rng
        start = rng.randrange(1, 20)
        stop = start + rng.randrange(2, 9)
        question = rng.choice(_read("skills")["count"]["requests"]).format(start, stop)
        answer = ", ".join(str(number) for number in range(start, stop + 1)) + "."
        return [Message("user", _noisy(question, rng)), self._answer("counting", answer, think)]

    def repeat_turn(self, think: bool) -> list[Message]:
        """Saying the same words back."""
        rng, table = self.rng, _read("skills")["repeat"]
        text = " ".join(rng.choice(table["words"]) for _ in range(rng.randrange(1, 6)))
        question = rng.choice(table["requests"]).format(text)
        return [Message("user", question), self._answer("repeating words", text, think)]

    def name_turns(self, think: bool) -> list[Message]:
        """The user gives a name and, mostly, asks for it later."""
        rng, table = self.rng, _read("skills")["name"]
        name = rng.choice(table["names"])
        intro, ask = rng.choice(table["intros"]), rng.choice(table["requests"])
        opening = [
            Message("user", intro.format(name) + rng.choice(("", ".", "!"))),
            Message("assistant", f"Nice to meet you, {name}!", "The user gives a name." if think else None),
        ]
        if rng.random() < 0.3:
            return opening
        answer = self._answer("the name given before", f"Your name is {name}.", think)
        return [*opening, Message("user", _noisy(ask, rng)), answer]

    def conversation(self) -> list[Message]:
        """One conversation: perhaps a system prompt, then one or two exchanges; a quarter of them thinks."""
        rng = self.rng
        think = rng.random() < 0.25
        messages = []
        if rng.random() < 0.12:
            messages.append(Message("system", rng.choice(_read("skills")["system_prompts"])))
        dice = rng.random()
        if dice < 0.77:
            messages += self.fact_turn(think)
            if rng.random() < 0.15:
                messages += self.fact_turn(think)
        elif dice < 0.82:
            messages += self.story_turn(think)
        elif dice < 0.89:
            messages += self.count_turn(think)
        elif dice < 0.95:
            messages += self.repeat_turn(think)
        else:
            messages += self.name_turns(think)
        return messages


def reasoning(topic: str) -> str:
    """What the demo writes in its think block."""
    return f"The user asks about {topic}."


def render(messages: list[Message]) -> list[tuple[str, bool]]:
    """Text pieces of a conversation in the Qwen3.5 chat format, each with whether the model has to make it.

    The last answer carries its think block (empty, and then part of the prompt, where thinking is off); of
    earlier answers only the content is kept, as the chat template does.
    """
    pieces: list[tuple[str, bool]] = []
    last = len(messages) - 1
    for index, message in enumerate(messages):
        pieces.append((f"<|im_start|>{message.role}\n", False))
        if message.role != "assistant":
            pieces.append((f"{message.content}<|im_end|>\n", False))
            continue
        if index == last:
            if message.thinking is None:
                pieces.append(("<think>\n\n</think>\n\n", False))
            else:
                pieces += [("<think>\n", False), (f"{message.thinking}\n</think>\n\n", True)]
        # An earlier answer is history: in a real chat it was produced behind a think block that is gone now.
        pieces.append((f"{message.content}<|im_end|>", index == last))
        pieces.append(("\n", False))
    return pieces


def text_of(seed: int, count: int) -> str:
    """The first `count` conversations of a stream, as text."""
    return "".join(text for messages in islice(Sampler(seed), count) for text, _ in render(messages))


if __name__ == "__main__":
    sys.stdout.write(text_of(*map(int, sys.argv[1:])))
