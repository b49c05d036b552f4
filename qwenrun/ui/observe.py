"""`qwenrun observe`: has a model read a text, and writes down what that drove through its matrices.

The reading is handed in: this room knows the text's file, the memory that is planned with, and what is said about it.
"""

from __future__ import annotations

import codecs
import hashlib
import sys
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from qwenrun import __version__
from qwenrun.errors import UsageError
from qwenrun.plan.device import spare_memory
from qwenrun.ui import console
from qwenrun.ui.models import find_model, model_name, plan_model, stored_in
from qwenrun.ui.progress import Progress, Status

# Bytes of text that are encoded at a time; a longer line is cut there.
LINE = 1 << 16


def observe(
    worker: Callable[[], Any],
    text: Path,
    out: Path,
    *,
    model: str | None,
    tokens: int | None,
    ctx: int,
    ram: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the importance that `text` ("-": stdin) gives the columns of a model's matrices to the file `out`, whose
    path goes to stdout. worker: imports `measure.observe`. tokens: how many are read at most.

    Raises UsageError for a text that can't be read, StorageError for a file that can't be written.
    """
    path, out = find_model(model, quiet), out.expanduser()
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists already", "choose another name, or add --force")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", f"mkdir -p {out.parent}")
    with _opened(text) as file:
        config, _, _ = stored_in(path)
        with Status(f"loading {path} ...", quiet):
            reading = worker()
            sums = reading.Sums(config)
            spare = spare_memory() if ram is None else ram
            spare = None if spare is None else max(0, spare - sums.nbytes(config))
            spare = plan_model(path, ctx=ctx, kv="bf16", ram=spare, vram=None, quiet=quiet)
            from qwenrun.engine.engine import Engine
            from qwenrun.quant.packfile.importance import write_importance

            engine = Engine.open(path, ctx=ctx, ram=spare, watch=sums)
        with engine:
            ids, digest = _encoded(file, engine.tokenizer.encode_with_controls, tokens, str(text))
            with Progress("observe", unit="tokens", quiet=quiet) as progress:
                seen = reading.observe(engine, sums, ids, progress)
    observed = sums.observed()
    about = {
        "model": model_name(config, path),
        "text": "stdin" if str(text) == "-" else text.name,
        "text_sha256": digest,
        "tokens": str(seen.tokens),
        "ctx": str(ctx),
    }
    write_importance(out, observed, {"tool": f"qwenrun {__version__}", **about})
    if as_json:
        content = {"path": str(out), **about, "matrices": len(observed), **asdict(seen)}
        console.document("observe", 1, content)
    else:
        console.say(str(out))
    if not quiet:
        speed = f"{seen.tokens / seen.seconds:,.0f} tok/s" if seen.seconds else ""
        console.note(f"observed {seen.tokens:,} tokens in {seen.pieces:,} pieces ({speed}): {len(observed)} matrices")
        if seen.unseen_experts:
            console.note(
                f"note: {seen.unseen_experts:,} of {seen.experts:,} experts were chosen by no token: they are given"
                " what their layer's others read; a longer text reaches more"
            )
    if seen.stopped:
        console.note(f"stopped after {seen.tokens:,} of {len(ids):,} tokens; {out} holds those")
        raise KeyboardInterrupt


def _opened(text: Path) -> BinaryIO:
    if str(text) == "-":
        if console.is_terminal(sys.stdin):
            raise UsageError("a text is read from stdin, and that is a terminal", "qwenrun observe TEXT -o FILE")
        return open(sys.stdin.fileno(), "rb", closefd=False)
    try:
        return text.expanduser().open("rb")
    except OSError as error:
        raise UsageError(f"{text} can't be read: {error.strerror}", f"ls {text.parent}") from error


def _encoded(file: BinaryIO, encode: Callable[[str], list[int]], most: int | None, name: str) -> tuple[array[int], str]:
    """The text's tokens, `most` at most, and the sha256 of the bytes that were read for them."""
    ids, digest, decoder = array("i"), hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    try:
        while most is None or len(ids) < most:
            line = file.readline(LINE)
            digest.update(line)
            ids.extend(encode(decoder.decode(line, final=not line)))
            if not line:
                break
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error.reason}", f"iconv -t UTF-8 {name}") from error
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}") from error
    return ids[:most], digest.hexdigest()
