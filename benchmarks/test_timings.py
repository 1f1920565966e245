"""The benchmarks through pytest-benchmark, on small sizes: ``pytest benchmarks/``.

What pytest-benchmark times here is what the benchmarks time, after the same check: a system whose result differs from the
definition fails and is not timed, one that is not here is skipped with the reason. To compare two commits with
pytest-benchmark's own tools: ``pytest benchmarks/ --benchmark-autosave``, then ``--benchmark-compare``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rxt_benchmarks import decode, drift, gpu_static, launches, moe, prefill, scaling, sqa, train, update
from rxt_benchmarks.measuring import Absent, Case, System, Task, difference, granted
from rxt_benchmarks.running import Options
from rxt_benchmarks.systems import check_system, make_systems

from rxt_model.demo_model import load_demo_model
from rxt_model.training.recall import measure_recall

MODEL = "rxt-alpha-micro"
ROUNDS = 3
THREADS = torch.get_num_threads()
OPTIONS = Options(
    models=(MODEL,), threads=(THREADS,), dtypes=("float32", "int8"), backends=("native", "native engine", "torch SDPA"),
    short=True,
)  # fmt: skip
CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "decode": lambda: decode._cases((1,), None, OPTIONS, print),
    "prefill": lambda: prefill._cases((32,), OPTIONS, print),
    "update": lambda: update._cases((32,), OPTIONS, print),
    "moe": lambda: moe._cases((16,), OPTIONS, print),
    "train": lambda: train._cases(1, 16, OPTIONS, print),
    "sqa": lambda: sqa._cases((256,), ("GQA", "xSQA"), ("forward", "backward"), OPTIONS, print),
}


@functools.cache
def systems(name: str) -> list[tuple[Case, System]]:
    """Every system of every case of a benchmark."""
    return [(case, system) for case in CASES[name]() for system in case.systems]


@pytest.mark.parametrize("name", CASES)
def test_work(name: str, benchmark: Any) -> None:
    """The fastest system of a benchmark that passes its check, all others being checked too."""
    tasks: list[tuple[float, int, Task, System]] = []
    for case, system in systems(name):
        try:
            task = system.make()
        except Absent as absence:
            print(f"{system.backend} {system.dtype}: {absence}")
            continue
        expected = case.expected if task.expected is None else task.expected
        found = difference(task.result(), expected, system.dtype)
        assert found <= granted(system.dtype, system.backend, None), (
            f"{system.backend} {system.dtype} is off by {found:.3g}"
        )
        tasks.append((min(task.run()), len(tasks), task, system))
    assert tasks, "not even torch's own was measured"
    _, _, task, system = min(tasks)
    benchmark.extra_info["system"] = f"{system.model or MODEL}, {system.backend}, {system.dtype}"
    benchmark.pedantic(task.run, rounds=ROUNDS)


@pytest.mark.parametrize("place", range(3), ids=["rxt", "stateless-reread", "stateless-cached"])
def test_scaling(place: int, benchmark: Any) -> None:
    """One turn of a conversation."""
    settings = scaling.Settings(model=MODEL, turns=4, repeats=1, query_tokens=8, answer_tokens=4)
    model = scaling.make_model(settings)
    (turns,), _ = scaling.make_conversations(settings, model, None)
    system = make_systems(model, seed=0)[place]
    check_system(system, turns[:2])
    benchmark.pedantic(lambda: system.turn(turns[2]), rounds=ROUNDS)


def test_drift(benchmark: Any) -> None:
    """Eight updates of the shipped model's memory, in float32 and in float64."""
    settings = drift.Settings(turns=8)
    ((_, network, conversation),) = drift._networks([drift.SHIPPED], settings)
    recorded = benchmark.pedantic(lambda: drift.drift(network, conversation, settings), rounds=ROUNDS)
    assert recorded["first_not_finite"] is None


def test_memory(benchmark: Any) -> None:
    """Two conversations in which a fact is asked for at once."""
    model = load_demo_model()
    report = benchmark.pedantic(lambda: measure_recall(model, distances=[1], conversations=2), rounds=1)
    assert report.points[0].asked == 2


def test_launches(tmp_path: Path, benchmark: Any) -> None:
    """Counting the launches of one model."""
    pytest.importorskip("triton")
    arguments = ["--model", MODEL, "--json", str(tmp_path / "launches.json")]
    assert benchmark.pedantic(lambda: launches.main(arguments), rounds=1) == 0


def test_gpu_static(benchmark: Any) -> None:
    """Reading the saved report of compiled kernels."""
    assert benchmark.pedantic(lambda: gpu_static.main([]), rounds=1) == 0
