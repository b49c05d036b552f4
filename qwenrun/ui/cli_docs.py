"""docs/cli.md, written from the command line's own declarations so that it can't drift from the program.

Knows typer's description of a command, and no command by name.
"""

from __future__ import annotations

from typing import Any

import typer

from qwenrun.ui.command import split_examples
from qwenrun.ui.repl import HELP

INTRO = """\
# Command line

Written by `make docs` from the program's own declarations; do not edit.

stdout carries the answer and nothing else. Progress, notes, reasoning, statistics and errors go to stderr,
colours and moving bars only to a terminal. `--json` prints one JSON document on stdout whose `schema` field
names its form, for example `"qwenrun.chat/1"`: within a version fields are added, never changed.

A MODEL is a pack, a Hugging Face folder (config.json and safetensors), or, where no weights are needed, a
name such as `Qwen3.5-122B-A10B`. Token counts may be written `4096`, `4k` or `1m` (powers of 1024), sizes
`24GiB`, `24GB` or bytes.
"""

AT_THE_PROMPT = """\
## At the prompt of `qwenrun chat`

{}
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
| `NO_COLOR` | no colours, and answers as they are instead of rendered markdown |
| `TERM=dumb` | the same, and no bars that move |
| `XDG_STATE_HOME` | where `qwenrun/history` of the chat prompt lies (default `~/.local/state`), readable by you alone |
"""


def markdown(app: typer.Typer) -> str:
    """The page on every command and option of `app`."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("qwenrun", [], resilient_parsing=True)
    parts = [INTRO, _group(group)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if not command.hidden:
            parts.append(_command(name, command))
    return "\n".join([*parts, AT_THE_PROMPT.format(_block(HELP.splitlines())), OUTRO])


def _group(group: Any) -> str:
    text, examples = split_examples(group.help or "")
    return f"{text}\n\n{_block(examples)}"


def _command(name: str, command: Any) -> str:
    text, examples = split_examples(command.help or "")
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([p.metavar if p.required else f"[{p.metavar}]" for p in arguments])
    lines = [f"## qwenrun {name}", "", text, "", _block(examples)]
    lines += [f"Usage: `{f'qwenrun {name} [OPTIONS] {usage}'.strip()}`", "", "| option | |", "|---|---|"]
    lines += [f"| `{_cell(_spelling(param))}` | {_cell(_meaning(param))} |" for param in command.params]
    return "\n".join([*lines, ""])


def _spelling(param: Any) -> str:
    """How an option or an argument is written: "-m, --model MODEL"."""
    if param.param_type_name == "argument":
        return str(param.metavar)
    shortest_first = sorted(param.opts, key=len)
    negative = f" / {', '.join(param.secondary_opts)}" if param.secondary_opts else ""
    return f"{', '.join(shortest_first)}{negative} {param.metavar or ''}".strip()


def _meaning(param: Any) -> str:
    """Its help, and what it is if not given."""
    shown = param.show_default
    if isinstance(shown, str):
        default = shown
    else:
        value = getattr(param.default, "value", param.default)
        default = "" if value in (None, False, ...) or param.required or not shown else str(value)
    extra = " Required." if param.required else f" Default: {default}." if default else ""
    return f"{param.help or ''}{extra}"


def _block(lines: list[str]) -> str:
    return "".join(f"    {line}".rstrip() + "\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
