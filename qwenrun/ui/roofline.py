"""docs/roofline.md: what decoding may reach on cards people have, by the code behind `qwenrun vram`."""

from __future__ import annotations

from qwenrun.plan.buffers import read_per_token
from qwenrun.plan.device import find_card
from qwenrun.plan.planner import Budget, Run, place, weigh
from qwenrun.plan.speed import DISK, Rates, decode_speed
from qwenrun.ui.vram import described

MODEL, RECIPES, CTX, RAM_BYTES = "Qwen3.5-122B-A10B", "balanced,int4,nvfp4", 32768, 64 << 30
CARDS = ("RTX 4090", "RTX 5090", "RTX PRO 6000", "A100 80GB", "H100", "H200")


def roofline_markdown() -> str:
    """The page."""
    lines = [
        "# Decoding on cards: predicted",
        "",
        "Written by `make docs` with the planner of `qwenrun vram`. **Predicted, not measured**: bytes over",
        "bandwidths, the slow end with even routing, one thing after another at 50 % of each bandwidth, the fast end",
        "with skewed routing, all at once at 90 %, and what a layer's launches take (see `qwenrun/plan/speed.py`). The",
        "floor is the weights read for a token, over the card's bandwidth as its maker states it, with all of them in",
        "VRAM: no kernel is faster. What an H100 reached: [gpu.md](gpu.md).",
        "",
        f"{MODEL}, {CTX:,} tokens of context, BF16 keys and values, {RAM_BYTES >> 30} GiB of RAM beside the card,",
        f"{DISK / 1e9:.1f} GB/s of disk.",
        "",
        "| card | GB/s | recipe | GB a token | floor, ms | experts in VRAM | tok/s, predicted | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    run = Run(ctx=CTX, mtp=False, vision=False)
    config, variants = described(MODEL, RECIPES)
    weighed = [(recipe, weigh(config, stored, run)) for recipe, stored in variants]
    for name in CARDS:
        card = find_card(name)
        budget, rates = Budget(card.vram, RAM_BYTES, gpu=True), Rates(card.bandwidth, card.link, DISK)
        for recipe, weights in weighed:
            plan = place(config, weights, run, budget)
            speed, read = decode_speed(plan, weights.stored, rates), read_per_token(config, weights.stored)
            lines.append(
                f"| {card.name} | {card.bandwidth / 1e9:,.0f} | {recipe} | {read / 1e9:.2f} "
                f"| {1e3 * read / card.bandwidth:.2f} | {plan.resident:.0%} | {speed.low:.0f} to {speed.high:.0f} "
                f"| {speed.binds} |"
            )
    return "\n".join(lines) + "\n"
