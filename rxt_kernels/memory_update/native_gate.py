"""Residual gates by the native CPU kernels, forward and backward; see ``reference.py`` for the formula.

The forward pass is one pass over memory; a gate that looks at all slots reads it once more before, for their statuses. What the
activation is applied to and the statuses are kept for the backward pass, one number per slot each. That is one pass too, two
where all slots matter, and sums for the gradients of parameters, whose order does not depend on the threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import ResidualGateParameters, flat_values
from rxt_kernels.memory_update.reference import residual_gate_reference
from rxt_kernels.native_runtime import extension, is_plain_call, unsupported_tensors


def _arguments(
    old: Tensor,
    new: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    status_weight: Tensor | None,
    status_bias: Tensor | None,
    kind: str,
    per_slot: bool,
    activation: str,
) -> tuple[Any, ...]:
    """What both kernels take first."""
    return (
        old.contiguous(), new.contiguous(), kind, activation == "tanh", per_slot, flat_values(weight), flat_values(bias),
        flat_values(status_weight), 0.0 if status_bias is None else float(status_bias),
    )  # fmt: skip


def _per_slot(old: Tensor) -> Tensor:
    return old.new_empty(old.shape[:2], dtype=torch.float32)


@torch.library.custom_op("rxt_kernels::residual_gate_native", mutates_args=())
def _gate(
    old: Tensor,
    new: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    status_weight: Tensor | None,
    status_bias: Tensor | None,
    kind: str,
    per_slot: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """old, new (B, S, D) -> the result (B, S, D); statuses and what the activation is applied to, (B, S) float32."""
    out = old.new_empty(old.shape)
    # A static gate has no status, and a backward pass does not read it.
    status, before = _per_slot(old).zero_(), _per_slot(old)
    arguments = _arguments(old, new, weight, bias, status_weight, status_bias, kind, per_slot, activation)
    extension.residual_gate(*arguments, status, before, out)
    return out, status, before


@torch.library.custom_op("rxt_kernels::residual_gate_backward_native", mutates_args=())
def _gate_backward(
    gradient: Tensor,
    status: Tensor,
    before: Tensor,
    old: Tensor,
    new: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    status_weight: Tensor | None,
    status_bias: Tensor | None,
    kind: str,
    per_slot: bool,
    activation: str,
) -> list[Tensor]:
    """Gradients of old, new, weight, and of those of bias, status_weight and status_bias that there are."""
    arguments = _arguments(old, new, weight, bias, status_weight, status_bias, kind, per_slot, activation)
    parameters = [weight, bias, status_weight, status_bias]
    small = [None if one is None else one.new_empty(one.numel(), dtype=torch.float32) for one in parameters]
    large = [old.new_empty(old.shape), old.new_empty(old.shape)]
    extension.residual_gate_backward(*arguments, status, before, gradient.contiguous(), *large, *small)
    found = zip(small, parameters, strict=True)
    return large + [own.view(one.shape).to(one.dtype) for own, one in found if own is not None and one is not None]


@_gate.register_fake
def _(old: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return old.new_empty(old.shape), _per_slot(old), _per_slot(old)


@_gate_backward.register_fake
def _(gradient: Tensor, status: Tensor, before: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:6] if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.kind, ctx.per_slot, ctx.activation = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    status, before, *tensors = ctx.saved_tensors
    found = iter(_gate_backward(gradient, status, before, *tensors, ctx.kind, ctx.per_slot, ctx.activation))
    return (*(None if tensor is None else next(found) for tensor in tensors), None, None, None)


_gate.register_autograd(_gradients, setup_context=_keep)


def _tensors(gate: ResidualGateParameters) -> list[Tensor]:
    return [value for value in gate if isinstance(value, Tensor)]


def supports_gate(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> str | None:
    """None, or why this call is not for the native kernels."""
    return unsupported_tensors(old, new, *_tensors(gate))


def residual_gate_native(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> Tensor:
    """old, new (B, S, D) -> (B, S, D); as the reference."""
    is_plain = is_plain_call(old, new, *_tensors(gate))
    if gate.kind == "replace" or (gate.kind == "add" and not is_plain):
        return residual_gate_reference(old, new, gate)
    old, new = torch.broadcast_tensors(old, new)
    learned = gate.kind != "static"  # the status of a static gate is never read
    tensors = gate.weight, gate.bias, gate.status_weight if learned else None, gate.status_bias if learned else None
    if not is_plain:
        result: Tensor = _gate(old, new, *tensors, gate.kind, gate.per_slot, gate.activation)[0]
        return result
    out = old.new_empty(old.shape)
    extension.residual_gate(
        *_arguments(old, new, *tensors, gate.kind, gate.per_slot, gate.activation), _per_slot(old), None, out
    )
    return out
