"""The reference backend: every op in pure torch, on any device, for any BlockSpec.

It is the oracle the other backends are held to, and what runs where none of them does.
"""

from __future__ import annotations

import sys
from functools import partial

from qwenrun.kernels import composed
from qwenrun.kernels.dispatch import Backend
from qwenrun.kernels.ref.attention import apply_rope, attention, decode_attention, rope_slots, rope_tables
from qwenrun.kernels.ref.choice import largest
from qwenrun.kernels.ref.codec import decode, encode
from qwenrun.kernels.ref.delta import conv, delta_rule
from qwenrun.kernels.ref.fit import fit
from qwenrun.kernels.ref.linear import embedding, experts, linear
from qwenrun.kernels.ref.norms import gated_rms_norm, rms_norm

BACKEND = Backend("ref", priority=0, devices=(), refuses=lambda op, spec: "")

_OWN = sys.modules[__name__]
router = partial(composed.router, _OWN)
linears = partial(composed.linears, _OWN)
swiglu = partial(composed.swiglu, _OWN)
moe_entry = partial(composed.moe_entry, _OWN)
delta_net = partial(composed.delta_net, _OWN)

__all__ = [
    "BACKEND",
    "apply_rope",
    "attention",
    "conv",
    "decode",
    "decode_attention",
    "delta_net",
    "delta_rule",
    "embedding",
    "encode",
    "experts",
    "fit",
    "gated_rms_norm",
    "largest",
    "linear",
    "linears",
    "moe_entry",
    "rms_norm",
    "rope_slots",
    "rope_tables",
    "router",
    "swiglu",
]
