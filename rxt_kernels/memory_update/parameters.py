"""The parameters of a memory update, as plain tuples of tensors (specification 2.10 to 2.12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GATE_KINDS = ("add", "replace", "static", "elementwise", "linear")
GATE_ACTIVATIONS = ("sigmoid", "tanh")
NORM_KINDS = ("classic-rms", "rms", "adaptive", "positional", "layer")
VARIANTS = ("simple", "self", "interlayer", "gated-self-interlayer", "grouped-self-interlayer")
PADDINGS = ("mask", "dilute")


class ResidualGateParameters(NamedTuple):
    """A residual connection of the memory, with or without a gate (specification 2.10)."""

    kind: str
    """"add" (old + new), "replace" (new), "static", "elementwise" or "linear"."""
    weight: Tensor | None = None
    """static, elementwise: (S, 1) per slot, (1,) otherwise; linear: (S, S) per slot, (1, S) otherwise."""
    bias: Tensor | None = None
    """linear: (S,) per slot, (1,) otherwise."""
    status_weight: Tensor | None = None
    """(1, D): slot status by a linear layer instead of the mean over D; elementwise per slot, and linear."""
    status_bias: Tensor | None = None
    """(1,)."""
    per_slot: bool = True
    activation: str = "sigmoid"


class MemoryNormParameters(NamedTuple):
    """A norm over memory slots (specification 2.11)."""

    kind: str
    """"classic-rms", "rms", "adaptive", "positional" or "layer"."""
    weight: Tensor | None = None
    """(D,): classic-rms, layer."""
    bias: Tensor | None = None
    """(D,): layer."""
    scale: Tensor | None = None
    """(D,), for positional also (S, 1): every kind but classic-rms."""
    gate: Tensor | None = None
    """One element, for positional (S, 1): every kind but classic-rms; sigmoid(gate) mixes normed and old."""
    ema_rms: Tensor | None = None
    """One element for adaptive, (S, 1) for positional: running mean of the rms, updated in place in training."""
    decay: float = 0.9
    """Share of the old running mean that is kept."""


class AttentionWeights(NamedTuple):
    """The projections of one attention, in the layout of torch.nn.Linear (specification 2.4)."""

    query: Tensor
    """(Hq * head_dim, D)."""
    key: Tensor
    """(Hkv * head_dim, D)."""
    value: Tensor
    """(Hkv * head_dim, D)."""
    output: Tensor
    """(D, max(Hq, Hkv) * head_dim)."""
    output_bias: Tensor | None
    """(D,)."""
    gate: Tensor | None
    """(max(Hq, Hkv) * head_dim, D): sigmoid(gate(query input)) multiplies the heads before the output projection."""
    query_heads: int
    key_value_heads: int
    head_dim: int


class MemoryUpdateLayer(NamedTuple):
    """Everything that one layer of memory attention owns (specification 2.12)."""

    memory_norm: MemoryNormParameters
    input_norm_weight: Tensor
    """(D,): the encoded interaction is always normed by RMSNorm."""
    attention: AttentionWeights
    residual_gate: ResidualGateParameters
    context_norm: MemoryNormParameters | None = None
    """Norm of the memory before the attention to other memory; every variant but simple."""
    context_attention: AttentionWeights | None = None
    context_gate: ResidualGateParameters | None = None
    interlayer_gate: ResidualGateParameters | None = None
    """Gate between a layer's own memory and the mean of the layers; the gated variants."""


def flat_values(parameter: Tensor | None) -> Tensor | None:
    """The values of a parameter in a row, as float32 and without gradient; a view where it is like that."""
    if parameter is None:
        return None
    values = parameter.detach()
    if values.dim() == 1 and values.dtype is torch.float32 and values.is_contiguous():
        return values  # as nearly all are; each operation spared here is spared hundreds of times in a memory write
    return values.float().reshape(-1).contiguous()
