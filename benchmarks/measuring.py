"""One piece of work done by several systems: each is checked against the reference, then all are timed round by round.

A :class:`Case` is the work at one size; a :class:`System` is who does it, in which dtype, and how to make it ready. In
every round each system works once, in an order that rotates, and the machine's limits are measured between any two of
them: what else the machine does hits all alike. The result are rows with percentiles, the floor that the fastest limits of
all rounds give, and the ratio to it. ``paired_ratio`` has the percentiles of each time over the floor of its own moment, by
the limits measured right before and right after it, whichever were faster: where the machine's rates come and go with what
its host does for others, this is what the software makes of what is there.

What a system computes is compared before it is timed:

    float32     largest difference, over the largest value of the reference: at most 1e-4
    bfloat16    root mean square of the difference, over that of the reference: at most twice what eager torch is off by in
                bfloat16, plus one rounding step. Eager torch itself is the measure; above 0.25 it is none, and is refused.
                Where there is no measure, because it is none or was not asked: at most 0.05
    int8        the same measure: at most 0.1 (weights of 8 bits, random ones)

A system that fails is not timed and is reported as refused; one that cannot be had here is reported as absent.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.testing import error

from .costs import Work
from .limits import Limits, Machine, floor
from .statistics import percentiles

__all__ = ["REFERENCE", "Absent", "Case", "Measured", "System", "Task", "difference", "measure_case", "timed"]

REFERENCE = "reference"
"""The backend that defines the result; its row in bfloat16 also says how far off eager torch is there."""

GRANTED = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}
_EAGER_BFLOAT16 = 0.25
_LEAST_SAMPLE = 2e-3  # seconds; shorter work is repeated within a sample
_LEAST_ROUNDS = 3


class Absent(Exception):  # noqa: N818 - it is no error
    """A system that cannot be had here; the message is the reason, in one sentence."""


@dataclass
class Task:
    """A system that is ready to work.

    Attributes:
        result: does the work once and gives what it computed, to be compared.
        run: does the work and gives the seconds of each time it was done.
        expected: what the result is compared with, where it is another one than the case's.
        is_warm: whether making the result has warmed it, so that it is not run once more before it is timed; for work
            that takes seconds.
    """

    result: Callable[[], Tensor]
    run: Callable[[], Sequence[float]]
    expected: Tensor | None = None
    is_warm: bool = False


@dataclass(frozen=True)
class System:
    """Who does the work; ``make`` may raise :class:`Absent`.

    ``model`` and ``work`` are given where systems of one case are of different sizes, as kinds of attention are.
    """

    backend: str
    dtype: str
    make: Callable[[], Task]
    model: str | None = None
    work: Work | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work at one size.

    Attributes:
        name: of the benchmark.
        model: whose sizes it has.
        threads: that everyone uses.
        shape: the sizes, for the row.
        expected: what has to come out, by the reference in float32.
        work: bytes and operations it cannot do without, by dtype.
        systems: who is compared; the reference first.
        weights: bytes of the weights among what has to be read, by dtype, where the floor of these alone is wanted too.
        eager: what eager torch computes in a dtype, asked where it is not timed in it and others are to be held to it.
    """

    name: str
    model: str
    threads: int
    shape: Mapping[str, int]
    expected: Tensor
    work: Callable[[str], Work]
    systems: Sequence[System]
    weights: Callable[[str], int] | None = None
    eager: Callable[[str], Tensor] | None = None

    @property
    def title(self) -> str:
        """What is measured, in a few words."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.shape.items())
        return f"{self.model}, {self.threads} thread{'s' if self.threads > 1 else ''}, {sizes}"


@dataclass
class Measured:
    """What came of a case."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True
    """Whether every round was measured."""


def difference(actual: Tensor, expected: Tensor, dtype: str) -> float:
    """How far a result is off; the module says how it is measured.

    Example:
        >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), "float32")
        0.25
    """
    if actual.shape != expected.shape or dtype == "float32":
        return error(actual, expected)
    wanted = expected.double()
    found = ((actual.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30)).item()
    return found if found == found else float("inf")


def granted(dtype: str, backend: str, eager: float | None) -> float:
    """The largest difference that a system may have.

    Args:
        dtype: that it computes in.
        backend: which it is.
        eager: the difference of the reference in that dtype, if it was measured.
    """
    if dtype == "bfloat16" and backend == REFERENCE:
        return _EAGER_BFLOAT16
    if dtype == "bfloat16" and eager is not None and eager <= _EAGER_BFLOAT16:
        return 2 * eager + torch.finfo(torch.bfloat16).eps
    return GRANTED[dtype]


def timed(work: Callable[[], object], seconds: float = _LEAST_SAMPLE) -> Callable[[], list[float]]:
    """A function that times work; short work as often within one sample as fills so many seconds, divided by how often.

    The work is done here once or twice, to find out how long it takes when it is warm.
    """
    once = seconds
    for _ in range(2):
        start = time.perf_counter()
        work()
        once = time.perf_counter() - start
        if once > seconds:
            break
    times = max(1, round(seconds / max(once, 1e-9)))

    def run() -> list[float]:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return [(time.perf_counter() - start) / times]

    return run


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class _Entrant:
    """A system that passed its check."""

    system: System
    task: Task
    difference: float
    granted: float
    samples: list[float] = field(default_factory=list)
    paired: list[float] = field(default_factory=list)

    def run(self, case: Case, machine: Machine, before: Limits) -> Limits:
        """Work once, ``before`` being the limits measured right before; gives those measured right after."""
        seconds = self.task.run()
        after = machine.sample()
        least = floor(self.work(case), self.system.dtype, before.or_faster(after)).seconds
        self.samples.extend(seconds)
        self.paired.extend(one / least for one in seconds)
        return after

    def work(self, case: Case) -> Work:
        """What cannot be done without."""
        return case.work(self.system.dtype) if self.system.work is None else self.system.work


def _sentence(failure: BaseException) -> str:
    text = str(failure).strip() or type(failure).__name__
    return text.splitlines()[0]


def _admit(case: Case, measured: Measured) -> list[_Entrant]:
    """Make and check every system; who is absent or refused is written down."""
    entrants: list[_Entrant] = []
    eager: dict[str, float] = {}
    for system in case.systems:
        who = {
            "name": case.name, "model": system.model or case.model, "backend": system.backend, "dtype": system.dtype,
            "threads": case.threads, "shape": dict(case.shape),
        }  # fmt: skip
        try:
            task = system.make()
            expected = case.expected if task.expected is None else task.expected
            found = difference(task.result(), expected, system.dtype)
            if system.backend == REFERENCE:
                eager[system.dtype] = found
            elif system.dtype == "bfloat16" and system.dtype not in eager and case.eager is not None:
                eager[system.dtype] = difference(case.eager(system.dtype), case.expected, system.dtype)
        except Absent as absence:
            measured.absent.append({**who, "reason": str(absence)})
            continue
        except Exception as failure:  # of one system; the others are measured nevertheless
            measured.refused.append({**who, "reason": f"it failed: {_sentence(failure)}"})
            continue
        limit = granted(system.dtype, system.backend, eager.get(system.dtype))
        if not found <= limit:
            reason = (
                f"its result differs from the reference by {found:.3g} (granted is {limit:.3g}), so it is not timed"
            )
            measured.refused.append({**who, "reason": reason})
            continue
        entrants.append(_Entrant(system, task, found, limit))
    return entrants


def measure_case(
    case: Case, machine: Machine, repeats: int, *, stop_at: float | None = None, progress: Callable[[], object] = int
) -> Measured:
    """Check every system of a case and time those that passed.

    Args:
        case: the work.
        machine: sampled before and after each system's turn.
        repeats: rounds.
        stop_at: ``time.monotonic()`` after which no further round begins, but the first three.
        progress: called after every round.
    """
    measured = Measured()
    entrants = _admit(case, measured)
    for entrant in entrants:
        if not entrant.task.is_warm:
            entrant.task.run()
    with _without_garbage_collection():
        for number in range(repeats):
            if stop_at is not None and number >= _LEAST_ROUNDS and time.monotonic() >= stop_at:
                measured.complete = False
                break
            limits = machine.sample()
            first = number % max(1, len(entrants))
            for entrant in (*entrants[first:], *entrants[:first]):
                limits = entrant.run(case, machine, limits)
            progress()
    measured.rows = [_row(case, entrant, machine.limits) for entrant in entrants]
    return measured


def _row(case: Case, entrant: _Entrant, limits: Limits) -> dict[str, Any]:
    system = entrant.system
    work = entrant.work(case)
    least = floor(work, system.dtype, limits)
    spread, paired = percentiles(entrant.samples), percentiles(entrant.paired)
    row = {
        "name": case.name,
        "model": system.model or case.model,
        "backend": system.backend,
        "dtype": system.dtype,
        "threads": case.threads,
        "shape": dict(case.shape),
        "p20": round(spread.p20, 9),
        "p50": round(spread.p50, 9),
        "p80": round(spread.p80, 9),
        "floor": round(least.seconds, 9),
        "ratio": round(spread.p50 / least.seconds, 4),
        "paired_ratio": {name: round(value, 4) for name, value in paired._asdict().items()},
        "bound": least.bound,
        "bytes": work.bytes,
        "flops": work.flops,
        "samples": len(entrant.samples),
        "difference": float(f"{entrant.difference:.3g}"),
        "granted": float(f"{entrant.granted:.3g}"),
        "limits": limits.as_dict(),
    }
    if case.weights is not None:
        weights = floor(Work(case.weights(system.dtype), work.flops), system.dtype, limits)
        row["weights_floor"] = round(weights.seconds, 9)
        row["weights_ratio"] = round(spread.p50 / weights.seconds, 4)
    return row
