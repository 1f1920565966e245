# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Residual gates of all layers in Triton; see ``reference.py`` for the formula.

Where the opening of a slot depends on that slot alone (static gates, elementwise gates per slot), one pass reads old and
new memory, takes the status, and writes the result. Where it depends on the status of all slots (linear gates, elementwise
gates with one opening for all), there is a pass for the status, a small product of torch's, and a pass that applies the
opening. Either way the number of launches is the same for any number of layers.

Backward, with u = old + new, b what the activation is taken of, and G = act(b):

    db = act'(b) * sum over D of dy * (new - old)
    ds = w * db (elementwise), db W (linear)          du = ds / D, or ds * status_weight
    sigmoid    dnew = G * dy + du                     dold = (1 - G) * dy + du
    tanh       dnew = (1 + G) * dy + du               dold = (1 - G) * dy + du

A program adds up the gradient of the status weight over its own rows; the sums of programs are added afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.memory_update.parameters import ResidualGateParameters
from rxt_kernels.memory_update.triton_rows import (
    backward_programs,
    block_of,
    load_columns,
    load_rows,
    load_slots,
    rows_of_program,
    slot_strides,
)
from rxt_kernels.triton_runtime import launch


@triton.jit
def _status_of(
    total, layer, column, width, status_weight, status_bias, status_weight_layer_stride, status_weight_stride,
    status_bias_stride, LEARNED: tl.constexpr,
):  # fmt: skip
    """(ROWS,): the mean of every row of old + new, or a linear layer of it."""
    if LEARNED:
        factor = load_columns(status_weight, layer, column, width, status_weight_layer_stride, status_weight_stride)
        bias = tl.load(status_bias + layer * status_bias_stride).to(tl.float32)
        return tl.sum(total * factor[None, :], axis=1) + bias
    return tl.sum(total, axis=1) / width


@triton.jit
def _open(before, TANH: tl.constexpr):
    """How much of the new and of the old memory goes on, and the slope of the activation.

    1 + tanh(b) = 2 sigmoid(2 b) and 1 - tanh(b) = 2 sigmoid(-2 b): nothing cancels where a gate is nearly open or closed.
    """
    factor: tl.constexpr = 2.0 if TANH else 1.0
    of_new = factor * tl.sigmoid(factor * before)
    of_old = factor * tl.sigmoid(-factor * before)
    return of_new, of_old, of_new * of_old


@triton.jit
def _memory_update_gate_status_kernel(
    old, new, status_weight, status_bias, status, rows, slots, width, layers_per_new,
    old_layer_stride, old_batch_stride, old_slot_stride, old_stride,
    new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    status_weight_layer_stride, status_weight_stride, status_bias_stride,
    LEARNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The status of every slot, for gates whose opening depends on all of them."""
    layer = tl.program_id(1).to(tl.int64)
    row, column, inside = rows_of_program(tl.program_id(0), rows, width, ROWS, BLOCK)
    total = load_rows(
        old, layer, row, column, inside, slots, old_layer_stride, old_batch_stride, old_slot_stride, old_stride
    ) + load_rows(
        new, layer // layers_per_new, row, column, inside, slots,
        new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    )  # fmt: skip
    found = _status_of(
        total, layer, column, width, status_weight, status_bias, status_weight_layer_stride, status_weight_stride,
        status_bias_stride, LEARNED,
    )  # fmt: skip
    tl.store(status + layer * rows + row, found, mask=row < rows)


@triton.jit
def _memory_update_gate_fwd_kernel(
    old, new, weight, status_weight, status_bias, before, status, out, rows, slots, width, layers_per_new,
    old_layer_stride, old_batch_stride, old_slot_stride, old_stride,
    new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    weight_layer_stride, weight_slot_stride,
    status_weight_layer_stride, status_weight_stride, status_bias_stride,
    before_layer_stride, before_batch_stride, before_slot_stride,
    GIVEN: tl.constexpr, ELEMENTWISE: tl.constexpr, LEARNED: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The result; unless ``before`` is given, also what the activation is taken of, and the status it came from."""
    layer = tl.program_id(1).to(tl.int64)
    row, column, inside = rows_of_program(tl.program_id(0), rows, width, ROWS, BLOCK)
    kept = load_rows(
        old, layer, row, column, inside, slots, old_layer_stride, old_batch_stride, old_slot_stride, old_stride
    )
    written = load_rows(
        new, layer // layers_per_new, row, column, inside, slots,
        new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    )  # fmt: skip
    place = layer * before_layer_stride + (row // slots) * before_batch_stride + (row % slots) * before_slot_stride
    if GIVEN:
        value = tl.load(before + place, mask=row < rows, other=0.0)
    else:
        value = load_slots(weight, layer, row, rows, slots, weight_layer_stride, weight_slot_stride)
        if ELEMENTWISE:
            found = _status_of(
                kept + written, layer, column, width, status_weight, status_bias, status_weight_layer_stride,
                status_weight_stride, status_bias_stride, LEARNED,
            )  # fmt: skip
            tl.store(status + layer * rows + row, found, mask=row < rows)
            value *= found
        tl.store(before + place, value, mask=row < rows)
    of_new, of_old, _ = _open(value, TANH)
    result = of_new[:, None] * written + of_old[:, None] * kept
    target = out + ((layer * rows + row) * width)[:, None] + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _memory_update_gate_bwd_opening_kernel(
    gradient, old, new, before, before_gradient, rows, slots, width, layers_per_new,
    gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
    old_layer_stride, old_batch_stride, old_slot_stride, old_stride,
    new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    before_layer_stride, before_batch_stride, before_slot_stride,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """db of every slot, for gates whose status gradient needs that of all slots."""
    layer = tl.program_id(1).to(tl.int64)
    row, column, inside = rows_of_program(tl.program_id(0), rows, width, ROWS, BLOCK)
    dy = load_rows(
        gradient, layer, row, column, inside, slots,
        gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
    )  # fmt: skip
    kept = load_rows(
        old, layer, row, column, inside, slots, old_layer_stride, old_batch_stride, old_slot_stride, old_stride
    )
    written = load_rows(
        new, layer // layers_per_new, row, column, inside, slots,
        new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    )  # fmt: skip
    place = layer * before_layer_stride + (row // slots) * before_batch_stride + (row % slots) * before_slot_stride
    _, _, slope = _open(tl.load(before + place, mask=row < rows, other=0.0), TANH)
    db = slope * tl.sum(dy * (written - kept), axis=1)
    tl.store(before_gradient + layer * rows + row, db, mask=row < rows)


@triton.jit
def _memory_update_gate_bwd_kernel(
    gradient, old, new, weight, status_weight, before, before_gradient, status_gradient,
    old_gradient, new_gradient, status_weight_partial, rows, slots, width, layers_per_new, blocks_per_program,
    gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
    old_layer_stride, old_batch_stride, old_slot_stride, old_stride,
    new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
    weight_layer_stride, weight_slot_stride, status_weight_layer_stride, status_weight_stride,
    before_layer_stride, before_batch_stride, before_slot_stride,
    GIVEN: tl.constexpr, HAS_STATUS: tl.constexpr, LEARNED: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dold and dnew; unless the status gradient is given, also db and ds."""
    layer = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    if LEARNED:
        factor = load_columns(status_weight, layer, column, width, status_weight_layer_stride, status_weight_stride)
    factor_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * blocks_per_program
    for block in range(blocks_per_program):
        row, column, inside = rows_of_program(first + block, rows, width, ROWS, BLOCK)
        dy = load_rows(
            gradient, layer, row, column, inside, slots,
            gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
        )  # fmt: skip
        kept = load_rows(
            old, layer, row, column, inside, slots, old_layer_stride, old_batch_stride, old_slot_stride, old_stride
        )
        written = load_rows(
            new, layer // layers_per_new, row, column, inside, slots,
            new_layer_stride, new_batch_stride, new_slot_stride, new_stride,
        )  # fmt: skip
        place = layer * before_layer_stride + (row // slots) * before_batch_stride + (row % slots) * before_slot_stride
        of_new, of_old, slope = _open(tl.load(before + place, mask=row < rows, other=0.0), TANH)
        linear_place = layer * rows + row
        if GIVEN:
            ds = tl.load(status_gradient + linear_place, mask=row < rows, other=0.0)
        else:
            db = slope * tl.sum(dy * (written - kept), axis=1)
            tl.store(before_gradient + linear_place, db, mask=row < rows)
            if HAS_STATUS:
                ds = db * load_slots(weight, layer, row, rows, slots, weight_layer_stride, weight_slot_stride)
                tl.store(status_gradient + linear_place, ds, mask=row < rows)
        d_new = of_new[:, None] * dy
        d_old = of_old[:, None] * dy
        if HAS_STATUS:
            if LEARNED:
                du = ds[:, None] * factor[None, :]
                factor_gradient += tl.sum(ds[:, None] * (kept + written), axis=0)
            else:
                du = (ds / width)[:, None]
            d_new += du
            d_old += du
        target = (linear_place * width)[:, None] + column[None, :]
        tl.store(old_gradient + target, d_old.to(old_gradient.dtype.element_ty), mask=inside)
        tl.store(new_gradient + target, d_new.to(new_gradient.dtype.element_ty), mask=inside)
    if LEARNED:
        partial = (layer * tl.num_programs(0) + tl.program_id(0)) * width + column
        tl.store(status_weight_partial + partial, factor_gradient, mask=column < width)


def _needs_all_slots(kind: str, per_slot: bool) -> bool:
    return kind == "linear" or (kind == "elementwise" and not per_slot)


def _before_strides(before: Tensor) -> tuple[int, int, int]:
    """Strides of (L, B, S), or (L, B, 1) for all slots."""
    return before.stride(0), before.stride(1), before.stride(2) if before.shape[2] > 1 else 0


class _Call:
    """Sizes, strides and switches of one call, in the order in which all kernels take them."""

    def __init__(
        self, old: Tensor, new: Tensor, status_weight: Tensor | None, status_bias: Tensor | None, activation: str
    ) -> None:
        self.layers, self.batch, self.slots, self.width = old.shape
        self.rows = self.batch * self.slots
        self.sizes = self.rows, self.slots, self.width, max(1, self.layers // max(1, new.shape[0]))
        self.main_strides = (*old.stride(), *new.stride())
        self.learned = status_weight is not None
        # A kernel reads none of the pointers whose switch is off; any tensor can stand in for them.
        self.status_weight = old if status_weight is None else status_weight
        self.status_weight_strides = (0, 0) if status_weight is None else status_weight.stride()
        self.status_bias = old if status_bias is None else status_bias
        self.status_bias_stride = 0 if status_bias is None else status_bias.stride(0)
        self.tanh = activation == "tanh"
        self.block = block_of(self.width)


@torch.library.custom_op("rxt_kernels::residual_gate_triton", mutates_args=())
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
    """The result (L, B, S, D); what the activation is taken of, (L, B, S) or (L, B, 1); the status, (L, B, S) or empty.

    old (L, B, S, D); new (L, B, S, D), or (G, B, S, D) for groups of L / G neighbouring layers; weight (L, S) or (L, 1),
    for linear gates (L, S, S) or (L, 1, S); bias (L, S) or (L, 1); status_weight (L, D); status_bias (L, 1).
    """
    call = _Call(old, new, status_weight, status_bias, activation)
    out = torch.empty(old.shape, dtype=old.dtype, device=old.device)
    status = _like_status(old, kind)
    config = block_config("memory_update_gate_fwd", old, call.width)
    grid = triton.cdiv(call.rows, config["ROWS"]), call.layers
    all_slots = _needs_all_slots(kind, per_slot)
    if all_slots:
        launch(
            _memory_update_gate_status_kernel, grid, old, new, call.status_weight, call.status_bias, status, *call.sizes,
            *call.main_strides, *call.status_weight_strides, call.status_bias_stride, LEARNED=call.learned,
            BLOCK=call.block, **config, on=old,
        )  # fmt: skip
        before = _before_of_all_slots(status, weight, bias, kind)
    else:
        before = _like_before(old, weight, kind, per_slot)
    launch(
        _memory_update_gate_fwd_kernel, grid, old, new, weight, call.status_weight, call.status_bias, before, status, out,
        *call.sizes, *call.main_strides, *slot_strides(weight), *call.status_weight_strides, call.status_bias_stride,
        *_before_strides(before), GIVEN=all_slots, ELEMENTWISE=kind == "elementwise", LEARNED=call.learned, TANH=call.tanh,
        BLOCK=call.block, **config, on=old,
    )  # fmt: skip
    return out, before, status


def _before_of_all_slots(status: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """status (L, B, S) float32 -> (L, B, S) or (L, B, 1) float32."""
    if kind == "linear":
        assert bias is not None
        return torch.baddbmm(bias.unsqueeze(1), status.to(weight.dtype), weight.transpose(1, 2)).float()
    return weight.float().unsqueeze(1) * status.mean(dim=2, keepdim=True)


def _like_before(old: Tensor, weight: Tensor, kind: str, per_slot: bool) -> Tensor:
    one = (weight.shape[1] == 1) if kind == "linear" else (kind == "elementwise" and not per_slot)
    layers, batch, slots, _ = old.shape
    return old.new_empty((layers, batch, 1 if one else slots), dtype=torch.float32)


def _like_status(old: Tensor, kind: str) -> Tensor:
    return old.new_empty((0,) if kind == "static" else old.shape[:3], dtype=torch.float32)


@torch.library.custom_op("rxt_kernels::residual_gate_backward_triton", mutates_args=())
def _gate_backward(
    gradient: Tensor,
    before: Tensor,
    status: Tensor,
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
    call = _Call(old, new, status_weight, status_bias, activation)
    before_gradient = torch.empty(old.shape[:3], dtype=torch.float32, device=old.device)
    config = block_config("memory_update_gate_bwd", old, call.width)
    all_slots = _needs_all_slots(kind, per_slot)
    small: list[Tensor]
    if all_slots:
        grid = triton.cdiv(call.rows, config["ROWS"]), call.layers
        launch(
            _memory_update_gate_bwd_opening_kernel, grid, gradient, old, new, before, before_gradient, *call.sizes,
            *gradient.stride(), *call.main_strides, *_before_strides(before), TANH=call.tanh, BLOCK=call.block, **config,
            on=old,
        )  # fmt: skip
        status_gradient, *small = _backward_of_all_slots(before_gradient, status, weight, bias, kind)
    else:
        status_gradient = torch.empty_like(before_gradient)
    old_gradient = torch.empty(old.shape, dtype=old.dtype, device=old.device)
    new_gradient = torch.empty(old.shape, dtype=new.dtype, device=old.device)
    programs, blocks_per_program = backward_programs(call.rows, config["ROWS"], call.layers)
    partial = torch.empty(
        call.layers if call.learned else 0, programs, call.width, dtype=torch.float32, device=old.device
    )
    launch(
        _memory_update_gate_bwd_kernel, (programs, call.layers), gradient, old, new, weight, call.status_weight, before,
        before_gradient, status_gradient, old_gradient, new_gradient, partial, *call.sizes, blocks_per_program,
        *gradient.stride(), *call.main_strides, *slot_strides(weight), *call.status_weight_strides,
        *_before_strides(before), GIVEN=all_slots, HAS_STATUS=kind != "static", LEARNED=call.learned, TANH=call.tanh,
        BLOCK=call.block, **config, on=old,
    )  # fmt: skip
    if not all_slots:
        slopes = before_gradient if kind == "static" else before_gradient * status
        small = [slopes.sum(dim=1 if weight.shape[1] > 1 else (1, 2)).view(weight.shape).to(weight.dtype)]
    if status_weight is not None and status_bias is not None:
        small.append(partial.sum(dim=1).to(status_weight.dtype))
        small.append(status_gradient.sum(dim=(1, 2)).unsqueeze(1).to(status_bias.dtype))
    if new.shape[0] != call.layers:
        new_gradient = new_gradient.unflatten(0, (new.shape[0], -1)).sum(dim=1)
    return [old_gradient, new_gradient, *small]


def _backward_of_all_slots(
    before_gradient: Tensor, status: Tensor, weight: Tensor, bias: Tensor | None, kind: str
) -> list[Tensor]:
    """db (L, B, S) and status (L, B, S) -> ds (L, B, S) float32, the gradient of the weight, that of the bias if any."""
    if kind == "linear":
        assert bias is not None
        if weight.shape[1] == 1:
            before_gradient = before_gradient.sum(dim=2, keepdim=True)
        narrow = before_gradient.to(weight.dtype)
        return [
            torch.bmm(narrow, weight).float(),
            torch.bmm(narrow.transpose(1, 2), status.to(weight.dtype)).to(weight.dtype),
            before_gradient.sum(dim=1).to(bias.dtype),
        ]
    db = before_gradient.sum(dim=2, keepdim=True)
    slots = status.shape[2]
    status_gradient = (db * weight.float().unsqueeze(1) / slots).expand(status.shape).contiguous()
    return [status_gradient, (db * status.mean(dim=2, keepdim=True)).sum(dim=1).to(weight.dtype)]


@_gate.register_fake
def _(
    old: Tensor, new: Tensor, weight: Tensor, bias: Tensor | None, status_weight: Tensor | None,
    status_bias: Tensor | None, kind: str, per_slot: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return old.new_empty(old.shape), _like_before(old, weight, kind, per_slot), _like_status(old, kind)


@_gate_backward.register_fake
def _(
    gradient: Tensor, before: Tensor, status: Tensor, old: Tensor, new: Tensor, weight: Tensor, bias: Tensor | None,
    status_weight: Tensor | None, status_bias: Tensor | None, *_: Any,
) -> list[Tensor]:  # fmt: skip
    tensors = (old, new, weight, bias, status_weight, status_bias)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.kind, ctx.per_slot, ctx.activation = inputs
    ctx.save_for_backward(output[1], output[2], *tensors)
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    before, status, *tensors = ctx.saved_tensors
    found = iter(_gate_backward(gradient, before, status, *tensors, ctx.kind, ctx.per_slot, ctx.activation))
    return (*(None if tensor is None else next(found) for tensor in tensors), None, None, None)


_gate.register_autograd(_gradients, setup_context=_keep)


def stacked_gate(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> Tensor:
    """Gates of all layers.

    Args:
        old: (L, B | 1, S, D).
        new: (L, B | 1, S, D), or (G, B | 1, S, D) for groups of L / G neighbouring layers.
        gate: as for one layer, each tensor with L in front.

    Returns:
        (L, B, S, D) with the dtype of old.
    """
    layers, batch = old.shape[0], max(old.shape[1], new.shape[1])
    if gate.kind in ("add", "replace"):
        new = new.unsqueeze(1).expand(-1, layers // new.shape[0], batch, -1, -1).flatten(0, 1)
        return (new if gate.kind == "replace" else old + new).to(old.dtype)
    assert gate.weight is not None
    learned = gate.kind != "static" and gate.status_weight is not None
    result: Tensor = _gate(
        old.expand(-1, batch, -1, -1),
        new.expand(-1, batch, -1, -1),
        gate.weight if gate.kind == "linear" else gate.weight.flatten(1),
        gate.bias,
        gate.status_weight.flatten(1) if learned and gate.status_weight is not None else None,
        gate.status_bias if learned else None,
        gate.kind,
        gate.per_slot,
        gate.activation,
    )[0]
    return result
