"""`qwenrun quantize`: checks a checkpoint against its config, has it converted, and tells what that did to it.

The conversion itself is handed in: this room knows names, progress and tables only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrun import __version__
from qwenrun.errors import ModelError, UsageError
from qwenrun.hub import cache
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import match
from qwenrun.quant.recipe import DEFAULT, Recipe
from qwenrun.ui import console
from qwenrun.ui.hub import repo_of
from qwenrun.ui.models import find_download, find_zoo, is_pack
from qwenrun.ui.progress import Progress
from qwenrun.ui.tables import table

WORST = 5
_NUMBERED = re.compile(r"\.(layers|blocks)\.\d+\.")


def quantize(
    convert: Callable[..., Any],
    name: str,
    out: Path,
    *,
    revision: str | None,
    recipe: str | None,
    importance: Path | None = None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert the folder, download or model of the hub `name` into the pack `out`; the report of `convert` goes to
    stdout. recipe: None takes the one that suits the checkpoint. importance: a file that `observe` wrote."""
    chosen, out = Recipe.load(recipe or DEFAULT), out.expanduser()
    with (
        _important(importance) as important,
        _opened(name, revision, out, force, quiet) as (config, checkpoint),
        Progress("quantize", quiet=quiet) as progress,
    ):
        if recipe is None and checkpoint.imported == "NVFP4":
            chosen = Recipe.load("nvfp4")  # carries the experts over as they are
        matched = match(config, checkpoint.tensors, name)
        try:
            report = convert(
                checkpoint,
                out,
                chosen,
                matched.tensors,
                tool=f"qwenrun {__version__}",
                notes=matched.notes,
                progress=lambda done, total, name: progress(done, total, kind(name)),
                force=force,
                importance=important,
            )
        except KeyboardInterrupt:
            progress.clear()
            console.note("stopped; the same command goes on where it was")
            raise
    if as_json:
        content = {key: value for key, value in report.to_json().items() if key != "schema"}
        console.document("quantize", 1, content)
    else:
        console.say(render(report))
    if not quiet:
        for text in (*report.notes, *summarised(report.warnings)):
            console.note(f"note: {text}")
        console.note(
            f"wrote {report.pack}: {console.size(report.pack_bytes)} from {console.size(report.source_bytes)}"
            f" in {console.seconds(report.seconds)}; try: qwenrun chat -m {report.pack}"
        )


@contextmanager
def _important(path: Path | None) -> Iterator[Any]:
    """The open file of importance, if one is given."""
    if path is None:
        yield None
        return
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {path}", f"qwenrun observe TEXT -m MODEL -o {path}")
    from qwenrun.quant.packfile.importance import Importance

    with Importance(path) as importance:
        yield importance


@contextmanager
def _opened(name: str, revision: str | None, out: Path, force: bool, quiet: bool) -> Iterator[tuple[ModelConfig, Any]]:
    """(config, open checkpoint) of what a person calls `name`: a folder, a download, else a model of the hub."""
    source = Path(name).expanduser()
    if not source.exists() and (download := find_download(name, revision or "main")):
        source = download.folder
    elif not source.exists() and not (cache.is_repo(name) or find_zoo(name)):
        raise ModelError(
            f"there is no model at {source}", "qwenrun quantize OWNER/NAME -o PACK fetches one from the hub"
        )
    elif source.exists() and revision:
        raise UsageError(
            f"--revision is of a model of the hub, and {source} is a folder", f"qwenrun quantize {name} -o {out}"
        )
    if is_pack(source):
        raise ModelError(f"{source} is a pack already", "give the Hugging Face folder it was made from")
    if source.exists():
        config = ModelConfig.from_folder(source)  # says what is wrong before torch is there
        from qwenrun.quant.packfile.checkpoint import Checkpoint

        with Checkpoint.open(source) as checkpoint:
            yield config, checkpoint
        return
    from qwenrun.hub import stream
    from qwenrun.quant.packfile.writer import check_target, work_folder

    check_target(out, force)
    repo = repo_of(name)
    folder = work_folder(out) / "source"
    with stream.open_remote(repo, revision or "main", folder) as checkpoint:
        if not quiet:
            at = str(checkpoint.supply.origin()["revision"])[:12]
            console.note(f"{repo} at {at}: {len(checkpoint.shards)} files of weights, fetched while they are quantized")
        yield ModelConfig.from_folder(folder), checkpoint


@dataclass(frozen=True)
class Group:
    """Tensors of all layers that are the same kind and are stored in the same format."""

    name: str
    format: str
    count: int
    nbytes: int
    values: int
    sqnr: tuple[float, ...]


def kind(name: str) -> str:
    """A tensor's name without its layer: `model.language_model.layers.7.mlp.gate.weight` -> `mlp.gate`."""
    short = _NUMBERED.sub(".", f".{name}").removeprefix(".")
    for prefix in ("model.language_model.", "model."):
        short = short.removeprefix(prefix)
    return short.removesuffix(".weight")


def grouped(rows: Iterable[Any]) -> list[Group]:
    """Rows of a report by kind and format; what was kept exactly by part and format, after the others."""
    groups: dict[tuple[bool, str, str], list[Any]] = {}
    for row in rows:
        exact = row.sqnr_db is None
        groups.setdefault((exact, f"{row.part} (exact)" if exact else kind(row.name), row.format), []).append(row)
    return [
        Group(
            name,
            form,
            len(members),
            sum(row.bytes for row in members),
            sum(math.prod(row.shape) for row in members),
            tuple(row.sqnr_db for row in members if row.sqnr_db is not None),
        )
        for (_, name, form), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def render(report: Any) -> str:
    """The report as text: a table by kind of tensor, and the tensors that came out worst."""
    groups = grouped(report.rows)
    rows: list[Sequence[str]] = [
        (
            group.name,
            group.format,
            f"{group.count:,}",
            console.size(group.nbytes),
            _bits(group.nbytes, group.values),
            f"{sum(group.sqnr) / len(group.sqnr):.1f}" if group.sqnr else "",
            f"{min(group.sqnr):.1f}" if group.sqnr else "",
        )
        for group in groups
    ]
    nbytes, values = sum(group.nbytes for group in groups), sum(group.values for group in groups)
    total = ("total", "", f"{len(report.rows):,}", console.size(nbytes), _bits(nbytes, values), "", "")
    lines = [table(("tensor", "<format", "count", "size", "bits", "mean dB", "min dB"), [*rows, (), total], left=2)]
    worst = sorted((row for row in report.rows if row.sqnr_db is not None), key=lambda row: row.sqnr_db)[:WORST]
    if worst:
        lines += ["", "worst:"]
        lines.append(
            table(
                ("tensor", "<format", "dB", "NMSE"),
                [(row.name, row.format, f"{row.sqnr_db:.1f}", f"{row.nmse:.1e}") for row in worst],
                left=2,
            )
        )
    outliers = sorted((row for row in report.rows if row.peak_to_rms), key=lambda row: -row.peak_to_rms)[:WORST]
    if outliers:
        lines += ["", "outliers:"]
        lines.append(
            table(
                ("tensor", "<format", "max/rms", "dB"),
                [
                    (
                        row.name,
                        row.format,
                        f"{row.peak_to_rms:.1f}",
                        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
                    )
                    for row in outliers
                ],
                left=2,
            )
        )
    lines += [
        "",
        "dB: 10 log10(sum w^2 / sum error^2) of the weights, more is better; 6 dB halve the error",
        "max/rms: a tensor's largest weight beside their root mean square; a large one makes its whole block coarse",
    ]
    return "\n".join(lines)


def _bits(nbytes: int, values: int) -> str:
    return f"{8 * nbytes / values:.3f}" if values else ""


def summarised(warnings: Sequence[str], most: int = 5) -> list[str]:
    """The first few, and how many more there are."""
    more = len(warnings) - most
    return [*warnings[:most], *([f"and {more:,} more like these: see --json"] if more > 0 else [])]
