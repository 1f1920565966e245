"""Routed experts in Triton, forward and backward; see ``reference.py`` for the formula.

Choices (a token and one of its experts) are sorted by expert. A program takes a block of choices of one expert; which
expert that is, it finds in a table on the device, so the host never learns the sizes of the groups, and a grid of
``choices / block + experts`` programs is large enough for every distribution: those left over return at once.

    before = x[token] W1_e + b1_e        hidden = act(before)        result = hidden W2_e + b2_e      (rows by expert)
    output[n] = sum over k of weight[n, k] * result[n, k]                                             (rows by choice)

Backward, with dr = weight * dy[token]:

    dweight = result . dy[token]    dhidden = dr W2^T    dbefore = act'(before, dhidden)    dx[n] = sum over k of dbefore W1^T
    dW2_e = hidden^T dr    db2_e = sum dr    dW1_e = x[token]^T dbefore    db1_e = sum dbefore

A gradient of weights belongs to one program per tile, which walks over the rows of its expert: no atomics, and an expert
without tokens gets zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.mixture_of_experts.reference import (
    ExpertTensors,
    MixtureOfExpertsOutput,
    SharedExperts,
    add_shared_experts,
    load_balance_loss_reference,
    route_reference,
)
from rxt_kernels.triton_runtime import launch, unsupported_tensors

BLOCK_ROWS = 32
BLOCK_COLUMNS = 64
BLOCK_INNER = 32
ACTIVATION_NUMBERS = {"linear": 0, "silu": 1, "swish": 1, "relu": 2, "gelu": 3, "sigmoid": 4}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return x * tl.sigmoid(x)
    if ACTIVATION == 2:
        return tl.maximum(x, 0.0)
    if ACTIVATION == 3:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 4:
        return tl.sigmoid(x)
    return x


@triton.jit
def _activation_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        opening = tl.sigmoid(x)
        return opening * (1.0 + x * (1.0 - opening))
    if ACTIVATION == 2:
        return tl.where(x > 0.0, 1.0, 0.0)
    if ACTIVATION == 3:
        bell = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * bell
    if ACTIVATION == 4:
        opening = tl.sigmoid(x)
        return opening * (1.0 - opening)
    return tl.full(x.shape, 1.0, dtype=tl.float32)


@triton.jit
def _block_of_choices(block, starts, blocks_until, experts, BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a block (``experts`` if there is none), its rows, and which of them there are."""
    number = tl.arange(0, BLOCK_EXPERTS)
    until = tl.load(blocks_until + number, mask=number < experts, other=2147483647)
    expert = tl.sum((until <= block).to(tl.int32), axis=0)
    first_block = tl.max(tl.where(number < expert, until, 0), axis=0)
    known = tl.minimum(expert, experts - 1)
    first = tl.load(starts + known)
    last = tl.load(starts + known + 1)
    row = first + (block - first_block) * ROWS + tl.arange(0, ROWS)
    return expert, row, row < last


@triton.jit
def _experts_up_kernel(
    x, w1, b1, order, before, hidden, starts, blocks_until, experts, width, inner, top_k,
    x_stride, x_inner_stride, w1_expert_stride, w1_inner_stride, w1_stride, b1_expert_stride, b1_stride,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_BEFORE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert, row, row_inside = _block_of_choices(tl.program_id(0), starts, blocks_until, experts, BLOCK_EXPERTS, ROWS)
    if expert < experts:
        row = row.to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        column_inside = column < width
        token = tl.load(order + row, mask=row_inside, other=0) // top_k
        weight = w1 + expert.to(tl.int64) * w1_expert_stride
        linear = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, inner, INNER):
            k = (first + tl.arange(0, INNER)).to(tl.int64)
            tile = tl.load(
                x + (token * x_stride)[:, None] + (k * x_inner_stride)[None, :],
                mask=row_inside[:, None] & (k < inner)[None, :], other=0.0,
            )  # fmt: skip
            place = weight + (k * w1_inner_stride)[:, None] + (column * w1_stride)[None, :]
            inside = (k < inner)[:, None] & column_inside[None, :]
            linear += tl.dot(tile, tl.load(place, mask=inside, other=0.0), input_precision="ieee")
            if GATED:
                second = tl.load(place + width * w1_stride, mask=inside, other=0.0)
                gate += tl.dot(tile, second, input_precision="ieee")
        if HAS_BIAS:
            bias = b1 + expert.to(tl.int64) * b1_expert_stride + column * b1_stride
            linear += tl.load(bias, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                gate += tl.load(bias + width * b1_stride, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        inside = row_inside[:, None] & column_inside[None, :]
        if KEEPS_BEFORE:
            target = before + (row * (2 * width if GATED else width))[:, None] + column[None, :]
            tl.store(target, linear.to(before.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(target + width, gate.to(before.dtype.element_ty), mask=inside)
        active = linear * _activate(gate, ACTIVATION) if GATED else _activate(linear, ACTIVATION)
        target = hidden + (row * width)[:, None] + column[None, :]
        tl.store(target, active.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_matmul_kernel(
    a, b, bias, source, scale, target, out, starts, blocks_until, experts, width, inner, source_divisor, target_divisor,
    a_stride, a_inner_stride, b_expert_stride, b_inner_stride, b_stride, bias_expert_stride, bias_stride,
    GATHERS: tl.constexpr, SCALES: tl.constexpr, SCATTERS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[target of row] = scale[row's choice] * a[source of row] @ b[expert] + bias[expert]."""
    expert, row, row_inside = _block_of_choices(tl.program_id(0), starts, blocks_until, experts, BLOCK_EXPERTS, ROWS)
    if expert < experts:
        row = row.to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        column_inside = column < width
        read = row
        if GATHERS:
            read = tl.load(source + row, mask=row_inside, other=0) // source_divisor
        weight = b + expert.to(tl.int64) * b_expert_stride
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, inner, INNER):
            k = (first + tl.arange(0, INNER)).to(tl.int64)
            tile = tl.load(
                a + (read * a_stride)[:, None] + (k * a_inner_stride)[None, :],
                mask=row_inside[:, None] & (k < inner)[None, :], other=0.0,
            )  # fmt: skip
            other = tl.load(
                weight + (k * b_inner_stride)[:, None] + (column * b_stride)[None, :],
                mask=(k < inner)[:, None] & column_inside[None, :], other=0.0,
            )  # fmt: skip
            total += tl.dot(tile.to(other.dtype), other, input_precision="ieee")
        if SCALES:
            choice = tl.load(source + row, mask=row_inside, other=0)
            total *= tl.load(scale + choice, mask=row_inside, other=0.0)[:, None]
        if HAS_BIAS:
            place = bias + expert.to(tl.int64) * bias_expert_stride + column * bias_stride
            total += tl.load(place, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        write = row
        if SCATTERS:
            write = tl.load(target + row, mask=row_inside, other=0) // target_divisor
        place = out + (write * width)[:, None] + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def _combine_kernel(
    results, weights, out, tokens, width,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over k, from first to last, of weight[n, k] * results[n, k]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(TOP_K):
        choice = row * TOP_K + k
        value = tl.load(results + (choice * width)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + choice, mask=row < tokens, other=0.0)[:, None]
        total += value
    tl.store(out + (row * width)[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _routing_gradient_kernel(
    results, gradient, out, choices, width, top_k, gradient_stride, gradient_inner_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight[n, k] = results[n, k] . dy[n]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (row < choices)[:, None] & (column < width)[None, :]
        value = tl.load(results + (row * width)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        place = ((row // top_k) * gradient_stride)[:, None] + (column * gradient_inner_stride)[None, :]
        total += tl.sum(value * tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32), axis=1)
    tl.store(out + row, total, mask=row < choices)


@triton.jit
def _activation_backward_kernel(
    before, hidden_gradient, hidden, before_gradient, rows, width,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of hidden units that of their inputs, and the hidden units once more."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    narrow = (row * width)[:, None] + column[None, :]
    wide = (row * (2 * width if GATED else width))[:, None] + column[None, :]
    dh = tl.load(hidden_gradient + narrow, mask=inside, other=0.0).to(tl.float32)
    linear = tl.load(before + wide, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(before + wide + width, mask=inside, other=0.0).to(tl.float32)
        active = _activate(gate, ACTIVATION)
        tl.store(hidden + narrow, (linear * active).to(hidden.dtype.element_ty), mask=inside)
        tl.store(before_gradient + wide, (dh * active).to(before_gradient.dtype.element_ty), mask=inside)
        gate_gradient = dh * linear * _activation_slope(gate, ACTIVATION)
        tl.store(before_gradient + wide + width, gate_gradient.to(before_gradient.dtype.element_ty), mask=inside)
    else:
        tl.store(hidden + narrow, _activate(linear, ACTIVATION).to(hidden.dtype.element_ty), mask=inside)
        linear_gradient = dh * _activation_slope(linear, ACTIVATION)
        tl.store(before_gradient + wide, linear_gradient.to(before_gradient.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_kernel(
    a, b, order, scale, out, bias_out, starts, a_width, b_width, top_k,
    a_stride, a_inner_stride, b_stride, b_inner_stride,
    GATHERS_A: tl.constexpr, GATHERS_B: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows of expert e of a[row]^T b[row], bias_out[e] = that of b[row].

    A gathered side is read at the row's token; gathered b is multiplied by the weight of the row's choice.
    """
    expert = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * A_COLUMNS + tl.arange(0, A_COLUMNS)).to(tl.int64)
    j = (tl.program_id(2) * B_COLUMNS + tl.arange(0, B_COLUMNS)).to(tl.int64)
    first = tl.load(starts + expert).to(tl.int32)
    last = tl.load(starts + expert + 1).to(tl.int32)
    total = tl.zeros((A_COLUMNS, B_COLUMNS), dtype=tl.float32)
    bias = tl.zeros((B_COLUMNS,), dtype=tl.float32)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        row_inside = row < last
        choice = row
        if GATHERS_A or GATHERS_B:
            choice = tl.load(order + row, mask=row_inside, other=0)
        a_row = choice // top_k if GATHERS_A else row
        b_row = choice // top_k if GATHERS_B else row
        left = tl.load(
            a + (a_row * a_stride)[:, None] + (i * a_inner_stride)[None, :],
            mask=row_inside[:, None] & (i < a_width)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + (b_row * b_stride)[:, None] + (j * b_inner_stride)[None, :],
            mask=row_inside[:, None] & (j < b_width)[None, :], other=0.0,
        )  # fmt: skip
        if GATHERS_B:
            factor = tl.load(scale + choice, mask=row_inside, other=0.0)
            right = (right.to(tl.float32) * factor[:, None]).to(left.dtype)
        total += tl.dot(tl.trans(left), right.to(left.dtype), input_precision="ieee")
        if HAS_BIAS:
            bias += tl.sum(right.to(tl.float32), axis=0)
    inside = (i < a_width)[:, None] & (j < b_width)[None, :]
    place = out + expert * a_width * b_width + (i * b_width)[:, None] + j[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        # Every tile of rows of the matrix has the same sums; they are stored once.
        tl.store(
            bias_out + expert * b_width + j,
            bias.to(bias_out.dtype.element_ty),
            mask=(j < b_width) & (tl.program_id(1) == 0),
        )


class _Groups(NamedTuple):
    """Choices sorted by expert, all on the device."""

    order: Tensor
    """(N * K,) int64: the choice of every row."""
    starts: Tensor
    """(E + 1,) int64: the first row of every expert, and the number of rows."""
    blocks_until: Tensor
    """(E,) int32: blocks of this expert and of those before it."""
    most_blocks: int
    experts: int


def _group(chosen: Tensor, experts: int) -> _Groups:
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    numbers = torch.arange(experts + 1, device=flat.device)
    starts = torch.searchsorted(flat[order], numbers)
    blocks = (starts.diff() + (BLOCK_ROWS - 1)) // BLOCK_ROWS
    most = triton.cdiv(flat.numel(), BLOCK_ROWS) + experts
    return _Groups(order, starts, blocks.cumsum(0).to(torch.int32), most, experts)


def _tile(groups: _Groups) -> dict[str, int]:
    experts = max(2, triton.next_power_of_2(groups.experts))
    return {"BLOCK_EXPERTS": experts, "ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS, "INNER": BLOCK_INNER}


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def _up(
    x: Tensor, w1: Tensor, b1: Tensor | None, groups: _Groups, top_k: int, gated: bool, activation: int, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, inner = groups.order.numel(), x.shape[1]
    width = w1.shape[2] // 2 if gated else w1.shape[2]
    hidden = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    before = torch.empty(rows if keep else 0, w1.shape[2], dtype=x.dtype, device=x.device)
    launch(
        _experts_up_kernel, (groups.most_blocks, triton.cdiv(width, BLOCK_COLUMNS)), x, w1, x if b1 is None else b1,
        groups.order, before, hidden, groups.starts, groups.blocks_until, groups.experts, width, inner, top_k,
        *x.stride(), *w1.stride(), *_strides(b1, 2), GATED=gated, ACTIVATION=activation, HAS_BIAS=b1 is not None,
        KEEPS_BEFORE=keep, **_tile(groups), on=x,
    )  # fmt: skip
    return hidden, before


def _matmul(
    a: Tensor,
    b: Tensor,
    groups: _Groups,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    scale: Tensor | None = None,
    scatter: bool = False,
) -> Tensor:
    """Rows of ``a`` (at their tokens if ``top_k`` is given) times the matrix of their expert."""
    width, inner, order = b.shape[2], b.shape[1], groups.order
    out = torch.empty(order.numel(), width, dtype=dtype, device=a.device)
    launch(
        _grouped_matmul_kernel, (groups.most_blocks, triton.cdiv(width, BLOCK_COLUMNS)), a, b, a if bias is None else bias,
        order, a if scale is None else scale, order, out, groups.starts, groups.blocks_until, groups.experts, width, inner,
        1 if top_k is None else top_k, 1, *a.stride(), *b.stride(), *_strides(bias, 2),
        GATHERS=top_k is not None, SCALES=scale is not None, SCATTERS=scatter, HAS_BIAS=bias is not None,
        **_tile(groups), on=a,
    )  # fmt: skip
    return out


def _combine(results: Tensor, weights: Tensor | None, tokens: int, top_k: int, dtype: torch.dtype) -> Tensor:
    width = results.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=results.device)
    launch(
        _combine_kernel, (triton.cdiv(tokens, 8), triton.cdiv(width, 128)), results,
        results if weights is None else weights, out, tokens, width,
        TOP_K=top_k, WEIGHTED=weights is not None, ROWS=8, COLUMNS=128, on=results,
    )  # fmt: skip
    return out


def _weight_gradient(
    a: Tensor,
    b: Tensor,
    groups: _Groups,
    like: Tensor,
    bias_like: Tensor | None,
    *,
    top_k: int,
    gather_a: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of (E, I, J) matrices and (E, J) biases; a ``scale`` says that b is gathered and multiplied by it."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    bias = None if bias_like is None else torch.empty(bias_like.shape, dtype=bias_like.dtype, device=like.device)
    experts, a_width, b_width = like.shape
    launch(
        _weight_gradient_kernel, (experts, triton.cdiv(a_width, 64), triton.cdiv(b_width, 64)), a, b, groups.order,
        a if scale is None else scale, out, out if bias is None else bias, groups.starts, a_width, b_width, top_k,
        *a.stride(), *b.stride(), GATHERS_A=gather_a, GATHERS_B=scale is not None, HAS_BIAS=bias is not None,
        ROWS=BLOCK_INNER, A_COLUMNS=64, B_COLUMNS=64, on=a,
    )  # fmt: skip
    return out, bias


@torch.library.custom_op("rxt_kernels::routed_experts_triton", mutates_args=())
def _routed_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (N, D) in the dtype of the weights; and, to be kept for the backward pass, inputs of the activation and
    the result of every choice."""
    tokens, top_k = chosen.shape
    groups = _group(chosen, w1.shape[0])
    hidden, before = _up(x, w1, b1, groups, top_k, gated, activation, keep)
    results = _matmul(hidden, w2, groups, x.dtype, bias=b2, scatter=True)
    return _combine(results, weights, tokens, top_k, weights.dtype), before, results


@torch.library.custom_op("rxt_kernels::routed_experts_backward_triton", mutates_args=())
def _routed_experts_backward(
    gradient: Tensor,
    before: Tensor,
    results: Tensor,
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
) -> list[Tensor]:
    tokens, top_k = chosen.shape
    groups = _group(chosen, w1.shape[0])
    rows, width = groups.order.numel(), w2.shape[1]
    routing = torch.empty(weights.shape, dtype=weights.dtype, device=x.device)
    launch(
        _routing_gradient_kernel, (triton.cdiv(rows, 8),), results, gradient, routing, rows, x.shape[1], top_k,
        *gradient.stride(), ROWS=8, COLUMNS=128, on=x,
    )  # fmt: skip
    factors = weights.contiguous()
    hidden_gradient = _matmul(gradient, w2.transpose(1, 2), groups, x.dtype, top_k=top_k, scale=factors)
    hidden = torch.empty_like(hidden_gradient)
    before_gradient = torch.empty_like(before)
    launch(
        _activation_backward_kernel, (triton.cdiv(rows, 8), triton.cdiv(width, 128)), before, hidden_gradient, hidden,
        before_gradient, rows, width, GATED=gated, ACTIVATION=activation, ROWS=8, COLUMNS=128, on=x,
    )  # fmt: skip
    by_choice = _matmul(before_gradient, w1.transpose(1, 2), groups, x.dtype, scatter=True)
    x_gradient = _combine(by_choice, None, tokens, top_k, x.dtype)
    w1_gradient, b1_gradient = _weight_gradient(x, before_gradient, groups, w1, b1, top_k=top_k, gather_a=True)
    w2_gradient, b2_gradient = _weight_gradient(hidden, gradient, groups, w2, b2, top_k=top_k, scale=factors)
    biases = [bias for bias in (b1_gradient, b2_gradient) if bias is not None]
    return [x_gradient, routing, w1_gradient, w2_gradient, *biases]


@_routed_experts.register_fake
def _(
    x: Tensor, weights: Tensor, chosen: Tensor, w1: Tensor, w2: Tensor, b1: Any, b2: Any, activation: int, gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = chosen.shape[0] * chosen.shape[1]
    before = x.new_empty((rows if keep else 0, w1.shape[2]))
    return x.new_empty(x.shape, dtype=weights.dtype), before, x.new_empty((rows, x.shape[1]))


@_routed_experts_backward.register_fake
def _(
    gradient: Tensor, before: Tensor, results: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, w1: Tensor,
    w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: int, gated: bool,
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor in (x, weights, w1, w2, b1, b2) if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, chosen, w1, w2, b1, b2, ctx.activation, ctx.gated, ctx.kept = inputs
    ctx.save_for_backward(output[1], output[2], x, weights, chosen, w1, w2, b1, b2)
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    before, results, x, weights, chosen, w1, w2, b1, b2 = ctx.saved_tensors
    found = _routed_experts_backward(
        gradient, before, results, x, weights, chosen, w1, w2, b1, b2, ctx.activation, ctx.gated
    )
    rest = iter(found[4:])
    biases = [None if bias is None else next(rest) for bias in (b1, b2)]
    return found[0], found[1], None, found[2], found[3], *biases, None, None, None


_routed_experts.register_autograd(_gradients, setup_context=_keep)


def supports(
    x: Tensor,
    router_weight: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    top_k: int,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    global_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    shared: SharedExperts | None = None,
    router_dtype: torch.dtype | None = None,
    accumulation: str = "descending_probability",
    dropout: float = 0.0,
) -> str | None:
    """None, or why this call is not for Triton."""
    if not isinstance(w1, Tensor) or not isinstance(w2, Tensor):
        return "there is one tensor per expert; the kernels take stacked ones, (E, D, 2F) and (E, F, D)."
    if dropout:
        return f"dropout is {dropout}; the kernels drop no hidden units."
    biases = [bias for bias in (b1, b2) if isinstance(bias, Tensor)]
    if any(tensor.dtype is not x.dtype for tensor in (w1, w2, *biases)):
        return f"x is {x.dtype} and an expert has another dtype; the kernels take one."
    return unsupported_tensors(x)


def mixture_of_experts_triton(
    x: Tensor,
    router_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    top_k: int,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    global_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    shared: SharedExperts | None = None,
    router_dtype: torch.dtype | None = None,
    accumulation: str = "descending_probability",
    dropout: float = 0.0,
) -> MixtureOfExpertsOutput:
    """x (..., D) -> MixtureOfExpertsOutput(output (..., D), load_balance_loss); as the reference.

    The router and the shared experts are torch's operations, which need no host either.
    """
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen, probabilities = route_reference(flat, router_weight, top_k, router_dtype)
    loss = load_balance_loss_reference(probabilities, router_weight.shape[0])
    weights = weights.to(torch.float32)
    if accumulation == "expert_index":
        chosen, by_index = chosen.sort(dim=-1)
        weights = weights.gather(-1, by_index)
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (flat, weights, w1, w2, b1, b2)
    )
    output = _routed_experts(flat, weights, chosen, w1, w2, b1, b2, ACTIVATION_NUMBERS[activation], gated, keep)[0]
    if shared is not None:
        output, loss = add_shared_experts(output, loss, flat, shared, top_k, activation, gated)
    if global_bias is not None:
        output = output + global_bias
    return MixtureOfExpertsOutput(output.to(x.dtype).view(x.shape), loss)
