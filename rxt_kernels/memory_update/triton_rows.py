# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""What the kernels of gates and norms share: a program takes whole rows of one layer of a tensor (L, B, S, D).

Row r of a layer is slot ``r % S`` of batch row ``r // S``. Strides are honoured, also that of zero by which a memory of
batch 1 stands for every row of a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LARGEST_WIDTH = 16384
MOST_BACKWARD_PROGRAMS = 512


@triton.jit
def rows_of_program(block, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of a block of rows, and which of them there are."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    return row, column, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def load_rows(pointer, layer, row, column, inside, slots, layer_stride, batch_stride, slot_stride, stride):
    """(ROWS, BLOCK) float32 of one layer of (L, B, S, D), zero outside."""
    place = layer * layer_stride + (row // slots) * batch_stride + (row % slots) * slot_stride
    return tl.load(pointer + place[:, None] + (column * stride)[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(pointer, layer, column, width, layer_stride, stride):
    """(BLOCK,) float32 of one layer of (L, D), zero outside."""
    return tl.load(pointer + layer * layer_stride + column * stride, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def load_slots(pointer, layer, row, rows, slots, layer_stride, slot_stride):
    """(ROWS,) float32 of one layer of (L, S), zero outside; a slot stride of zero is one value for all slots."""
    place = layer * layer_stride + (row % slots) * slot_stride
    return tl.load(pointer + place, mask=row < rows, other=0.0).to(tl.float32)


def block_of(width: int) -> int:
    """The power of two that holds a row."""
    return int(triton.next_power_of_2(width))


def backward_programs(rows: int, rows_of_block: int, layers: int) -> tuple[int, int]:
    """How many programs share a layer in a backward pass, and how many blocks of rows each of them walks over.

    Every program adds up the gradients of a layer's weights over its own rows, and leaves a partial sum of its own.
    """
    blocks = triton.cdiv(rows, rows_of_block)
    blocks_per_program = max(1, triton.cdiv(blocks * layers, MOST_BACKWARD_PROGRAMS))
    return triton.cdiv(blocks, blocks_per_program), blocks_per_program


def slot_strides(values: Tensor) -> tuple[int, int]:
    """Strides by which (L, S), or (L, 1) for all slots, is read."""
    return values.stride(0), values.stride(1) if values.shape[1] > 1 else 0


def too_wide(x: Tensor) -> str | None:
    """Why kernels cannot take rows of this width, in one sentence; None if they can."""
    if x.shape[-1] > LARGEST_WIDTH:
        return f"the memory has rows of {x.shape[-1]} values; the kernels hold a whole row of at most {LARGEST_WIDTH}."
    return None
