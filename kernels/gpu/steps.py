"""What a layer of the 122B asks of a card, op by op: a decoded token's and a prompt's. `traffic` counts the bytes of
these, `speed` times them.

Every row of a matrix comes again and again, which neither bytes nor speed depend on. Knows nothing of a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qwenrun.kernels import ref
from qwenrun.kernels.cases import SPECS, on_device
from qwenrun.kernels.ops import FACTORIES
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

HIDDEN, INNER, EXPERTS, CHOSEN = 3072, 1024, 256, 8
DENSE = {"int4-g128": "int4-g128-tiled", "nvfp4": "nvfp4-tiled", "int8-g128": "int8-g128", "bf16": "bf16"}
# Matrices of a layer by their rows and columns: into DeltaNet's heads, and out of them.
SHAPES = (("qkv", 12288, HIDDEN), ("out", HIDDEN, 8192))


@dataclass(frozen=True)
class Step:
    """An op with its arguments. minimum: bytes to be read or written however it is done; flops: of the formula's
    products."""

    name: str
    op: str
    arguments: tuple[Any, ...]
    minimum: int
    flops: int = 0

    def bound(self, backend: ModuleType, device: str = "") -> Callable[[], Any]:
        """The backend's op as the engine binds it, on its arguments, or on a copy of them on a device."""
        own, kernel = FACTORIES.get(self.op, 0), getattr(backend, self.op)
        given = [on_device(one, device) for one in self.arguments] if device else self.arguments
        return partial(kernel(*given[:own]), *given[own:]) if own else partial(kernel, *given)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in it, those of weights too."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Weight):
            yield from leaf.parts.values()
        elif isinstance(leaf, Tensor):
            yield leaf


def nbytes(*values: Any) -> int:
    """Bytes of all tensors in them."""
    return sum(t.nbytes for t in tensors(values))


def _matrix(rows: int, cols: int, spec: BlockSpec, lead: int = 0, tensor_scales: int = 1) -> Weight:
    """[rows, cols], or a stack of `lead`; at most 256 rows are drawn."""
    few = min(rows, 256)
    drawn = torch.randn(few, cols) / cols**0.5
    made = ref.encode(drawn, spec) if spec.scale else Weight.plain(drawn.bfloat16())
    parts = {}
    for name, part in made.parts.items():
        whole = part.expand(tensor_scales) if name == "tensor_scale" else part.repeat(-(-rows // few), 1)
        whole = whole if name == "tensor_scale" else whole[: rows // spec.group]
        parts[name] = whole.expand(lead, *whole.shape).contiguous() if lead else whole.contiguous()
    return Weight.from_parts(spec, rows, cols, parts)


def decode_steps(
    cut: int = 1, positions: Sequence[int] = (4096, 32768, 262144), chosen: int = CHOSEN
) -> Iterator[Step]:
    """One token's.

    cut: that many times fewer rows, heads and experts' numbers, for the interpreter is slow; with fewer, what does not
    depend on them weighs more, never less. positions: lengths of the cache. chosen: experts of a token.
    """
    for name, storage in DENSE.items():
        for part, rows, cols in SHAPES:
            x, w = torch.randn(1, cols), _matrix(rows // cut, cols, SPECS[storage])
            yield Step(f"linear {part} {name}", "linear", (x, w), nbytes(x, w) + 4 * w.rows, 2 * w.rows * cols)
    for name in ("int4-g128", "nvfp4"):
        spec, width, size = SPECS[DENSE[name]], max(HIDDEN // cut, 256), max(INNER // cut, 128)
        given: tuple[Any, ...] = (
            torch.randn(1, width) / 8,
            _matrix(2 * size, width, spec, chosen, 2),
            _matrix(width, size, spec, chosen),
            torch.arange(chosen)[None],
            torch.rand(1, chosen),
            torch.randn(1, width),
        )
        yield Step(f"experts {name}", "experts", given, nbytes(given) + 4 * width, 6 * chosen * width * size)
    for name in ("bf16", "int8"):
        for length in positions:
            q, k, v = torch.randn(1, 32, 256), torch.randn(1, 2, 256), torch.randn(1, 2, 256)
            caches = _caches(length, name)
            given = (q, k, v, *caches, torch.tensor([length - 1]), 0.0625)
            least = nbytes(given) + nbytes(caches) // length + nbytes(q)
            yield Step(f"attention {name} {length:,}", "decode_attention", given, least, 4 * 32 * 256 * length)
    heads, keys = 64 // cut, 16 // cut
    channels, values = (2 * keys + heads) * 128, heads * 128
    state, window = torch.randn(heads, 128, 128), torch.randn(3, channels)
    vectors = (torch.randn(channels, 4), window, -torch.rand(heads), torch.randn(heads), torch.randn(128), 1e-6, state)
    given = (torch.randn(1, channels), torch.randn(1, values), torch.randn(1, heads), torch.randn(1, heads), *vectors)
    yield Step("delta_net", "delta_net", given, nbytes(given) + nbytes(state, window) + 4 * values)
    for storage in ("int4-g128-tiled", "int8-g128"):
        size = max(INNER // cut, 128)
        shared = [_matrix(*shape, SPECS[storage]) for shape in ((size, HIDDEN), (size, HIDDEN), (HIDDEN, size))]
        router, gate = (_matrix(rows, HIDDEN, SPECS["bf16"]) for rows in (EXPERTS // cut, 1))
        given = (torch.randn(HIDDEN), 1e-6, router, chosen, *shared, gate, torch.randn(1, HIDDEN))
        given = (*given, torch.randn(1, HIDDEN))
        yield Step(f"moe_entry {storage}", "moe_entry", given, nbytes(given) + 12 * HIDDEN)


def _caches(length: int, name: str) -> list[Any]:
    """Keys and values [length, 2, 256]."""
    few = min(length, 4096)
    rows = torch.arange(length) % few
    drawn = [torch.randn(few, 2, 256) for _ in range(2)]
    if name == "bf16":
        return [one.bfloat16()[rows] for one in drawn]
    return [ref.encode(one, BlockSpec("int8", 256, "f16"))[rows] for one in drawn]


def prompt_steps(tokens: int, positions: Sequence[int] = (0, 32768), experts: int = EXPERTS) -> Iterator[Step]:
    """Those of `tokens` tokens at once. positions: of the first of them. experts: to choose from."""
    for name, storage in DENSE.items():
        for part, rows, cols in SHAPES:
            x, w = torch.randn(tokens, cols), _matrix(rows, cols, SPECS[storage])
            least, flops = nbytes(x, w) + 4 * rows * tokens, 2 * tokens * rows * cols
            yield Step(f"linear {part} {name} x{tokens}", "linear", (x, w), least, flops)
    for name in ("int4-g128", "nvfp4"):
        spec, index = SPECS[DENSE[name]], torch.rand(tokens, experts).topk(CHOSEN).indices
        given: tuple[Any, ...] = (
            torch.randn(tokens, HIDDEN),
            _matrix(2 * INNER, HIDDEN, spec, experts, 2),
            _matrix(HIDDEN, INNER, spec, experts),
            index,
            torch.rand(tokens, CHOSEN),
            torch.randn(tokens, HIDDEN),
        )
        least = nbytes(given) + 4 * tokens * HIDDEN
        yield Step(f"experts {name} x{tokens}", "experts", given, least, 6 * tokens * CHOSEN * HIDDEN * INNER)
    for name in ("bf16", "int8"):
        for start in positions:
            length = start + tokens
            q, caches = torch.randn(tokens, 32, 256), _caches(length, name)
            seen = tokens * start + tokens * (tokens + 1) // 2
            given = (q, *caches, 0.0625)
            yield Step(
                f"attention {name} {start:,} x{tokens}", "attention", given, nbytes(given, q), 4 * 32 * 256 * seen
            )
    channels, state = 12288, torch.zeros(64, 128, 128)
    vectors = (torch.randn(channels, 4), torch.randn(3, channels), -torch.rand(64), torch.randn(64), torch.randn(128))
    own = (torch.randn(tokens, channels), torch.randn(tokens, 8192), torch.randn(tokens, 64), torch.randn(tokens, 64))
    given = (*own, *vectors, 1e-6, state)
    least = nbytes(given, state) + 4 * 8192 * tokens
    yield Step(f"delta_net x{tokens}", "delta_net", given, least, 8 * tokens * 64 * 128 * 128)
