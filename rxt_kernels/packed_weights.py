"""Weights packed once for the native matrix product (``csrc/matmul/panels.h`` has the layout)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension

__all__ = ["PRECISIONS", "PackedWeights", "pack_into", "pack_weights", "packed_elements", "packed_product"]

PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Types that weights can be packed in; int8 has one scale per output."""


class PackedWeights(NamedTuple):
    """A matrix (outputs, inputs) in panels of sixteen outputs."""

    data: Tensor
    scales: Tensor | None
    """float32, one per output, filled up to whole panels; for int8 only."""
    outputs: int
    inputs: int


def pack_weights(matrix: Tensor, precision: str) -> PackedWeights:
    """Pack a matrix (outputs, inputs), float32 or bfloat16, of any strides.

    Args:
        matrix: as torch.nn.Linear has it; give ``w.t()`` for weights that are applied as ``x @ w``.
        precision: one of :data:`PRECISIONS`.

    Raises:
        ValueError: the precision is unknown, the matrix has not two dimensions, or it is to be packed in int8 and holds a
            value that is not finite.
        TypeError: the matrix has another dtype.

    Example:
        >>> from rxt_kernels.native_runtime import available
        >>> if available():
        ...     packed = pack_weights(torch.eye(3), "float32")
        ...     assert packed_product(torch.tensor([[1.0, 2.0, 3.0]]), packed).tolist() == [[1.0, 2.0, 3.0]]
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted are {', '.join(map(repr, PRECISIONS))}.")
    if matrix.dim() != 2:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; accepted is (outputs, inputs).")
    outputs, inputs = matrix.shape
    data = torch.empty(packed_elements(precision, outputs, inputs), dtype=PRECISIONS[precision])
    scales = torch.empty(extension.packed_scales(outputs)) if precision == "int8" else None
    pack_into(matrix, data, scales)
    return PackedWeights(data, scales, outputs, inputs)


def packed_elements(precision: str, outputs: int, inputs: int) -> int:
    """Elements of a packed matrix (outputs, inputs)."""
    count: int = extension.packed_elements(precision, outputs, inputs)
    return count


def pack_into(matrix: Tensor, data: Tensor, scales: Tensor | None) -> None:
    """As :func:`pack_weights`, into memory that is there: data (packed_elements,), and for int8 scales (whole panels,).

    Raises:
        ValueError, TypeError: as there, or data or scales that do not fit.
    """
    if data.dtype is torch.int8 and not torch.isfinite(matrix).all():
        raise ValueError(
            "matrix holds NaN or infinity, which int8 cannot; accepted are finite weights, or the precision 'float32' or "
            "'bfloat16'."
        )
    extension.pack(matrix.detach(), data, scales)


def packed_product(a: Tensor, weights: PackedWeights, bias: Tensor | None = None) -> Tensor:
    """a (rows, inputs) float32 @ weights^T (+ bias) -> (rows, outputs) float32."""
    out = a.new_empty(a.shape[0], weights.outputs)
    extension.packed_product(a, weights.data, weights.scales, bias, out)
    return out
