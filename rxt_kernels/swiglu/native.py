"""SwiGLU by the native CPU kernels: one pass forward, and one backward, which takes the sigmoid again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension, is_plain_call, neighbouring_rows, unsupported_tensors


def _forward(x: Tensor) -> Tensor:
    rows = neighbouring_rows(x)
    count, width = rows.shape
    out = rows.new_empty((count, width // 2))
    extension.swiglu_forward(rows, out)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], width // 2)


@torch.library.custom_op("rxt_kernels::swiglu_native", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    return _forward(x)


@torch.library.custom_op("rxt_kernels::swiglu_backward_native", mutates_args=())
def _backward(gradient: Tensor, x: Tensor) -> Tensor:
    rows = neighbouring_rows(x)
    x_gradient = x.new_empty(x.shape)
    extension.swiglu_backward(neighbouring_rows(gradient), rows, x_gradient.view(rows.shape))
    return x_gradient


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> Tensor:
    x_gradient: Tensor = _backward(gradient, *ctx.saved_tensors)
    return x_gradient


_swiglu.register_autograd(_gradients, setup_context=_keep)


def supports(x: Tensor) -> str | None:
    """None, or why this call is not for the native kernels."""
    return unsupported_tensors(x)


def swiglu_native(x: Tensor) -> Tensor:
    """x (..., 2F) -> (..., F)."""
    if is_plain_call(x):
        return _forward(x)
    out: Tensor = _swiglu(x)
    return out
