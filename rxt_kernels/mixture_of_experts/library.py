"""The routed experts as one opaque torch.library operation, for torch.compile and torch.export.

How many tokens an expert gets depends on data, so the grouping of the reference cannot be traced. In a graph it is the
operation ``rxt_kernels::routed_experts`` with a shape function and a gradient. The gradient is an opaque operation
too; it computes the hidden layers of the experts again, so that nothing but the inputs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.mixture_of_experts.reference import (
    ACTIVATIONS,
    Experts,
    ExpertTensors,
    group_by_expert,
    make_experts,
    routed_experts_reference,
)

_ARGUMENTS = (
    "Tensor x, Tensor routing_weights, Tensor chosen, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, "
    "Tensor? hidden_scale, bool stacked, str activation, bool gated"
)


_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "swish": torch.ops.aten.silu_backward,
    "relu": lambda gradient, x: gradient * (x > 0),
    "gelu": torch.ops.aten.gelu_backward,
    "sigmoid": lambda gradient, x: torch.ops.aten.sigmoid_backward(gradient, torch.sigmoid(x)),
    "linear": lambda gradient, x: gradient,
}


def _experts(
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    stacked: bool,
    activation: str,
    gated: bool,
) -> Experts:
    def layout(tensors: Sequence[Tensor]) -> ExpertTensors:
        return tensors[0] if stacked else tensors

    return make_experts(
        layout(w1), layout(w2), layout(b1) if b1 else None, layout(b2) if b2 else None, activation, gated
    )


@torch.library.custom_op("rxt_kernels::routed_experts", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def routed_experts(
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    hidden_scale: Tensor | None,
    stacked: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    experts = _experts(w1, w2, b1, b2, stacked, activation, gated)
    out = routed_experts_reference(x, routing_weights, chosen, experts, hidden_scale)
    # An operation may not return its own input, which the reference does for no token at all.
    return out.clone() if chosen.shape[0] == 0 else out


@routed_experts.register_fake
def _(x: Tensor, routing_weights: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=routing_weights.dtype)


@torch.library.custom_op(
    "rxt_kernels::routed_experts_backward", mutates_args=(), schema=f"(Tensor gradient, {_ARGUMENTS}) -> Tensor[]"
)
def routed_experts_backward(
    gradient: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    hidden_scale: Tensor | None,
    stacked: bool,
    activation: str,
    gated: bool,
) -> list[Tensor]:
    experts = _experts(w1, w2, b1, b2, stacked, activation, gated)
    top_k = chosen.shape[1]
    order, back, sizes = group_by_expert(chosen, len(experts.w1))
    token = order // top_k
    groups = x.index_select(0, token).split(sizes)
    # Gradient of each choice's weighted output, and of its weight, in the order of the experts.
    incoming = gradient.index_select(0, token)
    weighted = (incoming * routing_weights.flatten()[order, None]).to(x.dtype).split(sizes)
    incoming_groups = incoming.split(sizes)
    scales = None if hidden_scale is None else hidden_scale.flatten(0, 1).index_select(0, order).split(sizes)

    parameters = [torch.zeros_like(tensor) for tensor in (*w1, *w2, *b1, *b2)]
    slots = _slots(parameters, (len(w1), len(w2), len(b1), len(b2)), stacked)
    weight_gradients, input_gradients = [], []
    for number, group in enumerate(groups):
        if not sizes[number]:
            continue
        first, second = experts.w1[number], experts.w2[number]
        if not stacked:
            first, second = first.t(), second.t()
        before = group @ first
        if experts.b1 is not None:
            before = before + experts.b1[number]
        if gated:
            linear, gate = before.chunk(2, dim=-1)
            active = ACTIVATIONS[activation](gate)
            hidden = linear * active
        else:
            hidden = ACTIVATIONS[activation](before)
        if scales is not None:
            hidden = hidden * scales[number]
        output = hidden @ second
        if experts.b2 is not None:
            output = output + experts.b2[number]
        weight_gradients.append((incoming_groups[number] * output).sum(dim=1))

        output_gradient = weighted[number]
        hidden_gradient = output_gradient @ second.t()
        if scales is not None:
            hidden_gradient = hidden_gradient * scales[number]
        if gated:
            gate_gradient = _ACTIVATION_GRADIENTS[activation](hidden_gradient * linear, gate)
            before_gradient = torch.cat((hidden_gradient * active, gate_gradient), dim=-1)
        else:
            before_gradient = _ACTIVATION_GRADIENTS[activation](hidden_gradient, before)
        input_gradients.append(before_gradient @ first.t())
        for slot, left, right in ((slots[0], group, before_gradient), (slots[1], hidden, output_gradient)):
            slot[number].copy_(left.t() @ right if stacked else right.t() @ left)
        if b1:
            slots[2][number].copy_(before_gradient.sum(dim=0))
        if b2:
            slots[3][number].copy_(output_gradient.sum(dim=0))

    x_gradient, routing_gradient = torch.zeros_like(x), torch.zeros_like(routing_weights)
    if input_gradients:
        by_choice = torch.cat(input_gradients).index_select(0, back).unflatten(0, chosen.shape)
        x_gradient.copy_(by_choice.sum(dim=1))
        routing_gradient.copy_(torch.cat(weight_gradients).index_select(0, back).unflatten(0, chosen.shape))
    return [x_gradient, routing_gradient, *parameters]


def _slots(parameters: list[Tensor], lengths: tuple[int, ...], stacked: bool) -> list[Sequence[Tensor]]:
    """The gradient of every expert as a view: one sequence for each of w1, w2, b1, b2."""
    slots: list[Sequence[Tensor]] = []
    start = 0
    for length in lengths:
        own = parameters[start : start + length]
        slots.append(own[0].unbind() if stacked and own else own)
        start += length
    return slots


@routed_experts_backward.register_fake
def _(gradient: Tensor, x: Tensor, routing_weights: Tensor, chosen: Tensor, *lists: Any) -> list[Tensor]:
    inputs = (x, routing_weights, *lists[0], *lists[1], *lists[2], *lists[3])
    return [torch.empty_like(tensor) for tensor in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, routing_weights, chosen, w1, w2, b1, b2, hidden_scale, stacked, activation, gated = inputs
    ctx.save_for_backward(x, routing_weights, chosen, hidden_scale, *w1, *w2, *b1, *b2)
    ctx.lengths = (len(w1), len(w2), len(b1), len(b2))
    ctx.options = (stacked, activation, gated)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, routing_weights, chosen, hidden_scale, *rest = ctx.saved_tensors

    def lists(tensors: list[Tensor]) -> list[list[Tensor]]:
        parts, start = [], 0
        for length in ctx.lengths:
            parts.append(tensors[start : start + length])
            start += length
        return parts

    x_gradient, weights_gradient, *others = routed_experts_backward(
        gradient, x, routing_weights, chosen, *lists(rest), hidden_scale, *ctx.options
    )
    return (x_gradient, weights_gradient, None, *lists(others), None, None, None, None)


routed_experts.register_autograd(_backward, setup_context=_setup_context)


def routed_experts_in_graph(
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    hidden_scale: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """The routed experts as the opaque operation; arguments as those of the reference."""

    def as_list(tensors: ExpertTensors | None) -> list[Tensor]:
        if tensors is None:
            return []
        return [tensors] if isinstance(tensors, Tensor) else list(tensors)

    return routed_experts(
        x,
        routing_weights,
        chosen,
        as_list(w1),
        as_list(w2),
        as_list(b1),
        as_list(b2),
        hidden_scale,
        isinstance(w1, Tensor),
        activation,
        gated,
    )
