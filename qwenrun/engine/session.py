"""Session: one sequence and everything said in it so far.

Holds the tokens, the state they produced and a few checkpoints of it, so that a conversation pays for each
token once. Yields events (see `events`); prints nothing, and knows no weight and no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenrun.engine.events import Done, Event, Kind, Reason, Stats, Token
from qwenrun.engine.sampler import Sampler, SamplingParams
from qwenrun.engine.state import Saved, SequenceState
from qwenrun.errors import UsageError
from qwenrun.text.stream import ThinkSplitter
from qwenrun.text.tokenizer import Detokenizer

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A place in a session to come back to. Keys and values are not copied: they stay in the session's cache,
    so a snapshot lasts until other tokens are fed in their place."""

    tokens: tuple[int, ...]
    saved: Saved

    @property
    def position(self) -> int:
        return len(self.tokens)


class Session:
    """A sequence of at most `ctx` tokens. Not to be used from two threads at once.

    `tokens` are those the state has consumed. A token that was just sampled is consumed when the next one is
    asked for, so the last token of a finished generation is not among them.
    """

    def __init__(self, engine: Engine, state: SequenceState) -> None:
        """Engine.session makes sessions. state: memory that is this sequence's own while it lasts."""
        self._engine = engine
        self._chunk = engine.run.chunk
        self._state = state
        self._decode = engine.decoder(state)
        # Tokens whose keys and values are in the cache. Those from `position` on are left over from before a
        # rollback and stay usable until they are overwritten.
        self._ids: list[int] = []
        self._interrupted = False

    # -- what there is ---------------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """The tokens the state has consumed."""
        return self._ids[: self._state.position]

    @property
    def position(self) -> int:
        """How many tokens the state has consumed."""
        return min(self._state.position, len(self._ids))

    @property
    def ctx(self) -> int:
        """How many tokens fit."""
        return self._state.ctx

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, DeltaNet states and checkpoints, all allocated when the session was made."""
        return self._state.nbytes

    # -- feeding ---------------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], all_logits: bool = False, progress: Progress | None = None) -> Tensor:
        """Feed `ids` in chunks; return the logits f32 [V] after the last one, or [T, V] after each.

        progress(done, total) is called after every chunk. Raises UsageError if `ids` is empty or does not fit;
        the session is then as before.
        """
        if not ids:
            raise UsageError("there is nothing to prefill: no token was given")
        hidden = self.feed(ids, keep_all=all_logits, progress=progress)
        return self.logits(hidden if all_logits else hidden[-1])

    def step(self, token: int) -> Tensor:
        """Feed one token; return the logits f32 [V] for the one after it."""
        return self.logits(self.feed([token])[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits f32 [n, V] or [V] of what `feed` gave, f32 [n, H] or [H]."""
        return self._engine.model.logits(hidden)

    def _check_room(self, count: int) -> None:
        if self.position + count > self.ctx:
            raise _too_long(self.position + count, self.ctx)

    def feed(self, ids: Sequence[int], keep_all: bool = False, progress: Progress | None = None) -> Tensor:
        """Feed `ids` (one or more) in chunks; the hidden states f32 [n, H] after the final norm, of the last chunk or
        of all of them.

        Raises UsageError if they do not fit; the session is then as before.
        """
        self._check_room(len(ids))
        if min(ids) < 0 or max(ids) >= self._engine.config.vocab_size:
            raise UsageError(f"token ids go from 0 to {self._engine.config.vocab_size - 1}")
        self._settle()
        kept: list[Tensor] = []
        for start in range(0, len(ids), self._chunk):
            part = list(ids[start : start + self._chunk])
            hidden = self._forward(part)
            kept = [*kept, hidden] if keep_all else [hidden]
            if progress is not None:
                progress(start + len(part), len(ids))
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def _forward(self, part: list[int]) -> Tensor:
        """One chunk through the model. What is overwritten is forgotten first, so that an interruption (Ctrl-C
        in the middle of a layer) leaves nothing that looks valid and is not."""
        del self._ids[self._state.position :]
        self._state.forget_after(self._state.position)
        self._interrupted = True
        if self._decode is not None and len(part) == 1:
            hidden = self._decode(part[0])
        else:
            ids = torch.tensor(part, dtype=torch.long, device=self._state.device)
            hidden = self._engine.model.forward(ids, self._state)
        self._ids += part
        self._interrupted = False
        return hidden

    def _settle(self) -> None:
        """After an interruption: go back to a checkpoint and feed the tokens since again."""
        if self._interrupted:
            self._rewind(self.position)

    # -- going back ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy of the DeltaNet states here (constant size); memory of its own, beyond what was planned."""
        self._settle()
        return Snapshot(tuple(self.tokens), self._state.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Back (or forward) to where `snapshot` was taken in this session.

        Raises UsageError if other tokens were fed over its place, so that its keys and values are gone.
        """
        if tuple(self._ids[: snapshot.position]) != snapshot.tokens:
            raise UsageError(
                f"the snapshot at {snapshot.position:,} tokens is no longer valid: its tokens were overwritten"
            )
        self._interrupted = True
        self._state.restore(snapshot.saved)
        self._interrupted = False

    def checkpoint(self) -> None:
        """Keep this place in one of the session's checkpoint slots (the one unused longest makes room)."""
        self._settle()
        self._state.checkpoint()

    def rollback(self, k: int) -> None:
        """Take the last k tokens back: restore the nearest checkpoint and feed the tokens between again.

        Exact up to the rounding of another chunking. Raises UsageError unless 0 <= k <= position.
        """
        if not 0 <= k <= self.position:
            raise UsageError(f"can't take back {k} tokens: the session holds {self.position:,}")
        if k or self._interrupted:
            self._rewind(self.position - k)

    def reset(self) -> None:
        """Forget everything."""
        self._interrupted = True
        self._ids.clear()
        self._state.reset()
        self._interrupted = False

    def _rewind(self, target: int) -> None:
        """Make `position` exactly `target`, which is among the tokens the cache holds."""
        tokens = self._ids[:target]
        start = self._restore_before(target)
        if start < target:
            self.feed(tokens[start:])

    def _restore_before(self, target: int) -> int:
        """Restore the furthest place not after `target`: where we are, a checkpoint, or the start."""
        live = self._state.position
        best = self._state.nearest(target)
        if not self._interrupted and best <= live <= target:
            return live
        self._interrupted = True
        self._state.restore_nearest(target)
        self._interrupted = False
        return best

    # -- generating ------------------------------------------------------------------------------------------

    def generate(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Event]:
        """Feed `ids` to where the session is, then sample: yields a Token for each, and one Done.

        params: by default the model's own. max_tokens: by default until the context is full. stop_ids: tokens
        that end the generation and are not part of it; by default every end token the checkpoint names.
        Closing the iterator early leaves the session as if it had stopped there. Raises UsageError if `ids`
        does not fit.
        """
        if not ids:
            raise UsageError("there is nothing to continue: no token was given")
        self._check_room(len(ids))
        engine = self._engine
        return self._run(
            list(ids),
            resume=False,
            branch=None,
            params=engine.defaults if params is None else params,
            max_tokens=_checked(max_tokens),
            stop_ids=engine.eos_ids if stop_ids is None else frozenset(stop_ids),
            progress=progress,
            splitter=None,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Event]:
        """The model's answer to a conversation: yields Tokens, reasoning apart from answer, and one Done.

        messages: mappings with `role` and `content`, as the chat template takes them. think: by default the
        checkpoint's own choice. The tokens the session already holds of this conversation are not computed
        again; `Done.stats.cached_tokens` counts them.
        """
        engine = self._engine
        think = engine.thinking_default if think is None else think
        history, prompt = (engine.encode_chat(messages, think, tools, prompt=asked) for asked in (False, True))
        # Later turns keep this history but not the generation prompt (nor the reasoning that follows it): the
        # end of the history is where the next turn will branch off.
        branch = len(history) if prompt[: len(history)] == history else None
        if len(prompt) > self.ctx:
            raise _too_long(len(prompt), self.ctx)
        return self._run(
            prompt,
            resume=True,
            branch=branch,
            params=engine.sampling(think) if params is None else params,
            max_tokens=_checked(max_tokens),
            stop_ids=engine.eos_ids,
            progress=progress,
            splitter=ThinkSplitter(think),
        )

    def _run(
        self,
        prompt: list[int],
        *,
        resume: bool,
        branch: int | None,
        params: SamplingParams,
        max_tokens: int | None,
        stop_ids: frozenset[int],
        progress: Progress | None,
        splitter: ThinkSplitter | None,
    ) -> Iterator[Event]:
        """resume: `prompt` is the whole sequence, of which the session may hold a beginning; otherwise it is
        appended. branch: where in `prompt` to keep a checkpoint."""
        clock = time.perf_counter
        text = _Text(self._engine, splitter)
        begun, opened = clock(), self._engine.expert_stats()
        cached = self._reuse(prompt) if resume else 0
        device = self._state.device.type
        sampler = Sampler(params, self._engine.vocab_size, [*self.tokens, *prompt[cached:]], device)
        logits = self._prefill_prompt(prompt[cached:], None if branch is None else branch - cached, progress)
        prefill_seconds, prefilled = clock() - begun, self._engine.expert_stats()

        ids: list[int] = []
        reason: Reason = "length"
        steps, decode_seconds = 0, 0.0
        while max_tokens is None or len(ids) < max_tokens:
            begun = clock()
            if ids:
                if self.position >= self.ctx:
                    reason = "context"
                    break
                logits = self.step(ids[-1])
                steps += 1
            token = sampler(logits)
            if token in stop_ids:
                reason = "stop"
                decode_seconds += clock() - begun
                break
            ids.append(token)
            events = text.push(token)
            decode_seconds += clock() - begun
            yield from events
        yield from text.flush(ids[-1] if ids else 0)
        stats = Stats(
            len(prompt),
            cached,
            len(ids),
            steps,
            prefill_seconds,
            decode_seconds,
            prefilled - opened,
            self._engine.expert_stats() - prefilled,
        )
        yield Done(reason, text.of("answer"), text.of("reasoning"), tuple(ids), stats)

    def _reuse(self, prompt: list[int]) -> int:
        """Go to the furthest place from which `prompt` continues; returns it. Its last token is always left to
        compute, for the logits after it."""
        common = 0
        for held, wanted in zip(self._ids, prompt[:-1]):
            if held != wanted:
                break
            common += 1
        return self._restore_before(common)

    def _prefill_prompt(self, rest: list[int], branch: int | None, progress: Progress | None) -> Tensor:
        """Feed `rest`, with a checkpoint after `branch` of its tokens (if that is a place in it)."""
        if branch is None or not 0 <= branch < len(rest):
            return self.prefill(rest, progress=progress)

        def shifted(done: int, _: int) -> None:
            if progress is not None:
                progress(branch + done, len(rest))

        if branch:
            self.feed(rest[:branch], progress=None if progress is None else lambda n, _: progress(n, len(rest)))
        self.checkpoint()
        return self.prefill(rest[branch:], progress=shifted)


class _Text:
    """Token ids to events: whole characters only, reasoning apart from answer. Without a tokenizer, no text."""

    def __init__(self, engine: Engine, splitter: ThinkSplitter | None) -> None:
        self._tokenizer = engine.tokenizer if engine.has_tokenizer else None
        self._detokenizer = Detokenizer(self._tokenizer) if self._tokenizer else None
        self._splitter = splitter
        self._texts: dict[Kind, list[str]] = {"answer": [], "reasoning": []}

    def push(self, token: int) -> list[Token]:
        """The events of one token, at least one."""
        text = self._detokenizer.push(token) if self._detokenizer else ""
        if self._splitter is None:
            return self._events(token, [("answer", text)]) or [Token(token, "")]
        # Only the control token ends the reasoning: a model may quote the tag's spelling.
        control = self._tokenizer is not None and self._tokenizer.control(token) is not None
        return self._events(token, self._splitter.push(text, control)) or [Token(token, "", self._splitter.kind)]

    def flush(self, token: int) -> list[Token]:
        """What was held back, given out with the last token's id."""
        text = self._detokenizer.flush() if self._detokenizer else ""
        if self._splitter is None:
            return self._events(token, [("answer", text)])
        return self._events(token, [*self._splitter.push(text, control=False), *self._splitter.flush()])

    def _events(self, token: int, pieces: list[tuple[Kind, str]]) -> list[Token]:
        events = []
        for kind, text in pieces:
            if text:
                self._texts[kind].append(text)
                events.append(Token(token, text, kind))
        return events

    def of(self, kind: Kind) -> str:
        return "".join(self._texts[kind])


def _checked(max_tokens: int | None) -> int | None:
    if max_tokens is not None and max_tokens < 0:
        raise UsageError(f"max_tokens can't be negative: {max_tokens}")
    return max_tokens


def _too_long(tokens: int, ctx: int) -> UsageError:
    larger = -(-tokens // 1024) * 1024
    return UsageError(
        f"{tokens:,} tokens do not fit in the context of {ctx:,} tokens",
        f"open the model with a larger context (--ctx {larger}) or start over with a shorter text",
    )
