"""Every op of every backend against a plain float64 formula, from the one table of cases.

The formulas here are loops over elements of the definition; they share no code with the kernels, and decode
weights bit by bit on their own.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from qwenrun.kernels import ops, ref
from qwenrun.kernels.cases import SPECS, Case, cases, inputs
from qwenrun.kernels.dispatch import backends, refusal
from qwenrun.kernels.weight import Weight

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(bits: int) -> float:
    sign, exponent, mantissa = -1.0 if bits & 128 else 1.0, bits >> 3 & 15, bits & 7
    if bits & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def naive_decode(w: Weight) -> np.ndarray:
    """[.., R, C] float64, one value at a time from the format's definition."""
    if w.spec.plain:
        return w.codes.double().numpy()
    lead = w.codes.shape[:-2]
    out = np.zeros((*lead, w.rows, w.cols))
    if w.spec.tile:
        return naive_tiles(w, out)
    for at in np.ndindex(*lead, w.rows):
        codes, scales = w.codes[at].tolist(), w.scales[at].tolist()
        row = at[-1]
        factor = 1.0
        if w.tensor_scale is not None:
            per_matrix = w.tensor_scale[at[:-1]].tolist()
            factor = per_matrix[row * len(per_matrix) // w.rows]
        for c in range(w.cols):
            code = codes[c] if w.spec.codes == "int8" else codes[c // 2] >> 4 * (c % 2) & 15
            block = c // w.spec.block
            if w.spec.codes == "e2m1":
                value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7]
            elif w.spec.codes == "int8":
                value = float(code)
            elif w.zeros is not None:
                value = float(code - (w.zeros[at].tolist()[block // 2] >> 4 * (block % 2) & 15))
            else:
                value = float(code - 8)
            scale = scales[block]
            if w.spec.scale == "e4m3":
                scale = e4m3(scale)
            elif w.spec.scale == "e8m0":
                scale = 2.0 ** (scale - 127)
            out[(*at, c)] = value * scale * factor
    return out


def naive_tiles(w: Weight, out: np.ndarray) -> np.ndarray:
    """`naive_decode` for 16 rows interleaved: where a value lies, from the description of the layout."""
    blocks = w.cols // w.spec.block
    for at in np.ndindex(*out.shape[:-1]):
        matrix, row = at[:-1], at[-1]
        line, r = (*matrix, row // 16), row % 16
        codes, scales = w.codes[line].tolist(), w.scales[line].tolist()
        zeros = None if w.zeros is None else w.zeros[line].tolist()
        factor = 1.0
        if w.tensor_scale is not None:
            per_matrix = w.tensor_scale[matrix].tolist()
            factor = per_matrix[row * len(per_matrix) // w.rows]
        assert len(scales) == 16 * blocks
        for c in range(w.cols):
            byte, block = codes[c // 8 * 64 + 4 * r + c % 4], c // w.spec.block
            code = byte >> 4 if c % 8 >= 4 else byte & 15
            scale = scales[16 * block + r]
            if w.spec.codes == "e2m1":
                scale = e4m3(scale) if w.spec.scale == "e4m3" else 2.0 ** (scale - 127)
                value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7]
            else:
                value = float(code - (8 if zeros is None else zeros[8 * block + r % 8] >> 4 * (r // 8) & 15))
            out[(*at, c)] = value * scale * factor
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def naive_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def naive(case: Case, args: tuple) -> list[np.ndarray]:
    """The op's result, then its states afterwards."""
    a = [x.double().numpy() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    if case.op == "linear":
        return [a[0] @ naive_decode(args[1]).T]
    if case.op == "embedding":
        return [naive_decode(args[1])[args[0].numpy()]]
    if case.op == "experts":
        x, gate_up, down = a[0], naive_decode(args[1]), naive_decode(args[2])
        out = np.zeros_like(x)
        for t in range(len(x)):
            for expert, weight in zip(args[3][t].tolist(), a[4][t]):
                both = gate_up[expert] @ x[t]
                half = len(both) // 2
                out[t] += weight * (down[expert] @ (silu(both[:half]) * both[half:]))
        return [out]
    if case.op == "linears":
        x = a[3] if a[1] is None else naive_norm(a[3], a[1] + 1, a[2])
        return [x @ naive_decode(w).T for w in args[0]]
    if case.op == "swiglu":
        gate, up, down = (naive_decode(w) for w in args[:3])
        return [(silu(a[3] @ gate.T) * (a[3] @ up.T)) @ down.T]
    if case.op == "moe_entry":
        gate, up, down, shared_gate = (naive_decode(args[i]) for i in (4, 5, 6, 7))
        stream = a[8] + a[9]
        normed = naive_norm(stream, a[0] + 1, a[1])
        routed = (torch.from_numpy(normed), args[2], args[3])
        index, weight = naive(Case("router", case.dims, 0, 0, 0), routed)
        share = 1 / (1 + np.exp(-normed @ shared_gate.T))
        base = stream + share * ((silu(normed @ gate.T) * (normed @ up.T)) @ down.T)
        return [stream, normed, index, weight, base]
    if case.op == "router":
        logits = a[0] @ naive_decode(args[1]).T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        index = np.argsort(-p, axis=-1, kind="stable")[:, : args[2]]
        weight = np.take_along_axis(p, index, -1)
        return [index, weight / weight.sum(-1, keepdims=True)]
    if case.op == "attention":
        q, k, v, scale = a
        out = np.zeros_like(q)
        ratio = q.shape[1] // k.shape[1]
        for t in range(len(q)):
            seen = len(k) - len(q) + t + 1
            for h in range(q.shape[1]):
                scores = k[:seen, h // ratio] @ q[t, h] * scale
                p = np.exp(scores - scores.max())
                out[t, h] = p @ v[:seen, h // ratio] / p.sum()
        return [out]
    if case.op == "decode_attention":
        keys, values, at = args[3].clone(), args[4].clone(), case.dims["p"]
        keys[at], values[at] = args[1][0].to(keys.dtype), args[2][0].to(values.dtype)
        whole = Case("attention", {**case.dims, "T": 1}, 0, 0, 0)
        out = naive(whole, (args[0], keys[: at + 1], values[: at + 1], args[6]))[0]
        return [out, keys.double().numpy(), values.double().numpy()]
    if case.op == "largest":
        order = np.argsort(-a[0], kind="stable")[: args[1]]
        return [a[0][order], order]
    if case.op == "delta_rule":
        q, k, v, g, beta, state = a
        state = state.copy()
        out = np.zeros_like(v)
        ratio = v.shape[1] // k.shape[1]
        for t in range(len(v)):
            for h in range(v.shape[1]):
                kh, qh = (x[t, h // ratio] / np.sqrt((x[t, h // ratio] ** 2).sum() + 1e-6) for x in (k, q))
                state[h] *= np.exp(g[t, h])
                state[h] += np.outer(kh, beta[t, h] * (v[t, h] - kh @ state[h]))
                out[t, h] = qh / np.sqrt(len(qh)) @ state[h]
        return [out, state]
    if case.op == "conv":
        u, weight, state = a
        window = np.concatenate([state, u])
        out = np.stack([sum(window[t + i] * weight[:, i] for i in range(4)) for t in range(len(u))])
        return [silu(out), window[-3:]]
    if case.op == "delta_net":
        d, tokens = case.dims, case.dims["T"]
        mixed, window = naive(Case("conv", d, 0, 0, 0), (args[0], args[4], args[5]))
        keys = d["nk"] * d["dk"]
        q, k, v = (torch.from_numpy(x) for x in np.split(mixed, [keys, 2 * keys], axis=1))
        g, beta = a[6] * np.log1p(np.exp(a[3] + a[7])), 1 / (1 + np.exp(-a[2]))
        heads = [x.reshape(tokens, -1, d["dk"]) for x in (q, k)] + [v.reshape(tokens, -1, d["dv"])]
        rule = (*heads, torch.from_numpy(g), torch.from_numpy(beta), args[10])
        out, state = naive(Case("delta_rule", d, 0, 0, 0), rule)
        o, w, z = torch.from_numpy(out), args[8], args[1].reshape(tokens, -1, d["dv"])
        out = naive(Case("gated_rms_norm", d, 0, 0, 0), (o, w, z, 1e-6))[0]
        return [out.reshape(tokens, -1), window, state]
    if case.op == "rms_norm":
        x, w, eps, zero_centred = a
        return [naive_norm(x, w + 1 if zero_centred else w, eps)]
    if case.op == "gated_rms_norm":
        o, w, z, eps = a
        return [naive_norm(o, w, eps) * silu(z)]
    if case.op == "apply_rope":
        x, cos, sin = a
        out = x.copy()
        half = cos.shape[1]
        for j in range(half):
            c, s = cos[:, j, None], sin[:, j, None]
            out[..., j] = x[..., j] * c - x[..., j + half] * s
            out[..., j + half] = x[..., j + half] * c + x[..., j] * s
        return [out]
    raise AssertionError(case.op)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def guarded(state: Tensor) -> tuple[Tensor, Tensor]:
    """The state as a view into a poisoned buffer: (buffer, view)."""
    buffer = torch.full((state.shape[0] + 2, *state.shape[1:]), math.nan, dtype=state.dtype)
    buffer[1:-1] = state
    return buffer, buffer[1:-1]


STATES = {"decode_attention": (3, 4), "delta_rule": (5,), "conv": (2,), "delta_net": (5, 10)}


@pytest.mark.parametrize("backend", list(backends()))
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_case(case: Case, backend: str) -> None:
    if why := refusal(backend, case.op, "cpu", case.spec):
        pytest.skip(f"{backend} {why}")
    seed = random.randrange(1 << 31)
    args = list(inputs(case, torch.Generator().manual_seed(seed)))
    expected = naive(case, tuple(x.clone() if isinstance(x, Tensor) else x for x in args))
    buffers = []
    for at in STATES.get(case.op, ()):
        buffer, args[at] = guarded(args[at])
        buffers.append(buffer)
    before = [x.clone() if isinstance(x, Tensor) else None for x in args]
    kernel = getattr(backends()[backend], case.op)
    own = ops.FACTORIES.get(case.op)
    result = kernel(*args[:own])(*args[own:]) if own else kernel(*args)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    bound = case.bound_of(backends()[backend].BACKEND)
    results += [args[at] for at in STATES.get(case.op, ())]
    for buffer in buffers:
        assert buffer[0].isnan().all()
        assert buffer[-1].isnan().all()
    for got, wanted in zip(results, expected, strict=True):
        assert list(got.shape) == list(wanted.shape)
        assert distance(got.double().numpy(), np.asarray(wanted, dtype=float)) <= bound, f"seed {seed}"
    for number, (old, new) in enumerate(zip(before, args)):
        if old is not None and number not in STATES.get(case.op, ()):
            assert torch.equal(old, new), f"argument {number} was changed (seed {seed})"


def test_every_op_has_a_case() -> None:
    covered = {case.op for case in cases()}
    assert set(ops.OPS) - covered == {"encode", "decode", "fit", "rope_tables"}  # these have tests of their own


def test_a_wrong_kernel_would_fail() -> None:
    """The bounds can tell: a value head on the wrong key head, a nibble swapped, a tap reversed."""
    for case in cases():
        if case.name.startswith(("delta_rule-T5", "conv-T3", "linear-int4-g128-T1")):
            args = list(inputs(case, torch.Generator().manual_seed(1)))
            expected = naive(case, tuple(x.clone() if isinstance(x, Tensor) else x for x in args))
            if case.op == "delta_rule" or case.op == "conv":
                args[1] = args[1].flip(1)
            else:
                codes = args[1].codes
                args[1].codes = (codes >> 4) | (codes << 4)
            for package in backends().values():
                bound = case.bound_of(package.BACKEND)
                if not refusal(package.BACKEND.name, case.op, "cpu", case.spec):
                    got = getattr(package, case.op)(*args).double().numpy()
                    assert distance(got, expected[0]) > min(100 * bound, 0.3)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100])
def test_delta_rule_continues_from_its_state(cut: int) -> None:
    case = next(c for c in cases() if c.name.startswith("delta_rule-T150"))
    args = inputs(case, torch.Generator().manual_seed(cut))
    whole_state, state = args[5].clone(), args[5].clone()
    whole = ops.delta_rule(*args[:5], whole_state)
    parts = [ops.delta_rule(*(x[part] for x in args[:5]), state) for part in (slice(0, cut), slice(cut, None))]
    assert distance(torch.cat(parts).numpy(), whole.numpy()) < 1e-5
    assert distance(state.numpy(), whole_state.numpy()) < 1e-5


def test_delta_rule_with_extreme_decay() -> None:
    """A state that is forgotten at once must give no overflow and no NaN."""
    case = next(c for c in cases() if c.name.startswith("delta_rule-T150"))
    args = list(inputs(case, torch.Generator().manual_seed(3)))
    args[3] = torch.full_like(args[3], -200.0)
    expected = naive(case, tuple(x.clone() for x in args))[0]
    assert distance(ops.delta_rule(*args).double().numpy(), expected) < 1e-4


def test_large_linear_is_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("qwenrun.kernels.ref.linear")
    monkeypatch.setattr(module, "DECODE_VALUES", 7 * 384)
    for storage in ("nvfp4", "int4-g32-zero", "bf16"):
        weight = ops.encode(torch.randn(50, 384), SPECS[storage], tensor_scales=2)
        x = torch.randn(3, 384)
        assert distance(module.linear(x, weight).double().numpy(), x.double().numpy() @ naive_decode(weight).T) < 1e-5


def test_experts_on_strided_records() -> None:
    """Expert stacks as they lie in a pack: records with other bytes between them."""
    gate_up = ops.encode(torch.randn(3, 64, 128), SPECS["nvfp4"], tensor_scales=2)
    down = ops.encode(torch.randn(3, 128, 32), SPECS["int4-g32-zero"])
    strided = []
    for weight in (gate_up, down):
        parts = {}
        for name, tensor in weight.parts.items():
            record = torch.full((3, tensor[0].numel() * 2 + 5), 77).to(tensor.dtype)
            record[:, 5 : 5 + tensor[0].numel()] = tensor.flatten(1)
            parts[name] = record[:, 5 : 5 + tensor[0].numel()].unflatten(1, tensor.shape[1:])
        strided.append(Weight.from_parts(weight.spec, weight.rows, weight.cols, parts))
    x, index = torch.randn(4, 128), torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]])
    weight = torch.rand(4, 2)
    for tokens in (1, 4):
        args = x[:tokens], index[:tokens], weight[:tokens]
        plain = ops.experts(args[0], gate_up, down, *args[1:])
        assert torch.equal(plain, ops.experts(args[0], *strided, *args[1:]))


def rope_angle(position: float, slot: int, theta: float, rotary: int) -> float:
    return position * theta ** (-2 * slot / rotary)


def test_rope_tables_axes() -> None:
    positions = torch.tensor([[5, 9], [100, 3], [1000, 70]])
    cos, sin = ops.rope_tables(positions, 1e7, 64, (11, 11, 10))
    for j in range(32):
        axis = j % 3 if j < 3 * (11, 11, 10)[j % 3] else 0
        for t in range(2):
            angle = rope_angle(positions[axis, t].item(), j, 1e7, 64)
            assert cos[t, j].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert sin[t, j].item() == pytest.approx(math.sin(angle), abs=2e-4)
    flat = ops.rope_tables(torch.tensor([5, 9]), 1e7, 64, (11, 11, 10))
    same = ops.rope_tables(torch.tensor([[5, 9]] * 3), 1e7, 64, (11, 11, 10))
    assert torch.equal(flat[0], same[0])
    assert torch.equal(flat[1], same[1])


@pytest.mark.parametrize(
    ("factor", "gain", "multipliers"),
    [
        (4.0, 1.1386294, {0: 1, 14: 1, 15: 0.90625, 18: 0.625, 21: 0.34375, 22: 0.25, 31: 0.25}),
        (2.0, 1.0693147, {0: 1, 14: 1, 22: 0.5, 31: 0.5}),
    ],
)
def test_yarn(factor: float, gain: float, multipliers: dict[int, float]) -> None:
    """The published multipliers of this model's YaRN: theta 1e7, 64 rotary dimensions, 262,144 positions."""
    cos, sin = ops.rope_tables(torch.tensor([1]), 1e7, 64, None, (factor, 262144))
    angle = torch.atan2(sin[0], cos[0]).double()
    assert torch.hypot(cos, sin).mean().item() == pytest.approx(gain, abs=1e-6)
    for slot, multiplier in multipliers.items():
        assert angle[slot].item() == pytest.approx(rope_angle(1, slot, 1e7, 64) * multiplier, rel=1e-5)


def test_attention_memory_is_bounded() -> None:
    """8 heads x 512 x 6,000 scores would take 94 MiB at once; the blocks take less than a third of that."""
    from torch.profiler import ProfilerActivity, profile

    q, k = torch.randn(512, 8, 16), torch.randn(6000, 1, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        ref.attention(q, k, k, 0.25)
    largest = max((abs(e.cpu_memory_usage) for e in recorded.events() if e.name == "aten::bmm"), default=0)
    assert 0 < largest < 30 << 20
