"""A checkpoint in, a pack out: tensor by tensor in the order of the files, in pieces of bounded size.

Peak memory is a few pieces of at most 32 MiB of weights (or one expert) for each thread, whatever the model's
size. The result depends on the checkpoint and the recipe alone, also when a stopped run is gone on with. Knows the
names and shapes it was told, no model graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwenrun.kernels.spec import TILE_ROWS
from qwenrun.kernels.weight import TORCH_DTYPES, Weight
from qwenrun.quant import formats
from qwenrun.quant.errors import CheckpointError
from qwenrun.quant.packfile.checkpoint import INDEX, Checkpoint, contained
from qwenrun.quant.packfile.importance import Importance
from qwenrun.quant.packfile.layout import SIDE_FILES, Manifest, TensorEntry
from qwenrun.quant.packfile.writer import PackWriter, file_sha256
from qwenrun.quant.recipe import DTYPE_BYTES, KEEP, Recipe, TensorInfo, stored_bytes
from qwenrun.quant.report import Report, make_row
from qwenrun.quant.solve import REVISION, solve, tensor_scale_of

# Weights read and solved at a time, per job; an expert is always one job.
PIECE_VALUES = 4 << 20

# progress(done bytes of input, of how many, what is being worked on)
Progress = Callable[[int, int, str], None]


@dataclass
class _Sums:
    """What the pieces of one tensor add up to; a piece gives the same."""

    signal: float = 0.0
    noise: float = 0.0
    zero_rows: int = 0  # of the checkpoint
    stored_zero_rows: int = 0  # of the pack: more than those where rows were too small for the format
    carried: int = 0  # matrices whose codes were those of the checkpoint
    nbytes: int = 0
    peak: float = 0.0  # the largest magnitude

    def add(self, piece: _Sums) -> None:
        self.signal += piece.signal
        self.noise += piece.noise
        self.zero_rows += piece.zero_rows
        self.stored_zero_rows += piece.stored_zero_rows
        self.nbytes += piece.nbytes
        self.carried += piece.carried
        self.peak = max(self.peak, piece.peak)


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
    importance: Importance | None = None,
) -> Report:
    """Write the pack `out` from an open checkpoint whose tensors are exactly `inventory`.

    tool: name and version that the manifest records. notes: sentences for the manifest and the report.
    threads: by default as many as this process may use. force: replace an existing pack.
    importance: what the search for scales goes by, for those tensors that it knows.
    Raises CheckpointError (NaN, infinity, files that changed, importance of another model) and RecipeError, which leave
    nothing behind, and StorageError. After that, or a kill, the same call goes on with what was written (see
    `PackWriter`).
    """
    started = time.perf_counter()
    checkpoint.check_dtypes()
    if importance:
        importance.check(inventory)
    by_name = {info.name: info for info in inventory}
    order = [by_name[name] for name in checkpoint.in_file_order() if name in by_name]
    if len(order) != len(inventory):
        raise CheckpointError(f"{checkpoint.folder} lacks {len(inventory) - len(order)} tensors of the inventory")
    # Manifest and files are in the inventory's order: how a checkpoint is cut into shards leaves no trace.
    entries = {info.name: TensorEntry(info, recipe.assign(info)) for info in inventory}
    side_files = {
        name: contained(checkpoint.folder, name) for name in SIDE_FILES if (checkpoint.folder / name).is_file()
    }
    input_bytes = sum(prod(info.shape) * DTYPE_BYTES[info.dtype] for info in inventory)
    threads = threads or usable_cpus()

    done, lock = 0, threading.Lock()

    def advance(size: int, name: str) -> None:
        nonlocal done
        with lock:
            done += size
            if progress:
                progress(done, input_bytes, name)

    supply = checkpoint.supply
    making = _making(checkpoint, recipe, entries, tool, importance)
    with PackWriter(out, entries, force, making, supply.room) as writer:
        job = _Job(checkpoint, writer, importance)
        sums, hashes = _run(job, [entries[info.name] for info in order], threads, advance)
        if checkpoint.imported:
            notes = (*notes, _imported(checkpoint, sums))
        source = _source(checkpoint, hashes)
        if importance:
            # What the file says of itself comes first: it may say anything.
            source["importance"] = {**importance.about, "name": importance.path.name, "sha256": importance.sha256}
            searched = {name for name, e in entries.items() if not e.spec.plain and not sums[name].carried}
            aimed = len(searched.intersection(importance.names))
            notes = (*notes, f"scales of {aimed} of {len(searched)} tensors by {importance.path.name}")
        hashed = 0

        def advance_hash(size: int) -> None:
            nonlocal hashed
            hashed += size
            if progress:
                share = min(1.0, hashed / max(1, writer.total_bytes))
                progress(input_bytes, input_bytes, f"checksums of the pack, {share:.0%}")

        writer.finish(
            lambda files: Manifest(checkpoint.config, recipe.to_json(), source, tool, tuple(notes), entries, files),
            side_files,
            advance_hash,
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
            sums[info.name].stored_zero_rows - sums[info.name].zero_rows,
            entries[info.name].assignment.note,
            sums[info.name].peak,
        )
        for info in inventory
    )
    pack_bytes = sum(file.stat().st_size for file in out.iterdir())
    seconds = time.perf_counter() - started
    return Report(str(out), recipe.name, rows, input_bytes, pack_bytes, seconds, tuple(notes))


def _making(
    checkpoint: Checkpoint,
    recipe: Recipe,
    entries: dict[str, TensorEntry],
    tool: str,
    importance: Importance | None,
) -> str:
    """A hash of all that the pack's bytes and its pieces follow from."""
    files = [checkpoint.supply.identity(name) for name in checkpoint.shards]
    tensors = [[name, entry.info.shape, entry.info.dtype, entry.assignment.format] for name, entry in entries.items()]
    said = [tool, REVISION, PIECE_VALUES, checkpoint.config, recipe.to_json(), files, tensors]
    said.append(importance and [importance.path.name, importance.sha256])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# Recipes that have the formats of other tools everywhere.
RECIPES = {"GPTQ": "int4", "INT4": "int4", "NVFP4": "nvfp4"}


def _imported(checkpoint: Checkpoint, sums: dict[str, _Sums]) -> str:
    """What became of matrices that had been quantized before."""
    coded = [name for name in sums if checkpoint.is_coded(name)]
    carried = [name for name in coded if sums[name].carried]
    again = len(coded) - len(carried)
    end = f", {again} were decoded and quantized again: their errors add up" if again else ""
    if again and checkpoint.imported in RECIPES:
        end += f" (--recipe {RECIPES[checkpoint.imported]} carries over all it can)"
    return f"the checkpoint holds {checkpoint.imported}: {len(carried)} tensors were carried over bit for bit{end}"


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _format_name(entry: TensorEntry) -> str:
    return entry.info.dtype.lower() if entry.assignment.format == KEEP else entry.assignment.format


@dataclass(frozen=True, slots=True)
class _Job:
    """What every piece is made with."""

    checkpoint: Checkpoint
    writer: PackWriter
    importance: Importance | None

    def important(self, name: str, expert: int | None = None) -> Tensor | None:
        return self.importance.of(name, expert) if self.importance else None


def _run(
    job: _Job,
    entries: Sequence[TensorEntry],
    threads: int,
    advance: Callable[[int, str], None],
) -> tuple[dict[str, _Sums], dict[str, str]]:
    """Every piece is read, solved and written by one of `threads` threads, begun at most two pieces ahead.

    Returns the sums by tensor, and the sha256 of every file the tensors are in, unless the supply knows it. A file of
    a folder is hashed when its first tensor's turn comes: its tensors then come from the page cache, and the disk is
    read once. A file that the supply brings is given back when its last tensor is written.
    """
    checkpoint, writer = job.checkpoint, job.writer
    supply = checkpoint.supply
    sums = {entry.info.name: _Sums() for entry in entries}
    hashes: dict[str, Future[str]] = {}
    # (piece, tensor, its sums); the tensor's last piece is followed by the files that nobody else needs.
    waiting: deque[tuple[str, str, Future[_Sums]] | list[str]] = deque()
    stop = threading.Event()
    number = {shard: place for place, shard in enumerate(checkpoint.shards)}
    needs = {entry.info.name: checkpoint.shards_of(entry.info.name) for entry in entries}
    # A tensor's turn comes when its last file is there: so few files have to be there at a time.
    entries = sorted(entries, key=lambda entry: max(number[shard] for shard in needs[entry.info.name]))
    last_user = {shard: entry.info.name for entry in entries for shard in needs[entry.info.name]}

    def collect() -> None:
        item = waiting.popleft()
        if isinstance(item, list):
            writer.commit()
            for shard in item:
                checkpoint.forget(shard)
                supply.release(shard)
            return
        key, name, future = item
        piece = future.result()
        if key not in writer.pieces:
            writer.wrote(key, asdict(piece))
        # Added in the order of the pieces, so that the sums do not depend on which thread was first.
        sums[name].add(piece)
        advance(piece.nbytes, name)

    # Each piece is computed by one thread: that scales better than several threads in every small step.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
            try:
                left = [e for e in entries if any(key not in writer.pieces for key, _, _ in _pieces(checkpoint, e))]
                wanted = {shard for entry in left for shard in needs[entry.info.name]}
                supply.begin([shard for shard in checkpoint.shards if shard in wanted])
                unfinished = {entry.info.name for entry in left}
                for entry in entries:
                    name = entry.info.name
                    while name in unfinished and not supply.is_ready(needs[name]):
                        if waiting:
                            collect()
                        else:
                            supply.wait()
                    for shard in needs[name]:
                        if shard not in hashes and supply.known(shard) is None:
                            hashes[shard] = pool.submit(_source_sha256, checkpoint.folder / shard, stop)
                    for key, work in _works(job, entry):
                        waiting.append((key, name, pool.submit(work)))
                        while len(waiting) > 2 * threads:
                            collect()
                    if ended := [shard for shard in needs[name] if last_user[shard] == name and shard in wanted]:
                        waiting.append(ended)
                while waiting:
                    collect()
                return sums, {shard: future.result() for shard, future in hashes.items()}
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        supply.close()
        torch.set_num_threads(torch_threads)


def _source_sha256(path: Path, stop: threading.Event) -> str:
    """sha256 of a file of the checkpoint; given up soon after `stop` is set."""

    def check(_: int) -> None:
        if stop.is_set():
            raise CancelledError

    try:
        return file_sha256(path, check)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read any more: {error.strerror}") from error


def _pieces(checkpoint: Checkpoint, entry: TensorEntry) -> list[tuple[str, int, int]]:
    """The pieces of one tensor: (name in the journal, first row or expert, the one after the last)."""
    info = entry.info
    if info.is_experts:
        return [(f"{info.name}:{expert}", expert, expert + 1) for expert in range(info.shape[0])]
    step = max(TILE_ROWS, PIECE_VALUES // max(1, prod(info.shape[1:])) // TILE_ROWS * TILE_ROWS)
    if checkpoint.is_coded(info.name):
        step = info.shape[0]  # its arrays are read whole anyway, and whoever has all rows needs no scale told
    return [(f"{info.name}:{at}", at, min(at + step, info.shape[0])) for at in range(0, info.shape[0], step)]


def _works(job: _Job, entry: TensorEntry) -> Iterator[tuple[str, Callable[[], _Sums]]]:
    """The pieces of one tensor by name: each reads, checks, encodes and writes one, or knows that it is written."""
    info, how = entry.info, entry.assignment
    checkpoint, writer = job.checkpoint, job.writer
    pieces = _pieces(checkpoint, entry)
    known = {key: writer.pieces[key] for key, _, _ in pieces if key in writer.pieces}
    tensor_scale = None
    scaled = how.spec is not None and how.spec.tensor_scale and not info.is_experts
    if how.spec is not None and scaled and not checkpoint.is_coded(info.name) and len(known) < len(pieces):
        largest = 0.0
        for _, start, stop in pieces:
            largest = max(largest, _checked(checkpoint.read(info.name, start, stop), info.name)[1].max().item())
        tensor_scale = tensor_scale_of(how.spec, torch.tensor([largest]))
    for key, start, stop in pieces:
        if key in known:
            yield key, partial(_Sums, **known[key])
        elif info.is_experts:
            yield key, partial(_expert_work, job, entry, start)
        else:
            yield key, partial(_rows_work, job, entry, start, stop, tensor_scale)


def _expert_work(job: _Job, entry: TensorEntry, expert: int) -> _Sums:
    info, how = entry.info, entry.assignment
    checkpoint, writer = job.checkpoint, job.writer
    nbytes = prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
    if how.spec is not None and (carried := checkpoint.encoded(info.name, how.spec, expert)) is not None:
        writer.put_expert(info.name, expert, carried)
        return _Sums(nbytes=nbytes, carried=1)
    stored = checkpoint.read(info.name, expert, expert + 1)[0]
    values, largest = _checked(stored, info.name)
    zero_rows = int((largest == 0).sum())
    if how.spec is None:
        writer.put_expert(info.name, expert, Weight.plain(stored.to(TORCH_DTYPES[info.dtype])))
        return _Sums(zero_rows=zero_rows, stored_zero_rows=zero_rows, nbytes=nbytes)
    groups = largest.unflatten(0, (info.tensor_scales, -1)).amax(1)
    important = job.important(info.name, expert)
    made = solve(formats.parse(how.format), values, tensor_scale_of(how.spec, groups), important, how.spec.tile)
    writer.put_expert(info.name, expert, made.weight)
    return _Sums(made.signal, made.noise, zero_rows, made.zero_rows, nbytes=nbytes, peak=largest.max().item())


def _rows_work(job: _Job, entry: TensorEntry, start: int, stop: int, tensor_scale: Tensor | None) -> _Sums:
    info, how = entry.info, entry.assignment
    checkpoint, writer = job.checkpoint, job.writer
    nbytes = (stop - start) * prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
    if how.spec is not None and (carried := checkpoint.encoded(info.name, how.spec)) is not None:
        writer.put_rows(info.name, start, carried)
        return _Sums(nbytes=nbytes, carried=1)
    stored = checkpoint.read(info.name, start, stop)
    values, largest = _checked(stored, info.name)
    zero_rows = int((largest == 0).sum()) if stored.dim() == 2 else 0
    if how.spec is None:
        writer.put_rows(info.name, start, stored.to(TORCH_DTYPES[info.dtype]))
        return _Sums(zero_rows=zero_rows, stored_zero_rows=zero_rows, nbytes=nbytes)
    if how.spec.tensor_scale and tensor_scale is None:
        tensor_scale = tensor_scale_of(how.spec, largest.max()[None])
    made = solve(formats.parse(how.format), values, tensor_scale, job.important(info.name), how.spec.tile)
    writer.put_rows(info.name, start, made.weight)
    return _Sums(made.signal, made.noise, zero_rows, made.zero_rows, nbytes=nbytes, peak=largest.max().item())


_scratch = threading.local()


def _floats(stored: Tensor) -> Tensor:
    """In float32, in this thread's own memory until its next call: new pages would take eight times as long."""
    buffer = getattr(_scratch, "values", None)
    if buffer is None or buffer.numel() < stored.numel():
        buffer = _scratch.values = torch.empty(stored.numel())
    return buffer[: stored.numel()].view(stored.shape).copy_(stored)


def _checked(stored: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(the values in float32, the largest magnitude of each row); CheckpointError if one is NaN or infinite.

    The values are good until this thread checks others.
    """
    values = _floats(stored)
    rows = values.flatten(1) if values.dim() > 1 else values[:, None]
    # Both together are ten times as fast as `aminmax`, and four times as a norm.
    largest = torch.maximum(rows.amax(1), -rows.amin(1))
    # The maximum of a row with a NaN is NaN.
    if not torch.isfinite(largest).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"{name} holds {bad:,} values that are NaN or infinite: the checkpoint is damaged",
            hint="download the checkpoint again",
        )
    return values, largest


def _source(checkpoint: Checkpoint, hashes: dict[str, str]) -> dict[str, object]:
    """Where the weights came from: the folder's name (or the hub cache's repository and revision), and the size
    and sha256 of every file that was read."""
    folder, supply = checkpoint.folder.resolve(), checkpoint.supply
    source: dict[str, object] = {"name": folder.name}
    cache = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    if cache and folder.parent.name == "snapshots":
        source = {"repo": f"{cache.group(1)}/{cache.group(2)}", "revision": folder.name}
    source = supply.origin() or source
    never = threading.Event()
    files = {}
    for name in ["config.json", INDEX, *checkpoint.shards, *SIDE_FILES]:
        if (known := supply.known(name)) is not None:
            files[name] = {"sha256": known[0], "bytes": known[1]}
        elif (folder / name).is_file():
            digest = hashes.get(name) or _source_sha256(folder / name, never)
            files[name] = {"sha256": digest, "bytes": (folder / name).stat().st_size}
    source["files"] = files
    return source
