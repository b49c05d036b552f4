"""docs/cli.md, written from the command line's own declarations so that it can't drift from the program.

Knows typer's description of a command, and no command by name.
"""

from __future__ import annotations

from typing import Any

import typer

from qwenrun.ui.command import split_examples

INTRO = """\
# Command line

Written by `make docs` from the program's own declarations; do not edit.

stdout carries the answer and nothing else. Progress, notes, reasoning, statistics and errors go to stderr;
colours and bars only to a terminal, and never with `NO_COLOR` set or `TERM=dumb`. `--json` prints one JSON
document on stdout whose `schema` field names its form, for example `"qwenrun.chat/1"`: within a version fields
are added, never changed.

A MODEL is a pack, a Hugging Face folder (config.json and safetensors), or, where no weights are needed, a
name such as `Qwen3.5-122B-A10B`. Token counts may be written `4096`, `4k` or `1m` (powers of 1024), sizes
`24GiB`, `24GB` or bytes.
"""

OUTRO = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | something failed while running |
| 2 | usage: an option, a value, a recipe |
| 3 | a model is missing, corrupt, or of an unknown architecture |
| 4 | it does not fit the memory |
| 130 | interrupted with Ctrl-C |
| 141 | the reader of stdout went away (as with `qwenrun ... \\| head`); nothing is printed |

An error is one line `error: ...`, the numbers under it, and where there is one a line `hint: ...` with what to
type next.

## Environment

| variable | effect |
|---|---|
| `QWENRUN_DEBUG=1` | print the traceback of an error |
| `QWENRUN_BACKEND=ref` | compute with that backend of the kernels alone |
| `OMP_NUM_THREADS=N` | threads to compute with |
| `NO_COLOR`, `TERM=dumb` | no colours; no bars that move, no rendered markdown |
| `XDG_STATE_HOME` | where `qwenrun/history` of the chat prompt lies (default `~/.local/state`), readable by you alone |
"""


def cli_markdown(app: typer.Typer) -> str:
    """The page on every command and option of `app`."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("qwenrun", [], resilient_parsing=True)
    parts = [INTRO, _group(group)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if not command.hidden:
            parts.append(_command(name, command, context))
    return "\n".join([*parts, OUTRO])


def _group(group: Any) -> str:
    text, examples = split_examples(group.help or "")
    return f"{text}\n\n{_block(examples)}"


def _command(name: str, command: Any, parent: Any) -> str:
    context = type(parent)(command, info_name=name, parent=parent)
    text, examples = split_examples(command.help or "")
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    rows = [record for param in command.get_params(context) if (record := param.get_help_record(context))]
    lines = [f"## qwenrun {name}", "", text, "", _block(examples), f"Usage: `{usage}`", ""]
    lines += ["| option | |", "|---|---|"]
    lines += [f"| `{_cell(left)}` | {_cell(right)} |" for left, right in rows]
    return "\n".join([*lines, ""])


def _block(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
