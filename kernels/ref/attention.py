"""Causal attention with grouped heads, and rotary positions (interleaved M-RoPE, YaRN)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwenrun.kernels.ref.codec import decode, encode
from qwenrun.kernels.weight import Weight

# Queries and keys are taken in blocks: scores never exceed heads x QUERY_BLOCK x KEY_BLOCK float32 numbers.
QUERY_BLOCK = 256
KEY_BLOCK = 2048


def attention(q: Tensor, k: Tensor | Weight, v: Tensor | Weight, scale: float) -> Tensor:
    """See `qwenrun.kernels.ops.attention`."""
    count, heads, dim = q.shape
    length, groups = (k.lead[0], k.rows) if isinstance(k, Weight) else k.shape[:2]
    per_group = heads // groups
    first = length - count
    width = v.cols if isinstance(v, Weight) else v.shape[-1]
    out = torch.empty(count, heads, width, dtype=torch.float32, device=q.device)
    for start in range(0, count, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, count)
        # [G, M * T, D]: the query heads of a group share its keys.
        block = q[start:stop].float().mul(scale).unflatten(1, (groups, per_group))
        block = block.permute(1, 2, 0, 3).reshape(groups, -1, dim)
        position = torch.arange(first + start, first + stop, device=q.device).repeat(per_group)
        mixed = _mixed(block, position, k, v, first + start + 1, first + stop)
        mixed = mixed.unflatten(1, (per_group, stop - start))
        out[start:stop] = mixed.permute(2, 0, 1, 3).reshape(stop - start, heads, -1)
    return out.to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | Weight, values: Tensor | Weight, place: Tensor, scale: float
) -> Tensor:
    """See `qwenrun.kernels.ops.decode_attention`. All rows of the cache are looked at."""
    _store(keys, k, place)
    _store(values, v, place)
    groups, length = k.shape[1], len(keys.codes if isinstance(keys, Weight) else keys)
    block = q[0].float().mul(scale).unflatten(0, (groups, -1))
    mixed = _mixed(block, place.expand(block.shape[1]), keys, values, 1, length)
    return mixed.reshape(q.shape[:2] + mixed.shape[-1:]).to(q.dtype)


def _mixed(block: Tensor, position: Tensor, k: Tensor | Weight, v: Tensor | Weight, open_: int, end: int) -> Tensor:
    """What rows block [G, R, D], scaled, at positions [R], mix of the values they see: [G, R, Dv].

    Every row sees keys 0..open_-1, none a key from `end` on.
    """
    groups, width = block.shape[0], v.cols if isinstance(v, Weight) else v.shape[-1]
    top = torch.full(block.shape[:2], -math.inf, device=block.device)
    total = torch.zeros(block.shape[:2], device=block.device)
    mixed = torch.zeros(groups, block.shape[1], width, device=block.device)
    for low in range(0, end, KEY_BLOCK):
        high = min(low + KEY_BLOCK, end)
        scores, rows = block @ _rows(k, low, high).permute(1, 2, 0), _rows(v, low, high)
        if high > open_:
            at = torch.arange(low, high, device=block.device)
            scores = scores.masked_fill(at > position[:, None], -math.inf)
            # What nobody has written yet may be no number, and nothing times that is none either.
            rows = rows.masked_fill((at > position.max())[:, None, None], 0.0)
        # Online softmax: earlier blocks are rescaled to the new maximum. Block 0 holds key 0, which every
        # query sees, so the maximum is finite from the start.
        new_top = torch.maximum(top, scores.amax(-1))
        rescale = (top - new_top).exp()
        weights = (scores - new_top[..., None]).exp()
        total = total * rescale + weights.sum(-1)
        mixed = mixed * rescale[..., None] + weights @ rows.transpose(0, 1)
        top = new_top
    return mixed / total[..., None]


def _store(cached: Tensor | Weight, rows: Tensor, place: Tensor) -> None:
    """Write rows [1, Hkv, D] at row `place` of a cache, as it stores them."""
    if isinstance(cached, Weight):
        encoded = encode(rows.float(), cached.spec)
        for name, part in encoded.parts.items():
            cached.parts[name].index_copy_(0, place, part)
    else:
        cached.index_copy_(0, place, rows.to(cached.dtype))


def _rows(cached: Tensor | Weight, low: int, high: int) -> Tensor:
    """Rows low..high of keys or values in float32."""
    part = cached[low:high]
    return decode(part) if isinstance(part, Weight) else part.float()


def yarn_frequencies(theta: float, rotary_dim: int, factor: float, original: int) -> tuple[Tensor, float]:
    """YaRN's frequencies float32 [rotary_dim / 2] and the factor on cos and sin (arXiv 2309.00071).

    beta_fast 32, beta_slow 1, as the Qwen configs leave them at their defaults.
    """
    half = rotary_dim // 2

    def slot(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(slot(32)), 0), min(math.ceil(slot(1)), rotary_dim - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    return plain / factor * ramp + plain * (1 - ramp), 0.1 * math.log(factor) + 1.0


def rope_slots(
    theta: float, rotary_dim: int, mrope_section: tuple[int, ...] | None, yarn: tuple[float, int] | None
) -> tuple[Tensor, Tensor, float]:
    """For each of rotary_dim / 2 slots its frequency float32 and the axis int64 it turns with, and the gain of all."""
    gain = 1.0
    if yarn:
        frequencies, gain = yarn_frequencies(theta, rotary_dim, *yarn)
    else:
        frequencies = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    # Slot j turns with axis j mod 3 (time, height, width), the last two only while j < 3 * section.
    axes = torch.zeros(rotary_dim // 2, dtype=torch.long)
    if mrope_section:
        for number in (1, 2):
            axes[number : 3 * mrope_section[number] : 3] = number
    return frequencies, axes, gain


def rope_tables(
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    mrope_section: tuple[int, ...] | None = None,
    yarn: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.rope_tables`."""
    frequencies, axes, gain = rope_slots(theta, rotary_dim, mrope_section if positions.dim() > 1 else None, yarn)
    turning = positions.float().view(-1, positions.shape[-1])[axes.to(positions.device)].T
    angles = turning * frequencies.to(positions.device)
    return angles.cos() * gain, angles.sin() * gain


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.apply_rope`."""
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
