"""A decoder's weights as the native engine takes them: packed once, with what a task of a thread uses standing together.

Query, key, value and gate projections of an attention are one matrix. The linear half and the gate of an expert's first product
take turns panel by panel, so that the activation follows while both are at hand. The experts of a layer are one matrix, each
filled up to whole panels. A dense network is one shared expert.

Parameters are read where they are, one matrix at a time: beside the packed weights, no more than one matrix exists twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.decode.huge_pages import Arena
from rxt_kernels.decode.weights import (
    DecoderLayerWeights,
    DecoderWeights,
    EncoderWeights,
    ExpertWeights,
    FeedForwardWeights,
    MemoryReadWeights,
    NormWeights,
)
from rxt_kernels.memory_update.parameters import AttentionWeights
from rxt_kernels.mixture_of_experts.reference import ExpertTensors
from rxt_kernels.packed_weights import PRECISIONS, pack_into, packed_elements

PANEL = 16


def _whole(count: int) -> int:
    return -(-count // PANEL) * PANEL


def _values(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


class _Packer:
    """Packs matrices one behind the other, in the order in which a token meets them."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._arena = Arena()

    def matrix(self, matrix: Tensor, bias: Tensor | None = None, precision: str | None = None) -> tuple[Any, ...]:
        """(data, scales, outputs, inputs, bias) of a matrix (outputs, inputs)."""
        outputs, inputs = matrix.shape
        return self.stacked([matrix], None if bias is None else [bias], outputs, inputs, precision)

    def stacked(
        self,
        matrices: Iterable[Tensor],
        biases: Sequence[Tensor] | None,
        outputs: int,
        inputs: int,
        precision: str | None = None,
    ) -> tuple[Any, ...]:
        """The same of matrices with so many outputs together; each but the last fills whole panels."""
        precision = precision or self._precision
        data = self._arena.take(packed_elements(precision, outputs, inputs), PRECISIONS[precision])
        scales = torch.empty(_whole(outputs)) if precision == "int8" else None
        first = element = 0
        for matrix in matrices:
            last = first + _whole(len(matrix))
            after = element + packed_elements(precision, len(matrix), inputs)
            pack_into(matrix, data[element:after], None if scales is None else scales[first:last])
            first, element = last, after
        bias = None
        if biases is not None:
            bias = torch.zeros(_whole(outputs))
            bias[:outputs] = torch.cat([one.detach().float() for one in biases])
        return data, scales, outputs, inputs, bias


def _norm(norm: NormWeights) -> tuple[Tensor | None, Tensor | None]:
    return _values(norm.weight), _values(norm.bias)


def _attention(norm: NormWeights, weights: AttentionWeights, with_keys: bool, packer: _Packer) -> dict[str, Any]:
    parts = [weights.query, *((weights.key, weights.value) if with_keys else ())]
    if weights.gate is not None:
        parts.append(weights.gate)
    return {
        "norm": _norm(norm),
        "input": packer.matrix(torch.cat([part.detach() for part in parts])),
        "output": packer.matrix(weights.output, weights.output_bias),
        "query_heads": weights.query_heads,
        "key_value_heads": weights.key_value_heads,
        "head_dim": weights.head_dim,
        "gated": weights.gate is not None,
    }


def _memory_read(read: MemoryReadWeights, packer: _Packer) -> dict[str, Any]:
    slots = torch.cat([read.attention.key.detach(), read.attention.value.detach()])
    return {
        **_attention(read.query_norm, read.attention, False, packer),
        "slots_norm": _norm(read.slots_norm),
        "slots": packer.matrix(slots),
        "layer": read.layer,
    }


def _padded(rows: Tensor) -> Tensor:
    """(outputs, ...) filled up to whole panels by zeros."""
    missing = _whole(len(rows)) - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _by_turns(rows: Tensor, gated: bool) -> Tensor:
    """A first product (outputs, ...): whole panels, those of the linear half and of the gate by turns."""
    if not gated:
        return _padded(rows)
    halves = [_padded(half).unflatten(0, (-1, PANEL)) for half in rows.chunk(2)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def _experts(
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    gated: bool,
    packer: _Packer,
) -> dict[str, Any]:
    """Experts in either layout of :data:`ExpertTensors`."""

    def matrices(side: ExpertTensors) -> Iterator[Tensor]:
        for matrix in side:
            yield matrix.detach().t() if isinstance(side, Tensor) else matrix.detach()

    count = len(w2)
    first, second = next(matrices(w1)), next(matrices(w2))
    halves = 2 if gated else 1
    width = first.shape[0] // halves
    return {
        "count": count,
        "width": width,
        "gated": gated,
        "first": packer.stacked(
            (_by_turns(matrix, gated) for matrix in matrices(w1)),
            None if b1 is None else [_by_turns(bias.detach(), gated) for bias in b1],
            count * halves * _whole(width),
            first.shape[1],
        ),
        "second": packer.stacked(
            (_padded(matrix) for matrix in matrices(w2)),
            None if b2 is None else [_padded(bias.detach()) for bias in b2],
            count * _whole(second.shape[0]),
            width,
        ),
    }


def _dense(norm: NormWeights, weights: FeedForwardWeights, packer: _Packer) -> dict[str, Any]:
    return {
        "norm": _norm(norm),
        "gated": weights.gated,
        "activation": weights.activation,
        "routed": None,
        "shared": _experts(
            [weights.first], [weights.second], [weights.first_bias], [weights.second_bias], weights.gated, packer
        ),
        "router": None,
        "shared_gate": None,
        "top_k": 0,
        "routed_scale": 1.0,
        "shared_scale": 1.0,
        "output_bias": None,
    }


def _mixture(norm: NormWeights, weights: ExpertWeights, packer: _Packer) -> dict[str, Any]:
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
        # Routing decides which weights count at all: its own are few, and stay in float32.
        "router": packer.matrix(weights.router, precision="float32"),
        "shared_gate": None
        if shared is None or shared.gate_weight is None
        else packer.matrix(shared.gate_weight, precision="float32"),
        "routed": _experts(weights.w1, weights.w2, weights.b1, weights.b2, weights.gated, packer),
        "shared": None
        if shared is None
        else _experts(shared.w1, shared.w2, shared.b1, shared.b2, weights.gated, packer),
        "top_k": weights.top_k,
        "routed_scale": routed_scale,
        "shared_scale": shared_scale,
        "output_bias": None if output_bias is None else output_bias.contiguous(),
    }


def _layer(layer: DecoderLayerWeights, packer: _Packer) -> dict[str, Any]:
    network = layer.feed_forward
    make: Any = _mixture if isinstance(network, ExpertWeights) else _dense
    return {
        "attention": _attention(layer.attention_norm, layer.attention, True, packer),
        "memory_read": None if layer.memory_read is None else _memory_read(layer.memory_read, packer),
        "feed_forward": make(layer.feed_forward_norm, network, packer),
    }


def _network(weights: DecoderWeights | EncoderWeights, packer: _Packer) -> dict[str, Any]:
    return {
        "embedding": weights.embedding.detach(),
        "inverse_frequencies": _values(weights.inverse_frequencies),
        "splits_pairs": weights.rotary_layout == "split",
        "rounds_angles": weights.rounds_angles and weights.embedding.dtype is torch.bfloat16,
        "gate_activation": weights.gate_activation,
        "layers": [_layer(layer, packer) for layer in weights.layers],
    }


def native_decoder(weights: DecoderWeights, precision: str) -> dict[str, Any]:
    """What the engines of the extension share; they read it and hold no copy."""
    packer = _Packer(precision)
    return {
        **_network(weights, packer),
        "head_norm": None if weights.head_norm is None else _norm(weights.head_norm),
        "head": packer.matrix(weights.head, weights.head_bias),
    }


def native_encoder(weights: EncoderWeights, precision: str) -> dict[str, Any]:
    """The same of an encoder."""
    return {**_network(weights, _Packer(precision)), "head_norm": None, "head": None}
