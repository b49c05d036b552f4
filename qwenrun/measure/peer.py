"""The peer benchmark: qwenrun beside llama.cpp, on one model of the same shapes, in the same memory.

    python -m qwenrun.measure.peer make DIR
    python -m qwenrun.measure.peer run DIR --python PEER_VENV/bin/python --limit none,1500MiB,1000MiB

The model has the widths of Qwen3.5-35B-A3B, 8 layers, 64 experts and the real vocabulary, with random weights:
routing and speed do not need trained ones. `make` writes it as packs and as GGUF files. `run` measures each
engine in turn, every one in a process of its own, inside a control group that holds it and its file cache to
the limit. llama.cpp is found through llama-cpp-python in another environment; nothing of it is imported here.

GGUF: the container's version 3, and block layouts as ggml documents them. Knows no kernel and no engine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwenrun.errors import QwenrunError, UsageError
from qwenrun.measure.bandwidth import read_bandwidth
from qwenrun.measure.synth import WIDTHS, Lines, Pool, guarded, synth_config, synthesize
from qwenrun.model.config import ModelConfig
from qwenrun.quant.recipe import Recipe

BENCH = "35b-bench"
RECIPES = ("int4", "nvfp4")
GGUF_KINDS = ("q4_k_m", "q4_0")
SEED = 0
# Of a limit this much is left for Python, torch and what else is not the engine's to plan.
MARGIN = 48 << 20
SILENCE_SECONDS, MOST_SECONDS = 150.0, 900.0
PROMPT_TOKENS, GEN_TOKENS, RUNS, ROUNDS = 32, 32, 2, 1

# -- GGUF: blocks --------------------------------------------------------------------------------------------

Q4_K_SCALE = 32  # of 0..63, for all sub-blocks
Q6_K_SCALE = 8  # of -128..127


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: its number, values and bytes a block."""

    number: int
    values: int
    nbytes: int


F32 = BlockType(0, 1, 4)
Q4_0 = BlockType(2, 32, 18)
Q4_K = BlockType(12, 256, 144)
Q6_K = BlockType(14, 256, 210)


def _q4_0(pool: Pool, out: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """value = d * (q - 8): f16 d, 32 nibbles."""
    out[:, :2] = _f16(std / math.sqrt(56 / 3))
    out[:, 2:] = Pool.cut(pool.nibbles, out.shape[0] * 16, rng).reshape(-1, 16)


def _q4_k(pool: Pool, out: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """value = d * scale * q - dmin * minimum: f16 d, f16 dmin, 8 scales and 8 minimums of 6 bits, 256 nibbles."""
    d = std / (Q4_K_SCALE * math.sqrt((16**2 - 1) / 12))
    out[:, 0:2], out[:, 2:4] = _f16(d), _f16(7.5 * d)
    # Of the first four of each the low 6 bits of bytes 0-7; of the others 4 bits in bytes 8-11, 2 in 0-7's top.
    out[:, 4:12] = (Q4_K_SCALE >> 4) << 6 | Q4_K_SCALE
    out[:, 12:16] = (Q4_K_SCALE & 15) << 4 | (Q4_K_SCALE & 15)
    out[:, 16:] = Pool.cut(pool.raw, out.shape[0] * 128, rng).reshape(-1, 128)


def _q6_k(pool: Pool, out: np.ndarray, std: float, rng: np.random.Generator) -> None:
    """value = d * scale * (q - 32): 256 codes of 6 bits, 16 int8 scales, f16 d. Scales of both signs: mean 0."""
    out[:, :192] = Pool.cut(pool.raw, out.shape[0] * 192, rng).reshape(-1, 192)
    signs = Pool.cut(pool.raw, out.shape[0] * 16, rng).reshape(-1, 16) & 1
    out[:, 192:208] = np.where(signs, Q6_K_SCALE, 256 - Q6_K_SCALE)
    out[:, 208:] = _f16(std / (Q6_K_SCALE * math.sqrt((64**2 - 1) / 12 + 0.25)))


_FILL = {Q4_0: _q4_0, Q4_K: _q4_k, Q6_K: _q6_k}


def _f16(value: float) -> np.ndarray:
    return np.frombuffer(struct.pack("<e", value), np.uint8)


def random_blocks(pool: Pool, kind: BlockType, count: int, std: float, *key: str | int) -> np.ndarray:
    """uint8 [count, kind.nbytes]: blocks whose values have mean 0 and about the standard deviation `std`."""
    out = np.empty((count, kind.nbytes), np.uint8)
    _FILL[kind](pool, out, std, pool.rng(*key))
    return out


# -- GGUF: the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. shape: rows first. value: "random" (std 1/sqrt(columns)), "ones" or "decay"."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType = F32
    value: str = "random"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes


def _more_bits(layer: int, layers: int) -> bool:
    """Layers where Q4_K_M has 6 bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def gguf_tensors(config: ModelConfig, variety: str) -> list[GgufTensor]:
    """Every tensor llama.cpp's `qwen35moe` needs, in the types its quantizer chooses for `variety`."""
    hidden, layers, experts = config.hidden_size, config.num_layers, config.num_experts
    low = Q4_0 if variety == "q4_0" else Q4_K
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    out = [
        GgufTensor("token_embd.weight", (config.vocab_size, hidden), low),
        GgufTensor("output_norm.weight", (hidden,), value="ones"),
        GgufTensor("output.weight", (config.vocab_size, hidden), Q6_K),
    ]

    def add(name: str, *shape: int, kind: BlockType = F32, value: str = "random") -> None:
        out.append(GgufTensor(f"blk.{layer}.{name}", shape, kind, value))

    for layer in range(layers):
        high = Q6_K if variety == "q4_k_m" and _more_bits(layer, layers) else low
        add("attn_norm.weight", hidden, value="ones")
        add("post_attention_norm.weight", hidden, value="ones")
        if config.is_full(layer):
            add("attn_q.weight", 2 * heads, hidden, kind=low)
            add("attn_k.weight", kv, hidden, kind=low)
            add("attn_v.weight", kv, hidden, kind=high)
            add("attn_output.weight", hidden, heads, kind=low)
            add("attn_q_norm.weight", config.head_dim, value="ones")
            add("attn_k_norm.weight", config.head_dim, value="ones")
        else:
            add("attn_qkv.weight", config.conv_channels, hidden, kind=high)
            add("attn_gate.weight", config.value_size, hidden, kind=low)
            add("ssm_conv1d.weight", config.conv_channels, config.conv_kernel)
            add("ssm_dt.bias", config.linear_value_heads, value="ones")
            add("ssm_a", config.linear_value_heads, value="decay")
            add("ssm_beta.weight", config.linear_value_heads, hidden, kind=low)
            add("ssm_alpha.weight", config.linear_value_heads, hidden, kind=low)
            add("ssm_norm.weight", config.linear_value_dim, value="ones")
            add("ssm_out.weight", hidden, config.value_size, kind=low)
        add("ffn_gate_inp.weight", experts, hidden)
        add("ffn_gate_exps.weight", experts, config.expert_size, hidden, kind=low)
        add("ffn_up_exps.weight", experts, config.expert_size, hidden, kind=low)
        add("ffn_down_exps.weight", experts, hidden, config.expert_size, kind=high)
        add("ffn_gate_inp_shexp.weight", hidden)
        add("ffn_gate_shexp.weight", config.shared_size, hidden, kind=low)
        add("ffn_up_shexp.weight", config.shared_size, hidden, kind=low)
        add("ffn_down_shexp.weight", hidden, config.shared_size, kind=high)
    return out


def bytes_per_token(tensors: Sequence[GgufTensor], config: ModelConfig) -> int:
    """Weight bytes that decoding a token reads: of experts the chosen ones, of the embedding one row."""
    total = 0.0
    for tensor in tensors:
        share = config.top_k / config.num_experts if "_exps." in tensor.name else 1.0
        total += tensor.nbytes * (1 / config.vocab_size if tensor.name == "token_embd.weight" else share)
    return round(total)


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """The file's metadata. The vocabulary is a number without texts: tokens go in and logits come out."""
    arch = "qwen35moe"
    interval = config.full_layers[0] + 1 if config.full_layers else config.num_layers + 1
    return {
        "general.architecture": arch,
        "general.name": config.name,
        "general.alignment": _ALIGN,
        "tokenizer.ggml.model": "none",
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.expert_count": config.num_experts,
        f"{arch}.expert_used_count": config.top_k,
        f"{arch}.expert_feed_forward_length": config.expert_size,
        f"{arch}.expert_shared_feed_forward_length": config.shared_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope.theta,
        f"{arch}.rope.dimension_count": config.rope.rotary_dim,
        f"{arch}.rope.dimension_sections": [*config.rope.mrope_section, 0],
        f"{arch}.ssm.conv_kernel": config.conv_kernel,
        f"{arch}.ssm.inner_size": config.value_size,
        f"{arch}.ssm.state_size": config.linear_value_dim,
        f"{arch}.ssm.time_step_rank": config.linear_value_heads,
        f"{arch}.ssm.group_count": config.linear_key_heads,
        f"{arch}.full_attention_interval": interval,
    }


# -- GGUF: the container -------------------------------------------------------------------------------------

_ALIGN = 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + struct.pack(f"<{len(value)}i", *value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)


def gguf_header(keys: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the data, padded to where it begins; every tensor begins at a multiple of 32 after that."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    out += [_string(key) + _value(value) for key, value in keys.items()]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]  # the fastest dimension first
        out.append(_string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        out.append(struct.pack("<IQ", tensor.kind.number, offset))
        offset += -(-tensor.nbytes // _ALIGN) * _ALIGN
    header = b"".join(out)
    return header + bytes(-len(header) % _ALIGN)


def _tensor_data(pool: Pool, tensor: GgufTensor) -> Iterator[np.ndarray]:
    """The bytes of one tensor, in pieces."""
    std = tensor.shape[-1] ** -0.5
    if tensor.kind != F32:
        blocks = math.prod(tensor.shape) // tensor.kind.values
        for start in range(0, blocks, 1 << 16):
            yield random_blocks(pool, tensor.kind, min(1 << 16, blocks - start), std, tensor.name, start)
        return
    rng = pool.rng(tensor.name)
    if tensor.value == "ones":
        value = np.ones(tensor.shape, np.float32)
    elif tensor.value == "decay":
        value = -rng.uniform(1, 16, tensor.shape).astype(np.float32)
    else:
        value = rng.standard_normal(tensor.shape, np.float32) * np.float32(std)
    yield value.view(np.uint8)


def write_gguf(path: Path, config: ModelConfig, variety: str, progress: Callable[[int, int], None]) -> int:
    """Write a model of random blocks; whole or not at all. Its bytes."""
    tensors, pool = gguf_tensors(config, variety), Pool(SEED)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(gguf_header(gguf_keys(config), tensors))
            for tensor in tensors:
                for piece in _tensor_data(pool, tensor):
                    file.write(piece.data)
                    done += piece.nbytes
                    progress(done, total)
                file.write(bytes(-tensor.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


# -- make ----------------------------------------------------------------------------------------------------


def pack_path(folder: Path, recipe: str) -> Path:
    return folder / f"{recipe}.pack"


def gguf_path(folder: Path, variety: str) -> Path:
    return folder / f"{variety}.gguf"


def bench_config() -> dict[str, Any]:
    """The benchmark model's config.json."""
    widths = WIDTHS[BENCH]
    return synth_config(widths.model, layers=widths.layers, experts=widths.experts)


def make(folder: Path, raw: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write those of `names` (recipes and GGUF varieties) that are not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = gguf_path(folder, name) if name in GGUF_KINDS else pack_path(folder, name)
        if path.exists():
            print(f"{path} is there", file=sys.stderr)
        elif name in GGUF_KINDS:
            begun = time.perf_counter()
            size = write_gguf(path, ModelConfig.from_hf(dict(raw), BENCH), name, Lines(f"make {path}"))
            print(f"wrote {path}: {size / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        else:
            recipe = Recipe.load(name)
            written = synthesize(path, raw, recipe, seed=SEED, name=BENCH, progress=Lines(f"make {path}"))
            print(written.line(), file=sys.stderr)


# -- a process in a memory limit -----------------------------------------------------------------------------

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryLimit:
    """A control group with a limit, for one process; version 1 or 2, as the system has. Without a limit, nothing.

    Raises UsageError on entering if groups can't be made here: that takes root.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.folder: Path | None = None

    def __enter__(self) -> MemoryLimit:
        if self.limit is None:
            return self
        first = (_V1 / "memory.limit_in_bytes").exists()
        folder = (_V1 if first else _V2) / f"qwenrun-peer-{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(self.limit))
        except OSError as error:
            raise UsageError(
                f"a memory limit of {self.limit:,} bytes can't be set with {folder}: {error.strerror}",
                "run it as root on a system with the memory controller, or with --limit none",
            ) from error
        self.folder = folder
        return self

    def join(self) -> None:
        """Put the calling process into the group: for the child, before it becomes the program."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def killed(self) -> bool:
        """Whether the kernel killed for memory in this group."""
        if self.folder is None:
            return False
        for name in ("memory.oom_control", "memory.events"):
            file = self.folder / name
            if file.exists() and (found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)):
                return int(found[1]) > 0
        return False

    def __exit__(self, *_: object) -> None:
        for _attempt in range(50):
            try:
                if self.folder is not None:
                    self.folder.rmdir()
                return
            except OSError:  # the process is on its way out
                time.sleep(0.1)


def forget_pages(path: Path) -> None:
    """Have the kernel drop the cached pages of a file, or of all files of a folder: they are then read from disk."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@dataclass
class Outcome:
    """What a process said before it ended, or was ended. trouble: "" if it ended well."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    trouble: str = ""


def run_limited(
    command: Sequence[str], limit: int | None, env: Mapping[str, str], silence: float, most: float = math.inf
) -> Outcome:
    """Run a program in the limit; end it after `most` seconds, or if it says nothing, on stdout or stderr, for
    `silence` seconds."""
    outcome = Outcome()
    with MemoryLimit(limit) as group:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**os.environ, **env},
            preexec_fn=group.join,
            start_new_session=True,
        )
        said: queue.SimpleQueue[tuple[list[str], str] | None] = queue.SimpleQueue()

        def listen(stream: IO[str], lines: list[str]) -> None:
            for line in stream:
                said.put((lines, line.rstrip("\n")))
            said.put(None)

        streams = [(process.stdout, outcome.stdout), (process.stderr, outcome.stderr)]
        for stream, lines in streams:
            assert stream is not None
            threading.Thread(target=listen, args=(stream, lines), daemon=True).start()
        open_streams, end = len(streams), time.monotonic() + most
        try:
            while open_streams:
                item = said.get(timeout=max(0.0, min(silence, end - time.monotonic())))
                if item is None:
                    open_streams -= 1
                else:
                    item[0].append(item[1])
        except queue.Empty:
            late = time.monotonic() >= end
            outcome.trouble = f"not done in {most:.0f} s" if late else f"nothing in {silence:.0f} s"
        finally:
            if open_streams:
                process.kill()
            process.wait()
        if group.killed:
            outcome.trouble = "killed: out of memory"
        elif process.returncode and not outcome.trouble:
            outcome.trouble = f"exit code {process.returncode}"
    return outcome


# -- the engines ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What to measure, on both sides the same."""

    prompt_tokens: int
    gen_tokens: int
    runs: int
    threads: int
    silence: float
    most: float
    margin: int


@dataclass(frozen=True)
class Result:
    """One engine on one file in one limit. Tokens per second, None where there are none; trouble says why."""

    engine: str
    file: str
    limit: int | None
    decode: float | None
    prefill: float | None
    tokens: int
    bytes_per_token: int | None
    trouble: str = ""
    detail: str = ""

    def to_json(self, peer: float | None) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "file": self.file,
            "limit_bytes": self.limit,
            "decode_tokens_per_second": self.decode,
            "prefill_tokens_per_second": self.prefill,
            "decoded_tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "ratio_to_llama_cpp": self.decode / peer if self.decode and peer else None,
            "trouble": self.trouble,
            "detail": self.detail,
        }


# Runs under the other Python, with llama_cpp alone. One JSON line an event, so that a run that is ended has still
# told what it did. Feeds random tokens, as `qwenrun bench` does: first a round that is not counted.
_LLAMA = """
import ctypes, json, random, sys, time
task = json.loads(sys.argv[1])
import llama_cpp as lib
def say(**event):
    print(json.dumps(event), flush=True)
@lib.llama_log_callback
def log(level, text, data):
    if level >= 3:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()
lib.llama_log_set(log, None)
lib.llama_backend_init()
params = lib.llama_model_default_params()
params.n_gpu_layers = 0
if hasattr(params, "use_mmap"):
    params.use_mmap = True
else:
    params.load_mode = 1
params.use_extra_bufts = task["repack"]
begun = time.perf_counter()
model = lib.llama_model_load_from_file(task["file"].encode(), params)
if not model:
    sys.exit("the model could not be loaded")
settings = lib.llama_context_default_params()
settings.n_ctx = task["prompt_tokens"] + task["gen_tokens"] + 8
settings.n_batch = settings.n_ubatch = max(32, task["prompt_tokens"])
settings.n_threads = settings.n_threads_batch = task["threads"]
context = lib.llama_init_from_model(model, settings)
if not context:
    sys.exit("the context could not be made")
vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
say(what="loaded", seconds=time.perf_counter() - begun, vocab=vocab)
rng = random.Random(0)
def decode(tokens):
    array = (lib.llama_token * len(tokens))(*tokens)
    begun = time.perf_counter()
    status = lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens)))
    if status:
        sys.exit(f"llama_decode: {status}")
    logits = lib.llama_get_logits_ith(context, -1)
    spent = time.perf_counter() - begun
    if logits[0] != logits[0]:
        sys.exit("the logits are NaN")
    return spent
for number in range(task["runs"] + 1):
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    tokens = [rng.randrange(vocab) for _ in range(task["prompt_tokens"])]
    say(what="prefill", round=number, seconds=decode(tokens))
    for _ in range(task["gen_tokens"]):
        say(what="token", round=number, seconds=decode([rng.randrange(vocab)]))
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
held = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
say(what="done", anon=int(held[0]) * 1024 if held else None, system=lib.llama_print_system_info().decode())
"""


def llama_figures(lines: Sequence[str], task: Task) -> tuple[float | None, float | None, int, str]:
    """(decode, prefill tokens per second, tokens decoded in the counted rounds, detail) of the events of _LLAMA.

    If no counted round was reached, the first one's figures are all there is, and the detail says so.
    """
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    rounds: dict[int, list[float]] = {}
    prefills: dict[int, float] = {}
    for event in events:
        if event.get("what") == "token":
            rounds.setdefault(event["round"], []).append(event["seconds"])
        elif event.get("what") == "prefill":
            prefills[event["round"]] = task.prompt_tokens / event["seconds"]
    notes = []
    counted = {number: times for number, times in rounds.items() if number > 0}
    if rounds and not counted:
        counted = rounds
        notes.append("first round")
    warm = [speed for number, speed in prefills.items() if number > 0] or list(prefills.values())
    notes += [f"{event['anon'] / 2**20:,.0f} MiB of its own" for event in events if event.get("anon")]
    return (
        statistics.median(len(times) / sum(times) for times in counted.values()) if counted else None,
        statistics.median(warm) if warm else None,
        sum(map(len, counted.values())),
        ", ".join(notes),
    )


def run_llama(python: Path, file: Path, repack: bool, limit: int | None, task: Task, nbytes: int) -> Result:
    """llama.cpp on a GGUF file. repack: it may copy weights into the order its kernels like best."""
    forget_pages(file)
    arguments = {
        "file": str(file),
        "repack": repack,
        "prompt_tokens": task.prompt_tokens,
        "gen_tokens": task.gen_tokens,
        "runs": task.runs,
        "threads": task.threads,
    }
    outcome = run_limited([str(python), "-c", _LLAMA, json.dumps(arguments)], limit, {}, task.silence, task.most)
    decode, prefill, tokens, detail = llama_figures(outcome.stdout, task)
    trouble = outcome.trouble
    if trouble.startswith("exit") and outcome.stderr:
        trouble += f" ({outcome.stderr[-1][:200]})"
    name = f"{file.name}{', repacked' if repack else ''}"
    return Result("llama.cpp", name, limit, decode, prefill, tokens, nbytes, trouble, detail)


def qwenrun_command(pack: Path, limit: int | None, task: Task, takes_ram: bool) -> list[str]:
    """`qwenrun bench` for a pack in a limit."""
    command = [sys.executable, "-m", "qwenrun", "bench", "-m", str(pack), "--json"]
    command += ["--prompt-tokens", str(task.prompt_tokens), "--gen-tokens", str(task.gen_tokens)]
    command += ["--runs", str(task.runs)]
    if limit is not None and takes_ram:
        command += ["--ram", f"{(limit - task.margin) >> 20}MiB"]
    return command


def qwenrun_figures(text: str) -> tuple[float, float, int]:
    """(decode, prefill tokens per second, bytes per token) of `qwenrun bench --json`. Raises ValueError, KeyError."""
    data = json.loads(text)
    decode, prefill = data["decode_tokens_per_second"], data["prefill_tokens_per_second"]
    return decode["median"], prefill["median"], data["bytes_per_token"]


def run_qwenrun(pack: Path, limit: int | None, task: Task, takes_ram: bool) -> Result:
    """qwenrun on a pack."""
    forget_pages(pack)
    env = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(task.threads)}
    outcome = run_limited(qwenrun_command(pack, limit, task, takes_ram), limit, env, task.silence, task.most)
    detail = "" if takes_ram or limit is None else "bench has no --ram here"
    try:
        decode, prefill, nbytes = qwenrun_figures("\n".join(outcome.stdout))
    except (ValueError, KeyError, TypeError):
        said = next((line for line in reversed(outcome.stderr) if line.strip()), "")
        trouble = outcome.trouble or "no figures"
        return Result("qwenrun", pack.name, limit, None, None, 0, None, f"{trouble} ({said[:200]})", detail)
    tokens = task.gen_tokens * task.runs
    return Result("qwenrun", pack.name, limit, decode, prefill, tokens, nbytes, outcome.trouble, detail)


def bench_takes_ram() -> bool:
    """Whether this qwenrun's bench knows --ram."""
    command = [sys.executable, "-m", "qwenrun", "bench", "--help"]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return "--ram" in subprocess.run(command, capture_output=True, text=True, env=env).stdout


def check_peer(python: Path) -> str:
    """The version of llama-cpp-python that `python` has. Raises UsageError if it has none."""
    hint = "python3 -m venv PEER && PEER/bin/pip install llama-cpp-python, then --python PEER/bin/python"
    if shutil.which(python) is None:
        raise UsageError(f"there is no Python at {python}", hint)
    run = subprocess.run(
        [str(python), "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True
    )
    if run.returncode:
        raise UsageError(f"{python} has no llama-cpp-python", hint)
    return run.stdout.strip()


def compare(
    folder: Path, python: Path | None, limits: Sequence[int | None], task: Task, names: Sequence[str]
) -> Iterator[Result]:
    """Every engine and file in every limit, one after the other.

    Without a limit llama.cpp may repack, which is faster; with one that copy would not fit, and weights stay
    mapped. Raises UsageError for missing files.
    """
    config = ModelConfig.from_hf(bench_config(), BENCH)
    takes_ram = bench_takes_ram()
    for limit in limits:
        for name in names:
            if name in GGUF_KINDS:
                if python is not None:
                    nbytes = bytes_per_token(gguf_tensors(config, name), config)
                    for repack in (True, False) if limit is None else (False,):
                        yield run_llama(python, _there(gguf_path(folder, name)), repack, limit, task, nbytes)
            else:
                yield run_qwenrun(_there(pack_path(folder, name)), limit, task, takes_ram)


def _there(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist", f"python -m qwenrun.measure.peer make {path.parent}")
    return path


# -- the command line ----------------------------------------------------------------------------------------

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_limit(text: str) -> int | None:
    """Bytes of "1000MiB", "1.5GB"; None of "none". Raises UsageError."""
    if text.strip().lower() in ("none", "unlimited"):
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]I?B)?)\s*", text.upper())
    if not found:
        raise UsageError(f"{text!r} is no amount of memory", "--limit none,1500MiB,1000MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def shown(result: Result, peer: float | None) -> str:
    """One line for a result. peer: llama.cpp's best decode speed in the same limit."""
    limit = "unlimited" if result.limit is None else f"{result.limit / 2**20:,.0f} MiB"
    parts = [f"{result.engine:<10}{result.file:<22}{limit:>10}"]
    parts.append(f"{result.decode:8.2f} tok/s" if result.decode else "       - tok/s")
    parts.append(f"prefill {result.prefill:8.1f} tok/s" if result.prefill else "prefill        - tok/s")
    if result.decode and result.bytes_per_token:
        parts.append(f"{result.decode * result.bytes_per_token / 1e9:5.1f} GB/s")
    if result.decode and peer and result.engine != "llama.cpp":
        parts.append(f"{result.decode / peer:.2f}x")
    notes = "; ".join(filter(None, [result.trouble, result.detail]))
    return "  ".join(parts) + (f"  [{notes}]" if notes else "")


def combined(rounds: Sequence[Sequence[Result]]) -> list[Result]:
    """The medians over rounds of the same comparisons; trouble of any round is told."""

    def median(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return statistics.median(known) if known else None

    return [
        replace(
            same[0],
            decode=median([r.decode for r in same]),
            prefill=median([r.prefill for r in same]),
            tokens=sum(r.tokens for r in same),
            bytes_per_token=next((r.bytes_per_token for r in same if r.bytes_per_token), None),
            trouble=next(filter(None, (r.trouble for r in same)), ""),
        )
        for same in zip(*rounds, strict=True)
    ]


def summary(results: Sequence[Result], bandwidth: float) -> str:
    """One line of ratios out of the results without a limit: `int4` to the faster way llama.cpp runs Q4_K_M, in decode
    and prefill; its bytes per second to the read bandwidth; `nvfp4`'s bytes per second to `int4`'s. "-" where a
    side is missing."""
    free = [r for r in results if r.limit is None]

    def best(name: str, what: str) -> float | None:
        return max((v for r in free if Path(r.file).stem == name and (v := getattr(r, what))), default=None)

    def rate(name: str) -> float | None:
        return max((r.decode * (r.bytes_per_token or 0) for r in free if r.file == name and r.decode), default=None)

    def ratio(a: float | None, b: float | None) -> str:
        return f"{a / b:.2f}" if a and b else "-"

    ours, theirs, stream = "int4", "q4_k_m", rate("int4.pack")
    return (
        f"ratio decode={ratio(best(ours, 'decode'), best(theirs, 'decode'))}"
        f" prefill={ratio(best(ours, 'prefill'), best(theirs, 'prefill'))}"
        f" bandwidth_share={ratio(stream, bandwidth)} nvfp4_over_int4={ratio(rate('nvfp4.pack'), stream)}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qwenrun.measure.peer", description="qwenrun beside llama.cpp.")
    commands = parser.add_subparsers(dest="command", required=True)
    every = ",".join((*GGUF_KINDS, *RECIPES))
    maker = commands.add_parser("make", help="write the benchmark model: two packs, two GGUF files, 7.5 GB")
    runner = commands.add_parser("run", help="measure every engine in every limit")
    for command in (maker, runner):
        command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("--only", default=every, metavar="NAME,..", help=f"of {every}")
    runner.add_argument("--python", type=Path, help="a Python with llama-cpp-python; without it qwenrun alone is run")
    runner.add_argument("--limit", default="none", metavar="SIZE,..", help="memory limits, and none (default: none)")
    runner.add_argument("--margin", default=f"{MARGIN >> 20}MiB", help="of the limit, not given to qwenrun's --ram")
    runner.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, metavar="N")
    runner.add_argument("--gen-tokens", type=int, default=GEN_TOKENS, metavar="N")
    runner.add_argument("--runs", type=int, default=RUNS, metavar="N", help="counted runs, after one that is not")
    runner.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N", help="every engine in turn, N times; medians are compared"
    )
    runner.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    runner.add_argument(
        "--silence", type=float, default=SILENCE_SECONDS, metavar="S", help="end a run silent for so long"
    )
    runner.add_argument("--most", type=float, default=MOST_SECONDS, metavar="S", help="end a run after so long")
    runner.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = _parser().parse_args(arguments)

    def body() -> None:
        names = options.only.split(",")
        unknown = [name for name in names if name not in (*GGUF_KINDS, *RECIPES)]
        if unknown:
            raise UsageError(f"{unknown[0]!r} is not part of the benchmark", f"--only {','.join(GGUF_KINDS + RECIPES)}")
        if options.command == "make":
            make(options.folder, bench_config(), names)
        else:
            _run(options, names)

    return guarded(body)


def _run(options: argparse.Namespace, names: Sequence[str]) -> None:
    limits = [parse_limit(text) for text in options.limit.split(",")]
    margin = parse_limit(options.margin) or 0
    for limit in limits:
        if limit is not None and limit <= margin:
            raise UsageError(
                f"a limit of {limit:,} bytes leaves nothing after the margin of {margin:,}", "--margin 0MiB"
            )
    task = Task(
        prompt_tokens=options.prompt_tokens,
        gen_tokens=options.gen_tokens,
        runs=options.runs,
        threads=options.threads,
        silence=options.silence,
        most=options.most,
        margin=margin,
    )
    if options.python is not None:
        print(f"llama-cpp-python {check_peer(options.python)}", file=sys.stderr)
    # An end from outside must end the engine too: as an exception it does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rounds: list[list[Result]] = []
    bandwidths: list[float] = []
    for number in range(max(1, options.rounds)):
        # Measured in every round: on a shared machine the ceiling moves as much as what runs against it.
        bandwidth, how = read_bandwidth()
        bandwidths.append(bandwidth)
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {how}", file=sys.stderr)
        rounds.append([])
        for result in compare(options.folder, options.python, limits, task, names):
            rounds[-1].append(result)
            last = options.rounds <= 1 and not options.json
            print(shown(result, _peer(rounds[-1], result.limit)), file=sys.stdout if last else sys.stderr, flush=True)
        if options.rounds > 1:
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    results, bandwidth = combined(rounds), statistics.median(bandwidths)
    if options.json:
        content = [result.to_json(_peer(results, result.limit)) for result in results]
        document = {"schema": "qwenrun-peer/1", "margin_bytes": margin, "read_bandwidth": bandwidth, "results": content}
        print(json.dumps(document, indent=1))
    elif options.rounds > 1:
        for result in results:
            print(shown(result, _peer(results, result.limit)))
    if not any(result.decode for result in results):
        raise QwenrunError("no engine decoded a single token", "a larger --limit, or --silence")
    if not options.json and None in limits:
        print(summary(results, bandwidth))


def _peer(results: Sequence[Result], limit: int | None) -> float | None:
    """llama.cpp's best decode speed in a limit."""
    return max((r.decode for r in results if r.engine == "llama.cpp" and r.limit == limit and r.decode), default=None)


if __name__ == "__main__":
    sys.exit(main())
