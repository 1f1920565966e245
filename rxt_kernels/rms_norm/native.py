"""RMSNorm by the native CPU kernels: one pass over a row that stays in cache, with the residual addition in front.

The backward pass writes the gradient of x in one pass and sums that of the weight down the columns, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension, is_plain_call, neighbouring_rows, unsupported_tensors
from rxt_kernels.rms_norm.reference import EPSILON


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(normed, x + residual, inverse root mean squares), the last two where they are wanted."""
    rows = neighbouring_rows(x)
    normed = rows.new_empty(x.shape)
    total = None if residual is None else rows.new_empty(x.shape)
    inverse_rms = rows.new_empty(rows.shape[0], dtype=torch.float32) if keep else None
    extension.rms_norm_forward(
        rows,
        None if residual is None else neighbouring_rows(residual),
        weight.contiguous(),
        eps,
        normed.view(rows.shape),
        None if total is None else total.view(rows.shape),
        inverse_rms,
    )
    return normed, total, inverse_rms


@torch.library.custom_op("rxt_kernels::rms_norm_native", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, inverse_rms = _forward(x, None, weight, eps, True)
    assert inverse_rms is not None
    return normed, inverse_rms


@torch.library.custom_op("rxt_kernels::add_rms_norm_native", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, inverse_rms = _forward(x, residual, weight, eps, True)
    assert total is not None
    assert inverse_rms is not None
    return normed, total, inverse_rms


@torch.library.custom_op("rxt_kernels::rms_norm_backward_native", mutates_args=())
def _backward(
    gradient: Tensor, total_gradient: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    rows = neighbouring_rows(x).contiguous()
    x_gradient = rows.new_empty(x.shape)
    weight_gradient = rows.new_empty(weight.shape, dtype=torch.float32)
    extension.rms_norm_backward(
        rows,
        weight.contiguous(),
        inverse_rms,
        neighbouring_rows(gradient).contiguous(),
        None if total_gradient is None else neighbouring_rows(total_gradient).contiguous(),
        x_gradient.view(rows.shape),
        weight_gradient,
    )
    return x_gradient, weight_gradient.to(weight.dtype)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((_row_count(x),), dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((_row_count(x),), dtype=torch.float32)


@_backward.register_fake
def _(
    gradient: Tensor, total_gradient: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _row_count(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, inverse_rms = ctx.saved_tensors
    return (*_backward(gradient, None, x, weight, inverse_rms), None)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients_of_sum(ctx: Any, gradient: Tensor, direct: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, inverse_rms = ctx.saved_tensors
    sum_gradient, weight_gradient = _backward(gradient, direct, total, weight, inverse_rms)
    return sum_gradient, sum_gradient, weight_gradient, None


_rms_norm.register_autograd(_gradients, setup_context=_keep)
_add_rms_norm.register_autograd(_gradients_of_sum, setup_context=_keep_sum)


def supports(x: Tensor, weight: Tensor, eps: float | None = None) -> str | None:
    """None, or why this call is not for the native kernels."""
    return unsupported_tensors(x, weight)


def supports_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float | None = None) -> str | None:
    """None, or why this call is not for the native kernels."""
    return unsupported_tensors(x, residual, weight)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x (..., D), weight (D,) -> (..., D); arguments as those of the reference."""
    eps = EPSILON if eps is None else eps
    if is_plain_call(x, weight):
        return _forward(x, None, weight, eps, False)[0]
    normed: Tensor = _rms_norm(x, weight, eps)[0]
    return normed


def add_rms_norm_native(x: Tensor, residual: Tensor, weight: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """x, residual (..., D), weight (D,) -> (rms_norm(x + residual), x + residual)."""
    eps = EPSILON if eps is None else eps
    if is_plain_call(x, residual, weight):
        normed, total, _ = _forward(x, residual, weight, eps, False)
        assert total is not None
        return normed, total
    normed, total, _ = _add_rms_norm(x, residual, weight, eps)
    return normed, total
