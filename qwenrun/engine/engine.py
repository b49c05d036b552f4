"""Engine: an open model, from which sessions are made.

    with Engine.open("pack", ctx=8192) as engine:
        session = engine.session()
        for event in session.chat([{"role": "user", "content": "Hello"}]):
            ...

Opens packs and Hugging Face folders. Knows nothing of a terminal, and decides nothing about memory: `plan` says
what lies where, and the arena is made from that.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenrun.engine.arena import Arena
from qwenrun.engine.defaults import read_defaults
from qwenrun.engine.events import ExpertUse
from qwenrun.engine.experts import Experts
from qwenrun.engine.graph import CudaRecorder, GraphDecoder
from qwenrun.engine.sampler import SamplingParams
from qwenrun.engine.session import Session
from qwenrun.engine.sources import CheckpointSource, PackSource
from qwenrun.engine.state import SequenceState
from qwenrun.errors import ModelError, UsageError
from qwenrun.model.bind import bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.inventory import match
from qwenrun.model.linear import Watch
from qwenrun.model.moe import Routed
from qwenrun.model.qwen3_5 import Model
from qwenrun.plan.buffers import Run, read_per_token
from qwenrun.plan.device import SHARE, spare_memory
from qwenrun.plan.planner import Budget, Plan, place, weigh
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.layout import MANIFEST
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.recipe import KEEP, Assignment, TensorInfo
from qwenrun.text.template import render
from qwenrun.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
DEFAULT_CTX = 4096
# Set to 0 in the environment: every token on a card is computed kernel by kernel.
GRAPHS = "QWENRUN_GRAPHS"


class Engine:
    """A model bound to its kernels. Make it with `open`; close it, or use it as a context manager.

    path, is_pack, config, run, plan: what was opened, and how. model: the graph. stored: how each tensor is stored.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        arena: Arena,
        model: Model,
        stored: list[tuple[TensorInfo, Assignment]],
        pack: PackReader | None,
        experts: Experts | None,
    ) -> None:
        self.path = path
        self.is_pack = pack is not None
        self.config = plan.config
        self.run = plan.run
        self.plan = plan
        self.stored = stored
        self._arena = arena
        self._model: Model | None = model
        self._defaults = read_defaults(path, plan.config)
        self._pack = pack
        self._experts = experts
        self._sequences = list(range(plan.run.sequences))[::-1]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        ctx: int | None = None,
        kv: str = "bf16",
        device: str = "cpu",
        chunk: int = 512,
        snapshots: int = 2,
        sequences: int = 1,
        mtp: bool = False,
        ram: int | None = None,
        vram: int | None = None,
        prefetch: bool = True,
        direct: bool | None = None,
        watch: Watch | None = None,
    ) -> Engine:
        """Open a pack or a Hugging Face folder.

        ctx: tokens a session can hold; by default 4,096, or as many as the model has positions for.
        kv: "bf16", "int8" or "f32", the type of cached keys and values. device: "cpu" or a torch device.
        chunk: tokens a prefill step takes. snapshots: checkpoints a session keeps. sequences: sessions there can
        be at one time. mtp: also load the multi-token-prediction module. ram, vram: bytes that everything must
        fit in, by default what is free now; routed experts of a pack that have no room are read from disk when
        they are needed. prefetch: try whether reading experts ahead pays.
        direct: whether reads pass the page cache by; by default where it has no room for the pack.
        watch: shown what each matrix reads (on the CPU), before it does.

        Raises DoesNotFitError if the budget is too small for anything, ModelError (or the quant floor's errors)
        if it can't be read or is not a model of the family, UsageError for arguments that make no sense.
        """
        path = Path(path)
        target = _device(device)
        budget = _budget(target, ram, vram)

        def run_for(config: ModelConfig) -> Run:
            held = _checked_ctx(config, ctx)
            return Run(held, kv=kv, chunk=chunk, mtp=mtp, vision=False, snapshots=snapshots, sequences=sequences)

        if (path / MANIFEST).is_file():
            pack = PackReader.open(path)
            config = ModelConfig.from_hf(pack.config, name=path.resolve().name)
            found = {name: (entry.info.shape, entry.info.dtype) for name, entry in pack.tensors.items()}
            match(config, found, str(path))
            stored = pack.manifest.stored
            run = run_for(config)
            plan = place(config, weigh(config, stored, run), run, budget)
            _cap(target, plan)
            arena = Arena.from_plan(plan, target)
            experts = Experts(pack, plan, arena, direct) if plan.pools else None
            try:
                model = bind(PackSource(pack, arena, experts.of if experts else _no_experts), config, mtp, watch)
            except BaseException:
                if experts:
                    experts.close()
                raise
            if experts:
                if experts.direct:
                    pack.forget_pages()
                if prefetch:
                    experts.look_ahead(model)
            return cls(path, plan, arena, model, stored, pack, experts)
        if (path / "config.json").is_file():
            config = ModelConfig.from_folder(path)
            with Checkpoint.open(path) as checkpoint:
                matched = match(config, checkpoint.tensors, str(path))
                stored = [(info, Assignment(KEEP, None)) for info in matched.tensors]
                run = run_for(config)
                plan = place(config, weigh(config, stored, run, packed=False), run, budget)
                _cap(target, plan)
                arena = Arena.from_plan(plan, target)
                model = bind(CheckpointSource(checkpoint, arena), config, mtp, watch)
            return cls(path, plan, arena, model, stored, None, None)
        raise _no_model(path)

    # -- what was opened -------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        if self._model is None:
            raise UsageError(f"{self.path} was closed")
        return self._model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights, loaded when it is first asked for. Raises ModelError if there is none."""
        if not (self.path / TOKENIZER).is_file():
            raise ModelError(
                f"{self.path} has no {TOKENIZER}, so it can't read or write text",
                hint=f"copy {TOKENIZER} of the model there",
            )
        return Tokenizer.load(self.path)

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / TOKENIZER).is_file()

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        think: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation as the chat template has it. prompt: with the beginning of an answer at its end."""
        parts = render(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            enable_thinking=think,
            thinking_default=self.thinking_default,
            json_scalars=self.json_scalars,
        )
        return self.tokenizer.encode_parts(parts)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token the config, the generation config or the tokenizer names as an end."""
        return self._defaults.eos_ids | (frozenset(self.tokenizer.eos_ids) if self.has_tokenizer else frozenset())

    @cached_property
    def vocab_size(self) -> int:
        """Tokens that exist; rows of the logits from here on are padding."""
        return min(self.tokenizer.vocab_size if self.has_tokenizer else self.config.vocab_size, self.config.vocab_size)

    @property
    def thinking_default(self) -> bool:
        """Whether the model thinks before it answers if nobody says otherwise."""
        return self._defaults.thinking

    @property
    def defaults(self) -> SamplingParams:
        """`sampling` for an answer as this model gives it by default."""
        return self.sampling()

    @property
    def json_scalars(self) -> bool:
        """Whether the model's template writes numbers and booleans of tool arguments as JSON (Qwen3.6 does)."""
        return self._defaults.json_scalars

    def sampling(self, think: bool | None = None) -> SamplingParams:
        """The checkpoint's own sampling parameters; if it has none, what its authors recommend for an answer
        with or without thinking (by default `thinking_default`)."""
        return self._defaults.params(think)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._arena.device

    # -- memory ----------------------------------------------------------------------------------------------

    def bytes_per_token(self) -> int:
        """Weight bytes read to decode one token."""
        return read_per_token(self.config, self.stored)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the arena: every buffer of the plan but the workspace and the runtime's own memory."""
        return self._arena.nbytes

    def expert_stats(self) -> ExpertUse:
        """Counts of the expert cache since the engine was opened; all zero if there is none."""
        return self._experts.stats() if self._experts else ExpertUse()

    def disk_reads(self) -> tuple[int, float]:
        """Bytes of experts read from disk since the engine was opened, and seconds in which any read was under way."""
        return self._experts.disk_reads() if self._experts else (0, 0.0)

    def record_routes(self, sink: Callable[[str, np.ndarray], None] | None) -> None:
        """Call `sink(layer, chosen experts [T, k])` at every use of a layer's routed experts; None ends it."""
        if self._experts:
            self._experts.record(sink)

    # -- use -------------------------------------------------------------------------------------------------

    def decoder(self, state: SequenceState) -> Callable[[int], Tensor] | None:
        """What feeds one token to `state` faster than `Model.forward` does, if there is such a thing: on a card the
        graphs of `graph`, unless QWENRUN_GRAPHS is 0."""
        if state.device.type != "cuda" or os.environ.get(GRAPHS) == "0":
            return None
        return GraphDecoder(self.model, state, CudaRecorder(state.device))

    def session(self) -> Session:
        """A new, empty sequence. Its memory is given back when nobody holds it any more.

        Raises UsageError if there are as many as the engine was planned for.
        """
        if not self._sequences:
            raise UsageError(
                f"all {self.run.sequences} sequences this engine was planned for are in use",
                f"close one, or Engine.open(..., sequences={self.run.sequences + 1})",
            )
        number = self._sequences.pop()
        state = SequenceState(self.config, self.run, self._arena.sequence(number))
        session = Session(self, state)
        weakref.finalize(session, self._sequences.append, number)
        return session

    def close(self) -> None:
        """Let the weights go. Sessions of this engine are of no use any more."""
        self._model = None
        if self._experts is not None:
            self._experts.close()
        if self._pack is not None:
            self._pack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _budget(device: torch.device, ram: int | None, vram: int | None) -> Budget:
    """What was asked for, else what is free now."""
    ram = spare_memory() if ram is None else ram
    if device.type != "cuda":
        if vram is not None:
            raise UsageError("--vram has no meaning without a GPU", "--ram SIZE")
        return Budget(device=ram)
    free_vram, _ = torch.cuda.mem_get_info(device)
    return Budget(device=int(free_vram * SHARE) if vram is None else min(vram, free_vram), host=ram, gpu=True)


def _cap(device: torch.device, plan: Plan) -> None:
    """Have torch refuse what would go beyond the budget on a card, also for a moment, rather than take it from others.

    The driver's own memory, which is in the plan, is not torch's to count.
    """
    if device.type == "cuda":
        assert plan.budget.device is not None
        room = plan.budget.device - plan.parts()["runtime"] + torch.cuda.memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)


def _no_experts(prefix: str) -> Routed:
    raise ModelError(f"{prefix}: a dense model has no routed experts")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", hint="--device cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here, or torch was built without it", hint="--device cpu")
    if device.type == "cuda" and device.index is None:
        # Some of torch's functions want to know which.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked_ctx(config: ModelConfig, ctx: int | None) -> int:
    limit = config.positions
    if ctx is None:
        return min(DEFAULT_CTX, limit)
    if ctx > limit:
        raise UsageError(
            f"a context of {ctx:,} tokens is more than the {limit:,} positions of this model",
            hint=f"--ctx {limit}, or set YaRN with factor {config.yarn_factor(ctx)} in rope_parameters of config.json",
        )
    return ctx


def _no_model(path: Path) -> ModelError:
    if not path.exists():
        return ModelError(f"{path} does not exist", hint="give the folder of a pack or of a Hugging Face checkpoint")
    what = "is a file" if path.is_file() else f"has neither {MANIFEST} nor config.json"
    return ModelError(
        f"{path} is no model: it {what}",
        hint="give the folder of a pack (qwenrun quantize SRC -o PACK) or of a Hugging Face checkpoint",
    )
