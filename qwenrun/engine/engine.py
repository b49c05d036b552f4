"""Engine: an open model, from which sessions are made.

    with Engine.open("pack", ctx=8192) as engine:
        session = engine.session()
        for event in session.chat([{"role": "user", "content": "Hello"}]):
            ...

Opens packs and Hugging Face folders. Knows nothing of a terminal, and decides nothing about memory: `plan`
counts the buffers it lists.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch

from qwenrun.engine.defaults import Defaults, read_defaults
from qwenrun.engine.sampler import SamplingParams
from qwenrun.engine.session import Session
from qwenrun.errors import ModelError, UsageError
from qwenrun.model.bind import CheckpointSource, PackSource, bind
from qwenrun.model.config import ModelConfig
from qwenrun.model.qwen3_5 import Model
from qwenrun.plan.buffers import Buffer, Run, list_buffers, read_per_token
from qwenrun.quant.packfile.checkpoint import Checkpoint
from qwenrun.quant.packfile.layout import MANIFEST
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.recipe import Assignment, TensorInfo
from qwenrun.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
DEFAULT_CTX = 4096


class Engine:
    """A model bound to its kernels. Make it with `open`; close it, or use it as a context manager.

    path, is_pack, config, run: what was opened, and how. model: the graph. stored: how each tensor is stored.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        run: Run,
        model: Model,
        stored: list[tuple[TensorInfo, Assignment]],
        defaults: Defaults,
        pack: PackReader | None,
    ) -> None:
        self.path = path
        self.is_pack = pack is not None
        self.config = config
        self.run = run
        self.stored = stored
        self._model: Model | None = model
        self._defaults = defaults
        self._pack = pack

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
        mtp: bool = False,
    ) -> Engine:
        """Open a pack or a Hugging Face folder.

        ctx: tokens a session can hold; by default 4,096, or as many as the model has positions for.
        kv: "bf16", "int8" or "f32", the type of cached keys and values. device: "cpu" or a torch device.
        chunk: tokens a prefill step takes. snapshots: checkpoints a session keeps. mtp: also load the
        multi-token-prediction module.

        Raises ModelError (or the quant floor's errors) if it can't be read or is not a model of the family,
        UsageError for arguments that make no sense.
        """
        path = Path(path)
        target = _device(device)

        def run_for(config: ModelConfig) -> Run:
            return Run(_checked_ctx(config, ctx), kv=kv, chunk=chunk, mtp=mtp, vision=False, snapshots=snapshots)

        if (path / MANIFEST).is_file():
            pack = PackReader.open(path)
            config = ModelConfig.from_hf(pack.config, name=path.resolve().name)
            run = run_for(config)
            model, _ = bind(PackSource(pack), config, target, mtp)
            stored = [(entry.info, entry.assignment) for entry in pack.tensors.values()]
            return cls(path, config, run, model, stored, read_defaults(path, config), pack)
        if (path / "config.json").is_file():
            config = ModelConfig.from_folder(path)
            run = run_for(config)
            with Checkpoint.open(path) as checkpoint:
                model, matched = bind(CheckpointSource(checkpoint), config, target, mtp)
            stored = [(info, Assignment("keep", None)) for info in matched.tensors]
            return cls(path, config, run, model, stored, read_defaults(path, config), None)
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

    # -- memory ----------------------------------------------------------------------------------------------

    def buffers(self) -> list[Buffer]:
        """Every buffer this engine holds with its sessions (one, in `run.sequences`): weights, states, workspace."""
        return list_buffers(self.config, self.stored, self.run)

    def bytes_per_token(self) -> int:
        """Weight bytes read to decode one token."""
        return read_per_token(self.config, self.stored)

    # -- use -------------------------------------------------------------------------------------------------

    def session(self) -> Session:
        """A new, empty sequence with memory of its own."""
        return Session(self)

    def close(self) -> None:
        """Let the weights go. Sessions of this engine are of no use any more."""
        self._model = None
        if self._pack is not None:
            self._pack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", hint="--device cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here, or torch was built without it", hint="--device cpu")
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
