"""A checkpoint in, a pack out: tensor by tensor in the order of the files, in pieces of bounded size.

Peak memory is a few pieces of at most 32 MiB of weights (or one expert) for each thread, whatever the model's
size. The result depends on the checkpoint and the recipe alone. Knows the names and shapes it was told, no
model graph.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.kernels.weight import Weight
from qwenrun.quant import formats
from qwenrun.quant.errors import CheckpointError, QuantError
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.layout import SIDE_FILES, Manifest, TensorEntry
from qwenrun.quant.packfile.writer import PackWriter, file_sha256
from qwenrun.quant.recipe import DTYPE_BYTES, KEEP, Recipe, TensorInfo, stored_bytes
from qwenrun.quant.report import Report, make_row
from qwenrun.quant.solve import solve, squared_error, tensor_scale_of

# Weights read and solved at a time, per job; an expert is always one job.
PIECE_VALUES = 4 << 20

# progress(done bytes of input, of how many, what is being worked on)
Progress = Callable[[int, int, str], None]


@dataclass
class _Sums:
    """What the pieces of one tensor add up to."""

    signal: float = 0.0
    noise: float = 0.0
    zero_rows: int = 0


def convert(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    inventory: Sequence[TensorInfo],
    *,
    tool: str = "",
    notes: Sequence[str] = (),
    progress: Progress | None = None,
    force: bool = False,
    threads: int | None = None,
) -> Report:
    """Write the pack `out` from an open checkpoint whose tensors are exactly `inventory`.

    tool: name and version that the manifest records. notes: sentences for the manifest and the report.
    threads: by default as many as this process may use. force: replace an existing pack.
    Raises CheckpointError (NaN, infinity, files that changed), RecipeError, StorageError; then nothing is left
    behind.
    """
    started = time.perf_counter()
    checkpoint.check_dtypes()
    by_name = {info.name: info for info in inventory}
    order = [by_name[name] for name in checkpoint.in_file_order() if name in by_name]
    if len(order) != len(inventory):
        raise CheckpointError(f"{checkpoint.folder} lacks {len(inventory) - len(order)} tensors of the inventory")
    # Manifest and files are in the inventory's order: how a checkpoint is cut into shards leaves no trace.
    entries = {info.name: TensorEntry(info, recipe.assign(info)) for info in inventory}
    side_files = {name: checkpoint.folder / name for name in SIDE_FILES if (checkpoint.folder / name).is_file()}
    input_bytes = sum(prod(info.shape) * DTYPE_BYTES[info.dtype] for info in inventory)
    threads = threads or usable_cpus()

    done, lock = 0, threading.Lock()

    def advance(size: int, name: str) -> None:
        nonlocal done
        with lock:
            done += size
            if progress:
                progress(done, input_bytes, name)

    with PackWriter(out, entries, force) as writer:
        sums = _run(checkpoint, writer, [entries[info.name] for info in order], threads, advance)
        if progress:
            progress(input_bytes, input_bytes, "hashing")
        source = _source(checkpoint)
        writer.finish(
            lambda files: Manifest(checkpoint.config, recipe.to_json(), source, tool, tuple(notes), entries, files),
            side_files,
        )
    rows = tuple(
        make_row(
            info.name,
            info.part,
            info.shape,
            _format_name(entries[info.name]),
            stored_bytes(info, entries[info.name].assignment),
            sums[info.name].signal,
            sums[info.name].noise,
            sums[info.name].zero_rows,
            entries[info.name].assignment.note,
        )
        for info in inventory
    )
    pack_bytes = sum(file.stat().st_size for file in out.iterdir())
    seconds = time.perf_counter() - started
    return Report(str(out), recipe.name, rows, input_bytes, pack_bytes, seconds, tuple(notes))


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _format_name(entry: TensorEntry) -> str:
    return entry.info.dtype.lower() if entry.assignment.format == KEEP else entry.assignment.format


def _run(
    checkpoint: Checkpoint,
    writer: PackWriter,
    entries: Sequence[TensorEntry],
    threads: int,
    advance: Callable[[int, str], None],
) -> dict[str, _Sums]:
    """Read in this thread, solve and write in others, at most two pieces a thread ahead."""
    sums = {entry.info.name: _Sums() for entry in entries}
    waiting: deque[tuple[str, Future]] = deque()

    def collect() -> None:
        name, future = waiting.popleft()
        signal, noise, zero_rows, size = future.result()
        total = sums[name]
        # Added in the order of the pieces, so that the sums do not depend on which thread was first.
        total.signal += signal
        total.noise += noise
        total.zero_rows += zero_rows
        advance(size, name)

    # Each piece is computed by one thread: that scales better than several threads in every small step.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
            try:
                for entry in entries:
                    for job in _jobs(checkpoint, writer, entry):
                        waiting.append((entry.info.name, pool.submit(job)))
                        while len(waiting) > 2 * threads:
                            collect()
                while waiting:
                    collect()
            except BaseException:
                for _, future in waiting:
                    future.cancel()
                raise
    finally:
        torch.set_num_threads(torch_threads)
    return sums


_Job = Callable[[], tuple[float, float, int, int]]


def _jobs(checkpoint: Checkpoint, writer: PackWriter, entry: TensorEntry):  # type: ignore[no-untyped-def]
    """The pieces of one tensor. Each job reads, checks, encodes and writes one; it returns (signal, noise, zero
    rows, bytes read)."""
    info, how = entry.info, entry.assignment
    if info.is_experts:
        for expert in range(info.shape[0]):
            yield lambda expert=expert: _expert_job(checkpoint, writer, entry, expert)
        return
    row_values = prod(info.shape[1:])
    step = max(1, PIECE_VALUES // max(1, row_values))
    tensor_scale = None
    if how.spec is not None and how.spec.tensor_scale:
        largest = 0.0
        for start in range(0, info.shape[0], step):
            piece = checkpoint.read(info.name, start, min(start + step, info.shape[0]))
            largest = max(largest, _finite(piece, info.name).abs().max().item())
        tensor_scale = tensor_scale_of(how.spec, torch.tensor([largest]))
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        yield lambda start=start, stop=stop: _rows_job(checkpoint, writer, entry, start, stop, tensor_scale)


def _expert_job(
    checkpoint: Checkpoint, writer: PackWriter, entry: TensorEntry, expert: int
) -> tuple[float, float, int, int]:
    info, how = entry.info, entry.assignment
    stored = checkpoint.read(info.name, expert, expert + 1)[0]
    values = _finite(stored, info.name)
    if how.spec is None:
        writer.put_expert(info.name, expert, Weight.plain(stored))
        return 0.0, 0.0, _zero_rows(values), stored.numel() * stored.element_size()
    groups = values.abs().unflatten(0, (info.tensor_scales, -1)).amax((1, 2))
    weight = solve(formats.parse(how.format), values, tensor_scale_of(how.spec, groups))
    writer.put_expert(info.name, expert, weight)
    return *squared_error(values, weight), _zero_rows(values), stored.numel() * stored.element_size()


def _rows_job(
    checkpoint: Checkpoint,
    writer: PackWriter,
    entry: TensorEntry,
    start: int,
    stop: int,
    tensor_scale: Tensor | None,
) -> tuple[float, float, int, int]:
    info, how = entry.info, entry.assignment
    stored = checkpoint.read(info.name, start, stop)
    size = stored.numel() * stored.element_size()
    values = _finite(stored, info.name)
    if how.spec is None:
        writer.put_rows(info.name, start, stored)
        return 0.0, 0.0, _zero_rows(values) if values.dim() == 2 else 0, size
    weight = solve(formats.parse(how.format), values, tensor_scale)
    writer.put_rows(info.name, start, weight)
    return *squared_error(values, weight), _zero_rows(values), size


def _finite(stored: Tensor, name: str) -> Tensor:
    """The values in float32; CheckpointError if one is NaN or infinite."""
    values = stored.float()
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"{name} holds {bad:,} values that are NaN or infinite: the checkpoint is damaged",
            hint="download the checkpoint again",
        )
    return values


def _zero_rows(values: Tensor) -> int:
    return int((~values.any(-1)).sum())


def _source(checkpoint: Checkpoint) -> dict[str, object]:
    """Where the weights came from: the folder's name (or the hub cache's repository and revision), and the size
    and sha256 of every file that was read."""
    folder = checkpoint.folder.resolve()
    source: dict[str, object] = {"name": folder.name}
    cache = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    if cache and folder.parent.name == "snapshots":
        source = {"repo": f"{cache.group(1)}/{cache.group(2)}", "revision": folder.name}
    names = ["config.json", *checkpoint.shards]
    try:
        source["files"] = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names
        }
    except OSError as error:
        raise QuantError(f"{error.filename} can't be read any more: {error.strerror}") from error
    return source
