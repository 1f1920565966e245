"""The weights of a decoder as plain tuples of tensors, in the order in which a token meets them.

An engine is built from these and knows no modules; whoever has modules (``rxt_model``) makes the tuples. The tensors are
those of the model wherever their layout allows it, so that nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import AttentionWeights
from rxt_kernels.mixture_of_experts import SharedExperts
from rxt_kernels.mixture_of_experts.reference import ExpertTensors


class NormWeights(NamedTuple):
    """RMSNorm, or LayerNorm where there is a bias."""

    weight: Tensor
    """(D,)."""
    bias: Tensor | None = None
    """(D,)."""


class FeedForwardWeights(NamedTuple):
    """A dense feed-forward network (specification 2.7), matrices as in torch.nn.Linear."""

    first: Tensor
    """(2F, D) gated, linear half first; else (F, D)."""
    first_bias: Tensor
    second: Tensor
    """(D, F)."""
    second_bias: Tensor
    gated: bool
    activation: str


class ExpertWeights(NamedTuple):
    """A mixture of experts (specification 2.8), in either layout of :data:`ExpertTensors`."""

    router: Tensor
    """(E, D)."""
    w1: ExpertTensors
    """(E, D, 2F) gated, else (E, D, F), applied as x @ w1[e]; or E matrices as torch.nn.Linear has them."""
    w2: ExpertTensors
    """(E, F, D), or E matrices (D, F)."""
    b1: ExpertTensors | None
    b2: ExpertTensors | None
    global_bias: Tensor | None
    """(D,)."""
    shared: SharedExperts | None
    top_k: int
    gated: bool
    activation: str
    router_dtype: torch.dtype | None


class MemoryReadWeights(NamedTuple):
    """The memory cross-attention of one layer (specification 2.6)."""

    slots_norm: NormWeights
    """Norm of the slots, before keys and values are projected."""
    query_norm: NormWeights
    attention: AttentionWeights
    layer: int
    """Which layer of the memory is read."""


class DecoderLayerWeights(NamedTuple):
    """One layer: self-attention, perhaps a memory read, a feed-forward network."""

    attention_norm: NormWeights
    attention: AttentionWeights
    memory_read: MemoryReadWeights | None
    feed_forward_norm: NormWeights
    feed_forward: FeedForwardWeights | ExpertWeights


class EncoderWeights(NamedTuple):
    """A whole encoder: the same layers, in which every token sees all of its message."""

    embedding: Tensor
    """(V, D)."""
    layers: tuple[DecoderLayerWeights, ...]
    """Without memory reads."""
    inverse_frequencies: Tensor | None
    """As those of :class:`DecoderWeights`, like what follows."""
    rotary_layout: str
    rounds_angles: bool
    gate_activation: str


class DecoderWeights(NamedTuple):
    """A whole decoder."""

    embedding: Tensor
    """(V, D)."""
    layers: tuple[DecoderLayerWeights, ...]
    head_norm: NormWeights | None
    head: Tensor
    """(V, D)."""
    head_bias: Tensor | None
    """(V,)."""
    inverse_frequencies: Tensor | None
    """(head_dim / 2,) float32, on the device of the embedding; None where nothing is rotated."""
    rotary_layout: str
    rounds_angles: bool
    """Whether angles are rounded to the dtype of the model (specification 2.2)."""
    gate_activation: str
    """Of gated attention."""


def with_stacked_experts(weights: DecoderWeights) -> DecoderWeights:
    """The same with the experts of a layer in one tensor, as kernels for GPUs read them; separate ones are copied."""

    def stacked(tensors: ExpertTensors | None) -> Tensor | None:
        if tensors is None or isinstance(tensors, Tensor):
            return tensors
        one = torch.stack([tensor.detach() for tensor in tensors])
        return one.transpose(1, 2).contiguous() if one.dim() == 3 else one

    layers = []
    for layer in weights.layers:
        network = layer.feed_forward
        if isinstance(network, ExpertWeights):
            w1, w2 = stacked(network.w1), stacked(network.w2)
            assert w1 is not None
            assert w2 is not None
            network = network._replace(w1=w1, w2=w2, b1=stacked(network.b1), b2=stacked(network.b2))
        layers.append(layer._replace(feed_forward=network))
    return weights._replace(layers=tuple(layers))
