"""Counts what decoding one token moves: every address that a kernel asks for, under Triton's interpreter.

    TRITON_INTERPRET=1 python -m qwenrun.kernels.gpu.traffic [--json] [--page docs/traffic.md] [--only NAME]

Memory moves in sectors of 32 bytes. A sector counts once a launch (what is asked for again is in the caches) and once
in `asked` for every program that asks for it, which is what the caches have to give. What torch does around the kernels
counts too. Scratch is what an op writes and reads again itself: it is a few MB at most and stays in a card's L2, and it
is counted all the same. Nothing here is a speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from qwenrun.kernels import gpu
from qwenrun.kernels.gpu.steps import Step, decode_steps, tensors

SECTOR = 32
BOUND = 1.05


@dataclass(frozen=True)
class Moved:
    """What a step moved, in bytes: memory that outlives it, scratch, and what its programs asked the caches for."""

    name: str
    minimum: int
    kept: int
    scratch: int
    asked: int
    launches: int

    @property
    def ratio(self) -> float:
        return (self.kept + self.scratch) / self.minimum


class _Meter(TorchDispatchMode):
    """Sees every load and store of the interpreter, and every call of torch."""

    def __init__(self) -> None:
        super().__init__()
        # Sectors that the program, and that the programs before it of the same launch asked for: to read, to write.
        self._program: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._launch: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self.sectors: dict[int, int] = {}
        self.asked = self.launches = 0

    def touch(self, addresses: np.ndarray, width: int, write: bool) -> None:
        """Bytes at addresses, each `width` long."""
        ends = [addresses // SECTOR, (addresses + (width - 1)) // SECTOR]
        self._program[write].append(np.unique(np.concatenate(ends)))

    def next_program(self) -> None:
        for own, all_ in zip(self._program, self._launch):
            if own:
                distinct = np.unique(np.concatenate(own))
                self.asked += distinct.size * SECTOR
                all_.append(distinct)
                own.clear()

    def launched(self) -> None:
        """A launch is done: each of its sectors was read once, or written once, or both."""
        self.next_program()
        for all_ in self._launch:
            if all_:
                for sector in np.unique(np.concatenate(all_)).tolist():
                    self.sectors[sector] = self.sectors.get(sector, 0) + 1
                all_.clear()
        self.launches += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outs = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(outs) if isinstance(t, Tensor)]
        owners = {t.untyped_storage()._cdata for t in given}
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        views = all(t.untyped_storage()._cdata in owners for t in made) and not writes
        if not views and not function._schema.name.startswith(("aten::empty", "aten::new_empty")):
            for write, tensors in enumerate((given, made)):
                for tensor in tensors:
                    self.touch(np.arange(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, SECTOR), 1, bool(write))
            self.launched()
        return outs


@contextmanager
def _metered(meter: _Meter) -> Iterator[None]:
    """Have the interpreter tell `meter` of what its kernels do. Memory is counted at its own addresses."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, index, run = (
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx, executor.__call__,
    )  # fmt: skip

    def pointers(handle: Any, mask: Any, write: bool) -> None:
        size = max(1, handle.get_element_ty().primitive_bitwidth // 8)
        meter.touch(np.broadcast_to(handle.data, mask.data.shape)[mask.data].astype(np.int64).ravel(), size, write)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        pointers(ptrs, mask, False)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        pointers(ptrs, mask, True)
        return store(self, ptrs, value, mask, *rest)

    def grid_idx(self: Any, *at: Any) -> Any:
        meter.next_program()
        return index(self, *at)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(self, *args, **kwargs)
        meter.launched()

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.set_grid_idx, executor.__call__ = grid_idx, call
    try:
        with meter:
            yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx, executor.__call__ = index, run


def measure(step: Step) -> Moved:
    """Do the step once, uncounted, and once more."""
    work = step.bound(gpu)
    work()
    meter = _Meter()
    with _metered(meter):
        made = work()
    # Sorted runs of sectors of what was there before or is there after.
    lasting = [t.untyped_storage() for t in tensors((step.arguments, made))]
    spans = sorted({(s.data_ptr() // SECTOR, (s.data_ptr() + s.nbytes() - 1) // SECTOR) for s in lasting})
    starts, ends = np.array(spans).T
    at, times = np.array(list(meter.sectors)), np.array(list(meter.sectors.values()))
    which = np.clip(np.searchsorted(starts, at, side="right") - 1, 0, None)
    kept = int(times[(at >= starts[which]) & (at <= ends[which])].sum()) * SECTOR
    total = int(times.sum()) * SECTOR
    return Moved(step.name, step.minimum, kept, total - kept, meter.asked, meter.launches)


def page(found: Sequence[Moved]) -> str:
    """docs/traffic.md."""
    lines = [
        "# What decoding one token moves on a card",
        "",
        "Written by `make gpu-traffic`, which counts the addresses that the kernels ask for, under Triton's",
        "interpreter, at a quarter of the 122B's rows. Memory moves in sectors of 32 bytes, each once a launch.",
        "`minimum` is what is read and written however it is done: weights, caches and states, what goes in and what",
        "comes out. `scratch` is what an op writes and reads again itself, which stays in a card's L2; it is in the",
        "ratio. `asked of the caches`: each sector once for every program that asks for it. Nothing here is a speed.",
        "",
        "| step | minimum | memory | of it scratch | memory / minimum | asked of the caches / minimum | launches |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one.name} | {one.minimum:,} | {one.kept + one.scratch:,} | {one.scratch:,} | {one.ratio:.3f} "
            f"| {one.asked / one.minimum:.2f} | {one.launches} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a step moves more of what outlives it than BOUND allows."""
    parser = argparse.ArgumentParser("python -m qwenrun.kernels.gpu.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--only", default="", metavar="NAME", help="steps whose name has this in it")
    options = parser.parse_args(arguments)
    if not gpu.INTERPRETED:
        parser.error("addresses are seen under the interpreter alone: set TRITON_INTERPRET=1")
    found = []
    for step in decode_steps(cut=4, chosen=2):
        if options.only in step.name:
            found.append(measure(step))
            print(f"{step.name}: {found[-1].ratio:.3f} of the minimum", file=sys.stderr)
    if options.page:
        options.page.write_text(page(found))
    if options.json:
        document = [asdict(one) | {"ratio": one.ratio} for one in found]
        print(json.dumps({"schema": "qwenrun-gpu-traffic/1", "steps": document}, indent=1))
    else:
        print(page(found), end="")
    return int(any(one.kept > BOUND * one.minimum for one in found))


if __name__ == "__main__":
    sys.exit(main())
