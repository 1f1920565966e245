"""The memory write by the native CPU kernels; see ``reference.py`` for the formula.

Norm and residual gate are one pass over memory each; attention of the slots runs in the native attention kernels, and the
projections, products of a thousand rows, in torch's. Layers follow each other: each is work for every core as it is. What
does not depend on the layer is done once: sines and cosines of the key positions, and the mean over layers with its norm.

A memory of batch 1 reads itself once; only its write is repeated for every row of the batch.

Where gradients are recorded, each part is an operation of its own that torch can differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.memory_update.native_gate import residual_gate_native
from rxt_kernels.memory_update.native_norm import memory_norm_native
from rxt_kernels.memory_update.parameters import AttentionWeights, MemoryNormParameters, MemoryUpdateLayer
from rxt_kernels.native_runtime import unsupported_tensors
from rxt_kernels.rms_norm.native import rms_norm_native
from rxt_kernels.sparse_query_attention import native as attention


def supports(
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
    attention_dropout: float = 0.0,
    context_attention_dropout: float = 0.0,
    training: bool = False,
) -> str | None:
    """None, or why this call is not for the native kernels."""
    if training and (attention_dropout or context_attention_dropout):
        return (
            f"attention_dropout is {attention_dropout} and context_attention_dropout {context_attention_dropout} in "
            "training; the kernels drop no attention weights."
        )
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, which changes the dtype of projections in between; native kernels take one dtype."
    for weights in (weights for layer in layers for weights in (layer.attention, layer.context_attention)):
        if weights is not None and weights.head_dim > attention.LARGEST_HEAD:
            return f"heads have {weights.head_dim} values; the kernels take at most {attention.LARGEST_HEAD}."
    if key_angles is not None and key_angles.requires_grad:
        return "key_angles require a gradient; the kernels have none for angles."
    return unsupported_tensors(memory, encoded, layers[0].input_norm_weight, layers[0].attention.query)


def _attention(
    weights: AttentionWeights,
    query_input: Tensor,
    key_input: Tensor,
    key_mask: Tensor | None = None,
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
    split: bool = False,
) -> Tensor:
    """query_input (1 | B, S, D), key_input (B, T, D) -> (B, S, D)."""
    query = F.linear(query_input, weights.query).unflatten(-1, (weights.query_heads, weights.head_dim))
    key = F.linear(key_input, weights.key).unflatten(-1, (weights.key_value_heads, weights.head_dim))
    value = F.linear(key_input, weights.value).unflatten(-1, (weights.key_value_heads, weights.head_dim))
    query = query.expand(key.shape[0], -1, -1, -1)
    scale = weights.head_dim**-0.5
    options = attention.Options(False, key_mask, None, None, None, *tables, split, scale)
    heads = attention.attend(query, key, value, options).flatten(-2)
    if weights.gate is not None:
        heads = heads * torch.sigmoid(F.linear(query_input, weights.gate))
    return F.linear(heads, weights.output, weights.output_bias)


def memory_update_native(
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
    attention_dropout: float = 0.0,
    context_attention_dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """memory (L, 1 | B, S, D), encoded (L, B, T, D) -> (L, B, S, D); as the reference."""
    number_of_layers = encoded.shape[0]
    attention_mask = key_mask
    if key_mask is not None and padding == "dilute":
        # where and not a product: whatever the padded rows hold, also NaN, is gone.
        encoded = torch.where(key_mask[None, :, :, None], encoded, encoded.new_zeros(()))
        attention_mask = None
    if attention_mask is not None:
        attention_mask = attention_mask.contiguous()
    tables = attention.rotary_tables(key_angles)
    means: list[Tensor] = []
    if mean_norm is not None:
        groups = groups if variant == "grouped-self-interlayer" else 1
        means = [
            memory_norm_native(group.mean(dim=0), mean_norm, training)
            for group in memory.split(number_of_layers // groups)
        ]

    updated = []
    for index, layer in enumerate(layers):
        state = memory[index]
        if variant != "simple":
            assert layer.context_norm is not None
            assert layer.context_attention is not None
            assert layer.context_gate is not None
            own = memory_norm_native(state, layer.context_norm, training)
            context = own
            if variant != "self":
                context = means[index * len(means) // number_of_layers]
                if variant != "interlayer":
                    assert layer.interlayer_gate is not None
                    context = residual_gate_native(own, context, layer.interlayer_gate)
            state = residual_gate_native(state, _attention(layer.context_attention, own, context), layer.context_gate)
        written = _attention(
            layer.attention,
            memory_norm_native(state, layer.memory_norm, training),
            rms_norm_native(encoded[index], layer.input_norm_weight),
            attention_mask,
            tables,
            rotary_layout == "split",
        )
        updated.append(residual_gate_native(state.expand_as(written), written, layer.residual_gate))
    new_memory = torch.stack(updated)
    if key_mask is not None:
        new_memory = torch.where(key_mask.any(dim=1)[None, :, None, None], new_memory, memory)
    return new_memory
