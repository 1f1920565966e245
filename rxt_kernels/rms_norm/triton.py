"""RMSNorm in Triton: a program normalises a block of rows; see ``reference.py`` for the formula.

Backward, with x_hat = x * r and r = rsqrt(mean(x^2) + eps):

    dx = r * (w * dy - x_hat * mean(w * dy * x_hat))        dw = sum over rows of dy * x_hat

Every program adds up dw of its own rows in float32; the sums of all programs are added afterwards, so the order of
additions is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.rms_norm.reference import EPSILON
from rxt_kernels.triton_runtime import launch, row_view, unsupported_tensors

LARGEST_WIDTH = 32768
MOST_BACKWARD_PROGRAMS = 256


@triton.jit
def _row_offsets(row, inner, outer_stride, inner_stride):
    row = row.to(tl.int64)
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _rms_norm_fwd_kernel(
    x, residual, weight, out, total, inverse_rms,
    rows, width, x_inner, x_outer_stride, x_inner_stride, x_stride,
    residual_inner, residual_outer_stride, residual_inner_stride, residual_stride, weight_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = _row_offsets(row, x_inner, x_outer_stride, x_inner_stride)[:, None] + (column * x_stride)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    contiguous = row.to(tl.int64)[:, None] * width + column[None, :]
    if HAS_RESIDUAL:
        place = _row_offsets(row, residual_inner, residual_outer_stride, residual_inner_stride)
        added = tl.load(residual + place[:, None] + (column * residual_stride)[None, :], mask=inside, other=0.0)
        # Rounded like a stored sum before it is normalised: that is what the next layer adds to.
        value = (value.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + contiguous, value, mask=inside)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    scale = tl.load(weight + column * weight_stride, mask=column < width, other=0.0).to(tl.float32)
    normed = wide * inverse[:, None] * scale[None, :]
    tl.store(out + contiguous, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, inverse, mask=row < rows)


@triton.jit
def _rms_norm_bwd_kernel(
    gradient, total_gradient, x, weight, inverse_rms, x_gradient, weight_partial,
    rows, width, gradient_inner, gradient_outer_stride, gradient_inner_stride, gradient_stride,
    total_inner, total_outer_stride, total_inner_stride, total_stride,
    x_inner, x_outer_stride, x_inner_stride, x_stride, weight_stride, blocks_per_program,
    HAS_TOTAL_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    scale = tl.load(weight + column * weight_stride, mask=column < width, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(blocks_per_program):
        row = (program * blocks_per_program + block) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = _row_offsets(row, gradient_inner, gradient_outer_stride, gradient_inner_stride)
        dy = tl.load(gradient + place[:, None] + (column * gradient_stride)[None, :], mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        place = _row_offsets(row, x_inner, x_outer_stride, x_inner_stride)
        value = tl.load(x + place[:, None] + (column * x_stride)[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)
        normed = value * inverse[:, None]
        scaled = dy * scale[None, :]
        mean = tl.sum(scaled * normed, axis=1) / width
        dx = (scaled - normed * mean[:, None]) * inverse[:, None]
        if HAS_TOTAL_GRADIENT:
            place = _row_offsets(row, total_inner, total_outer_stride, total_inner_stride)
            direct = tl.load(total_gradient + place[:, None] + (column * total_stride)[None, :], mask=inside, other=0.0)
            dx += direct.to(tl.float32)
        contiguous = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(x_gradient + contiguous, dx.to(x_gradient.dtype.element_ty), mask=inside)
        weight_sum += tl.sum(dy * normed, axis=0)
    tl.store(weight_partial + program * width + column, weight_sum, mask=column < width)


def _tile(kernel: str, x: Tensor) -> dict[str, int]:
    """Rows of a program, and the power of two that holds a row."""
    width = x.shape[-1]
    return {**block_config(kernel, x, width), "BLOCK": triton.next_power_of_2(width)}


def _layout(rows: Tensor) -> tuple[int, int, int, int]:
    return rows.shape[1], rows.stride(0), rows.stride(1), rows.stride(2)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if residual is not None else out
    view = row_view(x)
    count, width = view.shape[0] * view.shape[1], view.shape[2]
    inverse_rms = torch.empty(count, dtype=torch.float32, device=x.device)
    tile = _tile("rms_norm_fwd", x)
    added = view if residual is None else row_view(residual)
    launch(
        _rms_norm_fwd_kernel, (triton.cdiv(count, tile["ROWS"]),), view, added, weight, out, total, inverse_rms, count,
        width, *_layout(view), *_layout(added), weight.stride(0), eps, HAS_RESIDUAL=residual is not None, **tile, on=x,
    )  # fmt: skip
    return out, total, inverse_rms


def _backward(
    gradient: Tensor, total_gradient: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    view = row_view(x)
    count, width = view.shape[0] * view.shape[1], view.shape[2]
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile("rms_norm_bwd", x)
    blocks = triton.cdiv(count, tile["ROWS"])
    blocks_per_program = max(1, triton.cdiv(blocks, MOST_BACKWARD_PROGRAMS))
    programs = triton.cdiv(blocks, blocks_per_program)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    own = row_view(gradient)
    direct = own if total_gradient is None else row_view(total_gradient)
    launch(
        _rms_norm_bwd_kernel, (programs,), own, direct, view, weight, inverse_rms, x_gradient, partial, count, width,
        *_layout(own), *_layout(direct), *_layout(view), weight.stride(0), blocks_per_program,
        HAS_TOTAL_GRADIENT=total_gradient is not None, **tile, on=x,
    )  # fmt: skip
    return x_gradient, partial.sum(0).to(weight.dtype)


@torch.library.custom_op("rxt_kernels::rms_norm_triton", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, _, inverse_rms = _forward(x, None, weight, eps)
    return out, inverse_rms


@torch.library.custom_op("rxt_kernels::add_rms_norm_triton", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


@torch.library.custom_op("rxt_kernels::rms_norm_backward_triton", mutates_args=())
def _rms_norm_backward(
    gradient: Tensor, total_gradient: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return _backward(gradient, total_gradient, x, weight, inverse_rms)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _inverse_like(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _inverse_like(x)


@_rms_norm_backward.register_fake
def _(
    gradient: Tensor, total_gradient: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(x), weight.new_empty(weight.shape)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _inverse_like(x: Tensor) -> Tensor:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return x.new_empty((count,), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, inverse_rms = ctx.saved_tensors
    return (*_rms_norm_backward(gradient, None, x, weight, inverse_rms), None)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients_of_sum(ctx: Any, gradient: Tensor, direct: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, inverse_rms = ctx.saved_tensors
    sum_gradient, weight_gradient = _rms_norm_backward(gradient, direct, total, weight, inverse_rms)
    return sum_gradient, sum_gradient, weight_gradient, None


_rms_norm.register_autograd(_gradients, setup_context=_keep)
_add_rms_norm.register_autograd(_gradients_of_sum, setup_context=_keep_sum)


def supports(x: Tensor, weight: Tensor, eps: float | None = None) -> str | None:
    """None, or why this call is not for Triton."""
    if (reason := unsupported_tensors(x, weight)) is not None:
        return reason
    if weight.dtype is not x.dtype:
        return f"x is {x.dtype} and weight is {weight.dtype}; the kernel takes one dtype."
    if x.shape[-1] > LARGEST_WIDTH:
        return f"x has rows of {x.shape[-1]} values; the kernel holds a whole row of at most {LARGEST_WIDTH}."
    return None


def supports_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float | None = None) -> str | None:
    """None, or why this call is not for Triton."""
    if residual.dtype is not x.dtype:
        return f"x is {x.dtype} and residual is {residual.dtype}; the kernel takes one dtype."
    return supports(x, weight, eps)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x (..., D), weight (D,) -> (..., D); arguments as those of the reference."""
    normed: Tensor = _rms_norm(x, weight, EPSILON if eps is None else eps)[0]
    return normed


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """x, residual (..., D), weight (D,) -> (rms_norm(x + residual), x + residual)."""
    normed, total, _ = _add_rms_norm(x, residual, weight, EPSILON if eps is None else eps)
    return normed, total
