"""`qwenrun chat`: one answer into a pipe, or the prompt of `repl`. A reader of the engine's events.

stdout gets the answer alone. Knows no file of a model and no tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qwenrun.engine.events import Done, Event, ExpertUse, Stats
from qwenrun.errors import UsageError
from qwenrun.ui import console
from qwenrun.ui.models import find_model, model_name, plan_model
from qwenrun.ui.progress import Progress, Status

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine
    from qwenrun.engine.sampler import SamplingParams

MAX_SEED = 2**63 - 1
# Prompts that are read faster than this are not worth a word.
QUIET_PREFILL_SECONDS = 0.5


@dataclass(frozen=True)
class ChatOptions:
    """The options of `qwenrun chat`. `sampling` holds those that were given; the model has the others.

    ram, vram: bytes that everything must fit in; without `ram` what is free now, without `vram` no GPU is used.
    """

    model: str | None = None
    prompt: str | None = None
    system: str | None = None
    think: bool | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ctx: int = 4096
    kv: str = "bf16"
    stats: bool = False
    as_json: bool = False
    ram: int | None = None
    vram: int | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.vram is None else "cuda"


def chat(options: ChatOptions) -> None:
    """Answer once if there is a prompt or piped text, else talk at a prompt."""
    if options.sampling.get("seed", 0) > MAX_SEED:
        raise UsageError(f"--seed {options.sampling['seed']} is more than {MAX_SEED}", "--seed 1")
    question = question_from(options.prompt)
    if question is None:
        _check_terminals(options)
    path = find_model(options.model)
    ram = plan_model(path, ctx=options.ctx, kv=options.kv, ram=options.ram, vram=options.vram)
    with Status(f"loading {path} ..."):
        from qwenrun.engine.engine import Engine

        engine = Engine.open(path, ctx=options.ctx, kv=options.kv, ram=ram, vram=options.vram, device=options.device)
    with engine:
        if question is None:
            from qwenrun.ui.repl import repl

            repl(engine, options)
        else:
            answer(engine, question, options)


def question_from(prompt: str | None) -> str | None:
    """The piped text, then the prompt; None if there is neither and stdin is a terminal.

    Raises UsageError if what there is is empty.
    """
    piped = _read_stdin()
    if prompt is None and piped is None:
        return None
    question = "\n\n".join(text for text in (piped, prompt) if text and text.strip())
    if not question:
        raise UsageError("the prompt is empty", 'qwenrun chat -p "your question"')
    return question


def _read_stdin() -> str | None:
    """All of stdin as text unless it is a terminal (or closed): a file's final newlines are not part of it."""
    if sys.stdin is None or console.is_terminal(sys.stdin):
        return None
    data = sys.stdin.buffer.read()
    text = data.decode("utf-8", errors="replace")
    if text.encode("utf-8", errors="replace") != data:
        console.note("stdin is not all UTF-8: what is not was replaced by \N{REPLACEMENT CHARACTER}")
    return text.rstrip("\r\n")


def _check_terminals(options: ChatOptions) -> None:
    if options.as_json:
        raise UsageError("--json answers one prompt, and there is none", 'qwenrun chat --json -p "your question"')
    if sys.stdin is None or not console.is_terminal(sys.stdout):
        raise UsageError(
            "there is no prompt, and without a terminal nobody to ask for one", 'qwenrun chat -p "your question"'
        )


def parameters(engine: Engine, options: ChatOptions, think: bool | None) -> SamplingParams:
    """The model's own sampling parameters, with those that were given in their place."""
    return replace(engine.sampling(think), **options.sampling)


def messages_for(question: str, system: str | None) -> list[dict[str, str]]:
    system_turn = [{"role": "system", "content": system}] if system else []
    return [*system_turn, {"role": "user", "content": question}]


def answer(engine: Engine, question: str, options: ChatOptions) -> None:
    """Ask once: the answer on stdout as it comes, or one JSON document."""
    params = parameters(engine, options, options.think)
    with Progress("reading", unit="tokens", min_seconds=QUIET_PREFILL_SECONDS) as progress:
        events = engine.session().chat(
            messages_for(question, options.system),
            think=options.think,
            params=params,
            max_tokens=options.max_tokens,
            progress=progress,
        )
        done = _collect(events) if options.as_json else _stream(events, progress)
    if options.as_json:
        console.document("chat", 1, _as_document(engine, options, params, done))
    for line in (ending(done, options), describe(done.stats) if options.stats else ""):
        if line:
            console.note(line)


def _collect(events: Iterator[Event]) -> Done:
    for event in events:
        if isinstance(event, Done):
            return event
    raise RuntimeError("a generation ended without saying so")


def _stream(events: Iterator[Event], progress: Progress) -> Done:
    """Write the answer to stdout as it comes, and reasoning dimmed to stderr if that is a terminal."""
    out, aside = sys.stdout, sys.stderr if console.is_terminal(sys.stderr) else None
    clean = console.printable if console.is_terminal(out) else str
    reasoning, written = False, ""
    with closing(events):  # type: ignore[type-var]
        try:
            for event in events:
                progress.clear()
                if isinstance(event, Done):
                    return event
                if event.kind == "reasoning":
                    if aside and event.text:
                        aside.write(console.dim(console.printable(event.text), aside))
                        aside.flush()
                        reasoning = True
                elif event.text:
                    if reasoning and aside:
                        aside.write("\n\n")
                        aside.flush()
                        reasoning = False
                    out.write(clean(event.text))
                    out.flush()
                    written = event.text
        finally:
            if reasoning and aside:
                aside.write("\n")
            if not written.endswith("\n"):
                out.write("\n")
                out.flush()
    raise RuntimeError("a generation ended without saying so")


def ending(done: Done, options: ChatOptions) -> str:
    """What to know about an answer that is not whole; "" for one that is."""
    if done.reason == "stop":
        return ""
    what = "the answer was cut off" if done.text else "the model was still reasoning and gave no answer: cut off"
    if done.reason == "length":
        return f"{what} at --max-tokens {options.max_tokens}"
    return f"{what} where the context of {options.ctx:,} tokens is full: --ctx {console.tokens(2 * options.ctx)}"


def describe(stats: Stats) -> str:
    """Lines: "prompt 31 tokens (20 cached) 412 tok/s, answer 18 tokens 39.1 tok/s", and what the expert cache did."""
    cached = f" ({stats.cached_tokens:,} cached)" if stats.cached_tokens else ""
    prefill = f" {_rate(stats.prefill_tokens_per_second)}" if stats.prefill_tokens_per_second else ""
    decode = f" {_rate(stats.decode_tokens_per_second)}" if stats.decode_tokens_per_second else ""
    total = console.seconds(stats.prefill_seconds + stats.decode_seconds)
    prompt = f"prompt {stats.prompt_tokens:,} tokens{cached}{prefill}"
    lines = [f"{prompt}, answer {stats.generated_tokens:,} tokens{decode}, {total}"]
    computed = stats.prompt_tokens - stats.cached_tokens
    for what, use, tokens in (
        ("prompt", stats.prefill_experts, computed),
        ("answer", stats.decode_experts, stats.decode_steps),
    ):
        if use.lookups and tokens:
            lines.append(f"experts of the {what}: {describe_experts(use, tokens)}")
    return "\n".join(lines)


def describe_experts(use: ExpertUse, tokens: int) -> str:
    """One line: "hits 92 %, 21.4 MB a token from disk, stalled 0.3 s"."""
    said = [f"hits {use.hit_rate:.1%}", f"{console.decimal_size(use.disk_bytes / tokens)} a token from disk"]
    if use.copied_bytes:
        said.append(f"{console.decimal_size(use.copied_bytes / tokens)} a token to the GPU")
    if use.assisted:
        said.append(f"{use.assisted / tokens:,.1f} a token on the CPU")
    if use.ahead:
        said.append(f"{use.ahead_used / use.ahead:.0%} of {use.ahead:,} read ahead were used")
    return ", ".join([*said, f"stalled {console.seconds(use.stall_seconds)}"])


def _rate(value: float) -> str:
    return f"{value:,.{1 if value < 100 else 0}f} tok/s"


def _as_document(engine: Engine, options: ChatOptions, params: SamplingParams, done: Done) -> dict[str, Any]:
    rates = {
        "prefill_tokens_per_second": done.stats.prefill_tokens_per_second,
        "decode_tokens_per_second": done.stats.decode_tokens_per_second,
    }
    return {
        "model": {"name": model_name(engine.config, engine.path), "path": str(engine.path), "pack": engine.is_pack},
        "answer": done.text,
        "reasoning": done.reasoning,
        "finish_reason": done.reason,
        "params": {
            **asdict(params),
            "max_tokens": options.max_tokens,
            "think": engine.thinking_default if options.think is None else options.think,
            "ctx": options.ctx,
            "kv": options.kv,
        },
        "stats": asdict(done.stats) | rates,
    }
