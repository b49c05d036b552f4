"""Selftest: whether this machine computes what it should. Every op of the table of cases against the reference, the
demo model's logits against those that are shipped, and how fast products read weights.

The first thing to run on a new machine, and what a report of a bug contains. Knows nothing of how it is shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwenrun.demo import data_dir, model_dir
from qwenrun.errors import UsageError
from qwenrun.kernels.cases import FLOAT32, SPECS, Case, cases, inputs, on_device
from qwenrun.kernels.dispatch import FALLBACK, backends, explain, pick
from qwenrun.kernels.ops import FACTORIES, encode
from qwenrun.kernels.weight import Weight
from qwenrun.measure.bandwidth import card_bandwidth, read_bandwidth
from qwenrun.measure.machine import diagnose

GOLDEN = "golden.json"
# The demo's logits come from bf16 weights in float32; a card's bfloat16 operands move them by some thousandths.
LOGITS_BOUND = {"cpu": 1e-3, "cuda": 2e-2}
# Products of a card round their operands to bfloat16: 2^-9 each, and a little for their sum.
OPERANDS_BOUND = 1e-2
# Rows and columns whose weights are far larger than what caches hold, on a card too.
SPEED_SHAPE = {"cpu": (16384, 4096), "cuda": (65536, 8192)}
SPEED_FORMS = ("int4-g128-tiled", "nvfp4-tiled", "int8-g128", "bf16")
SPEED_RUNS = 7


@dataclass(frozen=True)
class Checked:
    """One case: the backend that computed it, |y - reference| / |reference|, and what is allowed. error is NaN, and
    trouble says why, if it could not be computed at all."""

    case: str
    backend: str
    error: float
    bound: float
    trouble: str = ""

    @property
    def ok(self) -> bool:
        return not self.trouble and self.error <= self.bound


@dataclass(frozen=True)
class Streamed:
    """A product with one row of activations: bytes of weights per second, and their share of the read bandwidth; NaN
    and the reason if it could not be computed."""

    storage: str
    backend: str
    bytes_per_second: float
    share: float
    trouble: str = ""


@dataclass(frozen=True)
class Selftest:
    """All that was found. logits_error is against the shipped ones, relative to their largest magnitude; NaN, and
    logits_trouble says why, if there are none."""

    device: str
    machine: dict[str, Any]
    checked: tuple[Checked, ...]
    logits_error: float
    logits_trouble: str
    logits_bound: float
    read_bandwidth: float
    streamed: tuple[Streamed, ...]
    seconds: float

    @property
    def failed(self) -> list[Checked]:
        return [one for one in self.checked if not one.ok]

    @property
    def ok(self) -> bool:
        streams = not any(one.trouble for one in self.streamed)
        return not self.failed and streams and self.logits_error <= self.logits_bound

    def to_json(self) -> dict[str, Any]:
        """Numbers that are none are null: JSON has no NaN."""
        return _without_nan(asdict(self) | {"ok": self.ok})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def selftest(device: str | None = None, progress: Callable[[int, int], None] | None = None) -> Selftest:
    """Check `device` ("cpu" or "cuda"; by default a card if there is one). Raises UsageError if there is no such."""
    begun = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in LOGITS_BOUND:
        raise UsageError(f"there is no device {device!r} to test", "--device cpu, or --device cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no NVIDIA card", "qwenrun doctor; qwenrun selftest --device cpu")
    table = cases()
    checked = []
    for number, case in enumerate(table):
        checked.append(_checked(case, device))
        if progress:
            progress(number + 1, len(table))
    bandwidth, _ = read_bandwidth() if device == "cpu" else card_bandwidth()
    streamed = tuple(_streamed(storage, device, bandwidth) for storage in SPEED_FORMS)
    logits, trouble = float("nan"), ""
    try:
        logits = _logits_error(device)
    except Exception as error:  # as in _checked
        trouble = _said(error)
    return Selftest(
        device,
        diagnose(),
        tuple(checked),
        logits,
        trouble,
        LOGITS_BOUND[device],
        bandwidth,
        streamed,
        time.perf_counter() - begun,
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _results(kernel: Callable[..., Any], case: Case, arguments: list[Any]) -> Iterator[Tensor]:
    """What the op gives, then its tensor arguments, among which are the states it has changed."""
    own = FACTORIES.get(case.op)
    made = kernel(*arguments[:own])(*arguments[own:]) if own else kernel(*arguments)
    yield from made if isinstance(made, (list, tuple)) else [made]
    yield from (a for a in arguments if isinstance(a, Tensor))


def _checked(case: Case, device: str) -> Checked:
    kernel = pick(case.op, device, case.spec)
    package = next(p for p in backends().values() if getattr(p, case.op, None) is kernel)
    backend = package.BACKEND
    # Both sides are float32: the reference's own rounding is in the difference.
    bound = max(case.bound_of(backend), 10 * FLOAT32)
    if backend.devices == ("cuda",) and case.op in OPERANDS:
        bound = max(bound, OPERANDS_BOUND)
    given = list(inputs(case, torch.Generator().manual_seed(1)))
    wanted = [t.double() for t in _results(getattr(backends()[FALLBACK], case.op), case, on_device(given, "cpu"))]
    try:
        found = [t.double().cpu() for t in _results(kernel, case, on_device(given, device))]
    except Exception as error:  # whatever a driver or compiler raises is what this is to tell
        return Checked(case.name, backend.name, float("nan"), bound, _said(error))
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True)]
    # max() passes over what is not a number.
    worst = next((e for e in errors if e != e), max(errors))
    return Checked(case.name, backend.name, worst, bound)


OPERANDS = {"linear", "linears", "swiglu", "moe_entry", "experts", "attention", "decode_attention"}
OPERANDS |= {"delta_rule", "delta_net"}


def _seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _streamed(storage: str, device: str, bandwidth: float) -> Streamed:
    rows, cols = SPEED_SHAPE[device]
    spec = SPECS[storage]
    generator = torch.Generator().manual_seed(2)
    piece = encode(torch.randn(256, cols, generator=generator), spec)
    # The same rows again and again: speed does not ask what the numbers are.
    parts = {
        name: part if name == "tensor_scale" else part.repeat(rows // 256, 1).to(device)
        for name, part in piece.parts.items()
    }
    weight = Weight.from_parts(spec, rows, cols, {n: p.to(device) for n, p in parts.items()})
    kernel, x = pick("linear", device, spec), torch.randn(1, cols, generator=generator).to(device)
    served = explain(("linear",), device, spec)[0]["backend"]
    try:
        kernel(x, weight)
        times = [_seconds(lambda: kernel(x, weight), device) for _ in range(SPEED_RUNS)]
    except Exception as error:  # as in _checked
        return Streamed(storage, served, float("nan"), float("nan"), _said(error))
    speed = weight.nbytes / statistics.median(times)
    return Streamed(storage, served, speed, speed / bandwidth)


def _logits_error(device: str) -> float:
    """How far the demo model's logits are from the shipped ones, as a share of the largest of those."""
    golden = read_golden()
    found = demo_logits(golden["ids"], device)
    wanted = torch.tensor(golden["logits"])
    return float((found[golden["tokens"]] - wanted).abs().max() / wanted.abs().max())


def read_golden() -> dict[str, Any]:
    """ids: the prompt; tokens and logits: some of the logits f32 after it, of the reference."""
    import json

    return json.loads((data_dir() / GOLDEN).read_text())


def demo_logits(ids: list[int], device: str) -> Tensor:
    """The embedded demo model's logits f32 [V] after `ids`, on the CPU."""
    from qwenrun.engine.engine import Engine

    with Engine.open(model_dir(), ctx=len(ids) + 8, device=device) as engine:
        return engine.session().prefill(ids).float().cpu()


def make_golden() -> dict[str, Any]:
    """What `read_golden` reads, made anew with the reference (QWENRUN_BACKEND=ref)."""
    from qwenrun.text.tokenizer import Tokenizer

    ids = Tokenizer.load(model_dir()).encode("What is a pack, and what does qwenrun vram tell?")
    logits = demo_logits(ids, "cpu")
    tokens = torch.cat([logits.topk(24).indices, torch.arange(0, len(logits), max(1, len(logits) // 40))])
    tokens = tokens.unique()
    return {"ids": ids, "tokens": tokens.tolist(), "logits": [round(v, 6) for v in logits[tokens].tolist()]}
