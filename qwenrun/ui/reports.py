"""How measurements are shown: `bench`, `eval` and `doctor`, as text or as one JSON document.

Also opens the model that is measured. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwenrun.ui import console
from qwenrun.ui.chat import describe_experts
from qwenrun.ui.models import find_model, model_name, plan_model
from qwenrun.ui.progress import Progress, Status
from qwenrun.ui.tables import fields, table

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine

MISSES_SHOWN = 10


@contextmanager
def measuring(
    model: str | None,
    *,
    ctx: int,
    kv: str,
    label: str,
    unit: str,
    quiet: bool,
    ram: int | None = None,
    vram: int | None = None,
) -> Iterator[tuple[Engine, Progress]]:
    """The open model, and the progress of measuring it."""
    path = find_model(model, quiet)
    ram = plan_model(path, ctx=ctx, kv=kv, ram=ram, vram=vram, quiet=quiet)
    with Status(f"loading {path} ...", quiet):
        from qwenrun.engine.engine import Engine

        engine = Engine.open(path, ctx=ctx, kv=kv, ram=ram, vram=vram, device="cpu" if vram is None else "cuda")
    with engine, Progress(label, unit=unit, quiet=quiet) as progress:
        yield engine, progress


def bench_report(result: Any, *, as_json: bool) -> None:
    """Print a BenchResult."""
    if as_json:
        console.document("bench", 1, result.to_json())
        return
    share = result.achieved / result.read_bandwidth
    of_memory = "(the weights fit in the processor's cache)" if result.in_cache else f"({share:.0%} of it)"
    console.say(
        fields(
            [
                ("model", f"{result.model}, {console.decimal_size(result.bytes_per_token)} of weights a token"),
                ("machine", f"{result.machine}, {result.threads} thread{'' if result.threads == 1 else 's'}"),
                ("prefill", f"{_speed(result.prefill)}, {result.prompt_tokens:,} tokens"),
                ("decode", f"{_speed(result.decode)}, {result.gen_tokens:,} tokens"),
                ("weights read", f"{console.decimal_size(result.achieved)}/s {of_memory}"),
                ("memory reads", f"{console.decimal_size(result.read_bandwidth)}/s"),
                ("measured as", result.bandwidth_method),
                ("experts", _experts(result)),
                ("peak memory", console.size(result.peak_rss) if result.peak_rss else ""),
            ]
        )
    )


def _experts(result: Any) -> str:
    """What the cache did while decoding; "" for a model without routed experts."""
    plan, use = result.plan, result.decode_experts
    if not plan["experts"]:
        return ""
    tokens = result.gen_tokens * len(result.decode.runs)
    held = f"{plan['resident_experts']:,} of {plan['experts']:,} resident"
    disk = f", disk {console.decimal_size(result.disk_read_bandwidth)}/s" if result.disk_read_bandwidth else ""
    return f"{held}; decode: {describe_experts(use, tokens)}{disk}"


def _speed(speed: Any) -> str:
    runs = f"median of {len(speed.runs)}, {min(speed.runs):,.1f} to {max(speed.runs):,.1f}"
    return f"{speed.median:,.1f} tok/s ({runs})" if len(speed.runs) > 1 else f"{speed.median:,.1f} tok/s"


def eval_report(engine: Engine, figures: Sequence[Any], *, as_json: bool) -> None:
    """Print the Figures of each set."""
    name = model_name(engine.config, engine.path)
    if as_json:
        content = {"model": name, "path": str(engine.path), "sets": [each.to_json() for each in figures]}
        console.document("eval", 1, content)
        return
    rows = [(each.name, f"{len(each.answers):,}", f"{each.exact:,}", f"{each.rate:.1%}") for each in figures]
    console.say(f"model  {name}\n")
    console.say(table(("set", "questions", "exact", "rate"), rows))
    missed = [answer for each in figures for answer in each.answers if not answer.exact]
    if missed:
        console.say(f"\nmissed{f', the first {MISSES_SHOWN} of {len(missed)}' if len(missed) > MISSES_SHOWN else ''}:")
        for miss in missed[:MISSES_SHOWN]:
            answer = miss.answer or "(nothing)"
            console.say("\n" + fields([("asked", miss.question), ("expected", miss.expected), ("answered", answer)]))


def doctor_report(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what `diagnose` found."""
    if as_json:
        console.document("doctor", 1, found)
        return
    libraries = ", ".join(f"{name} {version or 'missing'}" for name, version in found["libraries"].items())
    console.say(
        fields(
            [
                ("system", f"{found['system']}, Python {found['python']}"),
                ("cpu", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"),
                ("cpu flags", " ".join(found["cpu_flags"]) or "none that kernels are written for"),
                ("cache", _size(found["cache_bytes"])),
                ("memory", f"{_size(found['available_memory_bytes'])} free of {_size(found['memory_bytes'])}"),
                ("disk", f"{_size(found['free_disk_bytes'])} free here"),
                ("gpu", ", ".join(found["gpus"]) or "none"),
                ("libraries", libraries),
                ("kernels", "; ".join(f"{name}: {detail}" for name, detail in found["kernels"].items()) or "none"),
            ]
        )
    )
    rows = [(row["op"], row["backend"], row["refused"]) for row in found["backends"]]
    console.say("\n" + table(("op", "<backend", "<passed over"), rows, left=2))


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else console.size(nbytes)
