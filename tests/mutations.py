"""Kernels made wrong on purpose: the source of a kernel with one piece exchanged, put in place of the right one."""

from __future__ import annotations

import inspect
import itertools
import linecache
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_numbers = itertools.count()


def mutated(kernel: Any, old: str, new: str) -> Any:
    """The kernel, interpreted, with ``old``, which must occur in its source, replaced by ``new``."""
    import triton

    source = inspect.getsource(kernel.fn)
    if old not in source:
        raise ValueError(f"{kernel.fn.__name__} has no {old!r} in it; the mutation has to follow the kernel.")
    source = source.replace(old, new)
    filename = f"<mutation {next(_numbers)} of {kernel.fn.__name__}>"
    # The interpreter reads a kernel's source again, from the line cache.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    names: dict[str, Any] = dict(kernel.fn.__globals__)
    names["triton"] = triton
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        exec(compile(source, filename, "exec"), names)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return names[kernel.fn.__name__]


@contextmanager
def mutation(module: ModuleType, kernel: str, old: str, new: str) -> Iterator[None]:
    """Replace a kernel of a module by its mutation inside the block."""
    right = getattr(module, kernel)
    setattr(module, kernel, mutated(right, old, new))
    try:
        yield
    finally:
        setattr(module, kernel, right)
