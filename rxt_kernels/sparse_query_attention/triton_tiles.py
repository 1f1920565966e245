"""What the attention kernels do with a tile in registers: loading it, hiding keys, one step of the online softmax.

Rows of a tile are queries or keys, columns the values of a head, padded to a power of two. Offsets are 64 bits wide.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from rxt_kernels.rotary.triton import angle_sines, rotate


@triton.jit
def head_columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT_LAYOUT: tl.constexpr):
    """Where the values of a tile's columns stand in a head, and which columns there are.

    A side that is rotated into the split layout as it is loaded has its second halves at BLOCK_D / 2. Only a head that is no
    power of two makes a difference: the other side has to be laid out likewise.
    """
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    if SPLIT_LAYOUT and HEAD_DIM < BLOCK_D:
        second = column // (BLOCK_D // 2)
        column = column % (BLOCK_D // 2)
        return column + second * (HEAD_DIM // 2), column < HEAD_DIM // 2
    return column, column < HEAD_DIM


@triton.jit
def head_offset(head, head_stride, HEAD_DIM: tl.constexpr, ADJACENT: tl.constexpr):
    """Where a head begins. As a product with a constant, it lets the compiler see that heads of 24 values begin at
    multiples of 128 bits; of a stride that is no multiple of 16 it assumes nothing."""
    if ADJACENT:
        return head * HEAD_DIM
    return head * head_stride


@triton.jit
def tile_pointers(pointer, row, row_stride, column, column_stride):
    """(rows, columns) pointers."""
    return pointer + (row.to(tl.int64) * row_stride)[:, None] + (column * column_stride)[None, :]


@triton.jit
def moved(pointers, rows, row_stride):
    """The same tile, so many rows further on: a product of two numbers for all of it."""
    return pointers + tl.cast(rows, tl.int64) * row_stride


@triton.jit
def load_tile(pointers, rows_inside, columns_inside, ROWS_MASKED: tl.constexpr):
    """A tile with zeros outside. Without ROWS_MASKED all its rows are inside."""
    inside = columns_inside[None, :]
    if ROWS_MASKED:
        inside = inside & rows_inside[:, None]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_queries(
    pointer, place, stride, rows_inside, angles, angle_place, angle_stride,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, SPLIT_LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries at these places, rotated if they are to be, in their own dtype."""
    # Pairs are read as they stand; it is the rotation that writes them as halves. Queries that meet keys which are laid out as
    # halves, and are not rotated themselves, are read like that.
    column, columns_inside = head_columns(HEAD_DIM, BLOCK_D, SPLIT_LAYOUT and not ROTATED)
    tile = load_tile(tile_pointers(pointer, place, 1, column, stride), rows_inside, columns_inside, True)
    if ROTATED:
        cosine, sine = angle_sines(angles, angle_place, 1, angle_stride, rows_inside, HEAD_DIM // 2, BLOCK_D // 2)
        tile = rotate(tile.to(tl.float32), cosine, sine, SPLIT_LAYOUT).to(tile.dtype)
    return tile


@triton.jit
def number_of_keys(lengths, batch, length_stride, key_time, HAS_LENGTHS: tl.constexpr):
    """How many keys there are for this row of the batch."""
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + batch * length_stride), key_time).to(tl.int32)
    return key_time


@triton.jit
def walk_of_queries(
    start, last, offset, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where whole blocks of keys end that all queries of a block see, and where the keys end that any of them sees."""
    end, seen_by_all = last, last
    if CAUSAL:
        end = tl.minimum(last, start + BLOCK_M + offset)
        seen_by_all = tl.minimum(last, start + 1 + offset)
    if HAS_MASK:
        seen_by_all = 0
    return tl.maximum(seen_by_all, 0) // BLOCK_N * BLOCK_N, end


@triton.jit
def visible_keys(
    query_row, key_row, last, offset, mask, mask_stride, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """(queries or 1, keys) bool: of ``last`` keys, query i sees those up to i + offset that the mask leaves."""
    inside = key_row < last
    if HAS_MASK:
        inside = inside & tl.load(mask + key_row.to(tl.int64) * mask_stride, mask=inside, other=0).to(tl.int1)
    visible = inside[None, :]
    if CAUSAL:
        visible = visible & (key_row[None, :] <= query_row[:, None] + offset)
    return visible


@triton.jit
def fold(highest, total, mixed, q, k, v, visible, scale_log2, MASKED: tl.constexpr):
    """Fold a block of keys into the highest score, the sum of exponentials and the mix of values of every query."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, axis=1) * scale_log2)
    base = higher
    if MASKED:
        # A query that has seen no key yet keeps zeros instead of exp(-inf - -inf).
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score * scale_log2 - base[:, None])
    fading = tl.exp2(highest - base)
    total = total * fading + tl.sum(weight, axis=1)
    mixed = tl.dot(weight.to(v.dtype), v, mixed * fading[:, None], input_precision="ieee")
    return higher, total, mixed
