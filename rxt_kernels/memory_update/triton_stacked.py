"""The parameters of a memory update of all layers at once: as those of one layer, each tensor with L in front.

The kernels take all layers in one launch, so they want one tensor where the layers have L. Whoever updates a memory again
and again with the same weights stacks them once and keeps the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
)

__all__ = [
    "StackedAttention",
    "StackedLayers",
    "difference",
    "map_tensors",
    "stack_layers",
    "stack_parameters",
    "store_running_means",
]

Parameters = TypeVar("Parameters", MemoryNormParameters, ResidualGateParameters)


class StackedAttention(NamedTuple):
    """The projections of one attention of every layer."""

    projections: Tensor
    """(L, rows, D): query, gate if there is one, key, value below each other, so that one product serves them all."""
    output: Tensor
    """(L, D, max(Hq, Hkv) * head_dim)."""
    output_bias: Tensor | None
    """(L, D)."""
    gated: bool
    query_heads: int
    key_value_heads: int
    head_dim: int


class StackedLayers(NamedTuple):
    """Everything that the layers of a memory attention own; fields as in MemoryUpdateLayer."""

    memory_norm: MemoryNormParameters
    input_norm_weight: Tensor
    """(L, D)."""
    attention: StackedAttention
    residual_gate: ResidualGateParameters
    context_norm: MemoryNormParameters | None
    context_attention: StackedAttention | None
    context_gate: ResidualGateParameters | None
    interlayer_gate: ResidualGateParameters | None


def map_tensors(function: Callable[[Tensor], Tensor], parameters: Parameters) -> Parameters:
    """The same parameters with every tensor replaced by what `function` makes of it."""
    values: list[Any] = [function(value) if isinstance(value, Tensor) else value for value in parameters]
    return type(parameters)(*values)


def stack_layers(layers: Sequence[MemoryUpdateLayer]) -> StackedLayers:
    """Stack layers of one structure (see :func:`difference`); gradients reach the layers' own tensors.

    Args:
        layers: of one memory update.

    Returns:
        Copies of their tensors, with L in front.
    """
    columns = dict(zip(MemoryUpdateLayer._fields, zip(*layers, strict=True), strict=True))
    return StackedLayers(
        memory_norm=stack_parameters(columns["memory_norm"]),
        input_norm_weight=torch.stack(columns["input_norm_weight"]),
        attention=_stack_attention(columns["attention"]),
        residual_gate=stack_parameters(columns["residual_gate"]),
        context_norm=None if layers[0].context_norm is None else stack_parameters(columns["context_norm"]),
        context_attention=None
        if layers[0].context_attention is None
        else _stack_attention(columns["context_attention"]),
        context_gate=None if layers[0].context_gate is None else stack_parameters(columns["context_gate"]),
        interlayer_gate=None if layers[0].interlayer_gate is None else stack_parameters(columns["interlayer_gate"]),
    )


def stack_parameters(parameters: Sequence[Parameters]) -> Parameters:
    """Norms or gates of one structure, one per layer, as one."""
    columns = zip(*parameters, strict=True)
    values: list[Any] = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return type(parameters[0])(*values)


def _stack_attention(weights: Sequence[AttentionWeights]) -> StackedAttention:
    first = weights[0]
    parts = [part for one in weights for part in (one.query, one.gate, one.key, one.value) if part is not None]
    biases = [one.output_bias for one in weights if one.output_bias is not None]
    return StackedAttention(
        torch.cat(parts).view(len(weights), -1, first.query.shape[1]),
        torch.stack([one.output for one in weights]),
        torch.stack(biases) if biases else None,
        first.gate is not None,
        first.query_heads,
        first.key_value_heads,
        first.head_dim,
    )


def store_running_means(stacked: StackedLayers, layers: Sequence[MemoryUpdateLayer]) -> None:
    """Copy the running means, which an update of stacked layers has advanced, back to the layers, in one go."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name in ("memory_norm", "context_norm"):
        norm = getattr(stacked, name)
        if norm is not None and norm.ema_rms is not None:
            targets += [getattr(layer, name).ema_rms for layer in layers]
            sources += norm.ema_rms.unbind()
    if targets:
        torch._foreach_copy_(targets, sources)


def _structure(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and shapes of tensors, and all that is no tensor, of parameters and the parameters in them."""
    if isinstance(value, Tensor):
        yield name, tuple(value.shape)
    elif isinstance(value, tuple):
        for field, entry in zip(value._fields, value, strict=True):  # type: ignore[attr-defined]
            yield from _structure(entry, f"{name}.{field}" if name else field)
    else:
        yield name, value


def difference(layers: Sequence[MemoryUpdateLayer]) -> str | None:
    """Why these layers cannot be stacked, in one sentence; None if they have one structure."""
    first = dict(_structure(layers[0]))
    for index, layer in enumerate(layers[1:], start=1):
        own = dict(_structure(layer))
        for name in (*first, *own):
            here, there = own.get(name), first.get(name)
            if here != there:
                return (
                    f"layers[{index}].{name} is {here!r} where layers[0] has {there!r}; the kernels take all layers at "
                    "once, so they must have one structure."
                )
    return None
