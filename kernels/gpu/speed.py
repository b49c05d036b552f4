"""Times what a layer of the 122B asks of a card, op by op, on the card that is there.

    python -m qwenrun.kernels.gpu.speed [--json] [--only NAME] [--tokens 512]

A decoded token's ops are played from CUDA graphs, as the engine plays them, over copies of their arguments that are
together larger than a card's L2; a prompt's are launched one by one. `bytes` are the fewest that an op has to move, so
a share of the bandwidth below 1 counts what it moves beyond them as lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from qwenrun.kernels import gpu
from qwenrun.kernels.gpu.steps import Step, decode_steps, prompt_steps, tensors

# Bytes of arguments that are gone through before one is used again: no L2 has as many.
AROUND = 512 << 20
RUNS = 15


@dataclass(frozen=True)
class Timed:
    """seconds: the median of one call. share: of the read bandwidth. tflops: 1e12 operations per second."""

    name: str
    seconds: float
    nbytes: int
    share: float
    tflops: float


def read_bandwidth() -> float:
    """Bytes per second that the card reads: the best of several sums over 2 GiB, or half of what is free."""
    free, _ = torch.cuda.mem_get_info()
    buffer = torch.ones(min(AROUND, free // 8), dtype=torch.float32, device="cuda")
    buffer.sum()
    return buffer.nbytes / min(_events(buffer.sum, 1) for _ in range(RUNS))


def _events(work: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` calls."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def seconds(step: Step, graph: bool) -> float:
    """The median time of one call."""
    whole = sum(t.nbytes for t in tensors(step.arguments))
    copies = [step.bound(gpu, "cuda") for _ in range(min(64, max(2, -(-AROUND // whole))))]

    def all_() -> None:
        for work in copies:
            work()

    for _ in range(2):
        all_()
    torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            all_()
        play: Callable[[], object] = recorded.replay
    else:
        play = all_
    play()
    return statistics.median(_events(play, 1) for _ in range(RUNS)) / len(copies)


def measure(steps: Iterator[Step], graph: bool, bandwidth: float) -> Iterator[Timed]:
    """Every step; what can't be computed is told on stderr and left out."""
    for step in steps:
        try:
            took = seconds(step, graph)
        except Exception as error:  # whatever a driver or compiler raises is what this is to tell
            print(f"{step.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        yield Timed(step.name, took, step.minimum, step.minimum / took / bandwidth, step.flops / took / 1e12)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser("python -m qwenrun.kernels.gpu.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--only", default="", metavar="NAME", help="ops whose name has this in it")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt (default: 512)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA card")
    bandwidth = read_bandwidth()
    every = ((decode_steps(), True), (prompt_steps(options.tokens), False))
    found = []
    for steps, graph in every:
        for one in measure((s for s in steps if options.only in s.name), graph, bandwidth):
            found.append(one)
            if not options.json:
                print(
                    f"{one.name:34} {one.seconds * 1e6:9.1f} us  {one.nbytes / one.seconds / 1e9:7.0f} GB/s  "
                    f"{one.share:6.1%}  {one.tflops:7.1f} Tflop/s",
                    flush=True,
                )
    if options.json:
        card = torch.cuda.get_device_name()
        rows = [asdict(one) for one in found]
        print(
            json.dumps(
                {"schema": "qwenrun-gpu-speed/1", "card": card, "read_bandwidth": bandwidth, "ops": rows}, indent=1
            )
        )
    else:
        print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e9:.0f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
