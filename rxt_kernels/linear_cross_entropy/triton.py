"""Linear layer and cross-entropy in Triton, in chunks of rows: never more logits than ``LARGEST_CHUNK`` values at once.

The matrix products are the vendor library's; the kernels walk over a row of logits. Forward keeps the logarithm of the sum
of exponentials of every row, with which backward computes a chunk of logits once more and turns it into its gradient in
place:    dlogits = (exp(logits - log_sum) - onehot(target)) * factor
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.triton_runtime import launch, unsupported_tensors

LARGEST_CHUNK = 1 << 24
ALIGNMENT = 16
"""Values that a row of logits is padded to, so that every row begins where the widest loads can."""


@triton.jit
def _fold(highest, total, value):
    """Running maximum and sum of exponentials, per lane, with one more block of values."""
    higher = tl.maximum(highest, value)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(highest - base) + tl.exp(value - base)


@triton.jit
def _cross_entropy_fwd_kernel(logits, target, losses, log_sums, row_stride, classes, ignored, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Whole blocks need no mask, which would cut loads to single values wherever it does not end at a multiple of 16.
    whole = classes // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        highest, total = _fold(highest, total, tl.load(logits + first + column).to(tl.float32))
    rest = whole + column
    value = tl.load(logits + rest, mask=rest < classes, other=float("-inf")).to(tl.float32)
    highest, total = _fold(highest, total, value)
    top = tl.max(highest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - base), axis=0))
    chosen = tl.load(target + row)
    counts = chosen != ignored
    known = (chosen >= 0) & (chosen < classes)
    picked = tl.load(logits + tl.where(known, chosen, 0)).to(tl.float32)
    # A target that is no class cannot be refused without asking the device; it must not look like a result either.
    loss = tl.where(known, log_sum - picked, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.store(log_sums + row, log_sum)


@triton.jit
def _logit_gradient(value, column, log_sum, chosen, factor):
    return (tl.exp(value.to(tl.float32) - log_sum) - tl.where(column == chosen, 1.0, 0.0)) * factor


@triton.jit
def _cross_entropy_bwd_kernel(logits, target, log_sums, factors, row_stride, classes, ignored, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    log_sum = tl.load(log_sums + row)
    chosen = tl.load(target + row)
    factor = tl.where(chosen != ignored, tl.load(factors + row), 0.0)
    column = tl.arange(0, BLOCK)
    whole = classes // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        gradient = _logit_gradient(tl.load(logits + first + column), first + column, log_sum, chosen, factor)
        tl.store(logits + first + column, gradient.to(logits.dtype.element_ty))
    rest = whole + column
    gradient = _logit_gradient(
        tl.load(logits + rest, mask=rest < classes, other=0.0), rest, log_sum, chosen, factor
    )  # fmt: skip
    tl.store(logits + rest, gradient.to(logits.dtype.element_ty), mask=rest < classes)


def _chunks(rows: int, classes: int) -> range:
    return range(0, rows, max(1, LARGEST_CHUNK // max(classes, 1)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (N, D), weight (V, D) -> (N, V), with rows that begin at multiples of ALIGNMENT values."""
    rows, classes = hidden.shape[0], weight.shape[0]
    if classes % ALIGNMENT == 0:
        return F.linear(hidden, weight, bias)
    padded = hidden.new_empty((rows, triton.cdiv(classes, ALIGNMENT) * ALIGNMENT))
    logits = padded[:, :classes]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


@torch.library.custom_op("rxt_kernels::linear_cross_entropy_triton", mutates_args=())
def _losses(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    """hidden (N, D), target (N,) -> loss and logarithm of the sum of exponentials of every row, float32."""
    rows, classes = hidden.shape[0], weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    log_sums = torch.empty_like(losses)
    chunks = _chunks(rows, classes)
    for first in chunks:
        part = slice(first, min(first + chunks.step, rows))
        logits = _logits(hidden[part], weight, bias)
        launch(
            _cross_entropy_fwd_kernel, (logits.shape[0],), logits, target[part], losses[part], log_sums[part],
            logits.stride(0), classes, ignored, **block_config("linear_cross_entropy_fwd", hidden, classes), on=hidden,
        )  # fmt: skip
    return losses, log_sums


@torch.library.custom_op("rxt_kernels::linear_cross_entropy_backward_triton", mutates_args=())
def _losses_backward(
    factors: Tensor, log_sums: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int
) -> list[Tensor]:
    rows, classes = hidden.shape[0], weight.shape[0]
    factors = factors.contiguous()
    hidden_gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    # Over the chunks, sums are kept in float32.
    weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    bias_gradient = torch.zeros(classes, dtype=torch.float32, device=weight.device)
    chunks = _chunks(rows, classes)
    for first in chunks:
        part = slice(first, min(first + chunks.step, rows))
        logits = _logits(hidden[part], weight, bias)
        launch(
            _cross_entropy_bwd_kernel, (logits.shape[0],), logits, target[part], log_sums[part], factors[part],
            logits.stride(0), classes, ignored, **block_config("linear_cross_entropy_bwd", hidden, classes), on=hidden,
        )  # fmt: skip
        hidden_gradient[part] = logits @ weight
        weight_gradient += logits.t() @ hidden[part]
        bias_gradient += logits.sum(0, dtype=torch.float32)
    gradients = [hidden_gradient, weight_gradient.to(weight.dtype)]
    return gradients if bias is None else [*gradients, bias_gradient.to(bias.dtype)]


@_losses.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = hidden.new_empty((hidden.shape[0],), dtype=torch.float32)
    return rows, torch.empty_like(rows)


@_losses_backward.register_fake
def _(
    factors: Tensor, log_sums: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignored: int
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias) if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, ctx.ignored = inputs
    ctx.save_for_backward(output[1], hidden, weight, target, bias)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    log_sums, hidden, weight, target, bias = ctx.saved_tensors
    found = _losses_backward(gradient, log_sums, hidden, weight, target, bias, ctx.ignored)
    return found[0], found[1], None, None if bias is None else found[2], None


_losses.register_autograd(_gradients, setup_context=_keep)


def supports(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> str | None:
    """None, or why this call is not for Triton."""
    if weight.dtype is not hidden.dtype or (bias is not None and bias.dtype is not hidden.dtype):
        return f"hidden is {hidden.dtype}, and weight or bias has another dtype; the kernels take one."
    return unsupported_tensors(hidden)


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """hidden (..., D), weight (V, D), target (...) -> scalar, or (...) for reduction "none"."""
    flat_target = target.flatten()
    losses = _losses(hidden.flatten(0, -2), weight, flat_target, bias, ignore_index)[0]
    if reduction == "none":
        return losses.view(target.shape).to(hidden.dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / (flat_target != ignore_index).sum().clamp(min=1)
    return total.to(hidden.dtype)
