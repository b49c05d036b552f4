"""Speed of an open model: prefill and decode tokens per second, medians of several runs, beside the memory's speed.

Feeds random tokens straight to a session, so that nothing is cached, sampled or printed in the measured time.
Knows nothing of how the figures are shown.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwenrun.engine.events import ExpertUse
from qwenrun.errors import UsageError
from qwenrun.measure.bandwidth import card_bandwidth, read_bandwidth
from qwenrun.measure.machine import machine, peak_rss

if TYPE_CHECKING:
    import torch

    from qwenrun.engine.engine import Engine
SEED = 0


@dataclass(frozen=True)
class Speed:
    """Tokens per second of each run, in order."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.runs), "max": max(self.runs), "runs": list(self.runs)}


@dataclass(frozen=True)
class BenchResult:
    """What one measurement found; bandwidths in bytes per second.

    achieved: weight bytes read per token times tokens per second. in_cache: the weights that a token reads fit
    into the processor's (or the card's) cache, so that `achieved` says nothing of memory. plan: what was planned, in
    bytes.
    prefill_experts, decode_experts: the expert cache in the measured runs. disk_read_bandwidth: bytes of experts
    read per second while any read was under way; 0 without one. peak_rss: of this process, so far.
    """

    model: str
    path: str
    prompt_tokens: int
    gen_tokens: int
    ctx: int
    kv: str
    prefill: Speed
    decode: Speed
    bytes_per_token: int
    read_bandwidth: float
    bandwidth_method: str
    threads: int
    machine: str
    in_cache: bool
    plan: Mapping[str, Any]
    prefill_experts: ExpertUse
    decode_experts: ExpertUse
    disk_read_bandwidth: float
    peak_rss: int | None

    @property
    def achieved(self) -> float:
        return self.bytes_per_token * self.decode.median

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "path": self.path,
            "prompt_tokens": self.prompt_tokens,
            "gen_tokens": self.gen_tokens,
            "ctx": self.ctx,
            "kv": self.kv,
            "prefill_tokens_per_second": self.prefill.to_json(),
            "decode_tokens_per_second": self.decode.to_json(),
            "bytes_per_token": self.bytes_per_token,
            "achieved_bytes_per_second": self.achieved,
            "read_bandwidth_bytes_per_second": self.read_bandwidth,
            "read_bandwidth_method": self.bandwidth_method,
            "weights_fit_in_cache": self.in_cache,
            "threads": self.threads,
            "machine": self.machine,
            "plan": dict(self.plan),
            "prefill_experts": self._use(self.prefill_experts, self.prompt_tokens),
            "decode_experts": self._use(self.decode_experts, self.gen_tokens),
            "disk_read_bytes_per_second": self.disk_read_bandwidth,
            "peak_rss_bytes": self.peak_rss,
        }

    def _use(self, use: ExpertUse, tokens: int) -> dict[str, Any]:
        count = tokens * len(self.decode.runs)
        return asdict(use) | {
            "hit_rate": use.hit_rate,
            "disk_bytes_per_token": use.disk_bytes / count,
            "copied_bytes_per_token": use.copied_bytes / count,
            "stall_seconds_per_token": use.stall_seconds / count,
        }


def finish(device: torch.device) -> None:
    """Wait until a card has done what it was told; it is told long before."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def bench(
    engine: Engine,
    prompt_tokens: int,
    gen_tokens: int,
    runs: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchResult:
    """Measure `runs` runs after one that is not counted. Raises UsageError if they do not fit the context."""
    import torch

    if prompt_tokens + gen_tokens > engine.run.ctx:
        raise UsageError(
            f"{prompt_tokens:,} + {gen_tokens:,} tokens do not fit in the context of {engine.run.ctx:,}",
            f"--ctx {prompt_tokens + gen_tokens}",
        )
    rng = random.Random(SEED)
    session = engine.session()
    total = (runs + 1) * (1 + gen_tokens)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, what)

    prefill, decode = [], []
    prefill_use = decode_use = ExpertUse()
    read_from = engine.disk_reads()
    for number in range(runs + 1):
        before = engine.expert_stats()
        session.reset()
        prompt = [rng.randrange(engine.vocab_size) for _ in range(prompt_tokens)]
        begun = time.perf_counter()
        session.prefill(prompt)
        finish(engine.device)
        prefill.append(prompt_tokens / (time.perf_counter() - begun))
        advance("prefill")
        between = engine.expert_stats()
        spent = 0.0
        for _ in range(gen_tokens):
            token = rng.randrange(engine.vocab_size)
            begun = time.perf_counter()
            session.step(token)
            finish(engine.device)
            spent += time.perf_counter() - begun
            advance("decode")
        decode.append(gen_tokens / spent)
        if number:
            prefill_use += between - before
            decode_use += engine.expert_stats() - between
        else:
            read_from = engine.disk_reads()
    read_bytes, read_seconds = (now - then for now, then in zip(engine.disk_reads(), read_from))
    disk_read = read_bytes / read_seconds if read_seconds > 0 else 0.0
    rss = peak_rss()  # before the measurement of memory, which takes memory of its own
    on_card = engine.device.type == "cuda"
    bandwidth, method = card_bandwidth() if on_card else read_bandwidth()
    cache, where = machine().cache_bytes, machine().line()
    if on_card:
        card = torch.cuda.get_device_properties(engine.device)
        cache, where = card.L2_cache_size, f"{card.name}, {where}"
    bytes_per_token = engine.bytes_per_token()
    return BenchResult(
        model=engine.config.name,
        path=str(engine.path),
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        ctx=engine.run.ctx,
        kv=engine.run.kv,
        prefill=Speed(tuple(prefill[1:])),
        decode=Speed(tuple(decode[1:])),
        bytes_per_token=bytes_per_token,
        read_bandwidth=bandwidth,
        bandwidth_method=method,
        threads=torch.get_num_threads(),
        machine=where,
        in_cache=cache is not None and bytes_per_token <= cache,
        plan={
            "device_bytes": engine.plan.parts(),
            "host_bytes": engine.plan.parts("host"),
            "disk_bytes": engine.plan.parts("disk"),
            "experts": engine.plan.experts,
            "resident_experts": engine.plan.slots,
        },
        prefill_experts=prefill_use,
        decode_experts=decode_use,
        disk_read_bandwidth=disk_read,
        peak_rss=rss,
    )
