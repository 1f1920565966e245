"""Rotary positions by the native CPU kernels: sines and cosines by torch, in the dtype of the angles, the rotation in one pass.

A gradient is turned back by the same kernel, with the layouts of reading and writing exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension, is_plain_call, unsupported_tensors


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, split: bool, inverse: bool) -> Tensor:
    heads = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    out = x.new_empty(x.shape)
    extension.rotary(heads, cosine, sine, split, inverse, out)
    return out


@torch.library.custom_op("rxt_kernels::rotary_native", mutates_args=())
def _rotary(x: Tensor, cosine: Tensor, sine: Tensor, split: bool, inverse: bool) -> Tensor:
    return _turn(x, cosine, sine, split, inverse)


@_rotary.register_fake
def _(x: Tensor, cosine: Tensor, sine: Tensor, split: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, cosine, sine, ctx.split, ctx.inverse = inputs
    ctx.save_for_backward(cosine, sine)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _rotary(gradient, *ctx.saved_tensors, ctx.split, not ctx.inverse), None, None, None, None


_rotary.register_autograd(_gradients, setup_context=_keep)


def supports(x: Tensor, angles: Tensor, layout: str = "interleaved") -> str | None:
    """None, or why this call is not for the native kernels."""
    if angles.requires_grad:
        return "the angles require a gradient; the kernels have none for angles."
    if angles.dtype is torch.float64:
        return "the angles are torch.float64, and so is the rotation by them; the kernels rotate in float32."
    return unsupported_tensors(x)


def rotary_native(x: Tensor, angles: Tensor, layout: str = "interleaved") -> Tensor:
    """x (B, T, H, head_dim), angles (T, head_dim/2) or (B, T, head_dim/2) -> like x."""
    cosine, sine = angles.cos().float().contiguous(), angles.sin().float().contiguous()
    split = layout == "split"
    if is_plain_call(x):
        return _turn(x, cosine, sine, split, False)
    rotated: Tensor = _rotary(x, cosine, sine, split, False)
    return rotated
