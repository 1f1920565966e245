"""Counting sort of choices by expert: integers only, stable, and nothing that the host would have to know.

A choice is a token and one of its experts; choice ``n * K + k`` is the k-th of token n. A token chooses an expert at most
once, so that among the choices of an expert, those of earlier tokens come first. Tokens are taken in blocks, one per
program of the router, and

    place of (n, e) = choices of experts before e             scan over experts, in every program
                    + choices of e in blocks before n's       scan over blocks, a launch of its own
                    + choices of e by tokens before n's       scan down a tile in registers

The router counts, and if there is one block only, it places the choices as well: a decoded token costs no launch here.
Shapes and grids follow from N, K and E alone, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rxt_kernels.configs import block_config
from rxt_kernels.triton_runtime import launch


@triton.jit
def store_order(order, rank, row, first, TOP_K: tl.constexpr):
    """Write the choices of a block of tokens to their places.

    rank (ROWS, BLOCK_EXPERTS) is the column in which a token chose an expert, or -1; first (BLOCK_EXPERTS,) is where the
    choices that this block makes of an expert begin.
    """
    chosen = rank >= 0
    ones = chosen.to(tl.int32)
    place = first[None, :] + tl.cumsum(ones, axis=0) - ones
    choice = row.to(tl.int32)[:, None] * TOP_K + rank
    tl.store(order + place.to(tl.int64), choice, mask=chosen)


@triton.jit
def store_starts(starts, until, expert, experts):
    """Write where every expert begins, and the number of choices; until (BLOCK_EXPERTS,) is where each ends."""
    tl.store(starts, 0)
    tl.store(starts + 1 + expert, until, mask=expert < experts)


@triton.jit
def _moe_scan_kernel(
    counts, offsets, totals, partial_sums, loss, blocks, experts, width, tokens,
    TOP_K: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """offsets[b, e] = sum of counts[:b, e], totals[e] = that of all blocks; the first program adds up the loss.

    All three have ``width`` columns, zeros beyond the experts, so that they are read in wide pieces.
    """
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    total = tl.zeros((BLOCKS,), dtype=loss.dtype.element_ty)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        place = block.to(tl.int64)[:, None] * width + expert[None, :]
        inside = (block < blocks)[:, None]
        count = tl.load(counts + place, mask=inside, other=0)
        tl.store(offsets + place, before[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        before += tl.sum(count, axis=0)
        total += tl.load(partial_sums + block, mask=block < blocks, other=0.0)
    tl.store(totals + expert, before)
    if tl.program_id(0) == 0:
        choices = tl.full((), tokens * TOP_K, dtype=loss.dtype.element_ty)
        tl.store(loss, tl.sum(total, axis=0) * experts / (choices + 1e-6))


@triton.jit
def load_choices(pointer, row, rows, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile (ROWS, BLOCK_K) of what is stored for every choice; -1 where there is none."""
    k = tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (k < TOP_K)[None, :]
    return tl.load(pointer + row[:, None] * TOP_K + k[None, :], mask=inside, other=-1)


@triton.jit
def column_of(tile, k, BLOCK_K: tl.constexpr):
    """Column k of a tile that is in registers, (ROWS, 1)."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_K)[None, :] == k, tile, 0), axis=1)[:, None]


@triton.jit
def _moe_scatter_kernel(
    chosen, offsets, totals, order, starts, tokens, experts,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """order[place] = choice, and starts."""
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    total = tl.load(totals + expert)
    until = tl.cumsum(total, axis=0)
    offset = tl.load(offsets + block * BLOCK_EXPERTS + expert)
    experts_of_row = load_choices(chosen, row, tokens, TOP_K, BLOCK_K)
    rank = tl.full((ROWS, BLOCK_EXPERTS), -1, dtype=tl.int32)
    for k in range(TOP_K):
        rank = tl.where(expert[None, :] == column_of(experts_of_row, k, BLOCK_K), k, rank)
    store_order(order, rank, row, until - total + offset, TOP_K)
    if block == 0:
        store_starts(starts, until, expert, experts)


def sort_blocks(
    chosen: Tensor,
    counts: Tensor,
    partial_sums: Tensor,
    loss: Tensor,
    order: Tensor,
    starts: Tensor,
    tile: dict[str, int],
) -> None:
    """Fill order (N * K,), starts (E + 1,) and the loss from what the router's programs counted.

    Args:
        chosen: (N, K) int32.
        counts: (blocks, BLOCK_EXPERTS) int32, choices of an expert by a block of tokens.
        partial_sums: (blocks,), sums of the chosen probabilities of a block.
        tile: the router's ROWS, BLOCK_EXPERTS and num_warps.
    """
    (tokens, top_k), (blocks, width), experts = chosen.shape, counts.shape, starts.numel() - 1
    offsets, totals = counts.new_empty(counts.shape), counts.new_empty((width,))
    config = block_config("moe_scan", counts, width)
    config["EXPERTS"] = min(config["EXPERTS"], width)
    launch(
        _moe_scan_kernel, (width // config["EXPERTS"],), counts, offsets, totals, partial_sums, loss, blocks, experts,
        width, tokens, TOP_K=top_k, **config, on=chosen,
    )  # fmt: skip
    launch(
        _moe_scatter_kernel, (blocks,), chosen, offsets, totals, order, starts, tokens, experts, TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k), **tile, on=chosen,
    )  # fmt: skip
