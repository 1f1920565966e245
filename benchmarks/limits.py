"""What this machine can do at most, measured again beside everything that is timed, so that limits drift with what they limit.

The native extension reads memory and multiplies in loops made for nothing else. Where it is not built, torch has to do:
the sum of a large array and the product of large matrices come less close, so that ratios to a floor look better than
they are. ``source`` says which of the two it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rxt_kernels import native_runtime

from .costs import Work
from .environment import fastest, machine_limits

__all__ = ["Floor", "Limits", "Machine", "floor"]

_BYTES = 256 << 20  # far more than any cache holds
_MATRIX = 1024


class Limits(NamedTuple):
    """Rates of one number of threads."""

    read_bandwidth: float
    """Bytes per second from memory."""
    fma: float
    """Operations per second, two per float32 multiply-add."""
    bfloat16: float
    """The same of products of bfloat16 that are summed in float32."""
    source: str
    """``native`` or ``torch``: who measured."""

    def or_faster(self, other: Limits) -> Limits:
        """The higher of two measured rates, each."""
        return Limits(
            max(self.read_bandwidth, other.read_bandwidth),
            max(self.fma, other.fma),
            max(self.bfloat16, other.bfloat16),
            self.source,
        )

    def as_dict(self) -> dict[str, Any]:
        """The form in which results are saved."""
        return {
            "read_bandwidth_bytes_per_second": self.read_bandwidth,
            "fma_flops_per_second": self.fma,
            "bfloat16_flops_per_second": self.bfloat16,
            "source": self.source,
        }


class Floor(NamedTuple):
    """The shortest time that some work can take, and which limit it is."""

    seconds: float
    bound: str


def floor(work: Work, dtype: str, limits: Limits) -> Floor:
    """Reading and computing can overlap, so the floor is the longer of the two.

    Weights of 8 bits are multiplied as bfloat16 at the fastest. A processor without products of bfloat16 widens them, so
    their rate is never below that of float32.

    Example:
        >>> floor(Work(bytes=100, flops=100), "float32", Limits(10.0, 50.0, 100.0, "native"))
        Floor(seconds=10.0, bound='read_bandwidth')
    """
    name, rate = "fma", limits.fma
    if dtype != "float32" and limits.bfloat16 > limits.fma:
        name, rate = "bfloat16", limits.bfloat16
    reading, computing = work.bytes / limits.read_bandwidth, work.flops / rate
    return Floor(reading, "read_bandwidth") if reading >= computing else Floor(computing, name)


class Machine:
    """The limits with a number of threads.

    What a machine can do at best is the fastest of all samples. A machine that others share does less at times: the rate of
    reading may halve and come back within seconds. So each sample is given as well, for what is timed next to it.

    Args:
        threads: which torch is set to as well.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._native = native_runtime.extension if native_runtime.available() else None
        self._best: Limits | None = None

    def sample(self) -> Limits:
        """Measure once more, in a tenth of a second, and give what was measured."""
        found = self._by_torch() if self._native is None else self._by_extension(self._native)
        self._best = found if self._best is None else self._best.or_faster(found)
        return found

    @property
    def limits(self) -> Limits:
        """The fastest so far.

        Raises:
            RuntimeError: nothing was measured yet.
        """
        if self._best is None:
            raise RuntimeError("limits were asked for before anything was measured; call sample first.")
        return self._best

    def _by_extension(self, native: Any) -> Limits:
        return Limits(
            native.measure_read_bandwidth(_BYTES, self._threads),
            native.measure_fma_rate(self._threads),
            native.measure_bfloat16_rate(self._threads),
            "native",
        )

    def _by_torch(self) -> Limits:
        found = machine_limits(megabytes=_BYTES >> 20, matrix=_MATRIX, repeats=2)
        fma = found["fma_flops_per_second"]
        before = self._best
        # Torch's products of bfloat16 are very slow where the processor has none; once is enough to know that.
        slow = before is not None and before.bfloat16 < before.fma
        bfloat16 = 0.0 if slow else _product_rate(torch.bfloat16)
        return Limits(found["read_bandwidth_bytes_per_second"], fma, bfloat16, "torch")


def _product_rate(dtype: torch.dtype) -> float:
    left, right = torch.ones(_MATRIX, _MATRIX, dtype=dtype), torch.ones(_MATRIX, _MATRIX, dtype=dtype)
    with torch.no_grad():
        return 2 * _MATRIX**3 / fastest(lambda: left @ right, 2, torch.device("cpu"))
