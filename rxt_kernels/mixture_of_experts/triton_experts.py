"""The routed experts in Triton, forward: grouped matrix products over choices that are sorted by expert.

A program takes a block of choices of one expert; which expert that is, it finds on the device from where the experts
begin, so that the host never learns the sizes of the groups. Of ``rows`` choices, no distribution makes more than
``(rows + min(rows, experts) * (block - 1)) / block`` blocks; programs left over return at once.

    before = x[token] W1_e + b1_e        hidden = act(before)        result = hidden W2_e + b2_e      (rows by expert)
    output[n] = sum over k of weight[n, k] * result[n, k]                                             (rows by choice)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.triton_runtime import launch

ACTIVATION_NUMBERS = {"linear": 0, "silu": 1, "swish": 1, "relu": 2, "gelu": 3, "sigmoid": 4}
SMALL_BLOCK = 16
"""Choices of an expert, on average, up to which kernels take their small blocks."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
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
def _block_of_choices(block, starts, experts, BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a block (one that does not exist if there is no such block), its rows, and which of them there are."""
    number = tl.arange(0, BLOCK_EXPERTS)
    first = tl.load(starts + number, mask=number < experts, other=0)
    last = tl.load(starts + number + 1, mask=number < experts, other=0)
    blocks = (last - first + (ROWS - 1)) // ROWS
    until = tl.cumsum(blocks, axis=0)
    expert = tl.sum((until <= block).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(number == expert, first + (block - (until - blocks)) * ROWS, 0), axis=0)
    end = tl.sum(tl.where(number == expert, last, 0), axis=0)
    row = begin + tl.arange(0, ROWS)
    return expert.to(tl.int64), row.to(tl.int64), row < end


@triton.jit
def _moe_up_kernel(
    x, w1, b1, order, before, hidden, starts, experts, width, inner, top_k,
    x_stride, x_inner_stride, w1_expert_stride, w1_inner_stride, w1_stride, b1_expert_stride, b1_stride,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_BEFORE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert, row, row_inside = _block_of_choices(tl.program_id(0), starts, experts, BLOCK_EXPERTS, ROWS)
    if expert < experts:
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        column_inside = column < width
        token = tl.load(order + row, mask=row_inside, other=0).to(tl.int64) // top_k
        weight = w1 + expert * w1_expert_stride
        linear = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, inner, INNER):
            k = (first + tl.arange(0, INNER)).to(tl.int64)
            tile = tl.load(
                x + (token * x_stride)[:, None] + (k * x_inner_stride)[None, :],
                mask=row_inside[:, None] & (k < inner)[None, :], other=0.0,
            )  # fmt: skip
            place = weight + (k * w1_inner_stride)[:, None]
            inside = (k < inner)[:, None] & column_inside[None, :]
            part = tl.load(place + (column * w1_stride)[None, :], mask=inside, other=0.0)
            linear += tl.dot(tile, part, input_precision="ieee")
            if GATED:
                part = tl.load(place + ((column + width) * w1_stride)[None, :], mask=inside, other=0.0)
                gate += tl.dot(tile, part, input_precision="ieee")
        if HAS_BIAS:
            bias = b1 + expert * b1_expert_stride
            linear += tl.load(bias + column * b1_stride, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                part = tl.load(bias + (column + width) * b1_stride, mask=column_inside, other=0.0)
                gate += part.to(tl.float32)[None, :]
        inside = row_inside[:, None] & column_inside[None, :]
        if KEEPS_BEFORE:
            target = before + (row * (2 * width if GATED else width))[:, None] + column[None, :]
            tl.store(target, linear.to(before.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(target + width, gate.to(before.dtype.element_ty), mask=inside)
        active = linear * activate(gate, ACTIVATION) if GATED else activate(linear, ACTIVATION)
        target = hidden + (row * width)[:, None] + column[None, :]
        tl.store(target, active.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _moe_down_kernel(
    a, b, bias, order, scale, out, starts, experts, width, inner, top_k,
    a_stride, a_inner_stride, b_expert_stride, b_inner_stride, b_stride, bias_expert_stride, bias_stride,
    GATHERS: tl.constexpr, SCALES: tl.constexpr, SCATTERS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[row or its choice] = scale[its choice] * a[row or its token] @ b[expert] + bias[expert]."""
    expert, row, row_inside = _block_of_choices(tl.program_id(0), starts, experts, BLOCK_EXPERTS, ROWS)
    if expert < experts:
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        column_inside = column < width
        choice = row
        if GATHERS or SCALES or SCATTERS:
            choice = tl.load(order + row, mask=row_inside, other=0).to(tl.int64)
        read = choice // top_k if GATHERS else row
        weight = b + expert * b_expert_stride
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
            total *= tl.load(scale + choice, mask=row_inside, other=0.0)[:, None]
        if HAS_BIAS:
            place = bias + expert * bias_expert_stride + column * bias_stride
            total += tl.load(place, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        write = choice if SCATTERS else row
        place = out + (write * width)[:, None] + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def _moe_combine_kernel(
    results, weights, out, tokens, width,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over k, from first to last, of weight[n, k] * results[n, k]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
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


class Groups(NamedTuple):
    """Choices sorted by expert, all on the device; see ``triton_router.Routed``."""

    order: Tensor
    """(N * K,) int32."""
    starts: Tensor
    """(E + 1,) int32."""
    top_k: int

    @property
    def rows(self) -> int:
        return self.order.numel()

    @property
    def experts(self) -> int:
        return self.starts.numel() - 1


def _blocks(kernel: str, groups: Groups, on: Tensor, width: int) -> tuple[int, dict[str, int]]:
    """How many blocks of choices there can be, and the constants of the kernel."""
    rows, experts = groups.rows, groups.experts
    few = "_few" if rows <= SMALL_BLOCK * experts else ""
    config = block_config(kernel + few, on, width)
    blocks = (rows + min(rows, experts) * (config["ROWS"] - 1)) // config["ROWS"]
    return blocks, {**config, "BLOCK_EXPERTS": triton.next_power_of_2(max(experts, 2))}


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def up(
    x: Tensor, w1: Tensor, b1: Tensor | None, groups: Groups, gated: bool, activation: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """x (N, D), w1 (E, D, 2F or F) -> hidden (N * K, F) and, if it is to be kept, before (N * K, 2F or F)."""
    inner, width = x.shape[1], w1.shape[2] // 2 if gated else w1.shape[2]
    hidden = x.new_empty((groups.rows, width))
    before = x.new_empty((groups.rows if keep else 0, w1.shape[2]))
    blocks, config = _blocks("moe_up", groups, x, inner)
    launch(
        _moe_up_kernel, (blocks, triton.cdiv(width, config["COLUMNS"])), x, w1, x if b1 is None else b1,
        groups.order, before, hidden, groups.starts, groups.experts, width, inner, groups.top_k,
        *x.stride(), *w1.stride(), *strides(b1, 2), GATED=gated, ACTIVATION=activation, HAS_BIAS=b1 is not None,
        KEEPS_BEFORE=keep, **config, on=x,
    )  # fmt: skip
    return hidden, before


def matmul(
    a: Tensor,
    b: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    gather: bool = False,
    scale: Tensor | None = None,
    scatter: bool = False,
) -> Tensor:
    """Every row of a times the matrix of its expert, b (E, I, J) -> (N * K, J).

    Rows are by expert. With ``gather``, a has a row per token; ``scale`` (N, K) multiplies the product by the weight of
    the choice; with ``scatter``, results are written by choice.
    """
    width, inner = b.shape[2], b.shape[1]
    out = torch.empty(groups.rows, width, dtype=dtype, device=a.device)
    blocks, config = _blocks("moe_down", groups, a, inner)
    launch(
        _moe_down_kernel, (blocks, triton.cdiv(width, config["COLUMNS"])), a, b, a if bias is None else bias,
        groups.order, a if scale is None else scale, out, groups.starts, groups.experts, width, inner, groups.top_k,
        *a.stride(), *b.stride(), *strides(bias, 2), GATHERS=gather, SCALES=scale is not None, SCATTERS=scatter,
        HAS_BIAS=bias is not None, **config, on=a,
    )  # fmt: skip
    return out


def combine(results: Tensor, weights: Tensor | None, top_k: int, dtype: torch.dtype) -> Tensor:
    """results (N * K, D) by choice -> their sum over the K choices of a token, (N, D), weighted if weights are given."""
    tokens, width = results.shape[0] // top_k, results.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=results.device)
    config = block_config("moe_combine", results, width)
    launch(
        _moe_combine_kernel, (triton.cdiv(tokens, config["ROWS"]), triton.cdiv(width, config["COLUMNS"])), results,
        results if weights is None else weights, out, tokens, width,
        TOP_K=top_k, WEIGHTED=weights is not None, **config, on=results,
    )  # fmt: skip
    return out
