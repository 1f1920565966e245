"""Sparse query attention in Triton, forward and backward; see ``reference.py`` for the formula.

Forward: a program takes a block of queries of one head, walks over the keys they see with an online softmax (Milakov and
Gimelshein 2018; Dao et al. 2022, algorithm 1), and keeps the logarithm of the sum of exponentials of every query.

Backward (Dao et al. 2022, appendix B), with P the weights and D = rowsum(dO * O):

    dV = P^T dO        dS = P * (dO V^T - D)        dQ = scale * dS K        dK = scale * dS^T Q

One kernel owns a block of keys and adds up dK and dV over all queries of all heads that read them, another owns a block of
queries and adds up dQ. Nothing is added by two programs, so there are no atomics and the result is always the same.

Queries and keys are rotated as they are loaded, and their gradients rotated back before they are stored. Where both sides
are rotated, the layout of the pairs cannot be seen in a score; where one is, the split layout is laid out in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.rotary.triton import angle_sines, column_of, rotate, unrotate, unsupported_angles
from rxt_kernels.triton_runtime import launch, unsupported_tensors

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 256


@triton.jit
def _load_tile(pointer, row, row_stride, column, column_stride, rows_inside, columns_inside):
    place = (row.to(tl.int64) * row_stride)[:, None] + (column * column_stride)[None, :]
    return tl.load(pointer + place, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0)


@triton.jit
def _load_rotated(
    pointer, row, row_stride, column_stride, rows_inside, half, angles, angle_stride, angle_pair_stride,
    ROTATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of queries or keys as it enters the scores, in its own dtype."""
    # Pairs are read interleaved; only the unrotated side of a split score has to be laid out like the rotated one.
    column, inside = column_of(BLOCK_D, half, SPLIT and not ROTATED)
    tile = _load_tile(pointer, row, row_stride, column, column_stride, rows_inside, inside)
    if ROTATED:
        cosine, sine = angle_sines(
            angles, row.to(tl.int64), angle_stride, angle_pair_stride, rows_inside, half, BLOCK_D // 2
        )
        tile = rotate(tile.to(tl.float32), cosine, sine, SPLIT).to(tile.dtype)
    return tile


@triton.jit
def _store_unrotated(
    pointer, tile, row, row_stride, rows_inside, half, angles, angle_stride, angle_pair_stride,
    ROTATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of what :func:`_load_rotated` loaded; the target has adjacent columns."""
    if ROTATED:
        cosine, sine = angle_sines(
            angles, row.to(tl.int64), angle_stride, angle_pair_stride, rows_inside, half, BLOCK_D // 2
        )
        tile = unrotate(tile, cosine, sine, SPLIT)
    column, inside = column_of(BLOCK_D, half, SPLIT and not ROTATED)
    place = (row.to(tl.int64) * row_stride)[:, None] + column[None, :]
    tl.store(pointer + place, tile.to(pointer.dtype.element_ty), mask=rows_inside[:, None] & inside[None, :])


@triton.jit
def _sees(
    query_row, key_row, query_time, key_time, last, mask, mask_stride, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr
):
    """(queries, keys) bool: which of these queries see which of these keys; ``last`` is the number of keys there are."""
    inside = key_row < last
    if HAS_MASK:
        inside = inside & tl.load(mask + key_row.to(tl.int64) * mask_stride, mask=inside, other=0).to(tl.int1)
    visible = inside[None, :] & (query_row < query_time)[:, None]
    if CAUSAL:
        visible = visible & (key_row[None, :] <= query_row[:, None] + (key_time - query_time))
    return visible


@triton.jit
def _sqa_fwd_kernel(
    query, key, value, out, log_sum, query_angles, key_angles, mask, lengths,
    query_time, key_time, heads, half, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    query_angle_batch_stride, query_angle_stride, query_angle_pair_stride,
    key_angle_batch_stride, key_angle_stride, key_angle_pair_stride,
    mask_batch_stride, mask_stride, length_stride,
    QUERIES_PER_KEY: tl.constexpr, QUERY_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    QUERY_ROTATED: tl.constexpr, KEY_ROTATED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    query += batch * query_batch_stride + (head % QUERY_HEADS) * query_head_stride
    key += batch * key_batch_stride + (head // QUERIES_PER_KEY) * key_head_stride
    value += batch * value_batch_stride + (head // QUERIES_PER_KEY) * value_head_stride
    mask += batch * mask_batch_stride
    query_angles += batch * query_angle_batch_stride
    key_angles += batch * key_angle_batch_stride

    row = start + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    columns_inside = column < 2 * half
    q = _load_rotated(
        query, row, query_time_stride, query_stride, row < query_time, half,
        query_angles, query_angle_stride, query_angle_pair_stride, QUERY_ROTATED, SPLIT, BLOCK_D,
    )  # fmt: skip
    last = key_time
    if HAS_LENGTHS:
        last = tl.minimum(last, tl.load(lengths + batch * length_stride).to(tl.int32))
    end = last
    if CAUSAL:
        end = tl.minimum(end, start + BLOCK_M + key_time - query_time)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(0, end, BLOCK_N):
        key_row = first + tl.arange(0, BLOCK_N)
        k = _load_rotated(
            key, key_row, key_time_stride, key_stride, key_row < last, half,
            key_angles, key_angle_stride, key_angle_pair_stride, KEY_ROTATED, SPLIT, BLOCK_D,
        )  # fmt: skip
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        visible = _sees(row, key_row, query_time, key_time, last, mask, mask_stride, CAUSAL, HAS_MASK)
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        # A query that has seen no key yet keeps zeros instead of exp(-inf - -inf).
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(weight, axis=1)
        v = _load_tile(value, key_row, value_time_stride, column, value_stride, key_row < last, columns_inside)
        mixed = mixed * fading[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = higher
    seen = total > 0.0
    mixed = mixed / tl.where(seen, total, 1.0)[:, None]
    rows_inside = row < query_time
    place = ((batch * query_time + row.to(tl.int64)) * heads + head) * (2 * half)
    inside = rows_inside[:, None] & columns_inside[None, :]
    tl.store(out + place[:, None] + column[None, :], mixed.to(out.dtype.element_ty), mask=inside)
    # In powers of two. Infinite where nothing was seen, so that every weight of that query is zero in the backward pass.
    logarithm = tl.where(seen, highest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(log_sum + (batch * heads + head) * query_time + row, logarithm, mask=rows_inside)


@triton.jit
def _sqa_bwd_delta_kernel(
    out, gradient, delta, query_time, heads, width,
    gradient_batch_stride, gradient_time_stride, gradient_head_stride, gradient_stride,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), (B, H, Tq)."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < query_time)[:, None] & (column < width)[None, :]
    place = ((batch * query_time + row.to(tl.int64)) * heads + head) * width
    o = tl.load(out + place[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gradient += batch * gradient_batch_stride + head * gradient_head_stride
    do = _load_tile(gradient, row, gradient_time_stride, column, gradient_stride, row < query_time, column < width)
    tl.store(
        delta + (batch * heads + head) * query_time + row, tl.sum(o * do.to(tl.float32), axis=1), mask=row < query_time
    )


@triton.jit
def _sqa_bwd_dkdv_kernel(
    query, key, value, gradient, log_sum, delta, key_gradient, value_gradient,
    query_angles, key_angles, mask, lengths,
    query_time, key_time, heads, key_heads, half, scale, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    gradient_batch_stride, gradient_time_stride, gradient_head_stride, gradient_stride,
    query_angle_batch_stride, query_angle_stride, query_angle_pair_stride,
    key_angle_batch_stride, key_angle_stride, key_angle_pair_stride,
    mask_batch_stride, mask_stride, length_stride,
    QUERIES_PER_KEY: tl.constexpr, QUERY_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    QUERY_ROTATED: tl.constexpr, KEY_ROTATED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    query += batch * query_batch_stride
    gradient += batch * gradient_batch_stride
    key += batch * key_batch_stride + key_head * key_head_stride
    value += batch * value_batch_stride + key_head * value_head_stride
    mask += batch * mask_batch_stride
    query_angles += batch * query_angle_batch_stride
    key_angles += batch * key_angle_batch_stride

    key_row = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    columns_inside = column < 2 * half
    last = key_time
    if HAS_LENGTHS:
        last = tl.minimum(last, tl.load(lengths + batch * length_stride).to(tl.int32))
    k = _load_rotated(
        key, key_row, key_time_stride, key_stride, key_row < last, half,
        key_angles, key_angle_stride, key_angle_pair_stride, KEY_ROTATED, SPLIT, BLOCK_D,
    )  # fmt: skip
    v = _load_tile(value, key_row, value_time_stride, column, value_stride, key_row < last, columns_inside)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    first_query = 0
    if CAUSAL:
        # The first query that sees the first of these keys, rounded down to a block.
        first_query = tl.maximum(start - (key_time - query_time), 0) // BLOCK_M * BLOCK_M
    for shared in range(QUERIES_PER_KEY):
        head = key_head * QUERIES_PER_KEY + shared
        for begin in range(first_query, query_time, BLOCK_M):
            row = begin + tl.arange(0, BLOCK_M)
            rows_inside = row < query_time
            q = _load_rotated(
                query + (head % QUERY_HEADS) * query_head_stride, row, query_time_stride, query_stride, rows_inside, half,
                query_angles, query_angle_stride, query_angle_pair_stride, QUERY_ROTATED, SPLIT, BLOCK_D,
            )  # fmt: skip
            do = _load_tile(
                gradient + head * gradient_head_stride, row, gradient_time_stride, column, gradient_stride, rows_inside,
                columns_inside,
            )  # fmt: skip
            place = (batch * heads + head) * query_time + row
            logarithm = tl.load(log_sum + place, mask=rows_inside, other=float("inf"))
            d = tl.load(delta + place, mask=rows_inside, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            visible = _sees(row, key_row, query_time, key_time, last, mask, mask_stride, CAUSAL, HAS_MASK)
            weight = tl.where(visible, tl.exp2(tl.where(visible, score, 0.0) - logarithm[:, None]), 0.0)
            dv += tl.dot(tl.trans(weight.to(do.dtype)), do, input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = weight * (dp - d[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    keys_inside = key_row < key_time
    place = (batch * key_time * key_heads + key_head) * (2 * half)
    row_stride = key_heads * 2 * half
    _store_unrotated(
        key_gradient + place, dk * scale, key_row, row_stride, keys_inside, half,
        key_angles, key_angle_stride, key_angle_pair_stride, KEY_ROTATED, SPLIT, BLOCK_D,
    )  # fmt: skip
    target = value_gradient + place + (key_row.to(tl.int64) * row_stride)[:, None] + column[None, :]
    tl.store(target, dv.to(value_gradient.dtype.element_ty), mask=keys_inside[:, None] & columns_inside[None, :])


@triton.jit
def _sqa_bwd_dq_kernel(
    query, key, value, gradient, log_sum, delta, query_gradient,
    query_angles, key_angles, mask, lengths,
    query_time, key_time, heads, half, scale, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    gradient_batch_stride, gradient_time_stride, gradient_head_stride, gradient_stride,
    query_angle_batch_stride, query_angle_stride, query_angle_pair_stride,
    key_angle_batch_stride, key_angle_stride, key_angle_pair_stride,
    mask_batch_stride, mask_stride, length_stride,
    QUERIES_PER_KEY: tl.constexpr, QUERY_HEADS: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    QUERY_ROTATED: tl.constexpr, KEY_ROTATED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // QUERY_HEADS).to(tl.int64)
    query_head = (tl.program_id(1) % QUERY_HEADS).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    query += batch * query_batch_stride + query_head * query_head_stride
    key += batch * key_batch_stride
    value += batch * value_batch_stride
    gradient += batch * gradient_batch_stride
    mask += batch * mask_batch_stride
    query_angles += batch * query_angle_batch_stride
    key_angles += batch * key_angle_batch_stride

    row = start + tl.arange(0, BLOCK_M)
    rows_inside = row < query_time
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    columns_inside = column < 2 * half
    q = _load_rotated(
        query, row, query_time_stride, query_stride, rows_inside, half,
        query_angles, query_angle_stride, query_angle_pair_stride, QUERY_ROTATED, SPLIT, BLOCK_D,
    )  # fmt: skip
    last = key_time
    if HAS_LENGTHS:
        last = tl.minimum(last, tl.load(lengths + batch * length_stride).to(tl.int32))
    end = last
    if CAUSAL:
        end = tl.minimum(end, start + BLOCK_M + key_time - query_time)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for tile in range(TILES):
        head = query_head + tile * QUERY_HEADS
        do = _load_tile(
            gradient + head * gradient_head_stride, row, gradient_time_stride, column, gradient_stride, rows_inside,
            columns_inside,
        )  # fmt: skip
        place = (batch * heads + head) * query_time + row
        logarithm = tl.load(log_sum + place, mask=rows_inside, other=float("inf"))
        d = tl.load(delta + place, mask=rows_inside, other=0.0)
        key_of_head = key + (head // QUERIES_PER_KEY) * key_head_stride
        value_of_head = value + (head // QUERIES_PER_KEY) * value_head_stride
        for first in range(0, end, BLOCK_N):
            key_row = first + tl.arange(0, BLOCK_N)
            k = _load_rotated(
                key_of_head, key_row, key_time_stride, key_stride, key_row < last, half,
                key_angles, key_angle_stride, key_angle_pair_stride, KEY_ROTATED, SPLIT, BLOCK_D,
            )  # fmt: skip
            v = _load_tile(
                value_of_head, key_row, value_time_stride, column, value_stride, key_row < last, columns_inside
            )
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            visible = _sees(row, key_row, query_time, key_time, last, mask, mask_stride, CAUSAL, HAS_MASK)
            weight = tl.where(visible, tl.exp2(tl.where(visible, score, 0.0) - logarithm[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = weight * (dp - d[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    target = query_gradient + (batch * query_time * QUERY_HEADS + query_head) * (2 * half)
    _store_unrotated(
        target, dq * scale, row, QUERY_HEADS * 2 * half, rows_inside, half,
        query_angles, query_angle_stride, query_angle_pair_stride, QUERY_ROTATED, SPLIT, BLOCK_D,
    )  # fmt: skip


def _blocks(head_dim: int) -> dict[str, int]:
    """Queries, keys and head values of a tile. A head is padded to a power of two that matrix units take."""
    block = max(16, triton.next_power_of_2(head_dim))
    side = 64 if block <= 64 else 32
    return {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_D": block}


class _Call:
    """Sizes, strides and switches of one call, in the order in which all kernels take them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        key_mask: Tensor | None,
        key_lengths: Tensor | None,
        query_angles: Tensor | None,
        key_angles: Tensor | None,
        split: bool,
        scale: float,
    ) -> None:
        self.batch, self.query_time, self.query_heads, self.head_dim = query.shape
        self.key_time, self.key_heads = key.shape[1], key.shape[2]
        self.heads = max(self.query_heads, self.key_heads)
        self.scales = scale, scale * LOG2_E
        # A kernel reads none of the pointers whose switch is off; any tensor can stand in for them.
        mask = query if key_mask is None else key_mask.view(torch.uint8)
        self.tensors = (
            query if query_angles is None else query_angles,
            query if key_angles is None else key_angles,
            mask,
            query if key_lengths is None else key_lengths,
        )
        self.main_strides = (*query.stride(), *key.stride(), *value.stride())
        self.side_strides = (
            *_angle_strides(query_angles),
            *_angle_strides(key_angles),
            *((0, 0) if key_mask is None else mask.stride()),
            0 if key_lengths is None else key_lengths.stride(0),
        )
        self.switches = {
            "QUERIES_PER_KEY": max(1, self.query_heads // self.key_heads),
            "QUERY_HEADS": self.query_heads,
            "CAUSAL": causal and self.query_time > 1,  # a single query is the newest token and sees every key
            "HAS_MASK": key_mask is not None,
            "HAS_LENGTHS": key_lengths is not None,
            "QUERY_ROTATED": query_angles is not None,
            "KEY_ROTATED": key_angles is not None,
            "SPLIT": split and (query_angles is None) != (key_angles is None),
            **_blocks(self.head_dim),
        }


def _angle_strides(angles: Tensor | None) -> tuple[int, int, int]:
    if angles is None:
        return 0, 0, 0
    return (angles.stride(0) if angles.dim() == 3 else 0), angles.stride(-2), angles.stride(-1)


@torch.library.custom_op("rxt_kernels::sparse_query_attention_triton", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_angles: Tensor | None,
    key_angles: Tensor | None,
    split: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    call = _Call(query, key, value, causal, key_mask, key_lengths, query_angles, key_angles, split, scale)
    shape = (call.batch, call.query_time, call.heads, call.head_dim)
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    log_sum = torch.empty(call.batch, call.heads, call.query_time, dtype=torch.float32, device=query.device)
    grid = triton.cdiv(call.query_time, call.switches["BLOCK_M"]), call.batch * call.heads
    launch(
        _sqa_fwd_kernel, grid, query, key, value, out, log_sum, *call.tensors,
        call.query_time, call.key_time, call.heads, call.head_dim // 2, call.scales[1],
        *call.main_strides, *call.side_strides, **call.switches, on=query,
    )  # fmt: skip
    return out, log_sum


@torch.library.custom_op("rxt_kernels::sparse_query_attention_backward_triton", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    out: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_angles: Tensor | None,
    key_angles: Tensor | None,
    split: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, causal, key_mask, key_lengths, query_angles, key_angles, split, scale)
    gradients = tuple(torch.empty(side.shape, dtype=side.dtype, device=side.device) for side in (query, key, value))
    delta = torch.empty_like(log_sum)
    block_m, block_n, block_d = (call.switches[f"BLOCK_{name}"] for name in "MND")
    query_blocks = triton.cdiv(call.query_time, block_m)
    launch(
        _sqa_bwd_delta_kernel, (query_blocks, call.batch * call.heads), out, gradient, delta,
        call.query_time, call.heads, call.head_dim, *gradient.stride(), BLOCK_M=block_m, BLOCK_D=block_d, on=query,
    )  # fmt: skip
    launch(
        _sqa_bwd_dkdv_kernel, (triton.cdiv(call.key_time, block_n), call.batch * call.key_heads),
        query, key, value, gradient, log_sum, delta, gradients[1], gradients[2], *call.tensors,
        call.query_time, call.key_time, call.heads, call.key_heads, call.head_dim // 2, *call.scales,
        *call.main_strides, *gradient.stride(), *call.side_strides, **call.switches, on=query,
    )  # fmt: skip
    launch(
        _sqa_bwd_dq_kernel, (query_blocks, call.batch * call.query_heads),
        query, key, value, gradient, log_sum, delta, gradients[0], *call.tensors,
        call.query_time, call.key_time, call.heads, call.head_dim // 2, *call.scales,
        *call.main_strides, *gradient.stride(), *call.side_strides,
        TILES=call.heads // call.query_heads, **call.switches, on=query,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


@_attention.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, time, query_heads, head_dim = query.shape
    heads = max(query_heads, key.shape[2])
    return query.new_empty((batch, time, heads, head_dim)), query.new_empty((batch, heads, time), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    gradient: Tensor, out: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.causal, key_mask, key_lengths, query_angles, key_angles, ctx.split, ctx.scale = inputs
    ctx.save_for_backward(*output, query, key, value, key_mask, key_lengths, query_angles, key_angles)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    out, log_sum, query, key, value, key_mask, key_lengths, query_angles, key_angles = ctx.saved_tensors
    found = _attention_backward(
        gradient, out, log_sum, query, key, value, ctx.causal, key_mask, key_lengths, query_angles, key_angles, ctx.split,
        ctx.scale,
    )  # fmt: skip
    return (*found, None, None, None, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> str | None:
    """None, or why this call is not for Triton."""
    if dropout:
        return f"dropout is {dropout}; the kernels drop no attention weights."
    if query.shape[3] > LARGEST_HEAD or query.shape[3] % 2:
        return f"heads have {query.shape[3]} values; the kernels take an even number of at most {LARGEST_HEAD}."
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; the kernels take one dtype."
    return unsupported_tensors(query) or unsupported_angles(query_angles) or unsupported_angles(key_angles)


def sparse_query_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, Tq, Hq, dh), key and value (B, Tk, Hkv, dh) -> (B, Tq, max(Hq, Hkv), dh); as the reference."""
    mixed: Tensor = _attention(
        query, key, value, causal, key_mask, key_lengths, query_angles, key_angles, rotary_layout == "split",
        query.shape[3] ** -0.5 if scale is None else scale,
    )[0]  # fmt: skip
    return mixed
