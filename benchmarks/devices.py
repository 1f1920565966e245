"""Where a benchmark runs, and how time is taken there.

On the CPU a clock is read. A GPU works behind the host's back: there, events are put between the kernels and read after
one synchronisation, so that measuring does not make the device wait.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CpuTimer", "CudaTimer", "Timer", "add_device_argument", "choose_device", "make_timer"]

DEVICES = ("cpu", "cuda")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to run (default: %(default)s)")


def choose_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: it is a GPU, and torch sees none.
    """
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}; accepted are {' and '.join(map(repr, DEVICES))}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', and torch sees no GPU here; run it on a machine with one, with a torch that is built for it, or "
            "leave --device out."
        )
    return torch.device(name)


class Timer(Protocol):
    """Takes times of one piece of work: start, any number of marks, then the seconds from start to each."""

    def start(self) -> None:
        """Forget the marks; time runs from here."""

    def mark(self, name: str) -> None:
        """Here; a name that was marked before moves."""

    def seconds(self) -> dict[str, float]:
        """Seconds from the start to every mark; waits until all of them have been passed."""


class CpuTimer:
    """Reads a clock.

    Example:
        >>> timer = CpuTimer()
        >>> timer.start()
        >>> timer.mark("end")
        >>> timer.seconds()["end"] >= 0
        True
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = 0.0
        self._marks: dict[str, float] = {}

    def start(self) -> None:
        self._marks = {}
        self._start = self._clock()

    def mark(self, name: str) -> None:
        self._marks[name] = self._clock()

    def seconds(self) -> dict[str, float]:
        return {name: at - self._start for name, at in self._marks.items()}


class CudaTimer:
    """Puts events into the current stream.

    Args:
        make_event: makes an event that can be recorded, waited for, and measured from.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._start: Any = None
        self._marks: dict[str, Any] = {}

    def _record(self) -> Any:
        event = self._make_event()
        event.record()
        return event

    def start(self) -> None:
        self._marks = {}
        self._start = self._record()

    def mark(self, name: str) -> None:
        self._marks.pop(name, None)  # the last mark stays the last, and is the one to wait for
        self._marks[name] = self._record()

    def seconds(self) -> dict[str, float]:
        if not self._marks:
            return {}
        list(self._marks.values())[-1].synchronize()
        return {name: self._start.elapsed_time(event) / 1e3 for name, event in self._marks.items()}


def make_timer(device: torch.device) -> Timer:
    """The timer for work on this device."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()
