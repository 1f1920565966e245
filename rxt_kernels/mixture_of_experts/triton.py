"""Mixture of experts in Triton, forward and backward; see ``reference.py`` for the formula.

    route     logits, softmax, top-k, weights, loss, and choices sorted by expert           ``triton_router``, ``triton_sort``
    experts   two grouped matrix products, and the weighted sum of a token's choices        ``triton_experts``
    backward  of both                                                                       ``triton_router``, ``triton_backward``

No step waits for the host, and every shape follows from the shapes of the inputs, so that a CUDA graph can hold the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.mixture_of_experts.reference import (
    ExpertTensors,
    MixtureOfExpertsOutput,
    SharedExperts,
    add_shared_experts,
)
from rxt_kernels.mixture_of_experts.triton_backward import experts_backward
from rxt_kernels.mixture_of_experts.triton_experts import ACTIVATION_NUMBERS, Groups, combine, matmul, up
from rxt_kernels.mixture_of_experts.triton_router import LARGEST_EXPERTS, route, route_backward
from rxt_kernels.triton_runtime import unsupported_tensors


@torch.library.custom_op("rxt_kernels::route_triton", mutates_args=())
def _route(
    x: Tensor, router_weight: Tensor, top_k: int, logits_dtype: torch.dtype, by_index: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights and experts of every token, the loss, the order of choices, and logits; see ``triton_router.Routed``."""
    routed = route(x, router_weight, top_k, logits_dtype, by_index, keep)
    return routed.weights, routed.chosen, routed.loss, routed.order, routed.starts, routed.logits


@torch.library.custom_op("rxt_kernels::route_backward_triton", mutates_args=())
def _route_backward(
    weights_gradient: Tensor, loss_gradient: Tensor, logits: Tensor, chosen: Tensor, x: Tensor, router_weight: Tensor
) -> tuple[Tensor, Tensor]:
    return route_backward(weights_gradient, loss_gradient, logits, chosen, x, router_weight)


@_route.register_fake
def _(
    x: Tensor, router_weight: Tensor, top_k: int, logits_dtype: torch.dtype, by_index: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = x.shape[0], router_weight.shape[0]
    return (
        x.new_empty((tokens, top_k), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.int32),
        x.new_empty((), dtype=torch.promote_types(logits_dtype, torch.float32)),
        x.new_empty((tokens * top_k,), dtype=torch.int32),
        x.new_empty((experts + 1,), dtype=torch.int32),
        x.new_empty((tokens if keep else 0, experts), dtype=logits_dtype),
    )


@_route_backward.register_fake
def _(
    weights_gradient: Tensor, loss_gradient: Tensor, logits: Tensor, chosen: Tensor, x: Tensor, router_weight: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), router_weight.new_empty(router_weight.shape)


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, chosen, _, order, starts, logits = output
    ctx.save_for_backward(logits, chosen, inputs[0], inputs[1])
    ctx.mark_non_differentiable(chosen, order, starts, logits)


def _route_gradients(ctx: Any, weights: Tensor, chosen: Any, loss: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*_route_backward(weights, loss, *ctx.saved_tensors), None, None, None, None)


_route.register_autograd(_route_gradients, setup_context=_keep_logits)


@torch.library.custom_op("rxt_kernels::routed_experts_triton", mutates_args=())
def _routed_experts(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (N, D) in the dtype of the weights; and, to be kept for the backward pass, inputs of the activation and
    the result of every choice."""
    top_k = weights.shape[1]
    groups = Groups(order, starts, top_k)
    hidden, before = up(x, w1, b1, groups, gated, activation, keep)
    results = matmul(hidden, w2, groups, x.dtype, bias=b2, scatter=True)
    return combine(results, weights.contiguous(), top_k, weights.dtype), before, results


@torch.library.custom_op("rxt_kernels::routed_experts_backward_triton", mutates_args=())
def _routed_experts_backward(
    gradient: Tensor,
    before: Tensor,
    results: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
) -> list[Tensor]:
    groups = Groups(order, starts, weights.shape[1])
    return experts_backward(gradient, before, results, x, weights, groups, w1, w2, b1, b2, gated, activation)


@_routed_experts.register_fake
def _(
    x: Tensor, weights: Tensor, order: Tensor, starts: Tensor, w1: Tensor, w2: Tensor, b1: Any, b2: Any,
    activation: int, gated: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = order.shape[0]
    before = x.new_empty((rows if keep else 0, w1.shape[2]))
    return x.new_empty(x.shape, dtype=weights.dtype), before, x.new_empty((rows, x.shape[1]))


@_routed_experts_backward.register_fake
def _(
    gradient: Tensor, before: Tensor, results: Tensor, x: Tensor, weights: Tensor, order: Tensor, starts: Tensor,
    w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: int, gated: bool,
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor in (x, weights, w1, w2, b1, b2) if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, order, starts, w1, w2, b1, b2, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(output[1], output[2], x, weights, order, starts, w1, w2, b1, b2)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # else zeros are made for both: as much memory again


def _gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 11
    found = _routed_experts_backward(gradient, *ctx.saved_tensors, ctx.activation, ctx.gated)
    rest = iter(found[4:])
    biases = [None if bias is None else next(rest) for bias in ctx.saved_tensors[-2:]]
    return found[0], found[1], None, None, found[2], found[3], *biases, None, None, None


_routed_experts.register_autograd(_gradients, setup_context=_keep)


def supports(
    x: Tensor,
    router_weight: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    top_k: int,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    global_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    shared: SharedExperts | None = None,
    router_dtype: torch.dtype | None = None,
    accumulation: str = "descending_probability",
    dropout: float = 0.0,
) -> str | None:
    """None, or why this call is not for Triton."""
    if dropout:
        return f"dropout is {dropout}; the kernels drop no hidden units."
    if router_weight.shape[0] > LARGEST_EXPERTS:
        return f"there are {router_weight.shape[0]} experts; the router holds at most {LARGEST_EXPERTS}."
    firsts = [
        tensors if isinstance(tensors, Tensor) else tensors[0] for tensors in (w1, w2, b1, b2) if tensors is not None
    ]
    if any(tensor.dtype is not x.dtype for tensor in firsts):
        return f"x is {x.dtype} and an expert has another dtype; the kernels take one."
    return unsupported_tensors(x, router_weight)


def _stacked(tensors: ExpertTensors) -> Tensor:
    """(E, ...) of either layout; a matrix of torch.nn.Linear is turned, by its strides."""
    if isinstance(tensors, Tensor):
        return tensors
    stack = torch.stack(tuple(tensors))
    return stack.transpose(1, 2) if stack.dim() == 3 else stack


def _logits_dtype(x: Tensor, router_dtype: torch.dtype | None) -> torch.dtype:
    """That of a linear layer: what is asked for, else that of autocast, else that of its input."""
    device = x.device.type
    if router_dtype is None and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if router_dtype is None else router_dtype


def mixture_of_experts_triton(
    x: Tensor,
    router_weight: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    top_k: int,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    global_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    shared: SharedExperts | None = None,
    router_dtype: torch.dtype | None = None,
    accumulation: str = "descending_probability",
    dropout: float = 0.0,
) -> MixtureOfExpertsOutput:
    """x (..., D) -> MixtureOfExpertsOutput(output (..., D), load_balance_loss); as the reference.

    Experts that are one tensor each are stacked first, which copies all their weights in every call: a model that is to be
    fast holds them stacked. Shared experts are dense, and torch's operations.
    """
    flat = x.reshape(-1, x.shape[-1])
    first, second = _stacked(w1), _stacked(w2)
    biases = [None if bias is None else _stacked(bias) for bias in (b1, b2)]
    learns = [tensor is not None and tensor.requires_grad for tensor in (flat, router_weight, first, second, *biases)]
    keep = torch.is_grad_enabled() and any(learns)
    dtype, by_index = _logits_dtype(x, router_dtype), accumulation == "expert_index"
    weights, _, loss, order, starts, _ = _route(flat, router_weight, top_k, dtype, by_index, keep and any(learns[:2]))
    number = ACTIVATION_NUMBERS[activation]
    output = _routed_experts(flat, weights, order, starts, first, second, *biases, number, gated, keep)[0]
    if shared is not None:
        output, loss = add_shared_experts(output, loss, flat, shared, top_k, activation, gated)
    if global_bias is not None:
        output = output + global_bias
    return MixtureOfExpertsOutput(output.to(x.dtype).view(x.shape), loss)
