"""What all Triton kernels share: whether they can run here, how they are launched, counted, and recorded.

Kernels run on a GPU, or, slowly and for tests only, on the CPU in Triton's interpreter, which has to be chosen by the
environment variable ``TRITON_INTERPRET=1`` before this package is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Launch",
    "available",
    "count_launches",
    "launch",
    "record_launches",
    "row_view",
    "unavailable",
    "unsupported_tensors",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in the interpreter, on the CPU."""

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

_counters: list[Counter[str]] = []
_records: list[list[Launch]] = []


class Launch(NamedTuple):
    """One launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, in one sentence; None if they can.

    Example:
        >>> (unavailable() is None) == available()
        True
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux, pip install 'rxt-kernels[triton]' adds it."
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "Triton kernels run on a GPU, and torch sees none; to try them on the CPU in Triton's interpreter, set "
        "TRITON_INTERPRET=1 before rxt_kernels is imported."
    )


def available() -> bool:
    """Whether Triton kernels can run in this process."""
    return unavailable() is None


def unsupported_tensors(*tensors: Tensor | None) -> str | None:
    """Why kernels cannot take these tensors, in one sentence; None if they can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
            return f"the tensors are on {tensor.device}; Triton kernels take tensors on a GPU."
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; Triton kernels take float16, bfloat16 and float32."
    return None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, on: Tensor, **options: Any) -> None:
    """Launch a kernel on the current stream of the device of ``on``; an empty grid launches nothing."""
    if 0 in grid:
        return
    for counter in _counters:
        counter[kernel.fn.__name__] += 1
    if _records:
        _records[-1].append(Launch(kernel, grid, arguments, options))
        return
    if on.device.type == "cuda":
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def _forget(those: list[Any], one: object) -> None:
    """Take this one out, and not one that is equal to it: nested blocks may have counted the same."""
    del those[next(index for index, other in enumerate(those) if other is one)]


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the kernels that are launched inside the block, by name.

    Example:
        >>> with count_launches() as launches:
        ...     pass
        >>> launches.total()
        0
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _forget(_counters, counter)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Record launches inside the block instead of making them: outputs stay uninitialised, and no GPU is needed.

    Example:
        >>> with record_launches() as launches:
        ...     pass
        >>> launches
        []
    """
    record: list[Launch] = []
    _records.append(record)
    try:
        yield record
    finally:
        _forget(_records, record)


def row_view(x: Tensor) -> Tensor:
    """x (..., D) as (outer, inner, D), a view wherever strides allow it; row r is (r // inner, r % inner).

    Neighbouring dimensions that one stride can walk are merged. Only a layout that still has three or more leading
    dimensions after that is copied.

    Example:
        >>> row_view(torch.empty(4, 6, 8)[:, :5]).shape
        torch.Size([4, 5, 8])
    """
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return x.reshape(1, -1, x.shape[-1])
    sizes, strides = [1] * (2 - len(sizes)) + sizes, [0] * (2 - len(strides)) + strides
    return x.as_strided((*sizes, x.shape[-1]), (*strides, x.stride(-1)))
