"""The memory update once more, in numpy and float64, one batch row and one layer at a time.

Written from specification 2.4 and 2.10 to 2.12 without looking at the reference; slow and literal on purpose. Running
means are returned and never changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rxt_kernels import AttentionWeights, MemoryNormParameters, MemoryUpdateLayer, ResidualGateParameters

Array = Any


def array(tensor: Tensor | None) -> Array:
    return None if tensor is None else tensor.detach().double().numpy()


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gate_oracle(old: Array, new: Array, gate: ResidualGateParameters) -> Array:
    """(S, D) and (S, D) -> (S, D), for one row of the batch."""
    if gate.kind == "add":
        return old + new
    if gate.kind == "replace":
        return new
    slots = old.shape[0]
    total = old + new
    weight, bias = array(gate.weight), array(gate.bias)
    if gate.status_weight is not None:
        status = np.array([total[s] @ array(gate.status_weight)[0] + array(gate.status_bias)[0] for s in range(slots)])
    else:
        status = np.array([total[s].mean() for s in range(slots)])
    out = np.empty_like(old)
    for s in range(slots):
        if gate.kind == "static":
            before = weight[s, 0] if gate.per_slot else weight[0]
        elif gate.kind == "elementwise":
            before = weight[s, 0] * status[s] if gate.per_slot else weight[0] * total.mean()
        else:
            row = s if gate.per_slot else 0
            before = sum(weight[row, other] * status[other] for other in range(slots)) + bias[row]
        if gate.activation == "sigmoid":
            opening = sigmoid(before)
            out[s] = opening * new[s] + (1 - opening) * old[s]
        else:
            opening = np.tanh(before)
            out[s] = (1 + opening) * new[s] + (1 - opening) * old[s]
    return out


def norm_oracle(
    x: Array, norm: MemoryNormParameters, training: bool, eps: float, means: dict[int, Array] | None = None
) -> Array:
    """(B, S, D) -> (B, S, D); `means` holds the running means by the id of their tensor and is updated."""
    if norm.kind == "classic-rms":
        return rms_norm(x, array(norm.weight), eps)
    scale, mix = array(norm.scale), sigmoid(array(norm.gate))
    if norm.kind == "layer":
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        normed = (centred / deviation * array(norm.weight) + array(norm.bias)) * scale
        return mix * normed + (1 - mix) * x
    r = np.sqrt((x**2).mean(-1, keepdims=True))
    if norm.kind != "rms":
        means = {} if means is None else means
        ema = means.get(id(norm.ema_rms), array(norm.ema_rms))
        if training:
            now = np.sqrt((x**2).mean()) if norm.kind == "adaptive" else r.mean(0)
            ema = norm.decay * ema + (1 - norm.decay) * now
            means[id(norm.ema_rms)] = ema
        if norm.kind == "positional" or training:
            r = ema
    return mix * (x / np.sqrt(r + 1e-6) * scale) + (1 - mix) * x


def attention_oracle(
    weights: AttentionWeights,
    queries: Array,
    keys: Array,
    visible: Array,
    angles: Array | None,
    layout: str,
) -> Array:
    """(S, D), (T, D) -> (S, D) for one row; head by head, query by query."""
    head_dim, half = weights.head_dim, weights.head_dim // 2
    q, k, v = queries @ array(weights.query).T, keys @ array(weights.key).T, keys @ array(weights.value).T
    heads = max(weights.query_heads, weights.key_value_heads)
    out = np.zeros((queries.shape[0], heads * head_dim))
    for h in range(heads):
        if weights.query_heads >= weights.key_value_heads:
            own_query, own_key = h, h // (weights.query_heads // weights.key_value_heads)
        else:
            own_query, own_key = h % weights.query_heads, h
        qh = q[:, own_query * head_dim : (own_query + 1) * head_dim]
        kh = k[:, own_key * head_dim : (own_key + 1) * head_dim]
        vh = v[:, own_key * head_dim : (own_key + 1) * head_dim]
        if angles is not None:
            turned = np.empty_like(kh)
            for t in range(kh.shape[0]):
                for j in range(half):
                    cos, sin = np.cos(angles[t, j]), np.sin(angles[t, j])
                    a, b = kh[t, 2 * j], kh[t, 2 * j + 1]
                    places = (2 * j, 2 * j + 1) if layout == "interleaved" else (j, half + j)
                    turned[t, places[0]], turned[t, places[1]] = a * cos - b * sin, a * sin + b * cos
            kh = turned
        for s in range(queries.shape[0]):
            if not visible.any():
                continue
            scores = (kh[visible] @ qh[s]) / np.sqrt(head_dim)
            share = np.exp(scores - scores.max())
            out[s, h * head_dim : (h + 1) * head_dim] = (share / share.sum()) @ vh[visible]
    if weights.gate is not None:
        out = out * sigmoid(queries @ array(weights.gate).T)
    out = out @ array(weights.output).T
    return out if weights.output_bias is None else out + array(weights.output_bias)


def memory_update_oracle(
    memory: Tensor,
    encoded: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    variant: str,
    mean_norm: MemoryNormParameters | None = None,
    groups: int = 1,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    padding: str = "mask",
    training: bool = False,
    eps: float = 2.220446049250313e-16,
) -> tuple[Array, dict[int, Array]]:
    """(new memory (L, B, S, D), running means by the id of their tensor)."""
    ed = array(encoded).copy()
    number, batch, time, _ = ed.shape
    old = np.broadcast_to(array(memory), (number, batch, *memory.shape[2:])).copy()
    mask = np.ones((batch, time), dtype=bool) if key_mask is None else key_mask.numpy()
    angles = None if key_angles is None else array(key_angles)
    means: dict[int, Array] = {}
    size = number // groups
    normed_means = []
    if mean_norm is not None:
        for group in range(groups):
            members = old[group * size : (group + 1) * size]
            normed_means.append(norm_oracle(sum(members) / size, mean_norm, training, eps, means))
    new = np.empty_like(old)
    for i, layer in enumerate(layers):
        z = old[i].copy()
        everything = np.ones(old.shape[2], dtype=bool)
        if variant != "simple":
            p = norm_oracle(old[i], layer.context_norm, training, eps, means)
            for b in range(batch):
                if variant == "self":
                    context = p[b]
                else:
                    context = normed_means[i // size][b]
                    if variant != "interlayer":
                        context = gate_oracle(p[b], context, layer.interlayer_gate)
                read = attention_oracle(layer.context_attention, p[b], context, everything, None, rotary_layout)
                z[b] = gate_oracle(old[i][b], read, layer.context_gate)
        q = norm_oracle(z, layer.memory_norm, training, eps, means)
        for b in range(batch):
            rows = ed[i][b].copy()
            visible = mask[b]
            if padding == "dilute":
                rows[~mask[b]] = 0.0
                visible = np.ones(time, dtype=bool)
            e = rms_norm(rows, array(layer.input_norm_weight), eps)
            own_angles = angles[b] if angles is not None and angles.ndim == 3 else angles
            written = attention_oracle(layer.attention, q[b], e, visible, own_angles, rotary_layout)
            new[i][b] = gate_oracle(z[b], written, layer.residual_gate) if mask[b].any() else old[i][b]
    return new, means
