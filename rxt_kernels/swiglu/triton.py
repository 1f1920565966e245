"""SwiGLU in Triton: a program takes a tile of rows and columns; see ``reference.py`` for the formula.

Backward, with s = sigmoid(g):    dl = dy * g * s        dg = dy * l * s * (1 + g * (1 - s))
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.triton_runtime import launch, row_view, unsupported_tensors


@triton.jit
def _swiglu_fwd_kernel(
    x, out, rows, width, inner, outer_stride, inner_stride, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = ((row // inner) * outer_stride + (row % inner) * inner_stride)[:, None]
    linear = tl.load(x + place + (column * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + place + ((column + width) * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    active = linear * gate * tl.sigmoid(gate)
    tl.store(out + row[:, None] * width + column[None, :], active.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    gradient, x, x_gradient, rows, width,
    gradient_inner, gradient_outer_stride, gradient_inner_stride, gradient_stride,
    inner, outer_stride, inner_stride, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = (row // gradient_inner) * gradient_outer_stride + (row % gradient_inner) * gradient_inner_stride
    dy = tl.load(gradient + place[:, None] + (column * gradient_stride)[None, :], mask=inside, other=0.0)
    dy = dy.to(tl.float32)
    place = ((row // inner) * outer_stride + (row % inner) * inner_stride)[:, None]
    linear = tl.load(x + place + (column * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + place + ((column + width) * stride)[None, :], mask=inside, other=0.0).to(tl.float32)
    opening = tl.sigmoid(gate)
    linear_gradient = dy * gate * opening
    gate_gradient = dy * linear * opening * (1.0 + gate * (1.0 - opening))
    target = x_gradient + row[:, None] * (2 * width) + column[None, :]
    tl.store(target, linear_gradient.to(x_gradient.dtype.element_ty), mask=inside)
    tl.store(target + width, gate_gradient.to(x_gradient.dtype.element_ty), mask=inside)


def _tiles(kernel: str, x: Tensor, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs, and what each of them takes."""
    width = x.shape[-1] // 2
    tile = block_config(kernel, x, width)
    return (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"])), tile


def _layout(rows: Tensor) -> tuple[int, int, int, int]:
    return rows.shape[1], rows.stride(0), rows.stride(1), rows.stride(2)


@torch.library.custom_op("rxt_kernels::swiglu_triton", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    view, width = row_view(x), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = view.shape[0] * view.shape[1]
    grid, tile = _tiles("swiglu_fwd", x, rows)
    launch(_swiglu_fwd_kernel, grid, view, out, rows, width, *_layout(view), **tile, on=x)
    return out


@torch.library.custom_op("rxt_kernels::swiglu_backward_triton", mutates_args=())
def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    own, view, width = row_view(gradient), row_view(x), x.shape[-1] // 2
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = view.shape[0] * view.shape[1]
    grid, tile = _tiles("swiglu_bwd", x, rows)
    launch(_swiglu_bwd_kernel, grid, own, view, x_gradient, rows, width, *_layout(own), *_layout(view), **tile, on=x)
    return x_gradient


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> Tensor:
    x_gradient: Tensor = _swiglu_backward(gradient, *ctx.saved_tensors)
    return x_gradient


_swiglu.register_autograd(_gradients, setup_context=_keep)


def supports(x: Tensor) -> str | None:
    """None, or why this call is not for Triton."""
    return unsupported_tensors(x)


def swiglu_triton(x: Tensor) -> Tensor:
    """x (..., 2F) -> (..., F)."""
    out: Tensor = _swiglu(x)
    return out
