"""Linear layer and cross-entropy by the native CPU kernels: blocks of logits that never leave the caches' neighbourhood.

Forward keeps two values of every row, the largest logit and the logarithm of the sum of exponentials below it, with which
backward computes a block of logits once more and turns it into its gradient. Rows whose target is to be ignored cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension, is_plain_call, neighbouring_rows, unsupported_tensors


def _forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int, reduction: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(loss, softmax sums), the latter where they are wanted; both float32."""
    losses = hidden.new_empty(target.shape, dtype=torch.float32)
    total = None if reduction == "none" else hidden.new_empty((), dtype=torch.float32)
    softmax_sums = hidden.new_empty((2, target.numel()), dtype=torch.float32) if keep else None
    extension.linear_cross_entropy_forward(
        neighbouring_rows(hidden),
        weight,
        target.flatten().contiguous(),
        None if bias is None else bias.contiguous(),
        ignored,
        reduction == "mean",
        losses.view(-1),
        total,
        softmax_sums,
    )
    return losses if total is None else total, softmax_sums


@torch.library.custom_op("rxt_kernels::linear_cross_entropy_native", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int, reduction: str
) -> tuple[Tensor, Tensor]:
    loss, softmax_sums = _forward(hidden, weight, target, bias, ignored, reduction, True)
    assert softmax_sums is not None
    return loss, softmax_sums


@torch.library.custom_op("rxt_kernels::linear_cross_entropy_backward_native", mutates_args=())
def _backward(
    loss_gradients: Tensor,
    softmax_sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: int,
) -> list[Tensor]:
    rows = neighbouring_rows(hidden)
    hidden_gradient, weight_gradient = hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)
    bias_gradient = None if bias is None else bias.new_empty(bias.shape)
    extension.linear_cross_entropy_backward(
        loss_gradients.flatten().contiguous(),
        softmax_sums,
        rows,
        weight,
        target.flatten().contiguous(),
        None if bias is None else bias.contiguous(),
        ignored,
        hidden_gradient.view(rows.shape),
        weight_gradient,
        bias_gradient,
    )
    return [gradient for gradient in (hidden_gradient, weight_gradient, bias_gradient) if gradient is not None]


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int, reduction: str
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, hidden.new_empty((2, target.numel()), dtype=torch.float32)


@_backward.register_fake
def _(
    loss_gradients: Tensor,
    softmax_sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: int,
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias) if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, ctx.ignored, ctx.reduction = inputs
    ctx.save_for_backward(output[1], hidden, weight, target, bias)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    softmax_sums, hidden, weight, target, bias = ctx.saved_tensors
    if ctx.reduction == "mean":
        gradient = gradient / (target != ctx.ignored).sum().clamp(min=1)
    found = _backward(gradient.expand(target.shape), softmax_sums, hidden, weight, target, bias, ctx.ignored)
    return found[0], found[1], None, None if bias is None else found[2], None, None


_linear_cross_entropy.register_autograd(_gradients, setup_context=_keep)


def supports(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> str | None:
    """None, or why this call is not for the native kernels."""
    return unsupported_tensors(hidden, weight, bias)


def linear_cross_entropy_native(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """hidden (..., D), weight (V, D), target (...) -> scalar, or (...) for reduction "none"."""
    if is_plain_call(hidden, weight, bias):
        loss = _forward(hidden, weight, target, bias, ignore_index, reduction, False)[0]
    else:
        loss = _linear_cross_entropy(hidden, weight, target, bias, ignore_index, reduction)[0]
    return loss.to(hidden.dtype)
