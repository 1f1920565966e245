"""Tensors whose elements lie more than 2^31 elements apart, in memory that is only promised.

A mapping without reserve costs address space and the pages that are touched. The tensor starts in its middle, so that an
offset which wraps around in 32 bits lands inside of the mapping too, on zeros: a wrong result, and no crash.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000
"""As Linux numbers it on every machine that PyTorch runs on; Python 3.13 is the first to name it."""
FAR = 2**31 + 64
"""Elements between neighbours along the far dimension."""


def far_view(x: Tensor, dim: int) -> Tensor:
    """The values of x in a view whose stride along ``dim``, of size 1 or 2, is beyond what 32 bits hold."""
    if x.shape[dim] > 2:
        raise ValueError(f"dim {dim} has size {x.shape[dim]}; a far dimension has at most 2.")
    strides = list(x.contiguous().stride())
    strides[dim] = FAR
    room = 2 * FAR + 2 * x.numel() + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, room * x.element_size(), flags=flags)
    buffer = torch.frombuffer(memory, dtype=x.dtype)
    view = buffer.as_strided(x.shape, strides, FAR)
    view.copy_(x.detach())
    return view
