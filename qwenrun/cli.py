"""The command line: declares every command and option; each body imports its worker and makes one call.

Cold: importing this imports typer and the standard library, so `--help` and `vram` answer at once. Knows how
an error becomes words and an exit code, and nothing of how anything is done.
"""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenrun import __version__
from qwenrun.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_NO_FIT, EXIT_OK, EXIT_USAGE, exit_code
from qwenrun.ui import console
from qwenrun.ui.command import Command, Group

EXIT_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


class Kv(StrEnum):
    bf16 = "bf16"
    int8 = "int8"
    f32 = "f32"


class Target(StrEnum):
    compressed = "compressed-tensors"
    bf16 = "bf16"


app = typer.Typer(
    cls=Group,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _recipes(incomplete: str) -> list[str]:
    from qwenrun.quant.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _zoo(incomplete: str) -> list[str]:
    from qwenrun.model.config import zoo_names

    return [name for name in zoo_names() if name.lower().startswith(incomplete.lower())]


def _convert(*arguments: Any, **options: Any) -> Any:
    """The quant floor's converter, imported when it is called: mistakes are told before torch is there."""
    from qwenrun.quant.convert import convert

    return convert(*arguments, **options)


def _export(*arguments: Any) -> int:
    """The quant floor's exporter, imported when it is called."""
    from qwenrun.quant.export import export

    return export(*arguments)


def _observer() -> Any:
    """The worker of `observe`, imported when it is called."""
    from qwenrun.measure import observe

    return observe


def _size(text: str | None, option: str) -> int | None:
    return console.parse_size(text, option) if text else None


def _show_version(wanted: bool) -> None:
    if wanted:
        console.say(f"qwenrun {__version__}")
        raise typer.Exit()


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A pack or a Hugging Face folder; without it the embedded demo model.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes.")]
Ram = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        help="RAM to stay inside; experts without room are read from disk.",
        show_default="what is free",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram", metavar="SIZE", help="Run on the GPU, inside this much of its memory.", show_default="no GPU"
    ),
]
KvOption = Annotated[Kv, typer.Option("--kv", metavar="bf16|int8|f32", help="How keys and values are stored.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize Qwen3.5-122B-A10B and its family, and run them on one machine inside a memory budget.

    Examples:
        qwenrun vram --ctx 32k,256k
        qwenrun quantize ~/Qwen3.5-35B-A3B -o 35b.pack
        qwenrun quantize Qwen/Qwen3.5-35B-A3B -o 35b.pack
        qwenrun chat -m 35b.pack
        cat build.log | qwenrun chat -m 35b.pack -p "why did it fail?"
    """
    if context.invoked_subcommand is None:
        console.say(context.get_help())


@app.command(cls=Command)
def quantize(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A Hugging Face folder, or OWNER/NAME: pulled, or else fetched meanwhile."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PACK", help="The pack to make, a folder.")],
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="R", help="A branch, a tag or a commit of the hub's.", show_default="main"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="balanced, nvfp4, int4, bf16, or a TOML file.",
            show_default="balanced; nvfp4 if SRC is",
            autocompletion=_recipes,
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            help="What observe wrote: columns that read more count more in the search for scales.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace PACK if it is there already.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a pack, and print what it did to each kind of tensor.

    Works piece by piece: memory does not grow with the model. A model of the hub that was not pulled is fetched file
    by file while it is quantized: at most two of its files are on the disk. Stopped, killed or out of disk, the same
    command goes on where it was. The table of errors is the answer and goes to stdout; --json has a row for every
    single tensor.

    Examples:
        qwenrun quantize ~/Qwen3.5-35B-A3B -o 35b.pack
        qwenrun quantize Qwen/Qwen3.5-122B-A10B -o 122b.pack
        qwenrun quantize SRC -o PACK --recipe mine.toml --json > report.json
        qwenrun quantize SRC -o PACK --importance texts.importance
    """
    from qwenrun.ui.quantize import quantize

    quantize(
        _convert,
        source,
        out,
        revision=revision,
        recipe=recipe,
        importance=importance,
        force=force,
        as_json=json,
        quiet=quiet,
    )


@app.command(cls=Command)
def observe(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text in UTF-8, or - for stdin.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The file of importance to write.")],
    model: Model = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", min=1, help="Read no more than N tokens.", show_default="all")
    ] = None,
    ctx: Annotated[str, typer.Option("--ctx", metavar="N", help="Tokens a piece of the text has.")] = "2k",
    ram: Ram = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there already.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have a model read a text, and write down how much each column of its matrices read, for quantize --importance.

    The text should be like what the model will be used for; some ten thousand tokens are enough. Where the checkpoint
    itself is too large for this machine, a pack of it serves. The tokens of the chat template, such as <|im_start|>,
    are taken as such. Computes on the CPU. Prints FILE; Ctrl-C writes what was seen so far.

    Examples:
        qwenrun observe texts.txt -m ~/Qwen3.5-35B-A3B -o texts.importance
        qwenrun observe texts.txt -m 122b.pack -o texts.importance --tokens 20000
        cat *.md | qwenrun observe - -m 35b.pack -o notes.importance
    """
    from qwenrun.ui.observe import observe

    observe(
        _observer,
        text,
        out,
        model=model,
        tokens=tokens,
        ctx=console.parse_tokens(ctx),
        ram=_size(ram, "--ram"),
        force=force,
        as_json=json,
        quiet=quiet,
    )


@app.command(cls=Command)
def chat(
    model: Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="Ask this once; piped text goes before it."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Reason before the answer.", show_default="as the model does"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="End the answer after N tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="X", min=0, help="0 always takes the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="X", min=0, max=1, help="Keep the likeliest that sum to X; 1 keeps all."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", min=0, help="Keep the N likeliest; 0 keeps all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", metavar="X", min=0, max=1, help="Keep those X times as likely as the likeliest."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", metavar="X", help="Taken from the logit of every token used before."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Same seed, same answer.")] = None,
    ctx: Annotated[str, typer.Option("--ctx", metavar="N", help="Tokens the conversation may have.")] = "4k",
    kv: KvOption = Kv.bf16,
    ram: Ram = None,
    vram: Vram = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens, speed and expert cache after each answer.")] = False,
    json: Json = False,
) -> None:
    """Talk with a model: at a prompt, or once with -p or piped text.

    Sampling options that are not given are the checkpoint's own. Piped in or out, stdout is the answer and a
    newline, nothing else; reasoning is shown on stderr, and only on a terminal. At the prompt /help lists the
    commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Examples:
        qwenrun chat -m 35b.pack
        qwenrun chat -m 122b.pack --ram 12GiB --ctx 32k
        qwenrun chat -p "What is qwenrun?"
        cat build.log | qwenrun chat -m 35b.pack -p "why did it fail?" > answer.txt
    """
    from qwenrun.ui.chat import ChatOptions, chat

    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "seed": seed,
    }
    chat(
        ChatOptions(
            model=model,
            prompt=prompt if prompt is None else console.well_formed(prompt),
            system=system if system is None else console.well_formed(system),
            think=think,
            max_tokens=max_tokens,
            sampling={name: value for name, value in sampling.items() if value is not None},
            ctx=console.parse_tokens(ctx),
            kv=kv.value,
            stats=stats,
            as_json=json,
            ram=_size(ram, "--ram"),
            vram=_size(vram, "--vram"),
        )
    )


@app.command(cls=Command)
def vram(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a Hugging Face folder or a pack.", autocompletion=_zoo)
    ] = "Qwen3.5-122B-A10B",
    ctx: Annotated[str, typer.Option("--ctx", metavar="N[,N...]", help="Context lengths to compute.")] = "4k,32k,256k",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE[,...]",
            help="balanced, nvfp4, int4, bf16, or TOML files; a pack has its own.",
            show_default="balanced",
            autocompletion=_recipes,
        ),
    ] = None,
    kv: Annotated[
        str, typer.Option("--kv", metavar="TYPE[,...]", help="How keys and values are stored: bf16, int8, f32.")
    ] = "bf16",
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help='A card, such as "RTX 4090" or H100: its memory.')
    ] = None,
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="Memory of the GPU.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="RAM, beside a GPU or without one.")] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Count the MTP head, which this version does not load.")] = False,
    vision: Annotated[
        bool, typer.Option("--vision", help="Count the vision tower, which this version does not load.")
    ] = False,
    ram_speed: Annotated[
        float, typer.Option("--ram-speed", metavar="GB/S", min=0.1, help="Read bandwidth of RAM.")
    ] = 60.0,
    disk_speed: Annotated[
        float, typer.Option("--disk-speed", metavar="GB/S", min=0.01, help="Read bandwidth of the disk.")
    ] = 3.5,
    json: Json = False,
) -> None:
    """Tell how much memory a model needs, part by part, and how it would lie in yours.

    Needs no weights and no file when MODEL is a name. The engine allocates from the same list. With --gpu,
    --vram or --ram: how many experts are resident, the largest context, a predicted speed, and exit code 4 if
    a column can't run there at all. Several values of --ctx, --recipe and --kv stand side by side.

    Examples:
        qwenrun vram
        qwenrun vram --gpu H100 --ctx 262144,1M
        qwenrun vram --vram 24GiB --ram 64GiB --recipe balanced,nvfp4 --kv int8
        qwenrun vram 35b.pack --ctx 32k --ram 12GiB
    """
    from qwenrun.ui.vram import VramOptions
    from qwenrun.ui.vram import vram as print_plan

    print_plan(
        model,
        VramOptions(
            ctx=ctx,
            recipe=recipe,
            kv=kv,
            gpu=gpu,
            vram=_size(vram, "--vram"),
            ram=_size(ram, "--ram"),
            mtp=mtp,
            vision=vision,
            ram_speed=ram_speed * 1e9,
            disk_speed=disk_speed * 1e9,
            as_json=json,
        ),
    )


@app.command(cls=Command)
def bench(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens to prefill.")] = 256,
    gen_tokens: Annotated[
        int, typer.Option("--gen-tokens", metavar="N", min=1, help="Tokens to decode after them.")
    ] = 32,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=1, help="Measured runs, after one to warm up.")] = 3,
    ctx: Annotated[
        str | None, typer.Option("--ctx", metavar="N", help="Context to allocate.", show_default="what is needed")
    ] = None,
    kv: KvOption = Kv.bf16,
    ram: Ram = None,
    vram: Vram = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prefill and decode, beside what this machine's memory can deliver.

    Decode reads every active weight once per token, so tokens per second times those bytes, set against the
    measured read bandwidth, tells how far there is to go. Tokens are random: routing is more even than on real
    text, and a budget's hit rate lower.

    Examples:
        qwenrun bench -m 35b.pack
        qwenrun bench -m 35b.pack --ram 8GiB
        qwenrun bench -m 35b.pack --prompt-tokens 2048 --gen-tokens 128 --json
    """
    from qwenrun.measure.bench import bench
    from qwenrun.ui.reports import bench_report, measuring

    held = console.parse_tokens(ctx) if ctx else prompt_tokens + gen_tokens
    with measuring(
        model,
        ctx=held,
        kv=kv.value,
        label="bench",
        unit="steps",
        quiet=quiet,
        ram=_size(ram, "--ram"),
        vram=_size(vram, "--vram"),
    ) as (engine, progress):
        result = bench(engine, prompt_tokens, gen_tokens, runs, progress)
    bench_report(result, as_json=json)


@app.command(name="eval", cls=Command)
def evaluate(
    model: Model = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            metavar="FILE",
            help='Lines of {"question": ..., "answer": ...}; without it the demo\'s two sets.',
            show_default=False,
        ),
    ] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Reason before the answer.")] = False,
    beside: Annotated[
        str | None,
        typer.Option(
            "--beside",
            metavar="MODEL",
            help="Also tell how far the model's distributions are from this one's, such as the one it was made from.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="End an answer after N tokens.")
    ] = 128,
    ctx: Annotated[str, typer.Option("--ctx", metavar="N", help="Context to allocate.")] = "1k",
    kv: KvOption = Kv.bf16,
    ram: Ram = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count the questions a model answers exactly, word for word, with greedy decoding.

    --beside feeds the expected answers to two models and compares the distributions of their tokens: a much finer
    measure than counting. Both have to fit into memory; --ram is what the first may take.

    Examples:
        qwenrun eval
        qwenrun eval -m demo.pack --pairs questions.jsonl --json
        qwenrun eval -m 35b.pack --beside ~/Qwen3.5-35B-A3B --pairs questions.jsonl
    """
    from qwenrun.measure.quality import distances, exact_answers, question_sets
    from qwenrun.ui.models import find_model
    from qwenrun.ui.reports import eval_report, measuring

    sets = question_sets(pairs)
    held = console.parse_tokens(ctx)
    if beside is not None:
        find_model(beside)
    with measuring(
        model, ctx=held, kv=kv.value, label="eval", unit="questions", quiet=quiet, ram=_size(ram, "--ram")
    ) as (engine, progress):
        figures = exact_answers(engine, sets, think=think, max_tokens=max_tokens, progress=progress)
        if beside is None:
            eval_report(engine, figures, as_json=json)
            return
        with measuring(beside, ctx=held, kv=kv.value, label="beside", unit="questions", quiet=quiet) as (other, again):
            apart = distances(engine, other, sets, think=think, progress=again)
        eval_report(engine, figures, apart, beside, as_json=json)


@app.command(cls=Command)
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="OWNER/NAME on the hub, or a short name of Qwen's.")],
    revision: Annotated[str, typer.Option("--revision", metavar="R", help="A branch, a tag or a commit.")] = "main",
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the hub's weights differ from MODEL's, here also a pack.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a model into Hugging Face's cache, every file's hash compared with the hub's; prints its folder.

    Stopped or killed, the same command goes on where it stopped. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and
    HF_HUB_OFFLINE mean what they mean to Hugging Face's own tools. --check exits with 1 if anything differs.

    Examples:
        qwenrun pull Qwen3.5-0.8B
        qwenrun pull Qwen/Qwen3.5-122B-A10B --revision main
        qwenrun pull --check 122b.pack
    """
    from qwenrun.ui import hub

    if check:
        hub.check(model, revision, as_json=json)
    else:
        hub.pull(model, revision, as_json=json, quiet=quiet)


@app.command(cls=Command)
def ls(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Where to look for packs.")
    ] = None,
    json: Json = False,
) -> None:
    """List packs in the current folder (or those given), and downloads in Hugging Face's cache.

    Examples:
        qwenrun ls
        qwenrun ls ~/packs --json
    """
    from qwenrun.ui.hub import ls

    ls(folders or [Path()], as_json=json)


@app.command(cls=Command)
def du(json: Json = False) -> None:
    """Tell what downloads of the family take in Hugging Face's cache, unfinished ones included.

    Examples:
        qwenrun du
    """
    from qwenrun.ui.hub import du

    du(as_json=json)


@app.command(cls=Command)
def rm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pack, or a downloaded model's name.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a pack, or a download with all its commits. Asks first; without a terminal it wants --yes.

    Examples:
        qwenrun rm 35b.pack
        qwenrun rm Qwen/Qwen3.5-0.8B --yes
    """
    from qwenrun.ui.hub import rm

    rm(model, yes=yes)


@app.command(cls=Command)
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pack, or the name of a model that was pulled.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hash every file of a pack or a download again and compare: with what was written, or with the hub's hashes.

    Examples:
        qwenrun verify 35b.pack
        qwenrun verify Qwen/Qwen3.5-0.8B
    """
    from qwenrun.ui.pack import verify

    verify(model, as_json=json, quiet=quiet)


@app.command(cls=Command)
def show(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="A pack.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
) -> None:
    """Print what is in a pack: model, recipe, formats, sizes, and what it was made from.

    Examples:
        qwenrun show 35b.pack
        qwenrun show 35b.pack --tensors
    """
    from qwenrun.ui.pack import show

    show(pack, tensors=tensors, as_json=json)


@app.command(cls=Command)
def export(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="A pack.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="The Hugging Face folder to make.")],
    to: Annotated[Target, typer.Option("--to", metavar="FORM", help="compressed-tensors or bf16.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a pack as a Hugging Face folder that other engines load; prints the folder.

    compressed-tensors keeps the codes of INT4, INT8 and NVFP4 matrices, but for the embedding and lm_head; bf16 decodes
    everything. Routed experts are written one by one.

    Examples:
        qwenrun export 122b.pack --to compressed-tensors -o 122b-int4
        qwenrun export 35b.pack --to bf16 -o 35b-decoded
    """
    from qwenrun.ui.pack import export

    export(_export, pack, out, to.value, as_json=json, quiet=quiet)


@app.command(cls=Command)
def doctor(json: Json = False) -> None:
    """Tell what this machine has, and which kernels would serve on it.

    Examples:
        qwenrun doctor
    """
    from qwenrun.measure.machine import diagnose
    from qwenrun.ui.reports import doctor_report

    doctor_report(diagnose(), as_json=json)


@app.command(cls=Command)
def selftest(
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="What to test.", show_default="the GPU, if there is one"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that this machine computes what it should: every kernel, the demo model, the speed of products.

    Exits with 1 if anything is off. What it prints belongs into a report of a bug.

    Examples:
        qwenrun selftest
        qwenrun selftest --device cpu --json
    """
    from qwenrun.measure import selftest as worker
    from qwenrun.ui.progress import Progress
    from qwenrun.ui.reports import selftest_report

    with Progress("selftest", unit="cases", quiet=quiet) as progress:
        found = worker.selftest(device, progress)
    selftest_report(found, as_json=json)


def cli_markdown() -> str:
    """docs/cli.md, from the declarations above."""
    from qwenrun.ui.cli_docs import markdown

    return markdown(app)


def main() -> int:
    """Run the command line on sys.argv; the exit code. Every way out of the program leads through here."""
    console.prepare_streams()
    if any(name.endswith("_COMPLETE") and name.startswith("_QWENRUN") for name in os.environ):
        app(prog_name="qwenrun")
    try:
        command: Any = typer.main.get_command(app)
        with command.make_context("qwenrun", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except BrokenPipeError:
        return _hang_up()
    except BaseException as error:
        return _report(error)
    return EXIT_OK


def _hang_up() -> int:
    """Nobody reads stdout any more (`... | head`): end in silence, and keep the exit's own flush from complaining."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return EXIT_BROKEN_PIPE


def _report(error: BaseException) -> int:
    """Say what went wrong on stderr; the exit code."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_OK if error.code is None else EXIT_FAILURE
    _flush_answer()
    if os.environ.get("QWENRUN_DEBUG") and not isinstance(error, KeyboardInterrupt | typer.Abort):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        console.note("\ninterrupted" if console.is_terminal(sys.stderr) else "interrupted")
        return EXIT_INTERRUPTED
    if hasattr(error, "format_message"):  # typer's own: an option or a command it could not understand
        context = getattr(error, "ctx", None)
        console.fail(_sentence(error.format_message()), f"{context.command_path if context else 'qwenrun'} --help")
        return EXIT_USAGE
    message, hint = getattr(error, "message", None), getattr(error, "hint", None)
    if isinstance(message, str) and isinstance(hint, str):
        console.fail(message, hint)
        return exit_code(error)
    if _is_out_of_memory(error):
        console.fail("out of memory", "a shorter --ctx, --kv int8 or a smaller recipe; see: qwenrun vram MODEL --ctx N")
        return EXIT_NO_FIT
    if isinstance(error, OSError) and error.strerror:
        console.fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return EXIT_FAILURE
    console.fail(
        f"internal: {type(error).__name__}: {error}",
        "" if os.environ.get("QWENRUN_DEBUG") else "run it again with QWENRUN_DEBUG=1 to see where",
    )
    return EXIT_FAILURE


def _flush_answer() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _hang_up()


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:].strip().removesuffix(".")


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own, or torch's: it raises a RuntimeError whose text alone tells."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )
