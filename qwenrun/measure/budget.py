"""Speed inside memory budgets: one pack, several budgets, each in a process of its own, reads past the page cache.

    python -m qwenrun.measure.budget PACK... [--shares 25,50,75,100] [--prompt-tokens 32] [--gen-tokens 48] [--json]

A share is one of the memory with which every expert would be resident. Ends with one line a pack and budget:

    budget=25% tok_s=3.1 hit=24.9% bytes_per_token=233.0MB rss_over_plan=-1.2%

`rss_over_plan` compares the process's peak resident memory, less what it was before the model was opened, with the
plan less its runtime. Knows no kernel and no cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenrun.errors import UsageError
from qwenrun.measure.machine import machine, peak_rss
from qwenrun.measure.synth import guarded
from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import Run
from qwenrun.plan.planner import weigh, whole_budget
from qwenrun.quant.packfile.layout import read_manifest

SHARES = "25,50,75,100"


def measure(pack: Path, ram: int, prompt_tokens: int, gen_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Open, prefill and decode once, after as many tokens again to warm the cache; figures as plain data."""
    import torch

    from qwenrun.engine.engine import Engine

    torch.zeros(1) + 1
    baseline = peak_rss() or 0
    rng = random.Random(seed)
    ctx = 2 * (prompt_tokens + gen_tokens)
    with Engine.open(pack, ctx=ctx, ram=ram, direct=True) as engine:
        session = engine.session()

        def ids(count: int) -> list[int]:
            return [rng.randrange(engine.config.vocab_size) for _ in range(count)]

        session.prefill(ids(prompt_tokens))
        for token in ids(gen_tokens):
            session.step(token)
        begun, cold = time.perf_counter(), engine.expert_stats()
        session.prefill(ids(prompt_tokens))
        prefill_seconds, between = time.perf_counter() - begun, engine.expert_stats()
        read = engine.disk_reads()
        begun = time.perf_counter()
        for token in ids(gen_tokens):
            session.step(token)
        seconds = time.perf_counter() - begun
        use, fill = engine.expert_stats() - between, between - cold
        nbytes, busy = (now - then for now, then in zip(engine.disk_reads(), read))
        parts = engine.plan.parts()
        planned = parts["total"] - parts["runtime"]
        return {
            "ram_bytes": ram,
            "plan_bytes": parts,
            "experts": engine.plan.experts,
            "resident_experts": engine.plan.slots,
            "tokens_per_second": gen_tokens / seconds,
            "prefill_tokens_per_second": prompt_tokens / prefill_seconds,
            "hit_rate": use.hit_rate,
            "disk_bytes_per_token": use.disk_bytes / gen_tokens,
            "prefill_disk_bytes": fill.disk_bytes,
            "stall_seconds_per_token": use.stall_seconds / gen_tokens,
            "ahead": use.ahead,
            "ahead_used": use.ahead_used,
            "disk_read_bytes_per_second": nbytes / busy if busy else 0.0,
            "baseline_rss_bytes": baseline,
            "peak_rss_bytes": peak_rss() or 0,
            "rss_over_plan": ((peak_rss() or 0) - baseline - planned) / planned,
        }


def line(name: str, share: str, figures: dict[str, Any]) -> str:
    """The one line of a budget."""
    fields = [
        f"budget={share}%",
        f"tok_s={figures['tokens_per_second']:.2f}",
        f"hit={figures['hit_rate']:.1%}",
        f"bytes_per_token={figures['disk_bytes_per_token'] / 1e6:.1f}MB",
        f"rss_over_plan={figures['rss_over_plan']:+.1%}",
        f"disk={figures['disk_read_bytes_per_second'] / 1e6:.0f}MB/s",
        f"stall={figures['stall_seconds_per_token'] * 1e3:.0f}ms",
        f"prefill_tok_s={figures['prefill_tokens_per_second']:.1f}",
        f"ram={figures['ram_bytes'] / 2**20:.0f}MiB",
        f"pack={name}",
    ]
    return " ".join(fields)


def whole(pack: Path, ctx: int) -> int:
    """Bytes with which every expert of a pack is resident."""
    manifest = read_manifest(pack)
    config = ModelConfig.from_hf(manifest.config, name=pack.name)
    run = Run(ctx=ctx, mtp=False, vision=False)
    return whole_budget(config, weigh(config, manifest.stored, run), run)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qwenrun.measure.budget", description=__doc__.splitlines()[0])
    parser.add_argument("packs", nargs="+", type=Path, metavar="PACK")
    parser.add_argument("--shares", default=SHARES, help=f"percent of what everything needs (default: {SHARES})")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--gen-tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return guarded(lambda: print(json.dumps(measure(*_sizes(options)))))
    return guarded(lambda: _all(options))


def _sizes(options: argparse.Namespace) -> tuple[Path, int, int, int]:
    return options.packs[0], options.one, options.prompt_tokens, options.gen_tokens


def _all(options: argparse.Namespace) -> None:
    shares = [text.strip() for text in options.shares.split(",")]
    if not all(text.replace(".", "", 1).isdigit() for text in shares):
        raise UsageError(f"--shares {options.shares!r} is no list of percentages", f"--shares {SHARES}")
    rows = []
    for pack in options.packs:
        most = whole(pack, 2 * (options.prompt_tokens + options.gen_tokens))
        for share in shares:
            print(f"{pack.name}: {share} % of {most / 2**30:.1f} GiB ...", file=sys.stderr)
            sizes = ["--prompt-tokens", str(options.prompt_tokens), "--gen-tokens", str(options.gen_tokens)]
            ram = str(int(most * float(share) / 100))
            command = [sys.executable, "-m", "qwenrun.measure.budget", str(pack), "--one", ram, *sizes]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if done.returncode:
                print(done.stderr.strip(), file=sys.stderr)
                rows.append({"pack": pack.name, "share": share, "exit_code": done.returncode})
                continue
            rows.append({"pack": pack.name, "share": share, **json.loads(done.stdout)})
    if options.json:
        print(json.dumps({"machine": machine().line(), "rows": rows}))
        return
    print(f"machine: {machine().line()}; {options.gen_tokens} tokens decoded after {options.prompt_tokens}, warm")
    for row in rows:
        if "exit_code" in row:
            print(f"budget={row['share']}% exit_code={row['exit_code']} pack={row['pack']}")
        else:
            print(line(row["pack"], row["share"], row))


if __name__ == "__main__":
    sys.exit(main())
