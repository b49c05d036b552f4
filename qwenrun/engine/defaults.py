"""What a checkpoint asks for when nobody says otherwise: end tokens, sampling, and whether it thinks.

The checkpoint's own files win: generation_config.json, then chat_template.jinja. Where they are silent, the
family's published recommendations do (the "Best Practices" of the Qwen3.5 model cards). Opens no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenrun.engine.sampler import SamplingParams
from qwenrun.errors import ModelError
from qwenrun.model.config import ModelConfig, read_json

THINKING = SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
NOT_THINKING = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
# Dense models up to this width (0.8B, 2B) answer without thinking unless told to.
SMALL_HIDDEN_SIZE = 2048
_SAMPLING_KEYS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
# How the two forms of the template differ: which value of enable_thinking has to be given to be noticed.
_TEMPLATE_TEST = re.compile(r"\benable_thinking\s+is\s+(true|false)\b")


@dataclass(frozen=True)
class Defaults:
    """eos_ids: those of config.json and generation_config.json. sampling: None if the checkpoint names none.
    json_scalars: whether its template writes tool arguments as JSON throughout, as Qwen3.6 does."""

    eos_ids: frozenset[int]
    thinking: bool
    sampling: SamplingParams | None
    json_scalars: bool = False

    def params(self, think: bool | None = None) -> SamplingParams:
        """Sampling for an answer with or without thinking (by default as the checkpoint does)."""
        think = self.thinking if think is None else think
        return self.sampling or (THINKING if think else NOT_THINKING)


def read_defaults(folder: Path, config: ModelConfig) -> Defaults:
    """Read `folder`'s files. Raises ModelError if generation_config.json is there and not valid."""
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object", hint="download the file again")
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8", errors="replace") if template.is_file() else ""
    try:
        return Defaults(
            eos_ids=frozenset(config.eos_ids) | _token_ids(data.get("eos_token_id")),
            thinking=_thinking(text, data, config),
            sampling=_sampling(data),
            # The variable came with 3.6's template, whose other change is how it writes arguments.
            json_scalars="preserve_thinking" in text,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}", hint="download the file again") from error


def _token_ids(value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id {value!r} is not a token id or a list of them")
    return frozenset(ids)


def _sampling(data: dict[str, Any]) -> SamplingParams | None:
    """What the file names; what it does not name is off, as it is for other engines that read it."""
    given = {key: data[key] for key in _SAMPLING_KEYS if data.get(key) is not None}
    if not given:
        return None
    do_sample = given.pop("do_sample", True)
    for key, value in given.items():
        if type(value) not in (int, float):
            raise TypeError(f"{key} {value!r} is not a number")
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    params = SamplingParams(**given)
    return params if do_sample else replace(params, temperature=0.0)


def _thinking(template: str, data: dict[str, Any], config: ModelConfig) -> bool:
    if isinstance(data.get("thinking_default"), bool):
        return data["thinking_default"]
    if tests := _TEMPLATE_TEST.findall(template):
        return tests[-1] == "false"
    return config.is_moe or config.hidden_size > SMALL_HIDDEN_SIZE
