"""Memory for weights that are read from end to end at every token: in few large pages, where the system has them.

A page of 4 KiB is read in a tenth of a microsecond, and looking up where the next one lies takes as long again; a page of
2 MiB is looked up once for all. Linux gives such pages to whoever asks (``madvise``); elsewhere, the memory is like any other.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["Arena"]

_PAGE = 2 << 20
_LINE = 64
_BLOCK = 64 << 20


class Arena:
    """Hands out tensors that stand one behind the other in large blocks; a block lives as long as one of its tensors.

    Memory that was not written yet takes no room.

    Example:
        >>> arena = Arena()
        >>> first, second = arena.take(3, torch.int8), arena.take(5, torch.float32)
        >>> second.data_ptr() - first.data_ptr(), second.shape
        (64, torch.Size([5]))
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor (count,) whose values are not set, on a line of the cache."""
        size = -(-count * dtype.itemsize // _LINE) * _LINE
        if size > len(self._free):
            self._free = _block(max(size, _BLOCK))
        own, self._free = self._free[:size], self._free[size:]
        return own.view(dtype)[:count]


def _block(size: int) -> Tensor:
    """Bytes (at least size,) that begin with a large page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, -(-size // _PAGE) * _PAGE + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % _PAGE :]
