"""qwenrun: run Qwen3.5-122B-A10B and its family on one machine, inside a memory budget.

    from qwenrun import Engine
    with Engine.open("pack", ctx=4096) as engine:
        session = engine.session()
        logits = session.prefill(engine.tokenizer.encode("Hello"))

Importing this package imports no torch; naming `Engine` or `SamplingParams` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenrun.engine.engine import Engine
    from qwenrun.engine.sampler import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from qwenrun.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from qwenrun.engine.sampler import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'qwenrun' has no attribute {name!r}")
