"""A decoder's weights as the native engine takes them: packed once, with what a task of a thread uses standing together.

Query, key, value and gate projections of an attention are one matrix. The linear half and the gate of an expert's first product
take turns panel by panel, so that the activation follows while both are at hand. The experts of a layer are one matrix, each
filled up to whole panels. A dense network is one shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.decode.weights import (
    DecoderLayerWeights,
    DecoderWeights,
    ExpertWeights,
    FeedForwardWeights,
    MemoryReadWeights,
    NormWeights,
)
from rxt_kernels.memory_update.parameters import AttentionWeights
from rxt_kernels.mixture_of_experts.reference import ExpertTensors
from rxt_kernels.packed_weights import pack_weights

PANEL = 16


def _whole(count: int) -> int:
    return -(-count // PANEL) * PANEL


def _values(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _matrix(matrix: Tensor, bias: Tensor | None, precision: str) -> tuple[Any, ...]:
    """(data, scales, outputs, inputs, bias) of a matrix (outputs, inputs)."""
    packed = pack_weights(matrix, precision)
    if bias is not None:
        bias = F.pad(bias.detach().float(), (0, _whole(packed.outputs) - packed.outputs)).contiguous()
    return (*packed, bias)


def _norm(norm: NormWeights) -> tuple[Tensor | None, Tensor | None]:
    return _values(norm.weight), _values(norm.bias)


def _attention(norm: NormWeights, weights: AttentionWeights, with_keys: bool, precision: str) -> dict[str, Any]:
    parts = [weights.query, *((weights.key, weights.value) if with_keys else ())]
    if weights.gate is not None:
        parts.append(weights.gate)
    return {
        "norm": _norm(norm),
        "input": _matrix(torch.cat([part.detach() for part in parts]), None, precision),
        "output": _matrix(weights.output, weights.output_bias, precision),
        "query_heads": weights.query_heads,
        "key_value_heads": weights.key_value_heads,
        "head_dim": weights.head_dim,
        "gated": weights.gate is not None,
    }


def _memory_read(read: MemoryReadWeights, precision: str) -> dict[str, Any]:
    slots = torch.cat([read.attention.key.detach(), read.attention.value.detach()])
    return {
        **_attention(read.query_norm, read.attention, False, precision),
        "slots_norm": _norm(read.slots_norm),
        "slots": _matrix(slots, None, precision),
        "layer": read.layer,
    }


def _padded_rows(matrix: Tensor) -> Tensor:
    """(E, outputs, ...) with outputs filled up to whole panels by zeros."""
    missing = _whole(matrix.shape[1]) - matrix.shape[1]
    return F.pad(matrix, (0, 0, 0, missing)) if matrix.dim() == 3 else F.pad(matrix, (0, missing))


def _by_turns(matrix: Tensor, gated: bool) -> Tensor:
    """First products (E, outputs, ...): whole panels, those of the linear half and of the gate by turns; flat over E."""
    if not gated:
        return _padded_rows(matrix).flatten(0, 1)
    halves = [_padded_rows(half).unflatten(1, (-1, PANEL)) for half in matrix.chunk(2, dim=1)]
    return torch.stack(halves, dim=2).flatten(0, 3)


def _experts(
    w1: Sequence[Tensor] | Tensor,
    w2: Sequence[Tensor] | Tensor,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    gated: bool,
    precision: str,
) -> dict[str, Any]:
    """Experts in either layout of :data:`ExpertTensors`."""
    if isinstance(w1, Tensor) and isinstance(w2, Tensor):
        first, second = w1.detach().transpose(1, 2), w2.detach().transpose(1, 2)
    else:
        first, second = (torch.stack([matrix.detach() for matrix in side]) for side in (w1, w2))

    def biases(side: ExpertTensors | None) -> Tensor | None:
        if side is None:
            return None
        return side.detach() if isinstance(side, Tensor) else torch.stack([bias.detach() for bias in side])

    first_bias, second_bias = biases(b1), biases(b2)
    return {
        "count": len(first),
        "width": second.shape[2],
        "gated": gated,
        "first": _matrix(
            _by_turns(first, gated), None if first_bias is None else _by_turns(first_bias, gated), precision
        ),
        "second": _matrix(
            _padded_rows(second).flatten(0, 1),
            None if second_bias is None else _padded_rows(second_bias).flatten(),
            precision,
        ),
    }


def _dense(norm: NormWeights, weights: FeedForwardWeights, precision: str) -> dict[str, Any]:
    return {
        "norm": _norm(norm),
        "gated": weights.gated,
        "activation": weights.activation,
        "routed": None,
        "shared": _experts(
            [weights.first], [weights.second], [weights.first_bias], [weights.second_bias], weights.gated, precision
        ),
        "router": None,
        "shared_gate": None,
        "top_k": 0,
        "routed_scale": 1.0,
        "shared_scale": 1.0,
        "output_bias": None,
    }


def _mixture(norm: NormWeights, weights: ExpertWeights, precision: str) -> dict[str, Any]:
    shared = weights.shared
    routed_scale = shared_scale = 1.0
    output_bias = None if weights.global_bias is None else weights.global_bias.detach().float()
    if shared is not None:
        number = len(shared.w1)
        if shared.weighted:
            routed_scale, shared_scale = (part / (weights.top_k + number) for part in (weights.top_k, number))
        if shared.global_bias is not None:
            own = shared.global_bias.detach().float() * shared_scale
            output_bias = own if output_bias is None else output_bias + own
    return {
        "norm": _norm(norm),
        "gated": weights.gated,
        "activation": weights.activation,
        "routed": _experts(weights.w1, weights.w2, weights.b1, weights.b2, weights.gated, precision),
        "shared": None
        if shared is None
        else _experts(shared.w1, shared.w2, shared.b1, shared.b2, weights.gated, precision),
        # Routing decides which weights count at all: its own are few, and stay in float32.
        "router": _matrix(weights.router, None, "float32"),
        "shared_gate": None
        if shared is None or shared.gate_weight is None
        else _matrix(shared.gate_weight, None, "float32"),
        "top_k": weights.top_k,
        "routed_scale": routed_scale,
        "shared_scale": shared_scale,
        "output_bias": None if output_bias is None else output_bias.contiguous(),
    }


def _layer(layer: DecoderLayerWeights, precision: str) -> dict[str, Any]:
    network = layer.feed_forward
    make: Any = _mixture if isinstance(network, ExpertWeights) else _dense
    return {
        "attention": _attention(layer.attention_norm, layer.attention, True, precision),
        "memory_read": None if layer.memory_read is None else _memory_read(layer.memory_read, precision),
        "feed_forward": make(layer.feed_forward_norm, network, precision),
    }


def native_decoder(weights: DecoderWeights, precision: str) -> dict[str, Any]:
    """What the engines of the extension share; they read it and hold no copy."""
    return {
        "embedding": weights.embedding.detach(),
        "inverse_frequencies": _values(weights.inverse_frequencies),
        "splits_pairs": weights.rotary_layout == "split",
        "rounds_angles": weights.rounds_angles and weights.embedding.dtype is torch.bfloat16,
        "gate_activation": weights.gate_activation,
        "layers": [_layer(layer, precision) for layer in weights.layers],
        "head_norm": None if weights.head_norm is None else _norm(weights.head_norm),
        "head": _matrix(weights.head, weights.head_bias, precision),
    }
