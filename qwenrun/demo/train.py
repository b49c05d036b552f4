"""Trains the demo model from scratch on a CPU and writes its folder: `python -m qwenrun.demo.train`.

Batches, optimizer, losses, measuring and export. Needs torch, safetensors and tokenizers; reads only `data/`.
Knows no engine: a greedy answer is right exactly if every next token of it is the likeliest one, so answers
are measured with one forward each instead of being generated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from qwenrun.demo import dataset, model_dir, network
from qwenrun.demo.tokenizer_train import ADDED_TOKENS, BASE_TOKENS, NOT_SPECIAL, train_tokenizer

ROWS_MULTIPLE = 128
IGNORE = -100
OPTIONS = ("steps", "batch", "lr", "weight_decay", "seed", "threads")
MTP_WEIGHT = 0.3
BALANCE_WEIGHT = 0.01


@dataclass(frozen=True)
class Sample:
    """Token ids of one conversation and, for each, whether the model has to produce it."""

    ids: list[int]
    wanted: list[bool]


@dataclass(frozen=True)
class Batch:
    """`tokens`, `real` [B, T]; `labels` [B, T] the tokens to be produced, IGNORE elsewhere (not shifted)."""

    tokens: Tensor
    labels: Tensor
    real: Tensor


def encode(tokenizer: Tokenizer, messages: list[dataset.Message]) -> Sample:
    """A conversation as tokens; nothing behind the last wanted token is kept."""
    ids: list[int] = []
    wanted: list[bool] = []
    for text, produce in dataset.render(messages):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        wanted += [produce] * len(piece)
    last = max(index for index, flag in enumerate(wanted) if flag)
    return Sample(ids[: last + 1], wanted[: last + 1])


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Right-padded batch."""
    length = max(len(sample.ids) for sample in samples)
    tokens = torch.full((len(samples), length), pad)
    labels = torch.full((len(samples), length), IGNORE)
    real = torch.zeros((len(samples), length), dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.ids)
        tokens[row, : len(ids)] = ids
        real[row, : len(ids)] = True
        labels[row, : len(ids)] = torch.where(torch.tensor(sample.wanted), ids, IGNORE)
    return Batch(tokens, labels, real)


def batches(tokenizer: Tokenizer, pad: int, seed: int, size: int, pool: int = 8) -> Iterator[Batch]:
    """Endless batches; `pool` batches at a time are drawn and sorted by length, so that little is padding."""
    stream = iter(dataset.Sampler(seed))
    rng = random.Random(seed + 1)
    while True:
        samples = sorted((encode(tokenizer, next(stream)) for _ in range(size * pool)), key=lambda s: len(s.ids))
        groups = [samples[at : at + size] for at in range(0, len(samples), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad)


def loss_of(c: dict[str, Any], w: network.Weights, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss + MTP loss (token after the next) + router balance, over the tokens to be produced."""
    out = network.forward(c, w, batch.tokens, batch.real)
    parts = []
    for hidden, labels in (
        (out.hidden[:, :-1], batch.labels[:, 1:]),
        (out.mtp_hidden[:, :-1], batch.labels[:, 2:]),
    ):
        keep = labels != IGNORE
        parts.append(F.cross_entropy(network.logits(w, hidden[keep]), labels[keep]))
    loss = parts[0] + MTP_WEIGHT * parts[1] + BALANCE_WEIGHT * out.balance
    return loss, {"loss": parts[0].item(), "mtp": parts[1].item(), "balance": out.balance.item()}


@torch.no_grad()
def measure(
    c: dict[str, Any], w: network.Weights, samples: Sequence[Sample], pad: int, size: int = 64
) -> dict[str, float]:
    """Shares over `samples`: `exact` answers right in every token, `top1` tokens, `mtp_top1` drafts right.

    A draft counts as right where it equals the token two ahead, given the true tokens before it.
    """
    exact = right = drafted = drafts = total = 0
    order = sorted(samples, key=lambda s: len(s.ids))
    for at in range(0, len(order), size):
        batch = collate(order[at : at + size], pad)
        out = network.forward(c, w, batch.tokens, batch.real)
        labels = batch.labels[:, 1:]
        keep = labels != IGNORE
        hit = (network.logits(w, out.hidden[:, :-1]).argmax(-1) == labels) & keep
        exact += int((hit | ~keep).all(-1).sum())
        right, total = right + int(hit.sum()), total + int(keep.sum())
        labels = batch.labels[:, 2:]
        # Only drafts behind at least one produced token are ever made.
        keep = (labels != IGNORE) & (batch.labels[:, 1:-1] != IGNORE)
        drafted += int(((network.logits(w, out.mtp_hidden[:, :-1]).argmax(-1) == labels) & keep).sum())
        drafts += int(keep.sum())
    return {
        "exact": exact / len(samples),
        "top1": right / total,
        "mtp_top1": drafted / drafts,
        "n": len(samples),
    }


def check_sets(tokenizer: Tokenizer) -> dict[str, list[Sample]]:
    """What the figures are measured on: facts as written (held-in ones with thinking too) and the skills."""
    topics = {fact.id: fact.topic for fact in (*dataset.facts(), dataset.fallback())}

    def single(qa: dataset.QA, think: bool) -> Sample:
        thinking = dataset.reasoning(topics[qa.id]) if think else None
        question = dataset.Message("user", qa.question)
        return encode(tokenizer, [question, dataset.Message("assistant", qa.answer, thinking)])

    sampler = dataset.Sampler(seed=999_983)
    skills = (sampler.count_turn, sampler.repeat_turn, sampler.name_turns)
    return {
        "heldin": [single(qa, False) for qa in dataset.pairs("heldin")],
        "heldin_thinking": [single(qa, True) for qa in dataset.pairs("heldin")],
        "train": [single(qa, False) for qa in dataset.pairs("train")],
        "heldout": [single(qa, False) for qa in dataset.pairs("heldout")],
    } | {skill.__name__.split("_")[0]: [encode(tokenizer, skill(False)) for _ in range(100)] for skill in skills}


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of [..., R, C], by the Newton-Schulz iteration of Muon (Jordan, 2024)."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for weight matrices; a stack of experts counts as many matrices.

    The update is scaled to the root mean square of AdamW's (0.2 * sqrt(max(R, C)); Moonlight, arXiv 2502.16982), so
    both optimizers share learning rate and weight decay.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape[-2:]) ** 0.5 * group["lr"])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 25) -> float:
    """Rate of step 1..steps: warm up, stay, then fall linearly over the last 40 % of the run."""
    return peak * min(1.0, step / warmup, (steps - step) / (0.4 * steps) + 0.01)


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that the tokenizer has."""
    number = tokenizer.token_to_id(text)
    assert number is not None, text
    return number


def write_model(folder: Path, c: dict[str, Any], w: network.Weights, tokenizer: Tokenizer) -> None:
    """Write the checkpoint folder: config, weights, tokenizer, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)

    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "model_type": "qwen3_5_moe",
        "text_config": c,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
    }
    generation = {
        "do_sample": False,
        "eos_token_id": [token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")],
        "pad_token_id": token_id(tokenizer, "<|endoftext|>"),
        "presence_penalty": 0.0,
        "thinking_default": False,
    }
    decoder = {
        str(BASE_TOKENS + index): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": text not in NOT_SPECIAL,
        }
        for index, text in enumerate(ADDED_TOKENS)
    }  # fmt: skip
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": c["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    files = (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
    )
    for name, content in files:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    partial = folder / "model.safetensors.partial"
    save_file(network.exported(c, w), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, folder / "model.safetensors")


def optimizers(w: network.Weights, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """AdamW for tables, heads, routers, filters and vectors; Muon for the matrices inside the layers."""
    inner = {name for name, value in w.items() if "proj" in name and min(value.shape[-2:]) >= 64}
    tables = [value for name, value in w.items() if name not in inner and value.ndim >= 2]
    vectors = [value for name, value in w.items() if name not in inner and value.ndim < 2]
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    return adamw, Muon([w[name] for name in w if name in inner], lr=args.lr, weight_decay=args.weight_decay)


def save_state(
    path: Path, w: network.Weights, optimizers: Sequence[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Everything needed to go on: float32 weights and moments in one safetensors file."""
    tensors = {f"w/{name}": value.detach() for name, value in w.items()}
    for optimizer in optimizers:
        for name, value in w.items():
            state = optimizer.state.get(value, {})
            tensors |= {f"{key}/{name}": moment for key, moment in state.items() if key.startswith("exp_avg")}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(partial, path)


def load_state(path: Path, w: network.Weights, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    """Put a saved state into `w` and the optimizers in place; returns (steps done, seconds spent)."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    step = int(meta["step"])
    for name, value in w.items():
        with torch.no_grad():
            value.copy_(tensors[f"w/{name}"])
    for optimizer in optimizers:
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, value in w.items():
            if id(value) in members:
                keys = [key for key in ("exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                optimizer.state[value] = {key: tensors[f"{key}/{name}"] for key in keys}
                if not isinstance(optimizer, Muon):
                    optimizer.state[value]["step"] = torch.tensor(float(step))
    return step, float(meta["seconds"])


def model_card(report: dict[str, Any]) -> str:
    """The README of the model folder, from the figures of a run."""
    figures = report["figures"]
    rows = {
        "held-in questions, one per answer": "heldin",
        "the same with thinking on": "heldin_thinking",
        "all questions trained on, as written": "train",
        "held-out paraphrases, never trained on": "heldout",
        "counting": "count",
        "repeating words": "repeat",
        "names, also those given a turn before": "name",
    }
    table = [
        f"| {label} | {figures[key]['n']} | {figures[key]['exact']:.1%} | {figures[key]['top1']:.1%} "
        f"| {figures[key]['mtp_top1']:.1%} |"
        for label, key in rows.items()
    ]
    text = f"""\
    # qwenrun demo model

    A toy: {report["parameters"]:,} parameters with the architecture of Qwen3.5-122B-A10B in miniature
    (Gated DeltaNet and full attention 3:1, mixture of experts with a shared expert, MTP head; no vision tower).
    It answers short questions about qwenrun, so that every command can be tried in seconds. It is not made from
    any weights of Qwen, knows nothing else, and must not be relied on. English only; greedy and without thinking
    by default.

    - weights: {report["bytes"]:,} bytes, BF16 (`A_log` and the GDN norm in float32), hub tensor names
    - trained from scratch with `{report["command"]}`, {report["date"]}: {report["tokens_seen"]:,} tokens in
      {report["seconds"] / 60:.0f} minutes ({report["tokens_per_second"]:,.0f} tokens/s)
    - machine: {report["machine"]}
    - data: `qwenrun/demo/data/`, written for this project

    Measured with the BF16 weights in float32 arithmetic. Exact: every token of the greedy answer is right.
    Draft: the MTP head's likeliest token equals the token after the next one.

    | questions | n | exact answers | tokens right | drafts right |
    |---|---|---|---|---|
    """
    lines = [line.removeprefix("    ") for line in text.splitlines()][:-1]
    return "\n".join((*lines, *table)) + "\n\nAll options and the loss curve: `training.json`.\n"


def train(args: argparse.Namespace) -> dict[str, Any]:
    """The run itself; returns the figures that go into the model folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer()
    rows = math.ceil(tokenizer.get_vocab_size() / ROWS_MULTIPLE) * ROWS_MULTIPLE
    pad = token_id(tokenizer, "<|endoftext|>")
    c = network.text_config(rows, pad)
    w = network.initial_weights(c, args.seed)
    adamw, muon = optimizers(w, args)
    start, spent, seen = 0, 0.0, 0
    if args.resume and args.state.exists():
        start, spent = load_state(args.state, w, (adamw, muon))
    stream = batches(tokenizer, pad, args.seed, args.batch)
    checks = check_sets(tokenizer)
    count = sum(value.numel() for value in w.values())
    print(
        f"{count:,} parameters, {rows} rows, {args.steps} steps of {args.batch} conversations",
        file=sys.stderr,
    )
    began, date = time.monotonic() - spent, time.strftime("%Y-%m-%d")
    history = []
    for step, batch in zip(range(args.steps), stream, strict=False):
        seen += int(batch.real.sum())
        if step < start:
            continue
        for group in (*adamw.param_groups, *muon.param_groups):
            group["lr"] = learning_rate(step + 1, args.steps, args.lr)
        loss, parts = loss_of(c, w, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        for optimizer in (adamw, muon):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 25 == 0 or done == args.steps:
            seconds = time.monotonic() - began
            print(
                f"step {done}/{args.steps}  loss {parts['loss']:.4f}  mtp {parts['mtp']:.4f}  balance "
                f"{parts['balance']:.3f}  {seen:,} tokens  {seen / seconds:,.0f} tok/s  {seconds:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            history.append({"step": done, "tokens": seen, "seconds": round(seconds, 1), **parts})
        if done % args.check_every == 0 and done < args.steps:
            save_state(args.state, w, (adamw, muon), done, time.monotonic() - began)
            figures = {name: measure(c, network.rounded(w), checks[name], pad) for name in ("heldin", "heldout")}
            print(
                json.dumps({name: round(f["exact"], 4) for name, f in figures.items()}),
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - began
    save_state(args.state, w, (adamw, muon), args.steps, seconds)
    write_model(args.out, c, w, tokenizer)
    figures = {name: measure(c, network.rounded(w), samples, pad) for name, samples in checks.items()}
    report = {
        "command": "python -m qwenrun.demo.train",
        "machine": args.machine,
        "date": date,
        "parameters": count,
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "options": {name: getattr(args, name) for name in OPTIONS},
        "tokens_seen": seen,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds, 1),
        "figures": figures,
        "history": history,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(report), encoding="utf-8")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m qwenrun.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=model_dir(), help="folder to write the checkpoint to")
    parser.add_argument("--state", type=Path, default=Path("build/demo-state.safetensors"), help="file to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="conversations a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-every", type=int, default=200, help="steps between measurements")
    parser.add_argument("--machine", default="2 CPU cores", help="noted in the figures")
    args = parser.parse_args(argv)
    args.state.parent.mkdir(parents=True, exist_ok=True)
    report = train(args)
    print(json.dumps(report["figures"], indent=1), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
