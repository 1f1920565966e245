"""Few queries over many keys: decoding over a cache, and over the short-term memory.

One query cannot fill a GPU by itself, and a walk over all keys takes long however little there is to compute. So the keys
are split (Dao et al. 2023, "Flash-Decoding"): every program folds some blocks of keys into a partial result, and a second
kernel combines these, weighted by their sums of exponentials:

    out = sum over splits of 2^log_sum * partial / sum over splits of 2^log_sum

Split i takes blocks i, i + splits, i + 2 splits, ... The host chooses the number of splits from the sizes of the tensors
and from the table of block sizes; how many keys are in use it need not know. However short a row is, its blocks are
spread evenly, and a split beyond its end contributes zeros with log_sum = -infinity.

Decoding reads keys and values once and does little with them, so it costs what the reading costs. A tile's rows are all
queries that read the same key head: its query heads, the few times, and, where a batch shares one memory, every row of it.
Keys and values are thus read once per group of queries, not once per query.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.sparse_query_attention.triton_arguments import SMALLEST_TILE, AttentionArguments
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
)
from rxt_kernels.triton_runtime import launch

MOST_QUERIES = 16
"""Queries of one head for which keys are split; more of them are a prefill, and fill the rows of a tile without help."""


@triton.jit(do_not_specialize=["rows", "query_time", "key_time", "splits"])
def _sqa_decode_kernel(
    query, key, value, mixed, log_sum, rows, query_time, key_time, splits, scale_log2,
    query_batch_stride, query_time_stride, query_head_stride, query_stride,
    key_batch_stride, key_time_stride, key_head_stride, key_stride,
    value_batch_stride, value_time_stride, value_head_stride, value_stride,
    angles, angle_batch_stride, angle_time_stride, angle_stride,
    mask, mask_batch_stride, mask_stride, lengths, length_stride,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_ADJACENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    ROTATED: tl.constexpr, SPLIT_LAYOUT: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``rows`` is the number of queries that read the same key head; without PARTIAL, ``mixed`` is the output."""
    key_batch = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    key_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    rows_inside = row < rows
    # From fast to slow: heads, times, rows of the batch. Only a shared memory, whose own batch is 0, has more than one.
    head = key_head * (HEADS // KEY_HEADS) + row % (HEADS // KEY_HEADS)
    token = row // (HEADS // KEY_HEADS)
    time = token % query_time
    batch = key_batch + token // query_time
    q = load_queries(
        query,
        batch * query_batch_stride + time.to(tl.int64) * query_time_stride
        + head_offset(head % QUERY_HEADS, query_head_stride, HEAD_DIM, HEADS_ADJACENT),
        query_stride, rows_inside,
        angles, batch * angle_batch_stride + time.to(tl.int64) * angle_time_stride, angle_stride,
        HEAD_DIM, ROTATED, SPLIT_LAYOUT, BLOCK_D,
    )  # fmt: skip
    key_column, key_columns = head_columns(HEAD_DIM, BLOCK_D, SPLIT_LAYOUT)
    column, columns = head_columns(HEAD_DIM, BLOCK_D, False)
    first_rows = tl.arange(0, BLOCK_N)
    key += key_batch * key_batch_stride + head_offset(key_head, key_head_stride, HEAD_DIM, HEADS_ADJACENT)
    value += key_batch * value_batch_stride + head_offset(key_head, value_head_stride, HEAD_DIM, HEADS_ADJACENT)
    mask += key_batch * mask_batch_stride
    keys = tile_pointers(key, first_rows, key_time_stride, key_column, key_stride)
    values = tile_pointers(value, first_rows, value_time_stride, column, value_stride)

    last = number_of_keys(lengths, key_batch, length_stride, key_time, HAS_LENGTHS)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mix = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(split * BLOCK_N, last, splits * BLOCK_N):
        key_row = first + tl.arange(0, BLOCK_N)
        k = load_tile(moved(keys, first, key_time_stride), key_row < last, key_columns, True)
        v = load_tile(moved(values, first, value_time_stride), key_row < last, columns, True)
        visible = visible_keys(time, key_row, last, key_time - query_time, mask, mask_stride, CAUSAL, HAS_MASK)
        highest, total, mix = fold(highest, total, mix, q, k, v, visible, scale_log2, True)

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    place = ((batch * query_time + time) * HEADS + head) * splits + split
    target = tile_pointers(mixed, place * HEAD_DIM, 1, column, 1)
    inside = rows_inside[:, None] & columns[None, :]
    tl.store(target, (mix / total[:, None]).to(mixed.dtype.element_ty), mask=inside)
    if PARTIAL:
        logarithm = tl.where(seen, highest + tl.log2(total), float("-inf"))
        tl.store(log_sum + place, logarithm, mask=rows_inside)


@triton.jit(do_not_specialize=["splits"])
def _sqa_decode_combine_kernel(
    mixed, log_sum, out, splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """mixed (rows, splits, dh) and log_sum (rows, splits), both float32, to out (rows, dh): a program for every row."""
    row = tl.program_id(0).to(tl.int64)
    column, columns = head_columns(HEAD_DIM, BLOCK_D, False)
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mix = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        place = row * splits + split
        partial = load_tile(tile_pointers(mixed, place * HEAD_DIM, 1, column, 1), split < splits, columns, True)
        logarithm = tl.load(log_sum + place, mask=split < splits, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(logarithm, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logarithm - base)
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(weight, axis=0)
        mix = mix * fading + tl.sum(weight[:, None] * partial, axis=0)
        highest = higher
    mix = mix / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * HEAD_DIM + column, mix.to(out.dtype.element_ty), mask=columns)


def number_of_splits(key_time: int, block: int, programs: int, enough: int) -> int:
    """Over how many programs the keys of a tile of queries are split.

    Args:
        key_time: keys that there are room for.
        block: keys that a program reads at once; it gets at least one block.
        programs: that there are without splitting.
        enough: programs that fill the GPU.

    Example:
        >>> number_of_splits(1024, block=64, programs=4, enough=256)
        16
        >>> number_of_splits(8192, block=64, programs=4, enough=256)
        64
        >>> number_of_splits(8192, block=64, programs=1000, enough=256)
        1
    """
    blocks = max(1, triton.cdiv(key_time, block))
    splits = max(1, min(blocks, enough // programs))
    # As few as take equally long: 17 blocks over 16 programs take two steps, and so they do over 9.
    return triton.cdiv(blocks, triton.cdiv(blocks, splits))


def attention_decode(arguments: AttentionArguments) -> Tensor:
    """The output for few queries; two launches, or one where a single program can walk over all keys."""
    query = arguments.query
    out = torch.empty(arguments.out_shape, dtype=query.dtype, device=query.device)
    config = block_config("sqa_decode", query, arguments.head_dim)
    enough = config.pop("PROGRAMS")
    rows = arguments.query_time * (arguments.heads // arguments.key_heads)
    key_batch = arguments.batch
    if arguments.is_shared:
        rows, key_batch = rows * arguments.batch, 1
    config["BLOCK_M"] = min(config["BLOCK_M"], max(SMALLEST_TILE, triton.next_power_of_2(rows)))
    programs = key_batch * arguments.key_heads, triton.cdiv(rows, config["BLOCK_M"])
    splits = number_of_splits(arguments.key_time, config["BLOCK_N"], max(1, programs[0] * programs[1]), enough)
    mixed, log_sum = out, out
    if splits > 1:
        mixed = torch.empty(*arguments.out_shape[:3], splits, arguments.head_dim, device=query.device)
        log_sum = torch.empty(*arguments.out_shape[:3], splits, device=query.device)
    launch(
        _sqa_decode_kernel, (*programs, splits), query, arguments.key, arguments.value, mixed, log_sum,
        rows, arguments.query_time, arguments.key_time, splits, arguments.scale_log2,
        *arguments.strides, *arguments.angles, *arguments.visibility,
        ROTATED=arguments.query_angles is not None, SPLIT_LAYOUT=arguments.split_layout, PARTIAL=splits > 1,
        **arguments.switches, **config, on=query,
    )  # fmt: skip
    if splits > 1:
        launch(
            _sqa_decode_combine_kernel, (out.numel() // arguments.head_dim,), mixed, log_sum, out, splits,
            HEAD_DIM=arguments.head_dim, BLOCK_D=arguments.switches["BLOCK_D"],
            **block_config("sqa_decode_combine", query, arguments.head_dim), on=query,
        )  # fmt: skip
    return out
