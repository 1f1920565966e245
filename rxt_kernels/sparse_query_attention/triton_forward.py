"""The forward kernel: an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

A program takes a block of queries of one head, walks over the keys they see, and keeps the logarithm of the sum of
exponentials of every query for the backward pass. The walk has two parts: blocks of keys that all its queries see, where
nothing is compared, and the blocks at the causal diagonal or at the end of the keys.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.rotary.triton import angle_sines, rotate
from rxt_kernels.sparse_query_attention.triton_arguments import AttentionArguments
from rxt_kernels.sparse_query_attention.triton_tiles import (
    fold,
    head_columns,
    head_offset,
    load_queries,
    load_tile,
    moved,
    number_of_keys,
    tile_pointers,
    visible_keys,
    walk_of_queries,
)
from rxt_kernels.triton_runtime import launch


@triton.jit
def _walk(
    highest, total, mixed, q, keys, values, key_time_stride, value_time_stride, key_columns, value_columns,
    row, begin, end, last, offset, mask, mask_stride, scale_log2, angles, angle_time_stride, angle_stride,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, KEYS_ROTATED: tl.constexpr,
    SPLIT_LAYOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the keys from ``begin`` to ``end``; without MASKED these are whole blocks that every query sees."""
    for first in range(begin, end, BLOCK_N):
        key_row = first + tl.arange(0, BLOCK_N)
        k = load_tile(moved(keys, first, key_time_stride), key_row < last, key_columns, MASKED)
        if KEYS_ROTATED:
            place = key_row.to(tl.int64) * angle_time_stride
            cosine, sine = angle_sines(angles, place, 1, angle_stride, key_row < last, HEAD_DIM // 2, BLOCK_D // 2)
            k = rotate(k.to(tl.float32), cosine, sine, SPLIT_LAYOUT).to(k.dtype)
        v = load_tile(moved(values, first, value_time_stride), key_row < last, value_columns, MASKED)
        visible = None
        if MASKED:
            visible = visible_keys(row, key_row, last, offset, mask, mask_stride, CAUSAL, HAS_MASK)
        highest, total, mixed = fold(highest, total, mixed, q, k, v, visible, scale_log2, MASKED)
    return highest, total, mixed


@triton.jit(do_not_specialize=["query_time", "key_time"])
def _sqa_fwd_kernel(
    query, key, value, out, log_sum, query_time, key_time, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    angles, angle_batch_stride, angle_time_stride, angle_stride,
    key_angles, key_angle_batch_stride, key_angle_time_stride, key_angle_stride,
    mask, mask_batch_stride, mask_stride, lengths, length_stride,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_ADJACENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    ROTATED: tl.constexpr, KEYS_ROTATED: tl.constexpr, ANGLES_ADJACENT: tl.constexpr, SPLIT_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    key_head = head // (HEADS // KEY_HEADS)
    # The last queries walk furthest in causal attention; they begin first, and short walks fill the end.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    rows_inside = row < query_time
    q = load_queries(
        query + batch * query_batch_stride + head_offset(head % QUERY_HEADS, query_head_stride, HEAD_DIM, HEADS_ADJACENT),
        row.to(tl.int64) * query_time_stride, query_stride, rows_inside,
        angles + batch * angle_batch_stride, row.to(tl.int64) * angle_time_stride, angle_stride,
        HEAD_DIM, ROTATED, SPLIT_LAYOUT, BLOCK_D,
    )  # fmt: skip
    # Of what is rotated on load, pairs are read as they stand.
    key_column, key_columns = head_columns(HEAD_DIM, BLOCK_D, SPLIT_LAYOUT and not KEYS_ROTATED)
    key_angles += batch * key_angle_batch_stride
    if (
        ANGLES_ADJACENT
    ):  # as constants, they let the compiler see that the angles of a key begin at multiples of 128 bits
        key_angle_time_stride = HEAD_DIM // 2
        key_angle_stride = 1
    column, columns = head_columns(HEAD_DIM, BLOCK_D, False)
    first_rows = tl.arange(0, BLOCK_N)
    key += batch * key_batch_stride + head_offset(key_head, key_head_stride, HEAD_DIM, HEADS_ADJACENT)
    value += batch * value_batch_stride + head_offset(key_head, value_head_stride, HEAD_DIM, HEADS_ADJACENT)
    mask += batch * mask_batch_stride
    keys = tile_pointers(key, first_rows, key_time_stride, key_column, key_stride)
    values = tile_pointers(value, first_rows, value_time_stride, column, value_stride)

    last = number_of_keys(lengths, batch, length_stride, key_time, HAS_LENGTHS)
    offset = key_time - query_time
    whole, end = walk_of_queries(start, last, offset, CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    highest, total, mixed = _walk(
        highest, total, mixed, q, keys, values, key_time_stride, value_time_stride, key_columns, columns,
        row, 0, whole, last, offset, mask, mask_stride, scale_log2, key_angles, key_angle_time_stride, key_angle_stride,
        False, CAUSAL, HAS_MASK, KEYS_ROTATED, SPLIT_LAYOUT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    highest, total, mixed = _walk(
        highest, total, mixed, q, keys, values, key_time_stride, value_time_stride, key_columns, columns,
        row, whole, end, last, offset, mask, mask_stride, scale_log2, key_angles, key_angle_time_stride, key_angle_stride,
        True, CAUSAL, HAS_MASK, KEYS_ROTATED, SPLIT_LAYOUT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    place = ((batch * query_time + row) * HEADS + head) * HEAD_DIM
    target = tile_pointers(out, place, 1, column, 1)
    inside = rows_inside[:, None] & columns[None, :]
    tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
    # In powers of two. Infinite where nothing was seen, so that every weight of that query is zero in the backward pass.
    logarithm = tl.where(seen, highest + tl.log2(total), float("inf"))
    tl.store(log_sum + (batch * HEADS + head) * query_time + row, logarithm, mask=rows_inside)


def attention_forward(arguments: AttentionArguments) -> tuple[Tensor, Tensor]:
    """The output, and (B, H, Tq) float32 logarithms, to the base 2, of each query's sum of exponentials."""
    query = arguments.query
    out = torch.empty(arguments.out_shape, dtype=query.dtype, device=query.device)
    log_sum = torch.empty(
        arguments.batch, arguments.heads, arguments.query_time, dtype=torch.float32, device=query.device
    )
    # Sines and cosines in the loop take registers, and smaller tiles.
    name = "sqa_fwd" if arguments.key_angles is None else "sqa_fwd_turning"
    config = block_config(name, query, arguments.head_dim)
    grid = arguments.batch * arguments.heads, triton.cdiv(arguments.query_time, config["BLOCK_M"])
    launch(
        _sqa_fwd_kernel, grid, query, arguments.key, arguments.value, out, log_sum,
        arguments.query_time, arguments.key_time, arguments.scale_log2, *arguments.strides, *arguments.angles,
        *arguments.angles_of_keys, *arguments.visibility, ROTATED=arguments.query_angles is not None,
        KEYS_ROTATED=arguments.key_angles is not None, ANGLES_ADJACENT=arguments.angles_adjacent,
        SPLIT_LAYOUT=arguments.split_layout, **arguments.switches, **config, on=query,
    )  # fmt: skip
    return out, log_sum
