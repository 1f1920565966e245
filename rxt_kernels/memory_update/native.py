"""The memory write by the native CPU kernels; see ``reference.py`` for the formula.

One call writes all layers (``csrc/memory_update/write.cpp``), in fp32 inside: norms, projections, attention and residual gates
follow each other without Python in between, on scratch that is kept. Layers follow each other: each is work for every core as
it is. What does not depend on the layer is done once: sines and cosines of the key positions, and the mean over layers with
its norm. A memory of batch 1 reads itself once; only its write is repeated for every row of the batch.

Where gradients are recorded or running means move, each part is an operation of its own that torch can differentiate, and the
projections are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.memory_update.native_gate import residual_gate_native
from rxt_kernels.memory_update.native_norm import memory_norm_native
from rxt_kernels.memory_update.parameters import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
    flat_values,
)
from rxt_kernels.native_runtime import extension, is_plain_call, unsupported_tensors
from rxt_kernels.rms_norm.native import rms_norm_native
from rxt_kernels.rms_norm.reference import EPSILON
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
    attention_mask = key_mask
    if key_mask is not None and padding == "dilute":
        # where and not a product: whatever the padded rows hold, also NaN, is gone.
        encoded = torch.where(key_mask[None, :, :, None], encoded, encoded.new_zeros(()))
        attention_mask = None
    if attention_mask is not None:
        attention_mask = attention_mask.contiguous()
    tables = attention.rotary_tables(key_angles)
    recorded = torch.is_grad_enabled() and any(one.requires_grad for one in _tensors((layers, mean_norm)))
    if not training and not recorded and is_plain_call(memory, encoded):
        written = _write(memory, encoded, layers, variant, mean_norm, groups, attention_mask, tables, rotary_layout)
    else:
        written = _compose(
            memory, encoded, layers, variant, mean_norm, groups, attention_mask, tables, rotary_layout, training
        )
    if key_mask is not None:
        written = torch.where(key_mask.any(dim=1)[None, :, None, None], written, memory)
    return written


# -- one call ---------------------------------------------------------------------------------------------------------


def _tensors(parameters: Any) -> Iterator[Tensor]:
    """Every tensor in tuples and lists of parameters."""
    if isinstance(parameters, Tensor):
        yield parameters
    elif isinstance(parameters, (tuple, list)):
        for part in parameters:
            yield from _tensors(part)


def _norm_arguments(norm: MemoryNormParameters | None) -> tuple[Any, ...] | None:
    """A norm as the extension takes it; a running mean takes the place of a row's own where it does outside of training."""
    if norm is None:
        return None
    if norm.kind == "classic-rms":
        return "rms", flat_values(norm.weight)
    is_positional = norm.kind == "positional"
    assert norm.scale is not None
    return (
        "layer" if norm.kind == "layer" else "plain",
        flat_values(norm.scale), flat_values(norm.gate), flat_values(norm.ema_rms) if is_positional else None,
        flat_values(norm.weight), flat_values(norm.bias), norm.scale.dim() == 2, is_positional,
    )  # fmt: skip


def _gate_arguments(gate: ResidualGateParameters | None) -> tuple[Any, ...] | None:
    if gate is None:
        return None
    learned = gate.kind != "static"  # the status of a static gate is never read
    return (
        gate.kind, gate.activation == "tanh", gate.per_slot, flat_values(gate.weight), flat_values(gate.bias),
        flat_values(gate.status_weight) if learned else None,
        float(gate.status_bias) if learned and gate.status_bias is not None else 0.0,
    )  # fmt: skip


def _attention_arguments(weights: AttentionWeights | None) -> tuple[Any, ...] | None:
    if weights is None:
        return None
    matrices = (weights.query, weights.key, weights.value, weights.output)
    return (
        *(_rows(matrix) for matrix in matrices), flat_values(weights.output_bias),
        None if weights.gate is None else _rows(weights.gate),
        weights.query_heads, weights.key_value_heads, weights.head_dim,
    )  # fmt: skip


def _rows(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _write(
    memory: Tensor,
    encoded: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    variant: str,
    mean_norm: MemoryNormParameters | None,
    groups: int,
    key_mask: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    rotary_layout: str,
) -> Tensor:
    """All layers by one call of the extension."""
    reads_own, reads_mean = variant != "simple", mean_norm is not None
    parameters = [
        (
            _norm_arguments(layer.memory_norm),
            flat_values(layer.input_norm_weight),
            _attention_arguments(layer.attention),
            _gate_arguments(layer.residual_gate),
            _norm_arguments(layer.context_norm) if reads_own else None,
            _attention_arguments(layer.context_attention) if reads_own else None,
            _gate_arguments(layer.context_gate) if reads_own else None,
            _gate_arguments(layer.interlayer_gate) if reads_mean and variant != "interlayer" else None,
        )
        for layer in layers
    ]
    out = torch.empty(encoded.shape[0], encoded.shape[1], *memory.shape[2:], dtype=torch.float32, device="cpu")
    extension.memory_write(
        memory.detach().float().contiguous(), encoded.detach().float().contiguous(), parameters,
        _norm_arguments(mean_norm), _group_count(variant, groups) if reads_mean else 0, EPSILON, key_mask, *tables,
        rotary_layout == "split", out,
    )  # fmt: skip
    return out.to(memory.dtype)


def _group_count(variant: str, groups: int) -> int:
    return groups if variant == "grouped-self-interlayer" else 1


# -- part by part -----------------------------------------------------------------------------------------------------


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


def _compose(
    memory: Tensor,
    encoded: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    variant: str,
    mean_norm: MemoryNormParameters | None,
    groups: int,
    key_mask: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    rotary_layout: str,
    training: bool,
) -> Tensor:
    """The same, each part by itself."""
    number_of_layers = len(layers)
    means: list[Tensor] = []
    if mean_norm is not None:
        means = [
            memory_norm_native(group.mean(dim=0), mean_norm, training)
            for group in memory.split(number_of_layers // _group_count(variant, groups))
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
            key_mask,
            tables,
            rotary_layout == "split",
        )
        updated.append(residual_gate_native(state.expand_as(written), written, layer.residual_gate))
    return torch.stack(updated)
