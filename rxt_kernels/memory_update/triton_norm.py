# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Memory norms of all layers in Triton; see ``reference.py`` for the formula. A program normalises whole rows.

With x_hat the normed row before its scale, c the factor it is x (or x minus its mean) times, m = sigmoid(gate), and dn the
gradient of x_hat * scale, which is m * dy (dy for classic-rms):

    dx = c * (da - mean over D of da * x_hat * k * x_hat) + (1 - m) * dy        da = dn * scale
    k is 1 for classic-rms and layer, 1 / (2 r) for rms, 0 where r is a running mean; layer also takes away the mean of da
    dscale = sum of dn * x_hat        dgate = m (1 - m) * sum of dy * (x_hat * scale - x)

A program adds up the gradients of weights over its own rows; the sums of programs are added afterwards. Running means are
advanced with torch's operations, outside of the operator, which changes none of its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.memory_update.parameters import MemoryNormParameters
from rxt_kernels.memory_update.reference import LAYER_NORM_EPSILON, NORM_EPSILON
from rxt_kernels.memory_update.triton_rows import (
    backward_programs,
    block_of,
    load_columns,
    load_rows,
    load_slots,
    rows_of_program,
    slot_strides,
)
from rxt_kernels.memory_update.triton_stacked import map_tensors
from rxt_kernels.rms_norm.reference import EPSILON
from rxt_kernels.triton_runtime import launch

CLASSIC, ROOT, RUNNING, LAYER = range(4)
"""What a row is divided by: its rms, the root of its rms, the root of a running mean, its standard deviation."""


@triton.jit
def _normalize(value, given, inside, width, eps, KIND: tl.constexpr):
    """x_hat, the factor c, and k of the backward pass."""
    if KIND == 3:
        centred = tl.where(inside, value - (tl.sum(value, axis=1) / width)[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        return centred * factor[:, None], factor, tl.full(factor.shape, 1.0, dtype=tl.float32)
    if KIND == 2:
        factor = tl.rsqrt(given + eps)
        return value * factor[:, None], factor, tl.zeros(factor.shape, dtype=tl.float32)
    mean_square = tl.sum(value * value, axis=1) / width
    if KIND == 1:
        rms = tl.sqrt(mean_square)
        factor = tl.rsqrt(rms + eps)
        return value * factor[:, None], factor, tl.where(rms > 0.0, 0.5 / tl.where(rms > 0.0, rms, 1.0), 0.0)
    factor = tl.rsqrt(mean_square + eps)
    return value * factor[:, None], factor, tl.full(factor.shape, 1.0, dtype=tl.float32)


@triton.jit
def _rows_kept(mask, row, rows, slots, mask_batch_stride, mask_slot_stride):
    """(ROWS,) bool: the rows that are no padding."""
    place = (row // slots) * mask_batch_stride + (row % slots) * mask_slot_stride
    return tl.load(mask + place, mask=row < rows, other=0).to(tl.int1)


@triton.jit
def _scale_of(
    scale, layer, row, column, rows, slots, width, scale_layer_stride, scale_slot_stride, scale_stride,
    SLOT_SCALE: tl.constexpr,
):  # fmt: skip
    """(ROWS, 1) or (1, BLOCK)."""
    if SLOT_SCALE:
        return load_slots(scale, layer, row, rows, slots, scale_layer_stride, scale_slot_stride)[:, None]
    return load_columns(scale, layer, column, width, scale_layer_stride, scale_stride)[None, :]


@triton.jit
def _memory_update_norm_fwd_kernel(
    x, scale, gate, weight, bias, rms, mask, out, rows, slots, width, eps,
    x_layer_stride, x_batch_stride, x_slot_stride, x_stride,
    scale_layer_stride, scale_slot_stride, scale_stride, gate_layer_stride, gate_slot_stride,
    weight_layer_stride, weight_stride, bias_layer_stride, bias_stride, rms_layer_stride, rms_slot_stride,
    mask_batch_stride, mask_slot_stride,
    KIND: tl.constexpr, SLOT_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    row, column, inside = rows_of_program(tl.program_id(0), rows, width, ROWS, BLOCK)
    read = inside
    if HAS_MASK:
        # Padding is not read, so that what it holds, also NaN, is gone.
        read = inside & _rows_kept(mask, row, rows, slots, mask_batch_stride, mask_slot_stride)[:, None]
    value = load_rows(x, layer, row, column, read, slots, x_layer_stride, x_batch_stride, x_slot_stride, x_stride)
    given = 0.0
    if KIND == 2:
        given = load_slots(rms, layer, row, rows, slots, rms_layer_stride, rms_slot_stride)
    normed, _, _ = _normalize(value, given, inside, width, eps, KIND)
    if KIND == 3:
        normed = normed * load_columns(weight, layer, column, width, weight_layer_stride, weight_stride)[None, :]
        normed += load_columns(bias, layer, column, width, bias_layer_stride, bias_stride)[None, :]
    normed *= _scale_of(
        scale, layer, row, column, rows, slots, width, scale_layer_stride, scale_slot_stride, scale_stride, SLOT_SCALE
    )
    if KIND != 0:
        mix = tl.sigmoid(load_slots(gate, layer, row, rows, slots, gate_layer_stride, gate_slot_stride))[:, None]
        normed = mix * normed + (1.0 - mix) * value
    target = out + ((layer * rows + row) * width)[:, None] + column[None, :]
    tl.store(target, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _memory_update_norm_bwd_kernel(
    gradient, x, scale, gate, weight, bias, rms, mask, x_gradient, partial, scale_rows, gate_rows,
    rows, slots, width, eps, blocks_per_program, partial_stride,
    gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
    x_layer_stride, x_batch_stride, x_slot_stride, x_stride,
    scale_layer_stride, scale_slot_stride, scale_stride, gate_layer_stride, gate_slot_stride,
    weight_layer_stride, weight_stride, bias_layer_stride, bias_stride, rms_layer_stride, rms_slot_stride,
    mask_batch_stride, mask_slot_stride,
    KIND: tl.constexpr, SLOT_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx; partial sums of the gradients of scale, weight and bias; per row, the gradients of scale and gate."""
    layer = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    scale_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    if KIND == 3:
        factor_of_column = load_columns(weight, layer, column, width, weight_layer_stride, weight_stride)[None, :]
        added = load_columns(bias, layer, column, width, bias_layer_stride, bias_stride)[None, :]
    first = tl.program_id(0).to(tl.int64) * blocks_per_program
    for block in range(blocks_per_program):
        row, column, inside = rows_of_program(first + block, rows, width, ROWS, BLOCK)
        read = inside
        if HAS_MASK:
            read = inside & _rows_kept(mask, row, rows, slots, mask_batch_stride, mask_slot_stride)[:, None]
        value = load_rows(x, layer, row, column, read, slots, x_layer_stride, x_batch_stride, x_slot_stride, x_stride)
        # A row of padding gets no gradient, so its own is not read either.
        dy = load_rows(
            gradient, layer, row, column, read, slots,
            gradient_layer_stride, gradient_batch_stride, gradient_slot_stride, gradient_stride,
        )  # fmt: skip
        given = 0.0
        if KIND == 2:
            given = load_slots(rms, layer, row, rows, slots, rms_layer_stride, rms_slot_stride)
        x_hat, factor, pull = _normalize(value, given, inside, width, eps, KIND)
        scale_here = _scale_of(
            scale, layer, row, column, rows, slots, width, scale_layer_stride, scale_slot_stride, scale_stride,
            SLOT_SCALE,
        )  # fmt: skip
        affine = x_hat
        if KIND == 3:
            affine = tl.where(inside, x_hat * factor_of_column + added, 0.0)
        dn = dy
        if KIND != 0:
            mix = tl.sigmoid(load_slots(gate, layer, row, rows, slots, gate_layer_stride, gate_slot_stride))
            dn = dy * mix[:, None]
            of_gate = tl.sum(dy * (affine * scale_here - value), axis=1) * mix * (1.0 - mix)
            tl.store(gate_rows + layer * rows + row, of_gate, mask=row < rows)
        if SLOT_SCALE:
            tl.store(scale_rows + layer * rows + row, tl.sum(dn * affine, axis=1), mask=row < rows)
        else:
            scale_sum += tl.sum(dn * affine, axis=0)
        da = dn * scale_here
        if KIND == 3:
            weight_sum += tl.sum(da * x_hat, axis=0)
            bias_sum += tl.sum(da, axis=0)
            da = da * factor_of_column
        dx = da - x_hat * (tl.sum(da * x_hat, axis=1) / width * pull)[:, None]
        if KIND == 3:
            dx -= (tl.sum(da, axis=1) / width)[:, None]
        dx *= factor[:, None]
        if KIND != 0:
            dx += dy - dn
        target = x_gradient + ((layer * rows + row) * width)[:, None] + column[None, :]
        tl.store(target, dx.to(x_gradient.dtype.element_ty), mask=inside)
    place = partial + (layer * tl.num_programs(0) + tl.program_id(0)) * width + column
    if not SLOT_SCALE:
        tl.store(place, scale_sum, mask=column < width)
    if KIND == 3:
        tl.store(place + partial_stride, weight_sum, mask=column < width)
        tl.store(place + 2 * partial_stride, bias_sum, mask=column < width)


class _Call:
    """Sizes, tensors, strides and switches of one call, in the order in which both kernels take them."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rms: Tensor | None,
        mask: Tensor | None,
        kind: str,
    ) -> None:
        self.layers, self.batch, self.slots, self.width = x.shape
        self.rows = self.batch * self.slots
        self.slot_scale = scale.dim() == 3
        self.number = {"classic-rms": CLASSIC, "layer": LAYER}.get(kind, ROOT if rms is None else RUNNING)
        eps = {CLASSIC: EPSILON, LAYER: LAYER_NORM_EPSILON}.get(self.number, NORM_EPSILON)
        self.sizes = self.rows, self.slots, self.width, eps
        bits = None if mask is None else mask.view(torch.uint8)
        # A kernel reads none of the pointers whose switch is off; any tensor can stand in for them.
        self.tensors = (scale, *(x if tensor is None else tensor for tensor in (gate, weight, bias, rms, bits)))
        self.strides = (
            *((scale.stride(0), scale.stride(1), 0) if self.slot_scale else (scale.stride(0), 0, scale.stride(1))),
            *((0, 0) if gate is None else slot_strides(gate)),
            *((0, 0) if weight is None else weight.stride()),
            *((0, 0) if bias is None else bias.stride()),
            *((0, 0) if rms is None else slot_strides(rms)),
            *((0, 0) if mask is None else mask.stride()),
        )
        self.switches = {
            "KIND": self.number,
            "SLOT_SCALE": self.slot_scale,
            "HAS_MASK": mask is not None,
            "BLOCK": block_of(self.width),
        }


@torch.library.custom_op("rxt_kernels::memory_norm_triton", mutates_args=())
def _norm(
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: Tensor | None,
    mask: Tensor | None,
    kind: str,
) -> Tensor:
    """x (L, B, S, D) -> (L, B, S, D).

    scale (L, D), or (L, S, 1) for one per slot; for classic-rms it is the weight. gate (L, S) or (L, 1), for every kind but
    classic-rms; weight and bias (L, D) for layer; rms (L, S) or (L, 1) float32 where a running mean divides; mask (B, S)
    bool: rows where it is False count as zero.
    """
    call = _Call(x, scale, gate, weight, bias, rms, mask, kind)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = block_config("memory_update_norm_fwd", x, call.width)
    launch(
        _memory_update_norm_fwd_kernel, (triton.cdiv(call.rows, config["ROWS"]), call.layers), x, *call.tensors, out,
        *call.sizes, *x.stride(), *call.strides, **call.switches, **config, on=x,
    )  # fmt: skip
    return out


@torch.library.custom_op("rxt_kernels::memory_norm_backward_triton", mutates_args=())
def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: Tensor | None,
    mask: Tensor | None,
    kind: str,
) -> list[Tensor]:
    """Gradients of x, scale, and of those of gate, weight and bias that there are."""
    call = _Call(x, scale, gate, weight, bias, rms, mask, kind)
    config = block_config("memory_update_norm_bwd", x, call.width)
    programs, blocks_per_program = backward_programs(call.rows, config["ROWS"], call.layers)
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums_of_columns = 3 if weight is not None else 0 if call.slot_scale else 1
    partial = torch.empty(sums_of_columns, call.layers, programs, call.width, dtype=torch.float32, device=x.device)
    rows = (call.layers, call.batch, call.slots)
    scale_rows = torch.empty(rows if call.slot_scale else (0,), dtype=torch.float32, device=x.device)
    gate_rows = torch.empty(rows if gate is not None else (0,), dtype=torch.float32, device=x.device)
    launch(
        _memory_update_norm_bwd_kernel, (programs, call.layers), gradient, x, *call.tensors, x_gradient, partial,
        scale_rows, gate_rows, *call.sizes, blocks_per_program, partial.stride(0), *gradient.stride(), *x.stride(),
        *call.strides, **call.switches, **config, on=x,
    )  # fmt: skip
    sums = partial.sum(dim=2)
    scale_gradient = scale_rows.sum(dim=1).unsqueeze(2) if call.slot_scale else sums[0]
    found = [x_gradient, scale_gradient.to(scale.dtype, copy=True)]
    if gate is not None:
        found.append(gate_rows.sum(dim=1 if gate.shape[1] > 1 else (1, 2)).view(gate.shape).to(gate.dtype))
    if weight is not None and bias is not None:
        found += [sums[1].to(weight.dtype, copy=True), sums[2].to(bias.dtype, copy=True)]
    return found


@_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_norm_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, scale: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, scale, gate, weight, bias) if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(_norm_backward(gradient, *tensors, ctx.kind))
    return (*(None if tensor is None else next(found) for tensor in tensors[:5]), None, None, None)


_norm.register_autograd(_gradients, setup_context=_keep)


def stacked_norm(x: Tensor, norm: MemoryNormParameters, training: bool = False, mask: Tensor | None = None) -> Tensor:
    """Norms of all layers.

    Args:
        x: (L, B, S, D).
        norm: as for one layer, each tensor with L in front; in training the running means are updated in place.
        training: whether they are.
        mask: (B, S) bool; rows where it is False count as zero.

    Returns:
        (L, B, S, D) with the dtype of x.
    """
    rms = None
    if norm.ema_rms is not None and (training or norm.kind == "positional"):
        mean = _by_layer(norm.ema_rms)
        if training:
            mean = (norm.decay * mean.float() + (1 - norm.decay) * _rms_now(x, norm.kind)).to(mean.dtype)
            norm.ema_rms.copy_(mean.view(norm.ema_rms.shape))
        # A copy: the backward pass needs the mean of now, also after the next update.
        rms = mean.to(torch.float32, copy=True)
    return _apply(x, norm, rms, mask)


def shared_norm(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> Tensor:
    """One norm for all layers, or groups of layers; in training its running mean is updated by one after the other.

    Args:
        x: (L, B, S, D).
        norm: of one layer.
        training: whether the running mean is updated.

    Returns:
        (L, B, S, D) with the dtype of x.
    """
    layers = x.shape[0]
    each = map_tensors(lambda tensor: tensor.unsqueeze(0).expand(layers, *tensor.shape), norm)
    if norm.ema_rms is None or not training:
        return stacked_norm(x, each)
    means = _means_in_turn(norm.ema_rms.flatten().float(), _rms_now(x, norm.kind), norm.decay).to(norm.ema_rms.dtype)
    norm.ema_rms.copy_(means[-1].view(norm.ema_rms.shape))
    return _apply(x, each, means.float(), None)


def _by_layer(values: Tensor) -> Tensor:
    """(L, ...) -> (L, S) or (L, 1)."""
    return values.reshape(values.shape[0], -1)


def _rms_now(x: Tensor, kind: str) -> Tensor:
    """(L, B, S, D) -> float32: the rms of a layer (L, 1), or for positional norms the mean rms of a slot (L, S)."""
    rms = torch.linalg.vector_norm(x.detach(), dim=3, dtype=torch.float32) * x.shape[3] ** -0.5
    if kind == "adaptive":
        return rms.square().mean(dim=(1, 2)).sqrt().unsqueeze(1)
    return rms.mean(dim=1)


def _means_in_turn(mean: Tensor, now: Tensor, decay: float) -> Tensor:
    """mean (n,), now (L, n) -> (L, n): the running mean after each of L updates, written out instead of repeated."""
    step = torch.arange(now.shape[0], device=now.device)
    age = step[:, None] - step[None, :]
    share = torch.where(age >= 0, (1 - decay) * decay ** age.clamp(min=0), 0.0)
    return decay ** (step + 1)[:, None] * mean + (share[:, :, None] * now).sum(dim=1)


def _apply(x: Tensor, norm: MemoryNormParameters, rms: Tensor | None, mask: Tensor | None) -> Tensor:
    scale = norm.weight if norm.kind == "classic-rms" else norm.scale
    assert scale is not None
    layer = norm.kind == "layer"
    normed: Tensor = _norm(
        x,
        scale,
        None if norm.gate is None else _by_layer(norm.gate),
        norm.weight if layer else None,
        norm.bias if layer else None,
        rms,
        mask,
        norm.kind,
    )
    return normed
