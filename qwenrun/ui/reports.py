"""How measurements are shown: `bench`, `eval`, `doctor` and `selftest`, as text or as one JSON document.

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
    from qwenrun.measure.selftest import Selftest

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


def eval_report(
    engine: Engine, figures: Sequence[Any], distances: Sequence[Any] = (), beside: str = "", *, as_json: bool
) -> None:
    """Print the Figures of each set, and its Distance from the model `beside`."""
    name = model_name(engine.config, engine.path)
    if as_json:
        content: dict[str, Any] = {"model": name, "path": str(engine.path)}
        content["sets"] = [each.to_json() for each in figures]
        if distances:
            content["beside"] = {"model": beside, "sets": [each.to_json() for each in distances]}
        console.document("eval", 1, content)
        return
    rows = [(each.name, f"{len(each.answers):,}", f"{each.exact:,}", f"{each.rate:.1%}") for each in figures]
    console.say(f"model  {name}\n")
    console.say(table(("set", "questions", "exact", "rate"), rows))
    if distances:
        console.say(f"\nbeside {beside}, over the tokens of the expected answers:\n")
        apart = [
            (each.name, f"{each.tokens:,}", f"{each.divergence:.2e}", f"{each.error:.0e}", f"{each.agree:.2%}")
            for each in distances
        ]
        console.say(table(("set", "tokens", "divergence", "+-", "same likeliest"), apart))
        console.say("\ndivergence: mean Kullback-Leibler, nats a token; 0 is the same model")
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


def selftest_report(found: Selftest, *, as_json: bool) -> None:
    """Print what `measure.selftest` found. Raises QwenrunError if anything is off."""
    from qwenrun.errors import QwenrunError

    if as_json:
        console.document("selftest", 1, found.to_json())
    else:
        _say_selftest(found)
    if not found.ok:
        failed = len(found.failed)
        what = [
            f"{failed} of {len(found.checked)} cases failed" if failed else "",
            "" if found.logits_error <= found.logits_bound else "the demo model's logits are off",
            "a product could not be timed" if any(one.trouble for one in found.streamed) else "",
        ]
        raise QwenrunError("; ".join(filter(None, what)), "report it with this output and qwenrun doctor's")


def _say_selftest(found: Selftest) -> None:
    """Each op with its backends and worst error against its bound, then what failed, the logits, the speeds."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for one in found.checked:
        rows.setdefault((one.case.split("-")[0], one.backend), []).append(one)
    lines = []
    for (op, backend), group in rows.items():
        worst = max(group, key=lambda one: one.error / one.bound if one.error == one.error else float("inf"))
        state = "ok" if all(one.ok for one in group) else "FAILED"
        lines.append((op, backend, str(len(group)), f"{worst.error:.1e}", f"{worst.bound:.1e}", state))
    console.say(table(("op", "<backend", "cases", "worst error", "allowed", "<"), lines, left=1))
    for one in found.failed:
        console.say(f"FAILED {one.case} on {one.backend}: {one.trouble or f'error {one.error:.2e}'}")
    speeds = [
        (one.storage, one.backend, f"{one.bytes_per_second / 1e9:.1f} GB/s", f"{one.share:.0%}")
        for one in found.streamed
    ]
    console.say("\n" + table(("product, one row", "<backend", "weights", "of the bandwidth"), speeds, left=1))
    for stream in found.streamed:
        if stream.trouble:
            console.say(f"FAILED {stream.storage} on {stream.backend}: {stream.trouble}")
    logits = f"off by {found.logits_error:.1e} of the largest, {found.logits_bound:.0e} allowed"
    gpus = ", ".join(found.machine["gpus"])
    console.say(
        "\n"
        + fields(
            [
                ("device", f"{found.device}, {gpus if found.device == 'cuda' else found.machine['cpu']}"),
                ("kernels", "; ".join(f"{k}: {v}" for k, v in found.machine["kernels"].items()) or "none"),
                ("bandwidth", f"{found.read_bandwidth / 1e9:.1f} GB/s read"),
                ("demo logits", found.logits_trouble or logits),
                ("result", f"{'ok' if found.ok else 'FAILED'}, {found.seconds:.1f} s"),
            ]
        )
    )


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else console.size(nbytes)
