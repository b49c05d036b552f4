"""Packs of random weights for any config of the family: scale without downloading, quantizing or owning a checkpoint.

    python -m qwenrun.measure.synth OUT --model 122b --layers 24 --experts 256 --recipe int4

Such a pack opens, verifies and runs like a real one, says nothing, and costs what its size costs. Codes are taken
from a pool of random bytes at another place for every record, scales are such that a decoded matrix has standard
deviation 1/sqrt(columns), norms and decays are as a fresh network has them. Its activations are finite and of
order one in every layer, and no two experts are equal. Knows no checkpoint and no engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenrun import __version__
from qwenrun.errors import QwenrunError, UsageError, exit_code
from qwenrun.kernels.ops import encode
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import TORCH_DTYPES, Weight
from qwenrun.model.config import FULL, LINEAR, ModelConfig, zoo_names
from qwenrun.model.inventory import inventory
from qwenrun.quant.errors import QuantError
from qwenrun.quant.packfile.layout import Manifest, TensorEntry
from qwenrun.quant.packfile.writer import PackWriter
from qwenrun.quant.recipe import DEFAULT, Recipe, TensorInfo

POOL_BYTES = 64 << 20
SCALE_POOL = 1 << 22
# Rows of a dense tensor are made in pieces of about this many bytes.
PIECE_BYTES = 16 << 20
# The pattern of every member of the family: three DeltaNet layers, one of full attention.
PATTERN = (LINEAR, LINEAR, LINEAR, FULL)
# The embedding's rows have unit variance, so that the token still tells in the last layer.
EMBEDDING_STD = 1.0
# Standard deviation of uniformly random codes: int4 in -7..7, a byte, and e2m1's sixteen values.
_CODE_STD = {"int4": math.sqrt(56 / 3), "int8": math.sqrt((256**2 - 1) / 12), "e2m1": math.sqrt(68.5 / 8)}
# E4M3 bit patterns 0x70..0x7E are 128, 144, ..., 240, 256, 288, ..., 448; 0x7F would be NaN.
_E4M3_LOW, _E4M3_END = 0x70, 0x7F
# With --skew: how large the embedding is, and which share of its variance all tokens have in common.
SKEW_STD, SKEW_SHARE = 6.0, 0.5
# What a layer's two halves add to the variance of the residual stream, measured on networks of this module.
LAYER_VARIANCE = 0.43
# No expert is chosen for more than this share of the tokens.
MOST_POPULAR = 0.95

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Widths:
    """A named model to synthesize: a member of the zoo with other numbers of layers and experts."""

    model: str
    layers: int | None = None
    experts: int | None = None


WIDTHS = {"35b-bench": Widths("35b", layers=8, experts=64)}


# -- the config ----------------------------------------------------------------------------------------------


def zoo_config(model: str) -> dict[str, Any]:
    """The config.json of a member of the zoo as a dictionary of one's own; "35b" means Qwen3.5's, not Qwen3.6's.

    Raises UsageError if no member is meant.
    """
    plain = [name for name in zoo_names() if name.lower().startswith(f"qwen3.5-{model.lower()}")]
    return copy.deepcopy(ModelConfig.from_name(plain[0] if len(plain) == 1 else model).raw)


def synth_config(
    model: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    mtp: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A member's config with other numbers of layers and experts, without vision, and without MTP unless asked for.

    changes: other keys of its text part. Raises UsageError, and ModelError if the result is no config.
    """
    config = zoo_config(model)
    config.pop("vision_config", None)
    text = config.get("text_config", config)
    if layers is not None:
        text["num_hidden_layers"] = layers
        text["layer_types"] = [PATTERN[i % len(PATTERN)] for i in range(layers)]
    if experts is not None:
        if "num_experts" not in text:
            raise UsageError(f"{model} is a dense model: it has no experts", "leave --experts out, or --model 122b")
        text["num_experts"] = experts
    if not mtp:
        text["mtp_num_hidden_layers"] = 0
    for key, value in (changes or {}).items():
        if key not in text:
            raise UsageError(f"--set {key}: the config of {model} has no such key", f"one of: {', '.join(text)}")
        text[key] = value
    ModelConfig.from_hf(config, name=model)  # refuse it before anything is written
    return config


# -- random values -------------------------------------------------------------------------------------------


class Pool:
    """Random arrays by name: the same seed and name give the same bytes, wherever and whenever they are asked for.

    Arrays are slices of a few pools, made when they are first needed; a name decides where a slice begins.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rng(self, *key: str | int) -> np.random.Generator:
        """A generator of its own for a name (and numbers after it)."""
        return np.random.default_rng([self.seed, *(zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key)])

    @cached_property
    def raw(self) -> np.ndarray:
        """uint8 [64 Mi], uniform."""
        return self.rng("raw").integers(0, 256, POOL_BYTES, np.uint8)

    @cached_property
    def nibbles(self) -> np.ndarray:
        """uint8 [64 Mi], both nibbles about uniform in 1..15: int4 codes of mean zero."""
        byte = np.arange(256)
        low, high = byte & 15, byte >> 4
        # A nibble of 0 takes its value from the other one.
        table = np.where(low > 0, low, high % 15 + 1) | np.where(high > 0, high, low % 15 + 1) << 4
        return table.astype(np.uint8)[self.raw]

    @cached_property
    def normal(self) -> np.ndarray:
        """float32 [16 Mi], standard normal."""
        return self.rng("normal").standard_normal(POOL_BYTES // 4, np.float32)

    @cached_property
    def scale_factors(self) -> np.ndarray:
        """float32 [4 Mi], of magnitude 0.75..1.25 with a random sign: a format's scales may be negative."""
        rng = self.rng("scales")
        sign = rng.integers(0, 2, SCALE_POOL, np.int8) * 2 - 1
        return (rng.uniform(0.75, 1.25, SCALE_POOL) * sign).astype(np.float32)

    @cached_property
    def e4m3(self) -> np.ndarray:
        """uint8 [4 Mi], bit patterns of E4M3 numbers from 128 to 448."""
        return self.rng("e4m3").integers(_E4M3_LOW, _E4M3_END, SCALE_POOL, np.uint8)

    @staticmethod
    def cut(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` consecutive elements from a random place; a view, or whole turns of the pool if it is too short."""
        if count >= pool.size:
            return np.resize(np.roll(pool, -int(rng.integers(pool.size))), count)
        start = int(rng.integers(pool.size - count))
        return pool[start : start + count]


def _e4m3_value(bits: np.ndarray) -> np.ndarray:
    """Values of positive normal E4M3 bit patterns."""
    return np.ldexp(1 + (bits & 7) / 8, (bits >> 3).astype(np.int32) - 7)


def random_weight(
    pool: Pool, spec: BlockSpec, rows: int, cols: int, std: float, tensor_scales: int, *key: str | int
) -> Weight:
    """A [rows, cols] matrix of `spec` whose decoded values have mean 0 and about the standard deviation `std`."""
    rng = pool.rng(*key)
    if spec.plain:
        values = torch.from_numpy(pool.cut(pool.normal, rows * cols, rng).reshape(rows, cols))
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[spec.codes]
        return Weight.plain((values * std).to(dtype))
    step = std / _CODE_STD[spec.codes]
    parts: dict[str, Tensor] = {}
    for part in spec.parts(rows, cols, tensor_scales):
        count = math.prod(part.shape)
        if part.name == "codes":
            source = pool.nibbles if spec.codes == "int4" else pool.raw
            array = pool.cut(source, count, rng)
        elif part.name == "zeros":
            array = np.full(count, 0x88, np.uint8)
        elif part.name == "tensor_scale":
            rms = math.sqrt(float(np.square(_e4m3_value(np.arange(_E4M3_LOW, _E4M3_END))).mean()))
            array = np.full(count, step / (rms if spec.scale == "e4m3" else 1.0), np.float32)
        elif spec.scale == "e4m3":
            if not spec.tensor_scale:
                bits = torch.tensor(step).to(torch.float8_e4m3fn).view(torch.uint8).item()
                array = np.full(count, bits, np.uint8)
            else:
                array = pool.cut(pool.e4m3, count, rng)
        elif spec.scale == "e8m0":
            exponent = 0 if spec.tensor_scale else round(math.log2(step))
            array = np.full(count, 127 + exponent, np.uint8)
        else:
            # tensor_scale has the step already where there is one.
            base = 1.0 if spec.tensor_scale else step
            array = (pool.cut(pool.scale_factors, count, rng) * np.float32(base)).astype(np.float16)
        parts[part.name] = torch.from_numpy(array).view(TORCH_DTYPES[part.dtype]).view(part.shape)
    return Weight.from_parts(spec, rows, cols, parts)


# -- what each tensor holds ----------------------------------------------------------------------------------


def popularity(experts: int, top_k: int, zipf: float) -> np.ndarray:
    """f64 [experts]: how probable it is that a token chooses the expert of rank 1, 2, ...; they sum to `top_k`.

    Proportional to rank^-zipf, but for the cap of MOST_POPULAR.
    """
    weights = np.arange(1.0, experts + 1) ** -zipf
    low, high = 0.0, float(experts) / weights[-1]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(weights * middle, MOST_POPULAR).sum() < top_k else (low, middle)
    return np.minimum(weights * high, MOST_POPULAR)


@dataclass(frozen=True)
class Skew:
    """Routing in which experts are as popular as their rank to the power -zipf.

    A router is one matrix, without a bias; so all tokens' embeddings have a direction in common, along which the
    router's rows have what sets popular experts apart. The rest of a row, orthogonal to that direction, is noise
    that tells tokens apart: the logits are normal with variance 1, about the quantile of the wanted popularity.
    """

    zipf: float
    hidden: int
    top_k: int

    def common(self, pool: Pool) -> Tensor:
        """f32 [H], of +1 and -1."""
        return torch.from_numpy(pool.rng("common").integers(0, 2, self.hidden).astype(np.float32) * 2 - 1)

    def embedding(self, pool: Pool, rows: int, *key: str | int) -> Tensor:
        """f32 [rows, H]."""
        noise = torch.from_numpy(Pool.cut(pool.normal, rows * self.hidden, pool.rng(*key)).reshape(rows, self.hidden))
        noise = noise * (SKEW_STD * math.sqrt(1 - SKEW_SHARE))
        return noise.add_(self.common(pool), alpha=SKEW_STD * math.sqrt(SKEW_SHARE))

    def router(self, pool: Pool, experts: int, layer: int, *key: str | int) -> Tensor:
        """f32 [experts, H]: who is popular is drawn for every layer anew."""
        rng, common = pool.rng(*key), self.common(pool)
        # The cosine between the common direction and what the router of this layer sees.
        shared = SKEW_STD * math.sqrt(SKEW_SHARE / (SKEW_STD**2 + LAYER_VARIANCE * (layer + 0.5)))
        quantile = NormalDist().inv_cdf
        ranked = [quantile(p) for p in popularity(experts, self.top_k, self.zipf)]
        wanted = torch.tensor(ranked)[torch.from_numpy(rng.permutation(experts))]
        noise = torch.from_numpy(rng.standard_normal((experts, self.hidden), np.float32))
        noise -= (noise @ common / self.hidden)[:, None] * common
        noise /= math.sqrt((1 - shared**2) * self.hidden)
        return noise + (wanted / (shared * self.hidden))[:, None] * common


def random_tensor(pool: Pool, info: TensorInfo, config: ModelConfig) -> Tensor:
    """What a tensor that is no encoded matrix holds in a fresh network, in its dtype."""
    name, rng = info.name, pool.rng(info.name)
    if name.endswith(".A_log"):
        value = torch.from_numpy(np.log(rng.uniform(1, 16, info.shape)))
    elif name.endswith((".dt_bias", "linear_attn.norm.weight")):
        value = torch.ones(info.shape)
    elif len(info.shape) == 1:
        value = torch.zeros(info.shape)  # norms are zero-centred, biases zero
    else:
        fan_in = math.prod(info.shape[1:])
        std = EMBEDDING_STD if info.part == "embedding" else fan_in**-0.5
        value = torch.from_numpy(rng.standard_normal(info.shape, np.float32) * std)
    return value.to(TORCH_DTYPES[info.dtype])


def _pieces(info: TensorInfo, spec: BlockSpec) -> Iterator[tuple[int, int]]:
    """Runs of rows of about PIECE_BYTES; all rows at once if a tensor scale binds them."""
    rows, cols = info.shape[0], math.prod(info.shape[1:])
    group = spec.group
    step = PIECE_BYTES * 8 // max(1, int(cols * spec.bits_per_weight)) // group * group
    step = rows if spec.tensor_scale else max(group, step)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _fill(writer: PackWriter, pool: Pool, entry: TensorEntry, config: ModelConfig, skew: Skew | None) -> Iterator[int]:
    """Write one tensor; yields the bytes of every piece."""
    info, spec = entry.info, entry.spec
    if info.is_experts:
        experts, rows, cols = info.shape
        for expert in range(experts):
            weight = random_weight(pool, spec, rows, cols, cols**-0.5, info.tensor_scales, info.name, expert)
            writer.put_expert(info.name, expert, weight)
            yield weight.nbytes
        return
    encoded, large = entry.assignment.spec is not None, len(info.shape) == 2 and math.prod(info.shape) > 1 << 20
    skewed = skew is not None and (info.part == "embedding" or info.name.endswith(".mlp.gate.weight"))
    if not (encoded or large or skewed):
        value = random_tensor(pool, info, config)
        writer.put_rows(info.name, 0, value)
        yield value.numel() * value.element_size()
        return
    rows, cols = info.shape
    for start, stop in [(0, rows)] if skewed and info.part != "embedding" else _pieces(info, spec):
        key = (info.name, start)
        if skewed:
            assert skew is not None
            embedding = info.part == "embedding"
            layer = 0 if embedding else int(info.name.partition("layers.")[2].partition(".")[0])
            values = skew.embedding(pool, stop - start, *key) if embedding else skew.router(pool, rows, layer, *key)
            weight = encode(values, spec)
        else:
            std = EMBEDDING_STD if info.part == "embedding" else cols**-0.5
            weight = random_weight(pool, spec, stop - start, cols, std, 1, *key)
        writer.put_rows(info.name, start, weight if encoded else weight.codes)
        yield weight.nbytes


# -- the pack ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What was written: bytes of all weights, seconds until they lay on the disk, hashed."""

    path: Path
    nbytes: int
    seconds: float

    def line(self) -> str:
        speed = self.nbytes / self.seconds / 1e6
        return f"wrote {self.path}: {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed:,.0f} MB/s"


def synthesize(
    out: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    seed: int = 0,
    zipf: float = 0.0,
    name: str = "synthetic",
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the pack `out` of random weights for a config.json; the same arguments give the same bytes.

    zipf: 0 for routing as it falls, about even; else see Skew. progress(done, total): bytes, written and hashed.
    Raises ModelError for a config that is none, StorageError if `out` can't be written.
    """
    begun = time.perf_counter()
    parsed = ModelConfig.from_hf(dict(config), name=name)
    if zipf and not parsed.is_moe:
        raise UsageError("a dense model routes nothing", "leave --skew out, or --model 122b")
    entries = {info.name: TensorEntry(info, recipe.assign(info)) for info in inventory(parsed)}
    pool = Pool(seed)
    skew = Skew(zipf, parsed.hidden_size, parsed.top_k) if zipf else None
    notes = [f"random weights of seed {seed}" + (f", routing skewed by {zipf:g}" if zipf else "")]
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, 2 * writer.total_bytes)

    with PackWriter(out, entries, force) as writer:
        for entry in entries.values():
            for size in _fill(writer, pool, entry, parsed, skew):
                advance(size)
        source = {"name": name, "seed": seed, "zipf": zipf}
        writer.finish(
            lambda files: Manifest(
                dict(config), recipe.to_json(), source, f"qwenrun {__version__}", tuple(notes), entries, files
            ),
            {},
            advance,
        )
    return Written(out, writer.total_bytes, time.perf_counter() - begun)


# -- the command line ----------------------------------------------------------------------------------------


class Lines:
    """Progress as a line on stderr, every few seconds."""

    def __init__(self, what: str, every: float = 5.0) -> None:
        self._what, self._every = what, every
        self._begun = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            print(f"{self._what}: {done / total:4.0%}, {now - self._begun:.0f} s", file=sys.stderr, flush=True)


def guarded(body: Callable[[], None]) -> int:
    """Run a command of this room; the exit code. Errors of ours go to stderr in their parts."""
    try:
        body()
    except (QwenrunError, QuantError) as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return exit_code(error)
    return 0


def _change(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE with a JSON value") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m qwenrun.measure.synth", description="Write a pack of random weights for a config of the family."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the pack to write")
    parser.add_argument("--model", default="122b", help="a member of the zoo (default: 122b)")
    parser.add_argument("--widths", choices=sorted(WIDTHS), help="a named model instead of --model")
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's)")
    parser.add_argument("--experts", type=int, help="number of routed experts (default: the model's)")
    parser.add_argument("--set", type=_change, action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--mtp", action="store_true", help="with the MTP head")
    parser.add_argument("--recipe", default=DEFAULT, help=f"how tensors are stored (default: {DEFAULT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, metavar="Z", help="popularity of experts: rank^-Z")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a pack")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = _parser().parse_args(arguments)

    def body() -> None:
        widths = WIDTHS[options.widths] if options.widths else Widths(options.model)
        config = synth_config(
            widths.model,
            layers=widths.layers if options.layers is None else options.layers,
            experts=widths.experts if options.experts is None else options.experts,
            mtp=options.mtp,
            changes=dict(options.changes),
        )
        written = synthesize(
            options.out,
            config,
            Recipe.load(options.recipe),
            seed=options.seed,
            zipf=options.skew,
            name=f"synthetic-{options.widths or options.model}",
            force=options.force,
            progress=Lines(f"synth {options.out}"),
        )
        print(written.line(), file=sys.stderr)

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
