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
    """A mixture of experts (specification 2.8), stacked over its E experts."""

    router: Tensor
    """(E, D)."""
    w1: Tensor
    """(E, D, 2F) gated, else (E, D, F); applied as x @ w1[e]."""
    w2: Tensor
    """(E, F, D)."""
    b1: Tensor | None
    b2: Tensor | None
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
