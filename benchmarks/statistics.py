"""The few statistics that benchmarks report: percentiles, exponents with an interval, and where two curves part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Estimate",
    "Percentiles",
    "exponent",
    "mean_with_interval",
    "overtaking_turn",
    "percentiles",
    "running_median",
]

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal distribution's.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Percentiles(NamedTuple):
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Percentiles of at least one sample, interpolated linearly.

    Example:
        >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        Percentiles(p20=2.0, p50=3.5, p80=5.0)
    """
    if not len(samples):
        raise ValueError("samples is empty; percentiles need at least one.")
    p20, p50, p80 = np.percentile(np.asarray(samples, dtype=np.float64), [20, 50, 80])
    return Percentiles(float(p20), float(p50), float(p80))


class Estimate(NamedTuple):
    """A value and its 95% confidence interval; the bounds are None when one run says nothing about the next."""

    value: float
    low: float | None
    high: float | None


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent repeats, with Student's t interval.

    Example:
        >>> mean_with_interval([1.0, 1.0, 1.0])
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    count = len(values)
    if count == 0:
        raise ValueError("values is empty; a mean needs at least one.")
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None)
    quantile = _STUDENT_T[count - 2] if count - 2 < len(_STUDENT_T) else 1.960
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def exponent(costs: Sequence[float]) -> float:
    """The b of ``cost ~ N**b`` over the upper half of N = 1 ... len(costs).

    Theil and Sen's estimate on logarithms, the median slope over all pairs of points: one turn that the machine spent
    elsewhere does not move it.

    Raises:
        ValueError: fewer than four costs, or one that is not positive.

    Example:
        >>> round(exponent([3.0 * n**2 for n in range(1, 65)]), 6)
        2.0
    """
    if len(costs) < 4:
        raise ValueError(f"costs holds {len(costs)} values; an exponent needs at least 4.")
    if min(costs) <= 0:
        raise ValueError(f"costs holds {min(costs)}; every cost must be positive to have a logarithm.")
    first = len(costs) // 2
    x = np.log(np.arange(first + 1, len(costs) + 1))
    y = np.log(np.asarray(costs[first:], dtype=np.float64))
    lower, upper = np.triu_indices(len(x), k=1)
    return float(np.median((y[upper] - y[lower]) / (x[upper] - x[lower])))


def running_median(values: Sequence[float], width: int = 5) -> list[float]:
    """Median over a centred window that looks no further ahead than back, so that the first value stands for itself.

    At the end it shrinks.

    Example:
        >>> running_median([9.0, 1.0, 1.0, 9.0], width=3)
        [9.0, 1.0, 1.0, 5.0]
    """
    half = width // 2
    return [float(np.median(values[max(0, i - half) : i + min(half, i) + 1])) for i in range(len(values))]


def overtaking_turn(ratios: Sequence[float]) -> int | None:
    """The turn from which on every ratio (the other's cost over ours) is above 1, or None if the last one is not.

    Example:
        >>> overtaking_turn([0.5, 1.1, 0.9, 1.2, 1.5])
        4
    """
    behind = [turn for turn, ratio in enumerate(ratios, start=1) if ratio <= 1.0]
    first = behind[-1] + 1 if behind else 1
    return first if first <= len(ratios) else None
