"""The Qwen3.5-MoE forward in plain torch with autograd, for training the demo: whole sequences, no cache.

The weights are a dict from hub tensor names to float32 tensors, so what is trained is what is written; only
the MTP experts are fused here and split on export. Shape letters: B batch, T tokens, H hidden, E experts, K
experts per token, I expert width, D head width, V vocabulary rows; GDN: N value heads, C chunk length.

The maths is the architecture's; a test holds it equal to transformers' `qwen3_5_moe`. Knows no tokenizer,
no data and no optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

TRUNK = "model.language_model."
MTP_LAYER = "mtp.layers.0."
# Kept in float32 in the file, as on the hub.
FLOAT32_SUFFIXES = ("linear_attn.A_log", "linear_attn.norm.weight")


def text_config(vocab_size: int, eos_token_id: int) -> dict[str, Any]:
    """The `text_config` of the demo: the 122B's keys with small numbers."""
    layers = 4
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": eos_token_id,
        "full_attention_interval": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 128,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 128,
        "use_cache": True,
        "vocab_size": vocab_size,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_type": "default",
            "rope_theta": 10000,
            "partial_rotary_factor": 0.5,
        },
    }


@dataclass(frozen=True)
class Output:
    """`hidden` [B, T, H] after the final norm, `mtp_hidden` [B, T-1, H] after the MTP norm; router loss."""

    hidden: Tensor
    mtp_hidden: Tensor
    balance: Tensor


def _moe_shapes(c: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    h, e, i, s = (
        c["hidden_size"],
        c["num_experts"],
        c["moe_intermediate_size"],
        c["shared_expert_intermediate_size"],
    )
    return {
        f"{at}input_layernorm.weight": (h,),
        f"{at}post_attention_layernorm.weight": (h,),
        f"{at}mlp.gate.weight": (e, h),
        f"{at}mlp.experts.gate_up_proj": (e, 2 * i, h),
        f"{at}mlp.experts.down_proj": (e, h, i),
        f"{at}mlp.shared_expert.gate_proj.weight": (s, h),
        f"{at}mlp.shared_expert.up_proj.weight": (s, h),
        f"{at}mlp.shared_expert.down_proj.weight": (h, s),
        f"{at}mlp.shared_expert_gate.weight": (1, h),
    }


def _attention_shapes(c: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    h, d, q, kv = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    return {
        f"{at}self_attn.q_proj.weight": (2 * q * d, h),
        f"{at}self_attn.k_proj.weight": (kv * d, h),
        f"{at}self_attn.v_proj.weight": (kv * d, h),
        f"{at}self_attn.o_proj.weight": (h, q * d),
        f"{at}self_attn.q_norm.weight": (d,),
        f"{at}self_attn.k_norm.weight": (d,),
    }


def _gdn_shapes(c: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    h, n, dv = c["hidden_size"], c["linear_num_value_heads"], c["linear_value_head_dim"]
    channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + n * dv
    return {
        f"{at}linear_attn.in_proj_qkv.weight": (channels, h),
        f"{at}linear_attn.in_proj_z.weight": (n * dv, h),
        f"{at}linear_attn.in_proj_b.weight": (n, h),
        f"{at}linear_attn.in_proj_a.weight": (n, h),
        f"{at}linear_attn.conv1d.weight": (channels, 1, c["linear_conv_kernel_dim"]),
        f"{at}linear_attn.A_log": (n,),
        f"{at}linear_attn.dt_bias": (n,),
        f"{at}linear_attn.norm.weight": (dv,),
        f"{at}linear_attn.out_proj.weight": (h, n * dv),
    }


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by hub name (MTP experts fused) with its shape."""
    h = c["hidden_size"]
    found: dict[str, tuple[int, ...]] = {f"{TRUNK}embed_tokens.weight": (c["vocab_size"], h)}
    for layer, kind in enumerate(c["layer_types"]):
        at = f"{TRUNK}layers.{layer}."
        found |= _attention_shapes(c, at) if kind == "full_attention" else _gdn_shapes(c, at)
        found |= _moe_shapes(c, at)
    found |= {f"{TRUNK}norm.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}
    found |= {"mtp.fc.weight": (h, 2 * h)} | {
        f"mtp.{name}.weight": (h,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    return found | _attention_shapes(c, MTP_LAYER) | _moe_shapes(c, MTP_LAYER)


def initial_weights(c: dict[str, Any], seed: int) -> Weights:
    """Random float32 weights with gradients on.

    Decay gates start as in Mamba-2 and Gated DeltaNet: time steps from 0.001 to 0.1, A from 1 to 16.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in shapes(c).items():
        if name.endswith("A_log"):
            value = torch.empty(shape).uniform_(1.0, 16.0, generator=generator).log()
        elif name.endswith("dt_bias"):
            step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            value = step + torch.log(-torch.expm1(-step))
        elif name.endswith("linear_attn.norm.weight"):
            value = torch.ones(shape)
        elif "norm" in name:
            value = torch.zeros(shape)
        elif name.endswith("conv1d.weight"):
            value = torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)
        else:
            std = shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                std /= math.sqrt(2 * c["num_hidden_layers"])
            elif "embed_tokens" in name or "lm_head" in name or "mlp.gate." in name:
                std = c["initializer_range"]
            value = torch.randn(shape, generator=generator) * std
        weights[name] = value.requires_grad_()
    return weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm over the last axis: the file stores w, the factor is 1 + w."""
    return F.rms_norm(x, (x.shape[-1],), 1.0 + weight, eps)


def l2_norm(x: Tensor) -> Tensor:
    """x over its Euclidean length, with 1e-6 inside the root."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def rotary_table(c: dict[str, Any], length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R] of the rotary part.

    Text has one position on all three M-RoPE axes, so the sections drop out.
    """
    rope = c["rope_parameters"]
    width = int(c["head_dim"] * rope["partial_rotary_factor"])
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(length).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of x [B, heads, T, D] in pairs (j, j + R/2); the rest passes through."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, kept), -1)


def attention(c: dict[str, Any], w: Weights, at: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gated full attention, x [B, T, H] -> same; per head q_proj holds D query rows, then D gate rows."""
    b, t, _ = x.shape
    d, q_heads, kv_heads = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    query, gate = F.linear(x, w[f"{at}q_proj.weight"]).view(b, t, q_heads, 2 * d).chunk(2, -1)
    key = F.linear(x, w[f"{at}k_proj.weight"]).view(b, t, kv_heads, d)
    value = F.linear(x, w[f"{at}v_proj.weight"]).view(b, t, kv_heads, d).transpose(1, 2)
    eps = c["rms_norm_eps"]
    query = rotate(rms_norm(query, w[f"{at}q_norm.weight"], eps).transpose(1, 2), cos, sin)
    key = rotate(rms_norm(key, w[f"{at}k_norm.weight"], eps).transpose(1, 2), cos, sin)
    share = q_heads // kv_heads
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    return F.linear((out * torch.sigmoid(gate)).reshape(b, t, q_heads * d), w[f"{at}o_proj.weight"])


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """Chunked gated delta rule: q, k [B, N, T, Dk] (normed and scaled), v [B, N, T, Dv], g, beta [B, N, T].

    g is the log decay (<= 0). Returns o [B, N, T, Dv]. Inside a chunk one unit triangular solve replaces the
    recurrence S = exp(g) S; S += k (beta (v - S^T k))^T; o = S^T q.
    """
    b, n, t, dk = k.shape
    pad = -t % chunk
    q, k, v = (F.pad(x, (0, 0, 0, pad)).view(b, n, -1, chunk, x.shape[-1]) for x in (q, k, v))
    g, beta = (F.pad(x, (0, pad)).view(b, n, -1, chunk) for x in (g, beta))
    total = g.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    k_beta = k * beta[..., None]
    system = k_beta @ k.transpose(-1, -2) * decay
    right = torch.cat((v * beta[..., None], k_beta * total.exp()[..., None]), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_v, k_read = solved.split((v.shape[-1], dk), -1)
    inside = q @ k.transpose(-1, -2) * decay
    q_read = q * total.exp()[..., None]
    k_write = k * (total[..., -1:] - total).exp()[..., None]
    leave = total[..., -1].exp()[..., None, None]
    out: list[Tensor] = []
    state: Tensor | None = None
    for i in range(q.shape[2]):
        value = new_v[:, :, i] if state is None else new_v[:, :, i] - k_read[:, :, i] @ state
        part = inside[:, :, i] @ value
        out.append(part if state is None else part + q_read[:, :, i] @ state)
        if i + 1 < q.shape[2]:
            written = k_write[:, :, i].transpose(-1, -2) @ value
            state = written if state is None else state * leave[:, :, i] + written
    return torch.cat(out, 2)[:, :, :t]


def gated_delta_net(c: dict[str, Any], w: Weights, at: str, x: Tensor) -> Tensor:
    """Gated DeltaNet, x [B, T, H] -> same; conv channels are all q heads, then all k, then all v heads."""
    b, t, _ = x.shape
    nk, nv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    dk, dv = c["linear_key_head_dim"], c["linear_value_head_dim"]
    taps = w[f"{at}conv1d.weight"]
    mixed = F.pad(F.linear(x, w[f"{at}in_proj_qkv.weight"]), (0, 0, taps.shape[-1] - 1, 0))
    # Depthwise convolution as a sum of shifted products: on a CPU faster than conv1d with its backward.
    shifted = [mixed[:, i : i + t] * taps[:, 0, i] for i in range(taps.shape[-1])]
    mixed = F.silu(torch.as_tensor(sum(shifted)))
    q, k, v = mixed.split((nk * dk, nk * dk, nv * dv), -1)
    q = l2_norm(q.view(b, t, nk, dk)) * dk**-0.5
    k = l2_norm(k.view(b, t, nk, dk))
    q, k = (y.repeat_interleave(nv // nk, 2).transpose(1, 2) for y in (q, k))
    v = v.view(b, t, nv, dv).transpose(1, 2)
    beta = torch.sigmoid(F.linear(x, w[f"{at}in_proj_b.weight"])).transpose(1, 2)
    a = F.linear(x, w[f"{at}in_proj_a.weight"])
    g = (-w[f"{at}A_log"].exp() * F.softplus(a + w[f"{at}dt_bias"])).transpose(1, 2)
    o = delta_rule(q, k, v, g, beta, chunk=min(64, max(16, t))).transpose(1, 2)
    z = F.linear(x, w[f"{at}in_proj_z.weight"]).view(b, t, nv, dv)
    o = F.rms_norm(o, (dv,), w[f"{at}norm.weight"], c["rms_norm_eps"]) * F.silu(z)
    return F.linear(o.reshape(b, t, nv * dv), w[f"{at}out_proj.weight"])


def moe(c: dict[str, Any], w: Weights, at: str, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Routed experts plus the gated shared expert on x [B, T, H]; rows are grouped by expert.

    Rows where `real` [B, T] is false (padding) get zeros and cost nothing. Also returns the load-balance loss
    E * sum_e(share of the routed rows * mean probability), 1 when even (Switch Transformer, eq. 4).
    """
    rows = x[real]
    n, experts, top_k = rows.shape[0], c["num_experts"], c["num_experts_per_tok"]
    probabilities = F.linear(rows, w[f"{at}gate.weight"]).softmax(-1)
    chosen_p, chosen = probabilities.topk(top_k, -1)
    chosen_p = chosen_p / chosen_p.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts)
    gate_up, down = w[f"{at}experts.gate_up_proj"], w[f"{at}experts.down_proj"]
    parts = rows[order // top_k].split(counts.tolist())
    out = []
    for e, part in enumerate(parts):
        gate, up = F.linear(part, gate_up[e]).chunk(2, -1)
        out.append(F.linear(F.silu(gate) * up, down[e]))
    routed = torch.cat(out)[order.argsort()].view(n, top_k, -1)
    y = (routed * chosen_p[..., None]).sum(1)
    gate = F.linear(rows, w[f"{at}shared_expert.gate_proj.weight"])
    up = F.linear(rows, w[f"{at}shared_expert.up_proj.weight"])
    shared = F.linear(F.silu(gate) * up, w[f"{at}shared_expert.down_proj.weight"])
    y = y + torch.sigmoid(F.linear(rows, w[f"{at}shared_expert_gate.weight"])) * shared
    balance = experts * (counts / (n * top_k) * probabilities.mean(0)).sum()
    return torch.zeros_like(x).masked_scatter(real[..., None], y), balance


def forward(c: dict[str, Any], w: Weights, tokens: Tensor, real: Tensor | None = None) -> Output:
    """Trunk and MTP head over `tokens` [B, T]: each row a sequence from position 0, padded at the right.

    `real` [B, T] is true where a row has a token. MTP row t joins hidden t with the embedding of token t+1.
    """
    if real is None:
        real = torch.ones_like(tokens, dtype=torch.bool)
    eps = c["rms_norm_eps"]
    embedded = F.embedding(tokens, w[f"{TRUNK}embed_tokens.weight"])
    cos, sin = rotary_table(c, tokens.shape[1])
    x, losses = embedded, []

    def block(x: Tensor, at: str, kind: str, cos: Tensor, sin: Tensor, real: Tensor) -> Tensor:
        normed = rms_norm(x, w[f"{at}input_layernorm.weight"], eps)
        if kind == "full_attention":
            x = x + attention(c, w, f"{at}self_attn.", normed, cos, sin)
        else:
            x = x + gated_delta_net(c, w, f"{at}linear_attn.", normed)
        routed, loss = moe(c, w, f"{at}mlp.", rms_norm(x, w[f"{at}post_attention_layernorm.weight"], eps), real)
        losses.append(loss)
        return x + routed

    for layer, kind in enumerate(c["layer_types"]):
        x = block(x, f"{TRUNK}layers.{layer}.", kind, cos, sin, real)
    hidden = rms_norm(x, w[f"{TRUNK}norm.weight"], eps)
    pair = torch.cat(
        (
            rms_norm(embedded[:, 1:], w["mtp.pre_fc_norm_embedding.weight"], eps),
            rms_norm(hidden[:, :-1], w["mtp.pre_fc_norm_hidden.weight"], eps),
        ),
        -1,
    )
    draft = block(F.linear(pair, w["mtp.fc.weight"]), MTP_LAYER, "full_attention", cos[1:], sin[1:], real[:, 1:])
    return Output(hidden, rms_norm(draft, w["mtp.norm.weight"], eps), torch.stack(losses).mean())


def logits(w: Weights, hidden: Tensor) -> Tensor:
    """lm_head on hidden [..., H] -> [..., V]; trunk and MTP share it."""
    return F.linear(hidden, w["lm_head.weight"])


def exported(c: dict[str, Any], w: Weights) -> Weights:
    """The tensors as the hub stores them: BF16 but for the float32 few, and one tensor per MTP expert."""
    out: Weights = {}
    for name, tensor in w.items():
        value = tensor.detach()
        value = value.clone() if name.endswith(FLOAT32_SUFFIXES) else value.to(torch.bfloat16)
        if name == f"{MTP_LAYER}mlp.experts.gate_up_proj":
            for e in range(c["num_experts"]):
                gate, up = value[e].chunk(2, 0)
                out[f"{MTP_LAYER}mlp.experts.{e}.gate_proj.weight"] = gate.contiguous()
                out[f"{MTP_LAYER}mlp.experts.{e}.up_proj.weight"] = up.contiguous()
        elif name == f"{MTP_LAYER}mlp.experts.down_proj":
            for e in range(c["num_experts"]):
                out[f"{MTP_LAYER}mlp.experts.{e}.down_proj.weight"] = value[e].contiguous()
        else:
            out[name] = value.contiguous()
    return out


def loaded(c: dict[str, Any], stored: Weights) -> Weights:
    """The inverse of `exported`: float32 weights, MTP experts fused, from the tensors of a checkpoint."""

    def fetch(name: str) -> Tensor:
        if name in stored:
            return stored[name].float()
        at, part = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        experts = range(c["num_experts"])
        return torch.stack([torch.cat([stored[f"{at}.{e}.{p}.weight"] for p in parts]) for e in experts]).float()

    return {name: fetch(name) for name in shapes(c)}


def rounded(w: Weights) -> Weights:
    """The weights as the exported file has them, back in float32: what the shipped model computes with."""
    return {
        name: tensor.detach() if name.endswith(FLOAT32_SUFFIXES) else tensor.detach().bfloat16().float()
        for name, tensor in w.items()
    }
