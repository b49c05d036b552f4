"""Which experts a model asks for, and how often a cache of a given size would have had them.

    python -m qwenrun.measure.routes -m PACK [--tokens 400] [--json]

Records the routes of generated answers (or, `--zipf Z`, makes up skewed ones), and replays them through the
engine's own SlotTable with several half-lives, and through the best that is possible, which knows the future
(Belady 1966). The default half-life was chosen by this; docs/log.md has the table. Knows no file and no kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenrun.engine.slots import SlotTable
from qwenrun.errors import QwenrunError, exit_code

HALF_LIVES = (1.0, 16.0, 64.0, 256.0, 1024.0, 1e9)
SHARES = (0.1, 0.25, 0.5, 0.75)

# One entry a layer and pass: the keys asked for (layer * experts + expert), how many tokens wanted each, and how many
# tokens the layer had then seen.
Trace = list[tuple[np.ndarray, np.ndarray, int]]


def record(engine: Any, prompts: Sequence[str], tokens: int) -> tuple[Trace, int]:
    """The routes of answers to `prompts`, each at most `tokens` long, sampled as the model's authors advise; and the
    number of experts in all layers."""
    first: dict[str, int] = {}
    seen: dict[str, int] = {}
    trace: Trace = []
    count = engine.config.num_experts

    def sink(layer: str, chosen: np.ndarray) -> None:
        base = first.setdefault(layer, len(first) * count)
        keys, counts = np.unique(chosen, return_counts=True)
        seen[layer] = seen.get(layer, 0) + len(chosen)
        trace.append((keys + base, counts, seen[layer]))

    engine.record_routes(sink)
    try:
        for prompt in prompts:
            for _ in engine.session().chat([{"role": "user", "content": prompt}], max_tokens=tokens):
                pass
    finally:
        engine.record_routes(None)
    return trace, len(first) * count


def made_up(layers: int, experts: int, top_k: int, tokens: int, zipf: float, seed: int = 0) -> tuple[Trace, int]:
    """Single tokens whose experts follow rank^-zipf, each layer in an order of its own that drifts: every 500 tokens
    a tenth of a layer's experts change places, as topics do."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1, dtype=float) ** -zipf
    orders = [rng.permutation(experts) for _ in range(layers)]
    trace: Trace = []
    ones = np.ones(top_k, dtype=np.int64)
    for token in range(tokens):
        for layer, order in enumerate(orders):
            if token % 500 == 499:
                some = rng.choice(experts, max(2, experts // 10), replace=False)
                order[some] = order[rng.permutation(some)]
            # The k largest of weights^(1/u): k draws without replacement.
            ranks = np.argpartition(np.log(rng.random(experts)) / weights, -top_k)[-top_k:]
            trace.append((np.sort(order[ranks]) + layer * experts, ones, token + 1))
    return trace, layers * experts


def replay(trace: Trace, experts: int, slots: int, half_life: float) -> float:
    """The hit rate of the engine's SlotTable, pooled over all layers, from empty."""
    table = SlotTable(experts, slots, half_life)
    hits = lookups = 0
    for keys, counts, now in trace:
        for key, count in zip(keys.tolist(), counts.tolist()):
            table.touch(key, count, now)
        held = []
        for key in keys.tolist():
            lookups += 1
            slot = int(table.slot_of[key])
            if slot >= 0:
                hits += 1
                table.pin(slot)
            else:
                slot = table.claim(key)
            if slot >= 0:
                held.append(slot)
        for slot in held:
            table.unpin(slot)
    return hits / lookups


def best_possible(trace: Trace, experts: int, slots: int) -> float:
    """The hit rate of a cache that throws out what is asked for latest in the future."""
    uses: list[deque[int]] = [deque() for _ in range(experts)]
    flat = [int(key) for keys, _, _ in trace for key in keys]
    for at, key in enumerate(flat):
        uses[key].append(at)
    following = np.full(experts, -1.0)  # next use of those that are held
    held: set[int] = set()
    hits = 0
    for key in flat:
        uses[key].popleft()
        if key in held:
            hits += 1
        elif len(held) < slots:
            held.add(key)
        else:
            victim = int(following.argmax())
            held.discard(victim)
            following[victim] = -1.0
            held.add(key)
        following[key] = uses[key][0] if uses[key] else np.inf
    return hits / len(flat)


def table(trace: Trace, experts: int) -> list[dict[str, float]]:
    """Hit rates for several sizes of a cache: by half-life ("1", ..., "inf"), and the best possible."""
    rows = []
    for share in SHARES:
        slots = max(1, round(share * experts))
        row = {"share": share, "slots": float(slots)}
        for half_life in HALF_LIVES:
            row["inf" if half_life > 1e6 else f"{half_life:g}"] = replay(trace, experts, slots, half_life)
        rows.append(row | {"best": best_possible(trace, experts, slots)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qwenrun.measure.routes", description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="a pack (default: made-up routes)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of an answer, or made up (default: 400)")
    parser.add_argument("--prompts", type=int, default=24, help="questions of the demo's set to ask (default: 24)")
    parser.add_argument("--zipf", type=float, default=1.0, help="skew of made-up routes (default: 1)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.model:
            from qwenrun.engine.engine import Engine
            from qwenrun.measure.quality import question_sets

            prompts = [question for question, _ in next(iter(question_sets(None).values()))][: options.prompts]
            with Engine.open(options.model, ctx=2048) as engine:
                trace, experts = record(engine, prompts, options.tokens)
        else:
            trace, experts = made_up(options.layers, options.experts, 8, options.tokens, options.zipf)
        rows = table(trace, experts)
    except QwenrunError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return exit_code(error)
    if options.json:
        print(json.dumps(rows))
        return 0
    names = [name for name in rows[0] if name not in ("share", "slots")]
    print("share  slots  " + "  ".join(f"{name:>6}" for name in names))
    for row in rows:
        print(f"{row['share']:5.0%}  {row['slots']:5.0f}  " + "  ".join(f"{row[name]:6.1%}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
