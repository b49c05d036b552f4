"""What the engine yields while it generates: Token ... Token, Done. Chat, pipes and bench all read this one stream.

Knows nothing of how an event is shown, and imports the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

Kind = Literal["answer", "reasoning"]
Reason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, usually one event each.

    text: what became printable with this token. Empty while the bytes of a character are incomplete, and for
        a token that only opens or closes the reasoning.
    kind: whether `text` is part of the answer or of the reasoning before it.

    A token whose text is part of both makes two events, and text held back to the end comes in one more with
    the last token's id: count `Done.ids`, not events.
    """

    id: int
    text: str
    kind: Kind = "answer"


@dataclass(slots=True)
class ExpertUse:
    """What the expert cache did: counts that go on, or the difference of two of them; all zero if every expert is in
    memory from the start.

    lookups: experts that layers asked for, each once a layer and pass; `hits` of them were there. disk_bytes: read
    from disk. copied_bytes: moved from RAM to the GPU. stall_seconds: time in which there was nothing to compute.
    ahead: experts read before their layer asked for them, `ahead_used` of which it then did. assisted: experts
    that the CPU computed beside a GPU.
    """

    lookups: int = 0
    hits: int = 0
    disk_bytes: int = 0
    copied_bytes: int = 0
    stall_seconds: float = 0.0
    ahead: int = 0
    ahead_used: int = 0
    assisted: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of lookups that found their expert; 1.0 if nothing was asked for."""
        return self.hits / self.lookups if self.lookups else 1.0

    def __add__(self, other: ExpertUse) -> ExpertUse:
        return ExpertUse(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: ExpertUse) -> ExpertUse:
        return ExpertUse(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Stats:
    """What one generation cost. Seconds are the engine's own: the time a reader holds an event is not counted.

    prompt_tokens: length of the whole prompt, `cached_tokens` of them taken over from what the session held.
    generated_tokens: tokens that were yielded; the stop token is not one of them.
    decode_steps: forward passes over one token. The first token comes from the prefill, so this is one less
        than the tokens sampled, stop token included.
    prefill_experts, decode_experts: the expert cache in each of the two.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_experts: ExpertUse = field(default_factory=ExpertUse)
    decode_experts: ExpertUse = field(default_factory=ExpertUse)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed (not cached) prompt tokens per second; 0.0 if nothing was computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps per second; 0.0 if there was none."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a generation.

    reason: "stop" (the model ended its turn), "length" (max_tokens), or "context" (the context is full).
    text, reasoning: all text of the two kinds. `ids`: the generated tokens without the stop token.
    """

    reason: Reason
    text: str = ""
    reasoning: str = ""
    ids: tuple[int, ...] = ()
    stats: Stats = field(default_factory=Stats)


Event = Token | Done
