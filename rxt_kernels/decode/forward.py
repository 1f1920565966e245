"""A decoder as a function of its weights, over the public operations (specification 2.6).

The residual is added by the norm that follows, in one operation; otherwise this computes what the modules do, in their
order. How keys and values are kept is left to the caller's ``attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.decode.weights import DecoderWeights, ExpertWeights, FeedForwardWeights, NormWeights
from rxt_kernels.memory_cross_attention import memory_cross_attention
from rxt_kernels.memory_update.parameters import AttentionWeights
from rxt_kernels.mixture_of_experts import mixture_of_experts
from rxt_kernels.mixture_of_experts.reference import ACTIVATIONS
from rxt_kernels.rms_norm import add_rms_norm, rms_norm
from rxt_kernels.swiglu import swiglu

LAYER_NORM_EPSILON = 1e-5

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value), each (B, T, heads, head_dim) and not rotated -> (B, T, heads, head_dim)."""


class MemoryKeyValue(NamedTuple):
    """Keys and values of one layer of memory, each (1 or B, S, key/value heads, head_dim)."""

    key: Tensor
    value: Tensor


def _activated(name: str, x: Tensor) -> Tensor:
    return torch.tanh(x) if name == "tanh" else ACTIVATIONS[name](x)


def _norm(x: Tensor, norm: NormWeights) -> Tensor:
    if norm.bias is None:
        return rms_norm(x, norm.weight)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, LAYER_NORM_EPSILON)


def _add_norm(x: Tensor, change: Tensor | None, norm: NormWeights) -> tuple[Tensor, Tensor]:
    """The norm of x + change, and x + change."""
    if change is None:
        return _norm(x, norm), x
    if norm.bias is None:
        return add_rms_norm(change, x, norm.weight)
    total = x + change
    return _norm(total, norm), total


def _heads(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    return F.linear(x, weight).unflatten(-1, (-1, head_dim))


def _output(heads: Tensor, query_input: Tensor, attention: AttentionWeights, gate_activation: str) -> Tensor:
    mixed = heads.flatten(-2)
    if attention.gate is not None:
        mixed = mixed * _activated(gate_activation, F.linear(query_input, attention.gate))
    return F.linear(mixed, attention.output, attention.output_bias)


def _feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    hidden = F.linear(x, weights.first, weights.first_bias)
    if not weights.gated:
        hidden = _activated(weights.activation, hidden)
    elif weights.activation in ("silu", "swish"):
        hidden = swiglu(hidden)
    else:
        linear, gate = hidden.chunk(2, dim=-1)
        hidden = linear * _activated(weights.activation, gate)
    return F.linear(hidden, weights.second, weights.second_bias)


def _experts(x: Tensor, weights: ExpertWeights) -> Tensor:
    return mixture_of_experts(
        x,
        weights.router,
        weights.w1,
        weights.w2,
        top_k=weights.top_k,
        b1=weights.b1,
        b2=weights.b2,
        global_bias=weights.global_bias,
        activation=weights.activation,
        gated=weights.gated,
        shared=weights.shared,
        router_dtype=weights.router_dtype,
    ).output


def rotary_angles(weights: DecoderWeights, positions: Tensor) -> Tensor | None:
    """Angles (..., head_dim / 2) at integer positions (...); None where nothing is rotated."""
    if weights.inverse_frequencies is None:
        return None
    angles = positions[..., None].to(torch.float32) * weights.inverse_frequencies
    return angles.to(weights.embedding.dtype) if weights.rounds_angles else angles


def project_memory(weights: DecoderWeights, memory: Tensor) -> list[MemoryKeyValue]:
    """Keys and values of every layer that reads memory (L, 1 or B, S, D); valid until the memory changes."""
    projected = []
    for layer in weights.layers:
        if (read := layer.memory_read) is not None:
            slots = _norm(memory[read.layer], read.slots_norm)
            attention = read.attention
            projected.append(
                MemoryKeyValue(
                    _heads(slots, attention.key, attention.head_dim), _heads(slots, attention.value, attention.head_dim)
                )
            )
    return projected


def hidden_states(
    weights: DecoderWeights, tokens: Tensor, angles: Tensor | None, attend: Attend, memory: Sequence[MemoryKeyValue]
) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) through every layer.

    Args:
        weights: the decoder.
        tokens: (B, T) int64.
        angles: (T, head_dim / 2) or (B, T, head_dim / 2) at the positions of the tokens.
        attend: self-attention over what the caller keeps; rotates.
        memory: what :func:`project_memory` made.

    Returns:
        The residual stream (B, T, D) without the change of the last layer, and that change; see :func:`logits`.
    """
    x, change = F.embedding(tokens, weights.embedding), None
    stored = iter(memory)
    for depth, layer in enumerate(weights.layers):
        normed, x = _add_norm(x, change, layer.attention_norm)
        own = layer.attention
        sides = (_heads(normed, side, own.head_dim) for side in (own.query, own.key, own.value))
        change = _output(attend(depth, *sides), normed, own, weights.gate_activation)
        if (read := layer.memory_read) is not None:
            normed, x = _add_norm(x, change, read.query_norm)
            heads = memory_cross_attention(
                _heads(normed, read.attention.query, read.attention.head_dim),
                *next(stored),
                query_angles=angles,
                rotary_layout=weights.rotary_layout,
            )
            change = _output(heads, normed, read.attention, weights.gate_activation)
        normed, x = _add_norm(x, change, layer.feed_forward_norm)
        feed_forward = layer.feed_forward
        change = (
            _experts(normed, feed_forward)
            if isinstance(feed_forward, ExpertWeights)
            else _feed_forward(normed, feed_forward)
        )
    assert change is not None
    return x, change


def logits(weights: DecoderWeights, x: Tensor, change: Tensor) -> Tensor:
    """The vocabulary head on x + change: (..., D) to (..., V)."""
    hidden = x + change if weights.head_norm is None else _add_norm(x, change, weights.head_norm)[0]
    return F.linear(hidden, weights.head, weights.head_bias)
