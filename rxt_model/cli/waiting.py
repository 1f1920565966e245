"""How long a thread of torch and of the native kernels waits for another before it gives its core away.

Both use the OpenMP runtime of GCC, whose threads spin for about three milliseconds at the end of every parallel loop and
before the next, unless they are told otherwise. That is harmless on a quiet machine. Where another program has one of the
cores, every loop then takes a time slice of the scheduler (``benchmarks/NOTES.md`` has figures). A tenth of a millisecond of
spinning costs nothing on a quiet machine that could be measured.
"""

from __future__ import annotations

import os
import sys

__all__ = ["wait_briefly"]

_SPINS = "10000"
"""Rounds of waiting before a thread sleeps: about a tenth of a millisecond, more than Python takes between two tokens."""


def wait_briefly() -> None:
    """Make OpenMP's threads sleep sooner, where the user has not said how they are to wait and torch is not loaded yet.

    The runtime reads ``GOMP_SPINCOUNT`` and ``OMP_WAIT_POLICY`` once, when it is loaded. Other runtimes know neither.

    Example:
        >>> wait_briefly()  # too late here: torch is there
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
