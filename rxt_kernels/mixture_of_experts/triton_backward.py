"""Gradients of the routed experts in Triton. With dr = weight * dy[token], and rows by expert:

    dweight = result . dy[token]    dhidden = dr W2^T    dbefore = act'(before, dhidden)    dx[n] = sum over k of dbefore W1^T
    dW2_e = hidden^T dr    db2_e = sum dr    dW1_e = x[token]^T dbefore    db1_e = sum dbefore

A gradient of weights belongs to one program per tile, which walks over the rows of its expert: no atomics, and an expert
without tokens gets zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.mixture_of_experts.triton_experts import Groups, activate, combine, matmul
from rxt_kernels.triton_runtime import launch


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """Derivative of the activation."""
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
def _moe_routing_gradient_kernel(
    results, gradient, out, choices, width, top_k, gradient_stride, gradient_inner_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight[n, k] = results[n, k] . dy[n]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (row < choices)[:, None] & (column < width)[None, :]
        value = tl.load(results + (row * width)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        place = ((row // top_k) * gradient_stride)[:, None] + (column * gradient_inner_stride)[None, :]
        total += tl.sum(value * tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32), axis=1)
    tl.store(out + row, total, mask=row < choices)


@triton.jit
def _moe_activation_gradient_kernel(
    before, hidden_gradient, hidden, before_gradient, rows, width,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of hidden units that of their inputs, and the hidden units once more."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    narrow = (row * width)[:, None] + column[None, :]
    wide = (row * (2 * width if GATED else width))[:, None] + column[None, :]
    dh = tl.load(hidden_gradient + narrow, mask=inside, other=0.0).to(tl.float32)
    linear = tl.load(before + wide, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(before + wide + width, mask=inside, other=0.0).to(tl.float32)
        active = activate(gate, ACTIVATION)
        tl.store(hidden + narrow, (linear * active).to(hidden.dtype.element_ty), mask=inside)
        tl.store(before_gradient + wide, (dh * active).to(before_gradient.dtype.element_ty), mask=inside)
        gate_gradient = dh * linear * _slope(gate, ACTIVATION)
        tl.store(before_gradient + wide + width, gate_gradient.to(before_gradient.dtype.element_ty), mask=inside)
    else:
        tl.store(hidden + narrow, activate(linear, ACTIVATION).to(hidden.dtype.element_ty), mask=inside)
        linear_gradient = dh * _slope(linear, ACTIVATION)
        tl.store(before_gradient + wide, linear_gradient.to(before_gradient.dtype.element_ty), mask=inside)


@triton.jit
def _moe_weight_gradient_kernel(
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
    first = tl.load(starts + expert)
    last = tl.load(starts + expert + 1)
    total = tl.zeros((A_COLUMNS, B_COLUMNS), dtype=tl.float32)
    bias = tl.zeros((B_COLUMNS,), dtype=tl.float32)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        row_inside = row < last
        choice = row
        if GATHERS_A or GATHERS_B:
            choice = tl.load(order + row, mask=row_inside, other=0).to(tl.int64)
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


def _routing_gradient(results: Tensor, gradient: Tensor, top_k: int) -> Tensor:
    rows, width = results.shape
    out = results.new_empty((gradient.shape[0], top_k), dtype=gradient.dtype)
    config = block_config("moe_routing_gradient", results, width)
    launch(
        _moe_routing_gradient_kernel, (triton.cdiv(rows, config["ROWS"]),), results, gradient, out, rows, width, top_k,
        *gradient.stride(), **config, on=results,
    )  # fmt: skip
    return out


def _activation_gradient(
    before: Tensor, hidden_gradient: Tensor, gated: bool, activation: int
) -> tuple[Tensor, Tensor]:
    """Gradient of ``before``, and the hidden units."""
    rows, width = hidden_gradient.shape
    hidden, before_gradient = before.new_empty(hidden_gradient.shape), before.new_empty(before.shape)
    config = block_config("moe_activation_gradient", before, width)
    launch(
        _moe_activation_gradient_kernel, (triton.cdiv(rows, config["ROWS"]), triton.cdiv(width, config["COLUMNS"])),
        before, hidden_gradient, hidden, before_gradient, rows, width, GATED=gated, ACTIVATION=activation, **config,
        on=before,
    )  # fmt: skip
    return before_gradient, hidden


def _weight_gradient(
    a: Tensor,
    b: Tensor,
    groups: Groups,
    like: Tensor,
    bias_like: Tensor | None,
    *,
    gather_a: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of (E, I, J) matrices and (E, J) biases; a ``scale`` says that b is gathered and multiplied by it."""
    out = like.new_empty(like.shape)
    bias = None if bias_like is None else bias_like.new_empty(bias_like.shape)
    experts, a_width, b_width = like.shape
    config = block_config("moe_weight_gradient", a, max(a_width, b_width))
    grid = experts, triton.cdiv(a_width, config["A_COLUMNS"]), triton.cdiv(b_width, config["B_COLUMNS"])
    launch(
        _moe_weight_gradient_kernel, grid, a, b, groups.order, a if scale is None else scale, out,
        out if bias is None else bias, groups.starts, a_width, b_width, groups.top_k, *a.stride(), *b.stride(),
        GATHERS_A=gather_a, GATHERS_B=scale is not None, HAS_BIAS=bias is not None, **config, on=a,
    )  # fmt: skip
    return out, bias


def experts_backward(
    gradient: Tensor,
    before: Tensor,
    results: Tensor,
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    gated: bool,
    activation: int,
) -> list[Tensor]:
    """Gradients of x, weights, w1, w2, and of the biases that there are."""
    routing = _routing_gradient(results, gradient, groups.top_k)
    factors = weights.contiguous()
    hidden_gradient = matmul(gradient, w2.transpose(1, 2), groups, x.dtype, gather=True, scale=factors)
    before_gradient, hidden = _activation_gradient(before, hidden_gradient, gated, activation)
    by_choice = matmul(before_gradient, w1.transpose(1, 2), groups, x.dtype, scatter=True)
    x_gradient = combine(by_choice, None, groups.top_k, x.dtype)
    w1_gradient, b1_gradient = _weight_gradient(x, before_gradient, groups, w1, b1, gather_a=True)
    w2_gradient, b2_gradient = _weight_gradient(hidden, gradient, groups, w2, b2, scale=factors)
    biases = [bias for bias in (b1_gradient, b2_gradient) if bias is not None]
    return [x_gradient, routing, w1_gradient, w2_gradient, *biases]
