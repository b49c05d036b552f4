"""What the reference kernels hold for a moment, as an estimate: the largest set of temporary tensors at once.

The steps of a forward pass follow each other, so the largest of them counts, not their sum. Every term is a
tensor of `kernels/ref` or of the graph in `model`, float32 unless said otherwise; a test sets the real peak of
torch's allocator beside it. Not counted: the allocator's own slack, and what is smaller than a token's row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwenrun.model.config import ModelConfig
from qwenrun.quant.recipe import Assignment, TensorInfo

# Block sizes of kernels/ref, which this cold file can't import; a test holds them together.
QUERY_BLOCK, KEY_BLOCK = 256, 2048
DECODE_VALUES = 8 << 20
DELTA_CHUNK = 64
# Bytes alive per value while a block of a matrix becomes float32, the result included: unpacked codes (1),
# codes as numbers (4), scaled (4); E2M1 looks its 16 values up by 4-byte and 8-byte indices.
DECODING = {"f32": 0, "bf16": 4, "f16": 4, "int8": 8, "int4": 9, "e2m1": 17}
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes (see BlockSpec) that take most memory to decode, of the dense matrices and of the experts."""

    dense: str
    routed: str

    @classmethod
    def of(cls, stored: Iterable[tuple[TensorInfo, Assignment]]) -> Codes:
        """stored: the tensors that are held, and how."""
        held = [(how.spec.codes if how.spec else info.dtype.lower(), info) for info, how in stored]
        return cls(
            _worst(codes for codes, info in held if len(info.shape) == 2 and info.part != "vision"),
            _worst(codes for codes, info in held if info.is_experts),
        )


def workspace(config: ModelConfig, codes: Codes, chunk: int, ctx: int) -> int:
    """Bytes of the largest step, with the residual stream beside it: before and after the mixer, and normed.

    chunk: tokens of a prefill step. ctx: tokens of the sequence.
    """
    tokens = min(chunk, ctx)
    return 3 * FLOAT * tokens * config.hidden_size + max(steps(config, codes, tokens, ctx).values())


def steps(config: ModelConfig, codes: Codes, tokens: int, ctx: int) -> dict[str, int]:
    """Bytes of each step of a pass over the last `tokens` of `ctx`, without the residual stream."""
    dense, routed, hidden = codes.dense, codes.routed, config.hidden_size

    def linear(rows: int, cols: int, codes: str) -> int:
        """The output (twice where it is put together from blocks), and one decoded block of the matrix."""
        blocks = 2 if rows * cols > DECODE_VALUES else 1
        return FLOAT * tokens * rows * blocks + DECODING[codes] * min(rows * cols, DECODE_VALUES)

    channels, values = config.conv_channels, config.value_size
    out = {
        "attention projections": linear(2 * config.num_heads * config.head_dim, hidden, dense),
        "attention": _attention(config, tokens, ctx),
        "delta projections": linear(channels, hidden, dense),
        # Input, the window with the state's rows before it, a product for each tap, result; the gate waits.
        "convolution": FLOAT * tokens * (channels * (3 + config.conv_kernel) + values),
        "delta rule": FLOAT * tokens * values + _delta_rule(config, tokens),
        # Queries, keys and values; gate; result, and three copies on its way through the norm.
        "delta norm": FLOAT * tokens * (channels + 5 * values),
        "logits": FLOAT * 2 * config.vocab_size + DECODING[dense] * min(config.vocab_size * hidden, DECODE_VALUES),
    }
    if not config.is_moe:
        # silu(gate) waits for the output of up.
        return out | {"mlp": FLOAT * tokens * config.mlp_size + linear(config.mlp_size, hidden, dense)}
    inner = config.expert_size
    # The weighted rows of every pair of token and expert, and their sum; of the expert at hand the rows that
    # chose it (at worst all), gate and up, their product.
    pairs = FLOAT * tokens * (config.top_k + 1) * hidden
    waiting = FLOAT * tokens * (hidden + 2 * inner)
    return out | {
        "experts": pairs + waiting + max(linear(2 * inner, hidden, routed), linear(hidden, inner, routed)),
        "shared expert": FLOAT * tokens * (hidden + config.shared_size) + linear(config.shared_size, hidden, dense),
    }


# Programs that attention's splits are as many as, and rows of each (kernels/gpu); a test holds them together.
CARD_PROGRAMS, CARD_ROWS, CARD_CHUNK = 256, 128, 32
# Torch's allocator takes segments of 20 MiB and leaves holes in them: this share of what is asked for, and so much.
CARD_SLACK, CARD_SEGMENTS = 1.1, 64 << 20


def card_workspace(config: ModelConfig, chunk: int, ctx: int) -> int:
    """`workspace` of the kernels for cards, with what torch's allocator takes beyond it."""
    tokens = min(chunk, ctx)
    # Before and after the mixer, normed, and what the experts are added to.
    stream = 4 * FLOAT * tokens * config.hidden_size
    return int(CARD_SLACK * (stream + max(card_steps(config, tokens, ctx).values()))) + CARD_SEGMENTS


def card_steps(config: ModelConfig, tokens: int, ctx: int, operand: int = 2) -> dict[str, int]:
    """Bytes of each step on a card. operand: of a number that tensor cores are given."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, channels, values = config.hidden_size, config.conv_channels, config.value_size
    rows = tokens * config.num_heads
    splits = max(1, min(-(-ctx // 256), CARD_PROGRAMS * CARD_ROWS // max(1, rows)))
    chunks = -(-tokens // CARD_CHUNK) * CARD_CHUNK
    out = {
        # Queries and gates, keys and values twice, queries normed, turned and as operands; what the splits mix, and the
        # result. Afterwards the sigmoid of the gate and the product, as it is and as operand.
        "attention": tokens * (FLOAT * (2 * heads + 4 * kv + 2 * heads) + operand * heads)
        + FLOAT * max(rows * splits * (config.head_dim + 2) + tokens * heads, 3 * tokens * heads),
        # Channels, gate, channels after the convolution, inverse and scores of all chunks, result and its norm, as
        # operand, and what comes of it.
        "delta": FLOAT * tokens * (2 * channels + 3 * values + hidden)
        + operand * tokens * values
        + 2 * FLOAT * chunks * CARD_CHUNK * config.linear_value_heads,
        "logits": 2 * FLOAT * config.vocab_size,
    }
    if not config.is_moe:
        return out | {"mlp": tokens * (FLOAT * (3 * config.mlp_size + hidden) + operand * (config.mlp_size + hidden))}
    # Of every pair of token and expert: its row of the result; where some experts are on their way, the token's row, as
    # operand; gate and up, their product, what comes of it, and that weighted.
    pair = FLOAT * (4 * hidden + 2 * config.expert_size) + operand * (hidden + config.expert_size)
    shared = FLOAT * 3 * config.shared_size + operand * (hidden + config.shared_size) + FLOAT * hidden
    return out | {"experts": tokens * config.top_k * pair, "shared expert": tokens * shared}


def _worst(codes: Iterable[str]) -> str:
    return max(codes, key=lambda name: DECODING[name], default="bf16")


def _attention(config: ModelConfig, tokens: int, ctx: int) -> int:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    queries, keys = min(QUERY_BLOCK, tokens), min(KEY_BLOCK, ctx)
    scores = config.num_heads * queries * keys
    # Scores, less their maximum, and exp of that; behind the first block of keys the weights of the last too.
    # Or, while the next scores are made, those of the last, and the block of keys as float32 (INT8: twice).
    inner = max(4 * scores, 3 * scores + 2 * keys * kv) if ctx > KEY_BLOCK else max(3 * scores, 2 * keys * kv)
    mask = config.num_heads // config.num_kv_heads * queries * keys  # bytes
    # Queries and gates, queries after norm and rotation, keys, values, result.
    whole = tokens * (2 * heads + 2 * heads + 2 * kv)
    # A block's queries, and its mixed values with two copies.
    block = queries * 4 * heads
    # Afterwards: sigmoid of the gate, and the product.
    return max(FLOAT * (whole + inner + block) + mask, FLOAT * tokens * 6 * heads)


def _delta_rule(config: ModelConfig, tokens: int) -> int:
    values, repeated = config.value_size, config.linear_value_heads * config.linear_key_dim
    # Queries, keys and values as they come; gate; queries and keys repeated for every value head, and either
    # the queries once more (scaled) or the results, of chunks and put together.
    whole = config.conv_channels + values + 2 * repeated + max(repeated, 2 * values)
    rows = min(tokens, DELTA_CHUNK)
    # In a chunk: decay, system and scores; right-hand side, its solution, and what they are made of.
    chunk = config.linear_value_heads * rows * (5 * rows + 3 * (config.linear_key_dim + config.linear_value_dim))
    return FLOAT * (tokens * whole + chunk)
