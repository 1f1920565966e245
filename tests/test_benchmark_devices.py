"""Where benchmarks run: choosing a device, and one timer for clocks and for events."""

from __future__ import annotations

import argparse
from itertools import count

import pytest
import torch
from helpers import refusal
from rxt_benchmarks import launches, memory, scaling
from rxt_benchmarks.devices import CpuTimer, CudaTimer, Timer, choose_device, make_timer


@pytest.mark.parametrize("module", [scaling, memory, launches])
def test_every_benchmark_takes_a_device(module: object) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)  # type: ignore[attr-defined]
    assert parser.parse_args([]).device == "cpu"
    assert parser.parse_args(["--device", "cuda"]).device == "cuda"
    with pytest.raises(argparse.ArgumentError, match="--device"):
        parser.parse_args(["--device", "tpu"])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with refusal(ValueError, "'tpu'", "'cpu' and 'cuda'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refusal(ValueError, "'cuda'", "no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda").type == "cuda"


@pytest.mark.parametrize("module", [scaling, memory, launches])
def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(
    module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    with refusal(ValueError, "'cuda'", "no GPU"):
        module.run(parser.parse_args(["--device", "cuda"]))  # type: ignore[attr-defined]


class Stream:
    """Time in milliseconds as a GPU would see it, and how often the host waited for it."""

    def __init__(self) -> None:
        self.clock = count()
        self.waited = 0

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at: int | None = None
        self.passed = False

    def record(self) -> None:
        self.at = next(self.stream.clock)

    def synchronize(self) -> None:
        self.passed = True
        self.stream.waited += 1

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None
        assert other.at is not None
        return float(other.at - self.at)


def test_both_timers_tell_the_same_and_the_device_is_waited_for_once() -> None:
    stream, clock = Stream(), count()
    timers: list[Timer] = [CpuTimer(clock=lambda: next(clock) / 1e3), CudaTimer(make_event=stream.event)]
    for timer in timers:
        for _ in range(2):
            timer.start()
            timer.mark("first")
            timer.mark("last")
            timer.mark("last")
            seconds = timer.seconds()
            assert list(seconds) == ["first", "last"]
            assert seconds == pytest.approx({"first": 0.001, "last": 0.003})
    assert stream.waited == 2


def test_the_timer_of_a_device() -> None:
    assert isinstance(make_timer(torch.device("cpu")), CpuTimer)
    assert isinstance(make_timer(torch.device("cuda")), CudaTimer)
