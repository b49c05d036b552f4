"""Causal attention with grouped heads, and rotary positions (interleaved M-RoPE, YaRN)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwenrun.kernels.ref.codec import decode
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
        top = torch.full(block.shape[:2], -math.inf, device=q.device)
        total = torch.zeros(block.shape[:2], device=q.device)
        mixed = torch.zeros(*block.shape[:2], width, device=q.device)
        visible = first + stop
        for low in range(0, visible, KEY_BLOCK):
            high = min(low + KEY_BLOCK, visible)
            scores = block @ _rows(k, low, high).permute(1, 2, 0)
            if high > first + start + 1:
                hidden = torch.arange(low, high, device=q.device) > position[:, None]
                scores = scores.masked_fill(hidden, -math.inf)
            # Online softmax: earlier blocks are rescaled to the new maximum. Block 0 holds key 0, which every
            # query sees, so the maximum is finite from the start.
            new_top = torch.maximum(top, scores.amax(-1))
            rescale = (top - new_top).exp()
            weights = (scores - new_top[..., None]).exp()
            total = total * rescale + weights.sum(-1)
            mixed = mixed * rescale[..., None] + weights @ _rows(v, low, high).transpose(0, 1)
            top = new_top
        mixed = (mixed / total[..., None]).unflatten(1, (per_group, stop - start))
        out[start:stop] = mixed.permute(2, 0, 1, 3).reshape(stop - start, heads, -1)
    return out.to(q.dtype)


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


def rope_tables(
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    mrope_section: tuple[int, ...] | None = None,
    yarn: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `qwenrun.kernels.ops.rope_tables`."""
    gain = 1.0
    if yarn:
        frequencies, gain = yarn_frequencies(theta, rotary_dim, *yarn)
    else:
        frequencies = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    frequencies = frequencies.to(positions.device)
    if positions.dim() == 1:
        angles = positions.float()[:, None] * frequencies
    else:
        # Slot j turns with axis j mod 3 (time, height, width), the last two only while j < 3 * section.
        axis = torch.zeros(rotary_dim // 2, dtype=torch.long)
        for number in (1, 2):
            assert mrope_section
            axis[number : 3 * mrope_section[number] : 3] = number
        angles = positions.float()[axis.to(positions.device)].T * frequencies
    return angles.cos() * gain, angles.sin() * gain


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `qwenrun.kernels.ops.apply_rope`."""
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
