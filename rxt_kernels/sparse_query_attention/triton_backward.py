"""The backward kernels (Dao et al. 2022, appendix B). With P the weights and D = rowsum(dO * O):

    dV = P^T dO        dS = P * (dO V^T - D)        dQ = scale * dS K        dK = scale * dS^T Q

One kernel owns a block of queries and adds up dQ over all keys; it also writes D, which it needs first. The other owns a
block of keys and adds up dK and dV over all queries of all heads that read them. Nothing is added by two programs, so
there are no atomics and the result is always the same. As in the forward kernel, blocks that are fully visible are
walked without a comparison.

A rotated query would be turned again for every block of keys; it is rotated once instead, by the kernel of ``rotary``.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.rotary.triton import angle_sines, rotary_triton, unrotate
from rxt_kernels.sparse_query_attention.triton_arguments import AttentionArguments
from rxt_kernels.sparse_query_attention.triton_tiles import (
    head_columns,
    head_offset,
    load_tile,
    moved,
    number_of_keys,
    tile_pointers,
    visible_keys,
    walk_of_queries,
)
from rxt_kernels.triton_runtime import launch


@triton.jit
def _weights_and_gradients(
    q, k, v, do, logarithm, delta, row, key_row, last, offset, mask, mask_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile of scores, (queries, keys) float32."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = visible_keys(row, key_row, last, offset, mask, mask_stride, CAUSAL, HAS_MASK)
        score = tl.where(visible, score, float("-inf"))
    weight = tl.exp2(score * scale_log2 - logarithm[:, None])
    return weight, weight * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])


@triton.jit
def _add_to_query(
    dq, q, do, logarithm, delta, keys, values, key_time_stride, value_time_stride, key_columns, value_columns,
    row, begin, end, last, offset, mask, mask_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``begin`` to ``end`` contribute to the gradient of a block of queries."""
    for first in range(begin, end, BLOCK_N):
        key_row = first + tl.arange(0, BLOCK_N)
        k = load_tile(moved(keys, first, key_time_stride), key_row < last, key_columns, MASKED)
        v = load_tile(moved(values, first, value_time_stride), key_row < last, value_columns, MASKED)
        _, ds = _weights_and_gradients(
            q, k, v, do, logarithm, delta, row, key_row, last, offset, mask, mask_stride, scale_log2,
            MASKED, CAUSAL, HAS_MASK,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["query_time", "key_time"])
def _sqa_bwd_dq_kernel(
    query, key, value, out, gradient, log_sum, delta, query_gradient, query_time, key_time, scale, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    gradient_batch_stride, gradient_time_stride, gradient_head_stride, gradient_stride,
    angles, angle_batch_stride, angle_time_stride, angle_stride,
    mask, mask_batch_stride, mask_stride, lengths, length_stride,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_ADJACENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    ROTATED: tl.constexpr, SPLIT_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // QUERY_HEADS).to(tl.int64)
    query_head = (tl.program_id(0) % QUERY_HEADS).to(tl.int64)
    # The last queries walk furthest in causal attention; they begin first, and short walks fill the end.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    rows_inside = row < query_time
    rotated_column, rotated_columns = head_columns(HEAD_DIM, BLOCK_D, SPLIT_LAYOUT)
    column, columns = head_columns(HEAD_DIM, BLOCK_D, False)
    first_rows = tl.arange(0, BLOCK_N)
    query += batch * query_batch_stride + head_offset(query_head, query_head_stride, HEAD_DIM, HEADS_ADJACENT)
    mask += batch * mask_batch_stride
    q = load_tile(
        tile_pointers(query, row, query_time_stride, rotated_column, query_stride), rows_inside, rotated_columns, True
    )

    last = number_of_keys(lengths, batch, length_stride, key_time, HAS_LENGTHS)
    offset = key_time - query_time
    whole, end = walk_of_queries(start, last, offset, CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    # With fewer query heads than key heads, a query head is read by several heads of the output.
    for tile in range(HEADS // QUERY_HEADS):
        head = query_head + tile * QUERY_HEADS
        key_head = head // (HEADS // KEY_HEADS)
        do = load_tile(
            tile_pointers(
                gradient + batch * gradient_batch_stride + head_offset(head, gradient_head_stride, HEAD_DIM, HEADS_ADJACENT),
                row, gradient_time_stride, column, gradient_stride,
            ), rows_inside, columns, True,
        )  # fmt: skip
        out_place = ((batch * query_time + row) * HEADS + head) * HEAD_DIM
        o = load_tile(tile_pointers(out, out_place, 1, column, 1), rows_inside, columns, True)
        d = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
        place = (batch * HEADS + head) * query_time + row
        tl.store(delta + place, d, mask=rows_inside)
        logarithm = tl.load(log_sum + place, mask=rows_inside, other=float("inf"))
        keys = tile_pointers(
            key + batch * key_batch_stride + head_offset(key_head, key_head_stride, HEAD_DIM, HEADS_ADJACENT),
            first_rows, key_time_stride, rotated_column, key_stride,
        )  # fmt: skip
        values = tile_pointers(
            value + batch * value_batch_stride + head_offset(key_head, value_head_stride, HEAD_DIM, HEADS_ADJACENT),
            first_rows, value_time_stride, column, value_stride,
        )  # fmt: skip
        dq = _add_to_query(
            dq, q, do, logarithm, d, keys, values, key_time_stride, value_time_stride, rotated_columns, columns,
            row, 0, whole, last, offset, mask, mask_stride, scale_log2, False, CAUSAL, HAS_MASK, BLOCK_N,
        )  # fmt: skip
        dq = _add_to_query(
            dq, q, do, logarithm, d, keys, values, key_time_stride, value_time_stride, rotated_columns, columns,
            row, whole, end, last, offset, mask, mask_stride, scale_log2, True, CAUSAL, HAS_MASK, BLOCK_N,
        )  # fmt: skip
    dq = dq * scale
    if ROTATED:
        cosine, sine = angle_sines(
            angles + batch * angle_batch_stride, row.to(tl.int64), angle_time_stride, angle_stride, rows_inside,
            HEAD_DIM // 2, BLOCK_D // 2,
        )  # fmt: skip
        dq = unrotate(dq, cosine, sine, SPLIT_LAYOUT)
    target_place = ((batch * query_time + row) * QUERY_HEADS + query_head) * HEAD_DIM
    target = tile_pointers(query_gradient, target_place, 1, column, 1)
    tl.store(target, dq.to(query_gradient.dtype.element_ty), mask=rows_inside[:, None] & columns[None, :])


@triton.jit
def _add_to_keys(
    dk, dv, k, v, queries, gradients, log_sum, delta, query_time_stride, gradient_time_stride, columns,
    key_row, query_time, begin, end, last, offset, mask, mask_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``begin`` to ``end`` contribute to the gradients of a block of keys and values."""
    for first in range(begin, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        rows_inside = row < query_time
        q = load_tile(moved(queries, first, query_time_stride), rows_inside, columns, True)
        do = load_tile(moved(gradients, first, gradient_time_stride), rows_inside, columns, True)
        logarithm = tl.load(log_sum + row, mask=rows_inside, other=float("inf"))
        d = tl.load(delta + row, mask=rows_inside, other=0.0)
        weight, ds = _weights_and_gradients(
            q, k, v, do, logarithm, d, row, key_row, last, offset, mask, mask_stride, scale_log2,
            MASKED, CAUSAL, HAS_MASK,
        )  # fmt: skip
        dv = tl.dot(tl.trans(weight.to(do.dtype)), do, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["query_time", "key_time"])
def _sqa_bwd_dkdv_kernel(
    query, key, value, gradient, log_sum, delta, key_gradient, value_gradient, query_time, key_time, scale, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    gradient_batch_stride, gradient_time_stride, gradient_head_stride, gradient_stride,
    mask, mask_batch_stride, mask_stride, lengths, length_stride,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_ADJACENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    key_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    key_row = start + tl.arange(0, BLOCK_N)
    column, columns = head_columns(HEAD_DIM, BLOCK_D, False)
    first_rows = tl.arange(0, BLOCK_M)
    query += batch * query_batch_stride
    key += batch * key_batch_stride + head_offset(key_head, key_head_stride, HEAD_DIM, HEADS_ADJACENT)
    value += batch * value_batch_stride + head_offset(key_head, value_head_stride, HEAD_DIM, HEADS_ADJACENT)
    gradient += batch * gradient_batch_stride
    mask += batch * mask_batch_stride

    last = number_of_keys(lengths, batch, length_stride, key_time, HAS_LENGTHS)
    offset = key_time - query_time
    k = load_tile(tile_pointers(key, key_row, key_time_stride, column, key_stride), key_row < last, columns, True)
    v = load_tile(tile_pointers(value, key_row, value_time_stride, column, value_stride), key_row < last, columns, True)
    # Queries from `whole` on see all of these keys, those before `begin` none.
    begin, whole = 0, 0
    if CAUSAL:
        begin = tl.maximum(start - offset, 0) // BLOCK_M * BLOCK_M
        whole = (tl.maximum(start + BLOCK_N - 1 - offset, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin = tl.where(start < last, begin, query_time)
    whole = tl.where(start + BLOCK_N <= last, tl.minimum(whole, query_time), query_time)
    if HAS_MASK:
        whole = query_time
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for shared in range(HEADS // KEY_HEADS):
        head = key_head * (HEADS // KEY_HEADS) + shared
        queries = tile_pointers(
            query + head_offset(head % QUERY_HEADS, query_head_stride, HEAD_DIM, HEADS_ADJACENT),
            first_rows,
            query_time_stride,
            column,
            query_stride,
        )
        gradients = tile_pointers(
            gradient + head_offset(head, gradient_head_stride, HEAD_DIM, HEADS_ADJACENT),
            first_rows,
            gradient_time_stride,
            column,
            gradient_stride,
        )
        place = (batch * HEADS + head) * query_time
        dk, dv = _add_to_keys(
            dk, dv, k, v, queries, gradients, log_sum + place, delta + place, query_time_stride, gradient_time_stride,
            columns, key_row, query_time, begin, whole, last, offset, mask, mask_stride, scale_log2,
            True, CAUSAL, HAS_MASK, BLOCK_M,
        )  # fmt: skip
        dk, dv = _add_to_keys(
            dk, dv, k, v, queries, gradients, log_sum + place, delta + place, query_time_stride, gradient_time_stride,
            columns, key_row, query_time, whole, query_time, last, offset, mask, mask_stride, scale_log2,
            False, CAUSAL, HAS_MASK, BLOCK_M,
        )  # fmt: skip
    target_place = ((batch * key_time + key_row) * KEY_HEADS + key_head) * HEAD_DIM
    inside = (key_row < key_time)[:, None] & columns[None, :]
    key_target = tile_pointers(key_gradient, target_place, 1, column, 1)
    value_target = tile_pointers(value_gradient, target_place, 1, column, 1)
    tl.store(key_target, (dk * scale).to(key_gradient.dtype.element_ty), mask=inside)
    tl.store(value_target, dv.to(value_gradient.dtype.element_ty), mask=inside)


def attention_backward(
    arguments: AttentionArguments, gradient: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, of the (rotated) key, and of value."""
    rotated = arguments
    if arguments.query_angles is not None:
        layout = "split" if arguments.split_layout else "interleaved"
        rotated = replace(arguments, query=rotary_triton(arguments.query, arguments.query_angles, layout))
    query, key, value = rotated.query, rotated.key, rotated.value
    gradients = tuple(torch.empty(side.shape, dtype=side.dtype, device=side.device) for side in (query, key, value))
    delta = torch.empty_like(log_sum)
    batch, query_time, key_time = arguments.batch, arguments.query_time, arguments.key_time
    sizes = query_time, key_time, arguments.scale, arguments.scale_log2

    switches = arguments.switches | {"HEADS_ADJACENT": arguments.heads_adjacent(query, key, value, gradient)}

    config = block_config("sqa_bwd_dq", query, arguments.head_dim)
    launch(
        _sqa_bwd_dq_kernel, (batch * arguments.query_heads, triton.cdiv(query_time, config["BLOCK_M"])),
        query, key, value, out, gradient, log_sum, delta, gradients[0], *sizes,
        *rotated.strides, *gradient.stride(), *arguments.angles, *arguments.visibility,
        ROTATED=arguments.query_angles is not None, SPLIT_LAYOUT=arguments.split_layout,
        **switches, **config, on=query,
    )  # fmt: skip
    config = block_config("sqa_bwd_dkdv", query, arguments.head_dim)
    launch(
        _sqa_bwd_dkdv_kernel, (batch * arguments.key_heads, triton.cdiv(key_time, config["BLOCK_N"])),
        query, key, value, gradient, log_sum, delta, gradients[1], gradients[2], *sizes,
        *rotated.strides, *gradient.stride(), *arguments.visibility, **switches, **config, on=query,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]
