"""The routed experts as one opaque torch.library operation, for torch.compile and torch.export.

How many tokens an expert gets depends on data, so the grouping of the reference cannot be traced. In a graph it is the
operation ``rxt_kernels::routed_experts`` with a shape function and a gradient; the gradient runs the reference again
(also as an opaque operation), so that nothing but the inputs is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.mixture_of_experts.reference import Experts, ExpertTensors, routed_experts_reference

_ARGUMENTS = (
    "Tensor x, Tensor routing_weights, Tensor chosen, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, "
    "bool stacked, str activation, bool gated"
)


def _run(
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    stacked: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    def layout(tensors: Sequence[Tensor]) -> ExpertTensors | None:
        if not tensors:
            return None
        return tensors[0] if stacked else tensors

    first, second = layout(w1), layout(w2)
    assert first is not None
    assert second is not None
    experts = Experts(first, second, layout(b1), layout(b2), activation, gated)
    return routed_experts_reference(x, routing_weights, chosen, experts)


@torch.library.custom_op("rxt_kernels::routed_experts", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def routed_experts(
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    stacked: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    out = _run(x, routing_weights, chosen, w1, w2, b1, b2, stacked, activation, gated)
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
    stacked: bool,
    activation: str,
    gated: bool,
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, routing_weights, *w1, *w2, *b1, *b2)]
        rest = leaves[2:]
        lists = []
        for tensors in (w1, w2, b1, b2):
            lists.append(rest[: len(tensors)])
            rest = rest[len(tensors) :]
        out = _run(leaves[0], leaves[1], chosen, *lists, stacked, activation, gated)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
    return [
        torch.zeros_like(leaf) if found is None else found.contiguous().clone()
        for leaf, found in zip(leaves, gradients, strict=True)
    ]


@routed_experts_backward.register_fake
def _(gradient: Tensor, x: Tensor, routing_weights: Tensor, chosen: Tensor, *lists: Any) -> list[Tensor]:
    inputs = (x, routing_weights, *lists[0], *lists[1], *lists[2], *lists[3])
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, routing_weights, chosen, w1, w2, b1, b2, stacked, activation, gated = inputs
    ctx.save_for_backward(x, routing_weights, chosen, *w1, *w2, *b1, *b2)
    ctx.lengths = (len(w1), len(w2), len(b1), len(b2))
    ctx.options = (stacked, activation, gated)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, routing_weights, chosen, *rest = ctx.saved_tensors

    def lists(tensors: list[Tensor]) -> list[list[Tensor]]:
        parts, start = [], 0
        for length in ctx.lengths:
            parts.append(tensors[start : start + length])
            start += length
        return parts

    x_gradient, weights_gradient, *others = routed_experts_backward(
        gradient, x, routing_weights, chosen, *lists(rest), *ctx.options
    )
    return (x_gradient, weights_gradient, None, *lists(others), None, None, None)


routed_experts.register_autograd(_backward, setup_context=_setup_context)


def routed_experts_in_graph(
    x: Tensor,
    routing_weights: Tensor,
    chosen: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
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
        isinstance(w1, Tensor),
        activation,
        gated,
    )
