"""The router in Triton: logits, softmax, top-k, renormalised weights, loss, and choices counted or placed by expert.

A program takes a block of tokens and all experts. It takes the K largest probabilities one after the other, the lowest
expert first where some are equal, and marks in a tile in which column a token chose an expert: that tile says where
weights are stored, how often an expert was chosen and, in one block alone, where the choices stand when sorted. A loss
(specification 2.8) is the sum of the chosen probabilities, up to a factor; each program adds up its own tokens.

Backward, with p the probabilities, T = sum of the chosen ones + 1e-9, c the loss's gradient times E / (N K + 1e-6):

    dp = (dw - sum(dw * p) / T) / T + c    for the chosen, else 0        dlogits = p * (dp - sum(dp * p))
    dx = dlogits Wg        dWg = dlogits^T x

What is kept for it are the logits, in their own dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.mixture_of_experts.triton_sort import column_of, load_choices, sort_blocks, store_order, store_starts
from rxt_kernels.triton_runtime import launch

LARGEST_EXPERTS = 1024


@triton.jit
def _softmax(logits, inside):
    """Over the experts that there are, in the dtype of the tile; NaN if a logit is."""
    logits = tl.where(inside, logits, float("-inf"))
    exponential = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return exponential / tl.sum(exponential, axis=1)[:, None]


@triton.jit
def _moe_route_kernel(
    x, router_weight, logits, weights, chosen, counts, partial_sums, order, starts, loss, tokens, experts, inner,
    x_stride, x_inner_stride, router_stride, router_inner_stride,
    TOP_K: tl.constexpr, BY_INDEX: tl.constexpr, KEEPS_LOGITS: tl.constexpr, ALONE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_EXPERTS).to(tl.int64)
    row_inside = row < tokens
    expert_inside = (expert < experts)[None, :]
    # The loss has the dtype of the softmax, and the logits that of the product, which is rounded to it.
    product = tl.zeros((ROWS, BLOCK_EXPERTS), dtype=loss.dtype.element_ty)
    for first in range(0, inner, INNER):
        k = (first + tl.arange(0, INNER)).to(tl.int64)
        tile = tl.load(
            x + (row * x_stride)[:, None] + (k * x_inner_stride)[None, :],
            mask=row_inside[:, None] & (k < inner)[None, :], other=0.0,
        )  # fmt: skip
        column = tl.load(
            router_weight + (k * router_inner_stride)[:, None] + (expert * router_stride)[None, :],
            mask=(k < inner)[:, None] & expert_inside, other=0.0,
        )  # fmt: skip
        product += tl.dot(
            tile.to(logits.dtype.element_ty), column.to(logits.dtype.element_ty), input_precision="ieee"
        )  # fmt: skip
    rounded = product.to(logits.dtype.element_ty)
    if KEEPS_LOGITS:
        tl.store(logits + row[:, None] * experts + expert[None, :], rounded, mask=row_inside[:, None] & expert_inside)
    probability = _softmax(rounded.to(product.dtype), expert_inside)

    # NaN counts as the largest, and experts that do not exist are never taken: a broken row stays within its experts.
    left = tl.where(expert_inside, tl.where(probability >= 0.0, probability, 2.0), -1.0)
    rank = tl.full((ROWS, BLOCK_EXPERTS), -1, dtype=tl.int32)
    for k in range(TOP_K):
        taken = expert[None, :] == tl.argmax(left, axis=1)[:, None]
        rank = tl.where(taken, k, rank)
        left = tl.where(taken, -1.0, left)
    rank = tl.where(row_inside[:, None], rank, -1)
    ones = (rank >= 0).to(tl.int32)
    if BY_INDEX:
        rank = tl.where(rank >= 0, tl.cumsum(ones, axis=1) - 1, -1)
    kept = tl.where(rank >= 0, probability, 0.0)
    total = tl.sum(kept, axis=1)
    place = row[:, None] * TOP_K + rank
    weight = kept / (total + 1e-9)[:, None]
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=rank >= 0)
    tl.store(chosen + place, tl.broadcast_to(expert[None, :], (ROWS, BLOCK_EXPERTS)).to(tl.int32), mask=rank >= 0)

    count = tl.sum(ones, axis=0)
    if ALONE:
        until = tl.cumsum(count, axis=0)
        store_order(order, rank, row, until - count, TOP_K)
        store_starts(starts, until, expert, experts)
        choices = tl.full((), tokens * TOP_K, dtype=loss.dtype.element_ty)
        tl.store(loss, tl.sum(total, axis=0) * experts / (choices + 1e-6))
    else:
        tl.store(counts + block * BLOCK_EXPERTS + expert, count)
        tl.store(partial_sums + block, tl.sum(total, axis=0))


@triton.jit
def _moe_route_backward_kernel(
    logits, chosen, weights_gradient, loss_gradient, logits_gradient, tokens, experts,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    inside = (row < tokens)[:, None] & (expert < experts)[None, :]
    place = row[:, None] * experts + expert[None, :]
    wide = loss_gradient.dtype.element_ty
    probability = _softmax(tl.load(logits + place, mask=inside, other=0.0).to(wide), (expert < experts)[None, :])
    experts_of_row = load_choices(chosen, row, tokens, TOP_K, BLOCK_K)
    gradients = load_choices(weights_gradient, row, tokens, TOP_K, BLOCK_K).to(wide)
    is_chosen = tl.zeros((ROWS, BLOCK_EXPERTS), dtype=tl.int1)
    dw = tl.zeros((ROWS, BLOCK_EXPERTS), dtype=wide)
    for k in range(TOP_K):
        taken = expert[None, :] == column_of(experts_of_row, k, BLOCK_K)
        is_chosen = is_chosen | taken
        dw = tl.where(taken, column_of(gradients, k, BLOCK_K), dw)
    kept = tl.where(is_chosen, probability, 0.0)
    total = (tl.sum(kept, axis=1) + 1e-9)[:, None]
    choices = tl.full((), tokens * TOP_K, dtype=wide)
    through_loss = tl.load(loss_gradient) * experts / (choices + 1e-6)
    through_weights = (dw - tl.sum(dw * kept, axis=1)[:, None] / total) / total
    dp = tl.where(is_chosen, through_weights + through_loss, 0.0)
    dlogits = probability * (dp - tl.sum(dp * kept, axis=1)[:, None])
    tl.store(logits_gradient + place, dlogits.to(logits_gradient.dtype.element_ty), mask=inside)


class Routed(NamedTuple):
    """Where tokens go. A choice, n * K + k, is the k-th of token n."""

    weights: Tensor
    """(N, K) float32, renormalised."""
    chosen: Tensor
    """(N, K) int32 expert numbers."""
    loss: Tensor
    """Scalar, float32 or wider."""
    order: Tensor
    """(N * K,) int32: choices sorted by expert, those of an expert in their own order."""
    starts: Tensor
    """(E + 1,) int32: where in the order each expert begins, and N * K."""
    logits: Tensor
    """(N, E) in the dtype of the logits, or (0, E) if they were not to be kept."""


def _tile(config: dict[str, int], experts: int) -> dict[str, int]:
    """What all kernels of one pass share: a block of tokens, all experts, and how many threads hold them."""
    block_experts = triton.next_power_of_2(max(experts, 2))
    return {"ROWS": config["ROWS"], "BLOCK_EXPERTS": block_experts, "num_warps": config["num_warps"]}


def route(
    x: Tensor, router_weight: Tensor, top_k: int, logits_dtype: torch.dtype, by_index: bool, keep_logits: bool
) -> Routed:
    """x (N, D), router_weight (E, D) -> Routed, columns by falling probability or by rising expert."""
    (tokens, inner), experts = x.shape, router_weight.shape[0]
    wide = torch.promote_types(logits_dtype, torch.float32)
    config = block_config("moe_route", x, experts)
    tile = _tile(config, experts)
    blocks = triton.cdiv(tokens, tile["ROWS"])
    # No token launches nothing: its loss and its starts are zero.
    make = x.new_empty if tokens else x.new_zeros
    routed = Routed(
        x.new_empty((tokens, top_k), dtype=torch.float32), x.new_empty((tokens, top_k), dtype=torch.int32),
        make((), dtype=wide), x.new_empty((tokens * top_k,), dtype=torch.int32),
        make((experts + 1,), dtype=torch.int32), x.new_empty((tokens if keep_logits else 0, experts), dtype=logits_dtype),
    )  # fmt: skip
    alone = blocks <= 1
    counts = x.new_empty((0 if alone else blocks, tile["BLOCK_EXPERTS"]), dtype=torch.int32)
    partial_sums = x.new_empty((0 if alone else blocks,), dtype=wide)
    launch(
        _moe_route_kernel, (blocks,), x, router_weight, routed.logits, routed.weights, routed.chosen, counts, partial_sums,
        routed.order, routed.starts, routed.loss, tokens, experts, inner, *x.stride(), *router_weight.stride(),
        TOP_K=top_k, BY_INDEX=by_index, KEEPS_LOGITS=keep_logits, ALONE=alone, **{**config, **tile}, on=x,
    )  # fmt: skip
    if not alone:
        sort_blocks(routed.chosen, counts, partial_sums, routed.loss, routed.order, routed.starts, tile)
    return routed


def route_backward(
    weights_gradient: Tensor, loss_gradient: Tensor, logits: Tensor, chosen: Tensor, x: Tensor, router_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the router's weight, each in its own dtype."""
    (tokens, top_k), experts = chosen.shape, logits.shape[1]
    logits_gradient = torch.empty_like(logits)
    config = block_config("moe_route_backward", x, experts)
    tile = _tile(config, experts)
    launch(
        _moe_route_backward_kernel, (triton.cdiv(tokens, tile["ROWS"]),), logits, chosen, weights_gradient.contiguous(),
        loss_gradient, logits_gradient, tokens, experts, TOP_K=top_k, BLOCK_K=triton.next_power_of_2(top_k),
        **{**config, **tile}, on=x,
    )  # fmt: skip
    x_gradient = logits_gradient @ router_weight.to(logits.dtype)
    router_gradient = logits_gradient.t() @ x.to(logits.dtype)
    return x_gradient.to(x.dtype), router_gradient.to(router_weight.dtype)
