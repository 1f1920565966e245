"""Memory update in Triton, all layers at once; see ``reference.py`` for the formula.

The layers of a memory do not read each other's new state, so they are one batch: norms and residual gates are kernels over
(L, B, S) with weights of every layer, projections are batched products, and the attention of layer l for batch row b is that
of row ``l * B + b``. A program belongs to one layer, the number of launches to none.

A memory of batch 1 is normed, projected, and read by the context attention once; only the queries of the main attention
are repeated for every row of the batch, because every row has keys of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import MemoryNormParameters, MemoryUpdateLayer, ResidualGateParameters
from rxt_kernels.memory_update.triton_gate import stacked_gate
from rxt_kernels.memory_update.triton_norm import shared_norm, stacked_norm
from rxt_kernels.memory_update.triton_rows import too_wide
from rxt_kernels.memory_update.triton_stacked import (
    StackedAttention,
    StackedLayers,
    difference,
    map_tensors,
    stack_layers,
    store_running_means,
)
from rxt_kernels.rotary.triton import unsupported_angles
from rxt_kernels.sparse_query_attention.triton import LARGEST_HEAD, sparse_query_attention_triton
from rxt_kernels.triton_runtime import unsupported_tensors

__all__ = [
    "memory_norm_triton",
    "memory_update_stacked",
    "memory_update_triton",
    "residual_gate_triton",
    "stack_layers",
    "supports",
    "supports_gate",
    "supports_norm",
]


def supports_gate(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> str | None:
    """None, or why this call is not for Triton."""
    return unsupported_tensors(old, new, *(value for value in gate if isinstance(value, Tensor))) or too_wide(old)


def residual_gate_triton(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> Tensor:
    """old, new (B, S, D) -> (B, S, D); as the reference."""
    return stacked_gate(old.unsqueeze(0), new.unsqueeze(0), map_tensors(_as_stack, gate)).squeeze(0)


def supports_norm(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> str | None:
    """None, or why this call is not for Triton."""
    if norm.ema_rms is not None and norm.ema_rms.requires_grad:
        return "ema_rms requires a gradient; the kernels have none for running means."
    return unsupported_tensors(x, *(value for value in norm if isinstance(value, Tensor))) or too_wide(x)


def memory_norm_triton(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> Tensor:
    """x (B, S, D) -> (B, S, D); as the reference."""
    return stacked_norm(x.unsqueeze(0), map_tensors(_as_stack, norm), training).squeeze(0)


def _as_stack(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


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
    """None, or why this call is not for Triton."""
    if training and (attention_dropout or context_attention_dropout):
        return (
            f"attention_dropout is {attention_dropout} and context_attention_dropout {context_attention_dropout} in "
            "training; the kernels drop no attention weights."
        )
    if (reason := difference(layers)) is not None:
        return reason
    for attention in (layers[0].attention, layers[0].context_attention):
        if attention is not None and (attention.head_dim > LARGEST_HEAD or attention.head_dim % 2):
            return f"heads have {attention.head_dim} values; the kernels take an even number of at most {LARGEST_HEAD}."
    if training and _shares_running_means(layers):
        return (
            "layers share a running mean, which has to be updated by one after the other; the kernels take all at once."
        )
    norms = [mean_norm, *(norm for layer in layers for norm in (layer.memory_norm, layer.context_norm))]
    for norm in norms:
        if norm is not None and (reason := supports_norm(memory, norm)) is not None:
            return reason
    return unsupported_tensors(memory, encoded) or too_wide(memory) or unsupported_angles(key_angles)


def _shares_running_means(layers: Sequence[MemoryUpdateLayer]) -> bool:
    """Whether one tensor is the running mean of two layers."""
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for norm in (layer.memory_norm, layer.context_norm):
            if norm is not None and norm.ema_rms is not None and owners.setdefault(id(norm.ema_rms), index) != index:
                return True
    return False


def memory_update_triton(
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
    stacked = stack_layers(layers)
    updated = memory_update_stacked(
        memory, encoded, stacked, mean_norm, groups, key_mask, key_angles, rotary_layout, padding, training
    )
    if training:
        store_running_means(stacked, layers)
    return updated


def memory_update_stacked(
    memory: Tensor,
    encoded: Tensor,
    layers: StackedLayers,
    mean_norm: MemoryNormParameters | None = None,
    groups: int = 1,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    padding: str = "mask",
    training: bool = False,
) -> Tensor:
    """The update for layers that are stacked already.

    Args:
        memory: (L, 1 | B, S, D).
        encoded: (L, B, T, D).
        layers: of :func:`stack_layers`; which parameters there are says what the variant is. In training the running
            means are updated in place.
        mean_norm: norm of the mean memory, for the interlayer variants.
        groups, key_mask, key_angles, rotary_layout, padding, training: as in the reference.

    Returns:
        (L, B, S, D).
    """
    state = memory
    if layers.context_norm is not None:
        state = _with_context(memory, layers, mean_norm, groups, training)
    # Padding is zero after its norm whether the softmax sees it or not, so nothing that it held reaches a product.
    encoded_norm = MemoryNormParameters("classic-rms", weight=layers.input_norm_weight)
    written = _attention(
        layers.attention,
        stacked_norm(state, layers.memory_norm, training),
        stacked_norm(encoded, encoded_norm, mask=key_mask),
        key_mask if padding == "mask" else None,
        key_angles,
        rotary_layout,
    )
    updated = stacked_gate(state, written, layers.residual_gate)
    if key_mask is not None:
        updated = torch.where(key_mask.any(dim=1)[None, :, None, None], updated, memory)
    return updated


def _with_context(
    memory: Tensor, layers: StackedLayers, mean_norm: MemoryNormParameters | None, groups: int, training: bool
) -> Tensor:
    """The memory (L, 1 | B, S, D) after it has read itself, or the mean over layers."""
    assert layers.context_norm is not None
    assert layers.context_attention is not None
    assert layers.context_gate is not None
    if mean_norm is not None:
        # Before the layers' own norms, as in the reference: norms that are one module have one running mean.
        mean = shared_norm(memory.unflatten(0, (groups, -1)).mean(dim=1), mean_norm, training)
    own = stacked_norm(memory, layers.context_norm, training)
    context = own
    if mean_norm is not None:
        context = mean if layers.interlayer_gate is None else stacked_gate(own, mean, layers.interlayer_gate)
    return stacked_gate(memory, _attention(layers.context_attention, own, context), layers.context_gate)


def _attention(
    weights: StackedAttention,
    query_input: Tensor,
    key_input: Tensor,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
) -> Tensor:
    """query_input (L, 1 | B, S, D), key_input (L | 1, B, T, D) -> (L, B, S, D)."""
    layers, _, slots, _ = query_input.shape
    batch = key_input.shape[1]
    query_rows = weights.query_heads * weights.head_dim
    gate_rows = weights.output.shape[2] if weights.gated else 0
    key_rows = weights.key_value_heads * weights.head_dim
    rows = [query_rows + gate_rows, 2 * key_rows]
    if key_input is query_input:
        from_query, from_key = _project(query_input, weights.projections).split(rows, dim=3)
    else:
        query_weight, key_weight = weights.projections.split(rows, dim=1)
        from_query, from_key = _project(query_input, query_weight), _project(key_input, key_weight)
    query = from_query[..., :query_rows].unflatten(3, (weights.query_heads, weights.head_dim))
    key, value = (
        side.unflatten(3, (weights.key_value_heads, weights.head_dim)).flatten(0, 1)
        for side in from_key.split(key_rows, dim=3)
    )
    if key_mask is not None:
        key_mask = key_mask.repeat(layers, 1)
    if key_angles is not None and key_angles.dim() == 3:
        key_angles = key_angles.repeat(layers, 1, 1)
    heads = sparse_query_attention_triton(
        query.expand(-1, batch, -1, -1, -1).flatten(0, 1), key, value, key_mask=key_mask, key_angles=key_angles,
        rotary_layout=rotary_layout,
    )  # fmt: skip
    heads = heads.view(layers, batch, slots, -1)
    if weights.gated:
        heads = heads * torch.sigmoid(from_query[..., query_rows:])
    return _project(heads, weights.output, weights.output_bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (L | 1, B, T, D), weight (L, rows, D), bias (L, rows) -> (L, B, T, rows), one product per layer in one launch."""
    flat = x.flatten(1, 2).expand(weight.shape[0], -1, -1)
    transposed = weight.transpose(1, 2)
    product = torch.bmm(flat, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), flat, transposed)
    return product.view(weight.shape[0], *x.shape[1:3], -1)
