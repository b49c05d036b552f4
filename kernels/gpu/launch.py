"""What starts the Triton kernels: grids, block sizes and memory, from torch tensors.

Imported at the first call only: Triton takes long to import, and most machines that run this have no use for it.
Under Triton's interpreter (TRITON_INTERPRET=1) products are made of float32, whose arithmetic it has right, on a card
of bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

# Products and sums may become one instruction: what Triton does unasked until 3.10, and warns of.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from torch import Tensor

from qwenrun.kernels import ref
from qwenrun.kernels.gpu import attend, choice, chunk, delta, fp4, matmul, moe, norms, rotary, rounded, tiles
from qwenrun.kernels.spec import BlockSpec
from qwenrun.kernels.weight import Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPERAND = torch.float32 if INTERPRETED else torch.bfloat16
OPERAND_TYPE = tl.float32 if INTERPRETED else tl.bfloat16

KINDS = {"int4": 0, "int8": 1, "e2m1": 2}
SCALES = {"f16": 0, "e4m3": 1, "e8m0": 2}
# Products of bytes by the card's own instruction, which the interpreter has not.
ASSEMBLY = not INTERPRETED
# A program of a product with one row has so many rows of the matrix, or a tile, and so many words of each at a time.
ROWS, STEPS, WARPS = 16, 64, 8
DOWN_ROWS, DOWN_WARPS = 8, 4
NORM_WARPS = 8
# Programs that fill a card, and the fewest words of a row that are a program's share.
FULL, LEAST_SHARE = 512, 128
PLAIN_ROWS, PLAIN_COLS = 4, 1024
# Interpreted, programs are slow, however much each does.
INTERPRETED_ROWS = 16
# Bytes that a thread reads at once.
PLAIN_RUN = 16
# Pairs of a token and an expert that are read pair by pair: of more, experts are read for all their tokens at once.
# Interpreted, each is slow.
FEW_PAIRS = 8 if INTERPRETED else 32


def _parts(w: Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes as words, scales as bits, zero points, tensor scales; for what there is none of, the codes."""
    assert w.scales is not None
    codes = w.codes.view(torch.int32)
    scales = w.scales.view(torch.uint16) if w.scales.dtype == torch.float16 else w.scales
    zeros = codes if w.zeros is None else w.zeros
    return codes, scales, zeros, codes if w.tensor_scale is None else w.tensor_scale


def format_of(spec: BlockSpec, tensor_scales: int) -> dict[str, int | bool]:
    """What the kernels of tiled matrices are told of them."""
    return {
        "KIND": KINDS[spec.codes],
        "SCALE": SCALES[spec.scale],
        "ZERO": spec.zero,
        "TENSOR": tensor_scales,
        "BLOCK": spec.block,
    }


def _format(w: Weight) -> dict[str, int | bool]:
    return format_of(w.spec, 0 if w.tensor_scale is None else w.tensor_scale.shape[-1])


def down_steps(spec: BlockSpec) -> int:
    """Words at a time of a program of `moe.down_tiled`: with zero points fewer, or it spills for sm_100."""
    return 64 if spec.zero else 128


def _steps(parts: tuple[Tensor, ...]) -> list[int]:
    """How far apart the matrices of a stack lie, in each of its parts."""
    return [part.stride(0) for part in parts]


@dataclass(frozen=True)
class Rounded:
    """Rows as `rounded` gives them: codes int32 [T, K / 2], steps f32 [T, K / 16]."""

    codes: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, tokens: int, cols: int, device: torch.device) -> Rounded:
        codes = torch.empty(tokens, cols // 2, dtype=torch.int32, device=device)
        return cls(codes, torch.empty(tokens, cols // 16, dtype=torch.float32, device=device))

    @property
    def written(self) -> tuple[Tensor, Tensor]:
        """As kernels that make it are given it."""
        return self.codes.view(torch.int8), self.steps

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """As kernels that read it are given it."""
        return self.codes, self.steps


# Blocks of 16 columns that a program rounds.
ROUNDED_BLOCKS = 16


def round_rows(x: Tensor, kind: int) -> Rounded:
    """x [T, K], rounded for codes of that kind."""
    rows, (tokens, cols) = x.float().contiguous(), x.shape
    made = Rounded.empty(tokens, cols, x.device)
    grid = (tokens, -(-cols // (16 * ROUNDED_BLOCKS)))
    rounded.round_rows[grid](rows, *made.written, cols, kind, ROUNDED_BLOCKS)
    return made


def operands(x: Tensor) -> Tensor:
    """x [T, K] of the type that tensor cores are given, with zeros up to a multiple of 128 columns."""
    rows, missing = x.to(OPERAND), -x.shape[1] % 128
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


# Set to 1 in the environment: prompts' rows for NVFP4 matrices are rounded to NVFP4, for the cores that have it.
FP4 = os.environ.get("QWENRUN_FP4") == "1"


@dataclass(frozen=True)
class Fp4Rows:
    """Rows as `fp4.encode_rows` makes them."""

    codes: Tensor
    scales: Tensor
    row_scales: Tensor


def rows_for(x: Tensor, w: Weight, each: int) -> Tensor | Fp4Rows:
    """x f32 [T, K] as products of `each` of its rows with a matrix of w read it."""
    if not takes_fp4(w, each):
        return operands(x)
    rows, (tokens, cols) = x.float().contiguous(), x.shape
    codes = torch.empty(tokens, cols // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, cols // 16, dtype=torch.uint8, device=x.device)
    row_scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    fp4.encode_rows[(tokens,)](rows, codes, scales, row_scales, cols, 1024)
    return Fp4Rows(codes, scales, row_scales)


def takes_fp4(w: Weight, rows: int) -> bool:
    """Whether products of `rows` rows with w are made of 4 bits on both sides."""
    there = INTERPRETED or _capability(w.codes.device) >= tiles.FP4_TARGETS[0]
    stored = w.spec.tile and w.spec.scale == "e4m3" and w.spec.block == 16
    return FP4 and there and stored and rows >= tiles.FP4_ROWS


def _width(cols: int) -> int:
    """Columns of a row of `operands`."""
    return -(-cols // 128) * 128


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is asked of a card inside is done beside what is asked of it behind, until `join`; all of it after what was
    asked before. So memory that one side gives back is not taken by the other before it is done with."""
    if device.type != "cuda":
        yield
        return
    _side(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_side(device)):
        yield


def join(device: torch.device) -> None:
    """What is asked from here on comes after what was asked `aside`."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side(device))


def linears(row: Row, weights: Sequence[Weight]) -> list[Tensor]:
    """Products of one row, the first beside the others."""
    first, *others = weights
    if first.spec.tile:
        row.rounded(KINDS[first.spec.codes])
    device = first.codes.device
    with aside(device):
        made = [row_product(row, w) for w in others]
    out = row_product(row, first)
    join(device)
    return [out, *made]


def moe_entry(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, router: Weight, k: int, shared: tuple[Weight, Weight, Weight],
    shared_gate: Weight,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `qwenrun.kernels.ops.moe_entry`, of one row: the shared expert beside the router."""
    stream, row = add_norm(x, y, norm, eps, kind_of(shared[:1]))
    with aside(x.device):
        base = row_swiglu(row, *shared, (stream, row_product(row, shared_gate)))
    index, weight = choose(row_product(row, router), k)
    join(x.device)
    return stream, row.plain, index, weight, base


class Row:
    """One row of activations f32 [1, K]; and as products with tiled matrices read it, rounded once for all of them."""

    def __init__(self, plain: Tensor | None, rounded: Rounded | None = None, kind: int = -1) -> None:
        """plain: None, if it will not be asked for. rounded: for codes of the kind, if there is that already."""
        self._plain = plain
        self._rounded = {} if rounded is None else {kind: rounded}

    @property
    def plain(self) -> Tensor:
        assert self._plain is not None
        return self._plain

    def rounded(self, kind: int) -> tuple[Tensor, Tensor]:
        if kind not in self._rounded:
            self._rounded[kind] = round_rows(self.plain, kind)
        return self._rounded[kind].read


def row(x: Tensor) -> Row:
    """x [1, K]."""
    return Row(x.float().contiguous())


def kind_of(weights: Sequence[Weight]) -> int:
    """The kind of codes that the first tiled matrix among them has; -1 if none is."""
    return next((KINDS[w.spec.codes] for w in weights if w.spec.tile), -1)


def product(x: Tensor, w: Weight) -> Tensor:
    """x f32 [T, K] times w -> f32 [T, N]."""
    tokens = x.shape[0]
    if tokens == 1:
        return row_product(row(x), w)
    if w.spec.tile:
        return _many_rows(x, w)
    out = torch.empty(tokens, w.rows, dtype=torch.float32, device=x.device)
    scales, scaled, block, _ = _plain(w)
    tile = tiles.choose(tokens, w.spec, _capability(x.device))
    grid = (-(-tokens // tile.rows), -(-w.rows // tile.cols))
    matmul.gemm_plain[grid](
        x.to(OPERAND).contiguous(), w.codes, scales, out, tokens, w.rows, w.cols, block, scaled,
        tile.rows, tile.cols, plain_columns(w.spec.block), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def exact_product(x: Tensor, w: Weight) -> Tensor:
    """`product` with a matrix of bfloat16 numbers, each x as the sum of two of them, which errs by 2^-17 of it: for
    what decides, where a near tie must not be turned. Tensor cores round x to one, by 2^-9. With float32 torch's."""
    if x.shape[0] == 1 or INTERPRETED or w.codes.dtype not in (torch.bfloat16, torch.float32):
        return product(x, w)
    if w.codes.dtype == torch.float32:
        return torch.nn.functional.linear(x, w.codes)
    high = x.to(OPERAND).float()
    return product(high, w) + product(x - high, w)


def plain_columns(block: int) -> int:
    """Columns that a step of `matmul.gemm_plain` has, of rows with scales for `block` columns (0: with none)."""
    return min(128, block) if block else 64


def _plain(w: Weight) -> tuple[Tensor, bool, int, int]:
    """Of a matrix or stack whose rows lie side by side: scales (for what has none, the codes), whether there are any,
    columns that have one, and columns that a thread reads at once."""
    scales = w.codes if w.scales is None else w.scales.view(torch.uint16)
    return scales, w.scales is not None, w.spec.block or w.cols, PLAIN_RUN // w.codes.element_size()


def plain_shape(rows: int, scaled: bool) -> tuple[int, int]:
    """Rows and warps that a program of `matmul.gemv_plain` has: of few rows one, or a card mostly waits."""
    few = INTERPRETED_ROWS if INTERPRETED else 1
    return PLAIN_ROWS if rows >= 1024 else few, 8 if scaled else 4


def row_product(x: Row, w: Weight, onto: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A row times w -> f32 [1, N]. onto (base f32 [1, N], gate f32 [1, 1]): base + sigmoid(gate) times that."""
    device = w.codes.device
    out = torch.empty(1, w.rows, dtype=torch.float32, device=device)
    if w.spec.tile:
        words, blocks = w.cols // 8, -(-w.rows // ROWS)
        # As many shares as it takes to fill a card, of whole steps; what they leave is read and written again.
        shares = min(-(-FULL // blocks), -(-words // LEAST_SHARE))
        share = -(-words // shares // STEPS) * STEPS
        shares = -(-words // share)
        parts = out if shares == 1 and onto is None else out.new_empty(shares, w.rows)
        matmul.gemv_tiled[(blocks, shares)](
            *x.rounded(KINDS[w.spec.codes]), *_parts(w), parts, w.rows, w.cols, share, **_format(w), ASSEMBLY=ASSEMBLY,
            STEPS=STEPS, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    else:
        shares, (scales, scaled, block, run) = 1, _plain(w)
        parts = out if onto is None else torch.empty_like(out)
        given = (x.plain, w.codes, scales, parts, w.rows, w.cols, block, scaled)
        rows, warps = plain_shape(w.rows, scaled)
        matmul.gemv_plain[(-(-w.rows // rows),)](*given, rows, PLAIN_COLS, run, num_warps=warps)
    if parts is not out:
        base, gate = (parts, parts) if onto is None else onto
        grid = (-(-w.rows // 256),)
        matmul.add_shares[grid](parts, base, gate, out, w.rows, shares, onto is not None, 256)
    return out


def add_norm(x: Tensor, y: Tensor | None, w: Tensor, eps: float, kind: int) -> tuple[Tensor, Row]:
    """(x + y, its zero-centred norm) of rows f32 [1, H]; without y x itself is normed. kind: of the codes that the row
    is for, -1 without any."""
    rows, size = x.float().contiguous(), x.shape[1]
    stream = rows if y is None else torch.empty_like(rows)
    normed, made = torch.empty_like(rows), None if kind < 0 else Rounded.empty(1, size, x.device)
    given = (rows, rows if y is None else y.float().contiguous(), w.float(), stream, normed)
    written = (normed, normed) if made is None else made.written
    whole = max(16, power_of_two(size))
    norms.add_norm[(1,)](*given, *written, eps, size, y is not None, kind, whole, num_warps=NORM_WARPS)
    return stream, Row(normed, made, kind)


def row_swiglu(x: Row, gate: Weight, up: Weight, down: Weight, onto: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """down(silu(gate x) * up x) of a row, onto as `row_product` has it."""
    device, inner, kind = gate.codes.device, gate.rows, kind_of([down])
    if gate.spec.tile and gate.spec == up.spec and gate.codes.shape == up.codes.shape and _format(gate) == _format(up):
        plain = torch.empty(1, inner, dtype=torch.float32, device=device) if kind < 0 else None
        made = None if kind < 0 else Rounded.empty(1, inner, device)
        written = (plain, plain) if made is None else made.written
        moe.swiglu_tiled[(inner // 16,)](
            *x.rounded(KINDS[gate.spec.codes]), *_parts(gate), *_parts(up), *written, gate.cols, inner, **_format(gate),
            ASSEMBLY=ASSEMBLY, STEPS=STEPS, FOR=kind, num_warps=WARPS,
        )  # fmt: skip
        return row_product(Row(plain, made, kind), down, onto)
    both = torch.cat([row_product(x, gate), row_product(x, up)], 1)
    middle = torch.empty(1, inner, dtype=torch.float32, device=device)
    moe.silu_times[(1, -(-inner // 256))](both, middle, inner, inner, 256)
    return row_product(Row(middle), down, onto)


def _many_rows(x: Tensor, w: Weight) -> Tensor:
    tokens = x.shape[0]
    out = torch.empty(tokens, w.rows, dtype=torch.float32, device=x.device)
    every = torch.arange(tokens, device=x.device)
    tile = tiles.FP4_TILE if takes_fp4(w, tokens) else tiles.choose(tokens, w.spec, _capability(x.device))
    first = torch.arange(0, tokens, tile.rows, device=x.device)
    last = (first + tile.rows).clamp(max=tokens)
    _grouped(rows_for(x, w, tokens), w, out, every, every, torch.zeros_like(first), first, last, [0, 0, 0, 0], tile)
    return out


@cache
def _capability(device: torch.device) -> int:
    """Of a card 10 times its compute capability, 80 under the interpreter."""
    if device.type != "cuda":
        return tiles.TARGETS[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _grouped(
    x: Tensor | Fp4Rows, w: Weight, out: Tensor, sources: Tensor, order: Tensor, matrix: Tensor, first: Tensor,
    last: Tensor, steps: list[int], tile: tiles.Tile,
) -> None:  # fmt: skip
    grid = (first.shape[0], -(-w.rows // tile.cols))
    if isinstance(x, Fp4Rows):
        codes, scales, _, tensor_scales = _parts(w)
        fp4.gemm_fp4[grid](
            x.codes, x.scales, x.row_scales, codes, scales, tensor_scales, out, sources, order, matrix, first, last,
            w.rows, w.cols, steps[0], steps[1], steps[3], _format(w)["TENSOR"], tile.rows, tile.cols,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return
    table = (sources, order, matrix, first, last, w.rows, w.cols, x.shape[1], *steps)
    matmul.gemm_tiled[grid](
        x, *_parts(w), out, *table, **_format(w), ASSEMBLY=ASSEMBLY, BM=tile.rows, BN=tile.cols, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def experts(
    x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor, base: Tensor | None, distinct: int
) -> Tensor:
    """See `qwenrun.kernels.ops.experts`; both stacks are tiled."""
    given = (x, gate_up, down, index.contiguous(), weight.contiguous(), base)
    return _few_tokens(*given) if index.numel() <= FEW_PAIRS else _many_tokens(*given, distinct)


def _few_tokens(x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    (tokens, k), hidden, inner = index.shape, down.rows, down.cols
    middle, kind = Rounded.empty(tokens * k, inner, x.device), KINDS[down.spec.codes]
    first, second = _parts(gate_up), _parts(down)
    moe.gate_up_tiled[(tokens * k, inner // 16)](
        *round_rows(x, KINDS[gate_up.spec.codes]).read, index, *first, *middle.written, hidden, inner, k,
        *_steps(first), **_format(gate_up), ASSEMBLY=ASSEMBLY, STEPS=STEPS, FOR=kind, num_warps=WARPS,
    )  # fmt: skip
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    moe.down_tiled[(tokens, -(-hidden // DOWN_ROWS))](
        *middle.read, index, weight, *second, out if base is None else base.contiguous(), out, hidden, inner,
        *_steps(second), k, base is not None, **_format(down), ASSEMBLY=ASSEMBLY, STEPS=down_steps(down.spec),
        ROWS=DOWN_ROWS, num_warps=DOWN_WARPS,
    )  # fmt: skip
    return out


def few_plain(x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    """`experts` of a few tokens, of stacks whose rows lie side by side."""
    (tokens, k), hidden, inner = index.shape, down.rows, down.cols
    flat = index.contiguous()
    both = _pairs(x.float().contiguous(), flat, gate_up, k)
    middle = torch.empty(tokens * k, inner, dtype=torch.float32, device=x.device)
    moe.silu_times[(tokens * k, -(-inner // 256))](both, middle, inner, inner, 256)
    return _weighted_sum(_pairs(middle, flat, down, 1), weight.contiguous(), base, hidden)


def _pairs(x: Tensor, index: Tensor, w: Weight, shared: int) -> Tensor:
    out = torch.empty(index.numel(), w.rows, dtype=torch.float32, device=x.device)
    scales, scaled, block, run = _plain(w)
    rows, warps = plain_shape(w.rows, scaled)
    matmul.gemv_plain_pairs[(-(-w.rows // rows), index.numel())](
        x, index, w.codes, scales, out, w.rows, w.cols, shared, w.codes.stride(0), scales.stride(0),
        block, scaled, rows, PLAIN_COLS, run, num_warps=warps,
    )  # fmt: skip
    return out


def _weighted_sum(rows: Tensor, weight: Tensor, base: Tensor | None, hidden: int) -> Tensor:
    tokens, k = weight.shape
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=rows.device)
    given = out if base is None else base.contiguous()
    moe.weighted_sum[(tokens, -(-hidden // 256))](rows, weight, given, out, hidden, k, base is not None, 256)
    return out


def _many_tokens(
    x: Tensor, gate_up: Weight, down: Weight, index: Tensor, weight: Tensor, base: Tensor | None, distinct: int
) -> Tensor:
    (tokens, k), hidden, inner = index.shape, down.rows, down.cols
    pairs, count, device = tokens * k, gate_up.codes.shape[0], x.device
    flat = index.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.zeros(count, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    # Both products have the same blocks of rows; of slots that nobody chose there are none.
    chosen = min(distinct or count, pairs)
    each = -(-pairs // chosen)
    tile = tiles.choose_all(each, (gate_up.spec, down.spec), _capability(device))
    if takes_fp4(gate_up, each) or takes_fp4(down, each):
        tile = tiles.FP4_TILE
    blocks = (sizes + tile.rows - 1) // tile.rows
    ends = blocks.cumsum(0)
    # As many as there can be at worst, so that nobody has to ask the card how many there are.
    number = torch.arange(chosen + pairs // tile.rows, device=device)
    matrix = torch.searchsorted(ends, number, right=True).clamp(max=count - 1)
    starts = sizes.cumsum(0) - sizes
    first = starts[matrix] + (number - (ends - blocks)[matrix]) * tile.rows
    last = torch.minimum(first + tile.rows, starts[matrix] + sizes[matrix])
    every = torch.arange(pairs, device=device)
    both = torch.empty(pairs, 2 * inner, dtype=torch.float32, device=device)
    table = (order, matrix, first, last)
    _grouped(rows_for(x, gate_up, each), gate_up, both, every // k, *table, _steps(_parts(gate_up)), tile)
    plain = takes_fp4(down, each)
    width = inner if plain else _width(inner)
    made = torch.empty(pairs, width, dtype=torch.float32 if plain else OPERAND, device=device)
    moe.silu_times[(pairs, -(-width // 256))](both, made, inner, width, 256)
    middle = rows_for(made, down, each) if plain else made
    rows = torch.empty(pairs, hidden, dtype=torch.float32, device=device)
    _grouped(middle, down, rows, every, *table, _steps(_parts(down)), tile)
    return _weighted_sum(rows, weight, base, hidden)


def rms_norm(x: Tensor, w: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """See `qwenrun.kernels.ops.rms_norm`."""
    rows, size = x.float().contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    shift = 1.0 if zero_centred else 0.0
    norms.rms_norm[(rows.numel() // size,)](rows, w.float(), rows, out, shift, eps, size, False, 1024)
    return out


def gated_rms_norm(o: Tensor, w: Tensor, z: Tensor, eps: float) -> Tensor:
    """See `qwenrun.kernels.ops.gated_rms_norm`."""
    rows, gate, size = o.float().contiguous(), z.float().contiguous(), o.shape[-1]
    out = torch.empty(o.shape, dtype=torch.float32, device=o.device)
    norms.rms_norm[(rows.numel() // size,)](rows, w.float(), gate, out, 0.0, eps, size, True, 256)
    return out


# Positions of a split, at least, and programs at most: of a prompt, and of one token, whose splits' results would
# otherwise be as many bytes as a short cache.
SPLIT, PROGRAMS = 256, 256
STEP_SPLIT, STEP_PROGRAMS = 64, 128
# Splits' results that are read at a time, and values of a head that a program joins.
JOIN_BLOCK, JOIN_SLICE = 16, 64
HEAD_SIZES = (32, 64, 128, 256)
VALUES, STEP_VALUES = 16, 32


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, scale: float
) -> Tensor:
    """q [T, Hq, D] over contiguous k, v [S, Hkv, D]; int8 ones with their float16 scales [S, Hkv]."""
    return _attend(q, k, v, (k_scales, v_scales), scale, None)


def decode_attention(
    q: Tensor, rows: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None],
    place: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `qwenrun.kernels.ops.decode_attention`; caches as `attention` takes them."""
    groups, size = rows[0].shape[1:]
    k, v = (x.float().contiguous() for x in rows)
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}[caches[0].dtype]
    codes = [c.view(torch.uint16) if kind == 1 else c for c in caches]
    bits = [k if s is None else s.view(torch.uint16) for s in scales]
    attend.store_row[(groups, 2)](k, v, *codes, *bits, place, groups, size, kind)
    return _attend(q, *caches, scales, scale, place)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, stored: tuple[Tensor | None, Tensor | None], scale: float, place: Tensor | None
) -> Tensor:
    """place: where q's one token stands, if the host doesn't know it; then k and v are the whole cache."""
    (tokens, heads, size), (length, groups) = q.shape, k.shape[:2]
    shared, rows = heads // groups, tokens * heads
    tile = tiles.attention(tokens * shared, length, stored[0] is not None, _capability(q.device))
    blocks = -(-tokens * shared // tile.rows)
    least = 0 if place is None else STEP_SPLIT
    programs = STEP_PROGRAMS if least else PROGRAMS
    splits = max(1, min(-(-length // (least or SPLIT)), programs // (blocks * groups)))
    parts = torch.empty(splits, rows, 2, dtype=torch.float32, device=q.device)
    mixed = torch.empty(splits, rows, size, dtype=torch.float32, device=q.device)
    given = q.to(OPERAND).contiguous()
    scales = [parts if s is None else s.view(torch.uint16) for s in stored]
    at = parts if place is None else place
    attend.attend_part[(blocks, groups, splits)](
        given, k, v, *scales, parts, mixed, at, scale, tokens, length, -(-length // splits), groups, shared,
        stored[0] is not None, least, size, OPERAND_TYPE, tile.rows, tile.cols, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    out = torch.empty(tokens, heads, size, dtype=torch.float32, device=q.device)
    # Of one token a head is joined by several programs, or most of a card waits.
    most, slice_ = power_of_two(splits), min(size, JOIN_SLICE) if least else size
    sizes = (least, most, size, slice_, min(most, JOIN_BLOCK))
    attend.join_parts[(rows, size // slice_)](parts, mixed, out, at, rows, splits, *sizes)
    return out


@cache
def _turns(
    theta: float, rotary_dim: int, section: tuple[int, ...] | None, yarn: tuple[float, int] | None, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Frequencies f32 and axes i32 of each slot on the device, and the gain."""
    frequencies, axes, gain = ref.rope_slots(theta, rotary_dim, section, yarn)
    return frequencies.to(device), axes.int().to(device), gain


def rope_tables(
    positions: Tensor, theta: float, rotary_dim: int, section: tuple[int, ...] | None, yarn: tuple[float, int] | None
) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.rope_tables`."""
    given, tokens, half = positions.contiguous(), positions.shape[-1], rotary_dim // 2
    frequencies, axes, gain = _turns(theta, rotary_dim, section if given.dim() > 1 else None, yarn, given.device)
    cos, sin = (torch.empty(tokens, half, dtype=torch.float32, device=given.device) for _ in range(2))
    rotary.rope_tables[(tokens,)](given, frequencies, axes, cos, sin, gain, tokens, half, power_of_two(half))
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.apply_rope`."""
    given, (tokens, heads, size) = x.float().contiguous(), x.shape
    out = torch.empty_like(given)
    sizes = (heads, size, cos.shape[-1], power_of_two(size))
    rotary.apply_rope[(tokens, heads)](given, cos.contiguous(), sin.contiguous(), out, *sizes)
    return out


def choose(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice of a router from its logits f32 [T, E]: see `qwenrun.kernels.ops.router`."""
    tokens, count = logits.shape
    index = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weight = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    choice.choose[(tokens,)](logits.contiguous(), index, weight, count, k, power_of_two(count))
    return index, weight


# Numbers that a program sorts at a time; interpreted, a sort of 1024 takes seconds.
SORTED = 64 if INTERPRETED else 1024


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.largest`, for counts up to SORTED / 2."""
    given, size = x.float().contiguous(), len(x)
    count = min(count, size)
    sizes = [size]
    while sizes[-1] > SORTED:
        sizes.append(-(-sizes[-1] // SORTED) * count)
    keys = torch.empty(sum(sizes[1:]), dtype=torch.int64, device=x.device)
    values = torch.empty(count, dtype=torch.float32, device=x.device)
    ids = torch.empty(count, dtype=torch.int64, device=x.device)
    at = 0
    for number, size in enumerate(sizes):
        shape = (count, number == 0, number == len(sizes) - 1, SORTED)
        choice.largest[(-(-size // SORTED),)](given, keys[at:] if len(keys) else ids, values, ids, size, *shape)
        at += size if number else 0
    return values, ids


def power_of_two(size: int) -> int:
    """The smallest that is not below size."""
    return 1 << (size - 1).bit_length()


def delta_net(
    qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, conv_state: Tensor, decay: Tensor,
    dt_bias: Tensor, norm: Tensor, eps: float, state: Tensor,
) -> Tensor:  # fmt: skip
    """See `qwenrun.kernels.ops.delta_net`, for one token; both states are contiguous float32."""
    (heads, dk, dv), channels, taps = state.shape, qkv.shape[1], conv_weight.shape[1]
    mixed = torch.empty(channels, dtype=torch.float32, device=qkv.device)
    weight = conv_weight.float().contiguous()
    delta.conv_step[(-(-channels // 256),)](qkv.float().contiguous(), weight, conv_state, mixed, channels, taps, 256)
    out = torch.empty(1, heads, dv, dtype=torch.float32, device=qkv.device)
    gates = [x.float().contiguous() for x in (a, b, decay, dt_bias)]
    delta.delta_step[(heads, -(-dv // STEP_VALUES))](
        mixed, *gates, state, out, (channels - heads * dv) // (2 * dk), heads, dk**-0.5, dk, dv, power_of_two(dk),
        STEP_VALUES,
    )  # fmt: skip
    return gated_rms_norm(out, norm, z.view(1, heads, dv), eps).view(1, -1)


def conv(u: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.conv`."""
    rows, (channels, taps) = u.float().contiguous(), weight.shape
    out = torch.empty(rows.shape, dtype=torch.float32, device=u.device)
    delta.conv[(rows.shape[0], -(-channels // 256))](
        rows, weight.float().contiguous(), state.contiguous(), out, rows.shape[0], channels, taps, 256
    )
    state.copy_(torch.cat([state, rows[1 - taps :]])[1 - taps :])
    return out


# Tokens of a chunk, values and warps of a program that goes through the chunks (with more it spills); the fewest
# tokens that are worth it.
CHUNK, CHUNK_VALUES, CHUNK_WARPS, CHUNKED = 32, 32, 8, 17


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.delta_rule`; the state is contiguous float32."""
    (tokens, key_heads, dk), (heads, dv) = q.shape, v.shape[1:]
    rows = [x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v)]
    steps, gates = [x.stride(0) for x in rows], (g.contiguous(), beta.contiguous())
    out = torch.empty(tokens, heads, dv, dtype=torch.float32, device=q.device)
    if tokens < CHUNKED:
        delta.delta_rule[(heads, -(-dv // VALUES))](
            *rows, *gates, state, out, tokens, *steps, key_heads, heads, dk**-0.5, dk, dv, power_of_two(dk), VALUES
        )
        return out
    chunks, keys = -(-tokens // CHUNK), max(16, power_of_two(dk))
    inverse, within = torch.empty(2, chunks, heads, CHUNK, CHUNK, dtype=torch.float32, device=q.device)
    chunk.chunk_inside[(chunks, heads)](
        *rows[:2],
        *gates,
        inverse,
        within,
        tokens,
        *steps[:2],
        key_heads,
        heads,
        dk**-0.5,
        dk,
        keys,
        OPERAND_TYPE,
        CHUNK,
    )
    chunk.chunk_states[(heads, -(-dv // CHUNK_VALUES))](
        *rows, *gates, inverse, within, state, out, tokens, *steps, key_heads, heads, dk**-0.5, dk, dv, keys,
        OPERAND_TYPE, CHUNK_VALUES, CHUNK, num_warps=CHUNK_WARPS, num_stages=1,
    )  # fmt: skip
    return out
