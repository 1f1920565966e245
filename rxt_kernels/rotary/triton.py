"""Rotary positions in Triton; see ``reference.py`` for the formula.

:func:`rotate` and :func:`unrotate` work on tiles in registers, and other rooms' kernels use them to rotate what they load.
The kernel here is for those who want rotated heads by themselves. A row is one head of one token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.triton_runtime import launch, unsupported_tensors

LARGEST_HEAD = 1024


@triton.jit
def angle_sines(angles, row, stride_row, stride_pair, rows_inside, half, HALF_BLOCK: tl.constexpr):
    """Cosines and sines of the angles of these rows, (rows, HALF_BLOCK) float32, rounded to the dtype of the angles."""
    pair = tl.arange(0, HALF_BLOCK).to(tl.int64)
    inside = rows_inside[:, None] & (pair < half)[None, :]
    angle = tl.load(angles + (row * stride_row)[:, None] + (pair * stride_pair)[None, :], mask=inside, other=0.0)
    wide = angle.to(tl.float32)
    cosine, sine = tl.cos(wide), tl.sin(wide)
    return cosine.to(angle.dtype).to(tl.float32), sine.to(angle.dtype).to(tl.float32)


@triton.jit
def rotate(x, cosine, sine, SPLIT: tl.constexpr):
    """Turn the interleaved pairs of x (rows, BLOCK) float32; written interleaved, or first halves before second halves."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    turned = tl.join(a * cosine - b * sine, a * sine + b * cosine)
    if SPLIT:
        turned = tl.permute(turned, (0, 2, 1))
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit
def unrotate(x, cosine, sine, SPLIT: tl.constexpr):
    """The inverse of :func:`rotate`, which is also its transpose: what a gradient goes through."""
    if SPLIT:
        pairs = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    else:
        pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2))
    first, second = tl.split(pairs)
    turned = tl.join(first * cosine + second * sine, second * cosine - first * sine)
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit
def column_of(BLOCK: tl.constexpr, half, SPLIT: tl.constexpr):
    """Where the values of a tile's columns stand in a head of 2 * half values, and which columns there are.

    Only heads that are no power of two make a difference: a split tile has its second halves at BLOCK / 2, not at half.
    """
    column = tl.arange(0, BLOCK).to(tl.int64)
    if SPLIT:
        second = column // (BLOCK // 2)
        column = column % (BLOCK // 2)
        return column + second * half, column < half
    return column, column < 2 * half


@triton.jit
def _rotary_kernel(
    x, angles, out, rows, time, heads,
    x_batch_stride, x_time_stride, x_head_stride, x_stride,
    angles_batch_stride, angles_time_stride, angles_stride,
    HALF: tl.constexpr, SPLIT: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = row // heads
    batch, position, head = token // time, token % time, row % heads
    from_column, from_inside = column_of(BLOCK, HALF, SPLIT and INVERSE)
    to_column, to_inside = column_of(BLOCK, HALF, SPLIT and not INVERSE)
    exists = row < rows
    place = batch * x_batch_stride + position * x_time_stride + head * x_head_stride
    value = tl.load(
        x + place[:, None] + (from_column * x_stride)[None, :], mask=exists[:, None] & from_inside[None, :], other=0.0
    ).to(tl.float32)
    cosine, sine = angle_sines(
        angles + batch[:, None] * angles_batch_stride,
        position,
        angles_time_stride,
        angles_stride,
        exists,
        HALF,
        BLOCK // 2,
    )
    if INVERSE:
        value = unrotate(value, cosine, sine, SPLIT)
    else:
        value = rotate(value, cosine, sine, SPLIT)
    target = out + row[:, None] * (2 * HALF) + to_column[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=exists[:, None] & to_inside[None, :])


@torch.library.custom_op("rxt_kernels::rotary_triton", mutates_args=())
def _rotary(x: Tensor, angles: Tensor, split: bool, inverse: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, time, heads, head_dim = x.shape
    rows = x.numel() // head_dim if head_dim else 0
    tile = {**block_config("rotary", x, head_dim), "BLOCK": triton.next_power_of_2(max(head_dim, 2))}
    batch_stride = angles.stride(0) if angles.dim() == 3 else 0
    # Half a head is a constant of the kernel: its masks are then seen to leave whole vectors.
    launch(
        _rotary_kernel, (triton.cdiv(rows, tile["ROWS"]),), x, angles, out, rows, time, heads,
        *x.stride(), batch_stride, angles.stride(-2), angles.stride(-1),
        HALF=head_dim // 2, SPLIT=split, INVERSE=inverse, **tile, on=x,
    )  # fmt: skip
    return out


@_rotary.register_fake
def _(x: Tensor, angles: Tensor, split: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, angles, ctx.split, ctx.inverse = inputs
    ctx.save_for_backward(angles)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _rotary(gradient, *ctx.saved_tensors, ctx.split, not ctx.inverse), None, None, None


_rotary.register_autograd(_gradients, setup_context=_keep)


def unsupported_angles(angles: Tensor | None) -> str | None:
    """Why kernels cannot take these angles, in one sentence; None if they can."""
    if angles is not None and angles.requires_grad:
        return "the angles require a gradient; the kernels have none for angles."
    return unsupported_tensors(angles)


def supports(x: Tensor, angles: Tensor, layout: str = "interleaved") -> str | None:
    """None, or why this call is not for Triton."""
    if x.shape[-1] > LARGEST_HEAD:
        return f"x has heads of {x.shape[-1]} values; the kernel takes at most {LARGEST_HEAD}."
    return unsupported_tensors(x) or unsupported_angles(angles)


def rotary_triton(x: Tensor, angles: Tensor, layout: str = "interleaved") -> Tensor:
    """x (B, T, H, head_dim), angles (T, head_dim/2) or (B, T, head_dim/2) -> like x."""
    rotated: Tensor = _rotary(x, angles, layout == "split", False)
    return rotated
