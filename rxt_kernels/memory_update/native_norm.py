"""Memory norms by the native CPU kernels, forward and backward; see ``reference.py`` for the formula.

A norm is one pass over rows that stay in cache. The backward pass computes a row's statistics again, writes the gradient of x,
and sums those of the parameters in an order that does not depend on the threads. Running means are updated by torch, before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import MemoryNormParameters, flat_values
from rxt_kernels.native_runtime import extension, is_plain_call, unsupported_tensors
from rxt_kernels.rms_norm.native import rms_norm_native


def _arguments(
    x: Tensor,
    scale: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given_rms: Tensor | None,
    gate_per_slot: bool,
) -> tuple[Any, ...]:
    """What both kernels take first."""
    return (
        x.contiguous(), weight is not None, *map(flat_values, (scale, gate, given_rms, weight, bias)), scale.dim() == 2,
        gate_per_slot,
    )  # fmt: skip


@torch.library.custom_op("rxt_kernels::memory_norm_native", mutates_args=())
def _norm(
    x: Tensor,
    scale: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given_rms: Tensor | None,
    gate_per_slot: bool,
) -> Tensor:
    """x (B, S, D) -> (B, S, D).

    scale (D,) or (S, 1); gate one element, or (S, 1) if gate_per_slot; weight and bias (D,) of a layer norm; given_rms (S,)
    float32 where it takes the place of a row's own.
    """
    out = x.new_empty(x.shape)
    extension.memory_norm(*_arguments(x, scale, gate, weight, bias, given_rms, gate_per_slot), out)
    return out


@torch.library.custom_op("rxt_kernels::memory_norm_backward_native", mutates_args=())
def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given_rms: Tensor | None,
    gate_per_slot: bool,
) -> list[Tensor]:
    """Gradients of x, scale, gate, and of weight and bias if there are any."""
    arguments = _arguments(x, scale, gate, weight, bias, given_rms, gate_per_slot)
    parameters = [scale, gate, weight, bias]
    small = [None if one is None else one.new_empty(one.numel(), dtype=torch.float32) for one in parameters]
    x_gradient = x.new_empty(x.shape)
    extension.memory_norm_backward(*arguments, gradient.contiguous(), x_gradient, *small)
    found = zip(small, parameters, strict=True)
    return [
        x_gradient,
        *(own.view(one.shape).to(one.dtype) for own, one in found if own is not None and one is not None),
    ]


@_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_norm_backward.register_fake
def _(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:5] if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gate_per_slot = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(_norm_backward(gradient, *tensors, ctx.gate_per_slot))
    return (*(None if tensor is None else next(found) for tensor in tensors[:5]), None, None)


_norm.register_autograd(_gradients, setup_context=_keep)


def _tensors(norm: MemoryNormParameters) -> list[Tensor]:
    return [value for value in norm if isinstance(value, Tensor)]


def supports_norm(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> str | None:
    """None, or why this call is not for the native kernels."""
    if norm.ema_rms is not None and norm.ema_rms.requires_grad:
        return "ema_rms requires a gradient; the kernels have none for running means."
    return unsupported_tensors(x, *_tensors(norm))


def _given_rms(x: Tensor, norm: MemoryNormParameters, training: bool) -> Tensor | None:
    """The running mean where it takes the place of a row's rms, (S,) float32, after its update in training."""
    if norm.ema_rms is None or not (training or norm.kind == "positional"):
        return None
    if training:
        squares = x.detach().float().square()
        now = squares.mean() if norm.kind == "adaptive" else squares.mean(dim=-1, keepdim=True)
        now = now.sqrt() if norm.kind == "adaptive" else now.sqrt().mean(dim=0)
        norm.ema_rms.mul_(norm.decay).add_(now * (1 - norm.decay))
    # A copy: the backward pass needs the mean of now, also after the next update.
    return norm.ema_rms.detach().float().reshape(-1).expand(x.shape[1]).clone()


def memory_norm_native(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> Tensor:
    """x (B, S, D) -> (B, S, D); as the reference."""
    if norm.kind == "classic-rms":
        assert norm.weight is not None
        return rms_norm_native(x, norm.weight)
    assert norm.scale is not None
    assert norm.gate is not None
    arguments = (
        x, norm.scale, norm.gate, norm.weight, norm.bias, _given_rms(x, norm, training), norm.kind == "positional"
    )  # fmt: skip
    if not is_plain_call(x, *_tensors(norm)):
        result: Tensor = _norm(*arguments)
        return result
    out = x.new_empty(x.shape)
    extension.memory_norm(*_arguments(*arguments), out)
    return out
