"""The report: cases are recorded, their kernels compiled, each once, and both are put together."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from rxt_kernels.aot.cases import Case
from rxt_kernels.aot.compiler import Compiled, Job, compile_job, compiler_cache, failed, job_of
from rxt_kernels.aot.targets import TARGETS, Target
from rxt_kernels.aot.work import Work, bound_of, tensor_bytes, work_of
from rxt_kernels.configs import for_architecture
from rxt_kernels.triton_runtime import Launch, record_launches

__all__ = ["Recorded", "as_json", "as_table", "build", "problems", "record"]


@dataclass(frozen=True)
class Recorded:
    """A launch of a case as it would be made on a target: all that is needed of it, and none of its tensors."""

    case: Case
    job: Job
    programs: int
    work: Work
    tensor_bytes: dict[str, int]


def _without_data(value: Tensor | torch.device) -> Tensor | torch.device:
    return value.to("meta") if isinstance(value, Tensor) else torch.device("meta")


class _ComputesNothing(TorchDispatchMode):
    """What torch does to large tensors between the kernels is not computed: nobody reads the result."""

    large = 1 << 14

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shares_memory = any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns))
        if func.namespace != "aten" or shares_memory or all(tensor.numel() < self.large for tensor in tensors):
            return func(*args, **kwargs)
        like = tree_map_only((Tensor, torch.device), _without_data, (args, kwargs))
        return tree_map_only(
            Tensor,
            lambda tensor: torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensors[0].device
            ),
            func(*like[0], **like[1]),
        )


def launches_of(case: Case) -> list[Launch]:
    """The launches of a case, recorded instead of made."""
    with record_launches() as launches, _ComputesNothing():
        case.call()
    return launches


def record(case: Case, target: Target) -> list[Recorded]:
    """What a case would launch on a target, with the target's block sizes."""
    with for_architecture(target.name):
        launches = launches_of(case)
    recorded = []
    for launch in launches:
        name = launch.kernel.fn.__name__
        values = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.options}
        programs = 1
        for size in launch.grid:
            programs *= size
        recorded.append(
            Recorded(case, job_of(launch, target), programs, work_of(name, values), tensor_bytes(name, values))
        )  # fmt: skip
    return recorded


def _compile_in(directory: str, job: Job) -> Compiled:
    with compiler_cache(directory):
        return compile_job(job)


class _Worker:
    """A process that compiles one job after the other. A compiler that takes its process with it costs one job."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pool: ProcessPoolExecutor | None = None

    def compile(self, job: Job) -> Compiled:
        if self._pool is None:
            # A fork of a process that has run torch's threads may hang; a fresh one imports what it needs.
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self._pool.submit(_compile_in, self._directory, job).result()
        except BrokenProcessPool:
            self._pool = None
            return failed(job, "the compiler ended its process")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _compiled(jobs: Sequence[Job], directory: str, processes: int) -> Iterator[Compiled]:
    workers = [_Worker(directory) for _ in range(processes)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def compile_by_anyone(job: Job) -> Compiled:
        worker = idle.get()
        try:
            return worker.compile(job)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(processes) as threads:
            yield from threads.map(compile_by_anyone, jobs)
    finally:
        for worker in workers:
            worker.close()


def build(
    cases: Sequence[Case], targets: Sequence[Target], directory: str | Path, processes: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Compile every kernel of these cases for these targets.

    Args:
        cases: what is called.
        targets: what for.
        directory: where Triton keeps what it compiles.
        processes: that compile at once.

    Returns:
        ``kernels``, a row for every piece of compiled code, and ``launches``, a row for every launch of every case and
        target with the number of its kernel.
    """
    is_quiet = not sys.stderr.isatty()
    recorded: dict[str, list[Recorded]] = {}
    for case in tqdm(cases, desc="record", unit="case", disable=is_quiet):
        for target in targets:
            recorded.setdefault(target.name, []).extend(record(case, target))
    jobs = {one.job.key: one.job for group in recorded.values() for one in group}
    compiled = _compiled(list(jobs.values()), str(directory), processes)
    kernels = dict(
        zip(jobs, tqdm(compiled, desc="compile", unit="kernel", total=len(jobs), disable=is_quiet), strict=True)
    )
    numbers = {key: number for number, key in enumerate(jobs)}
    launches = []
    seen = set()
    for group in recorded.values():
        for one in group:
            row = _launch_row(one, numbers[one.job.key], kernels[one.job.key])
            if (text := json.dumps(row, sort_keys=True)) not in seen:
                seen.add(text)
                launches.append(row)
    return {
        "kernels": [{"number": numbers[key], **kernel.to_dict()} for key, kernel in kernels.items()],
        "launches": launches,
    }


def _launch_row(one: Recorded, number: int, kernel: Compiled) -> dict[str, Any]:
    moved = sum(one.tensor_bytes[name] for name in (*kernel.read, *kernel.written))
    bound = bound_of(one.work, moved, TARGETS[one.job.target])
    return {
        "case": one.case.name,
        "kernel": number,
        "target": one.job.target,
        "programs": one.programs,
        "bytes": moved,
        "flops": one.work.products + one.work.others,
        "specials": one.work.specials,
        "bound_microseconds": float(f"{1e6 * bound.seconds:.3g}"),
        "limit": bound.limit,
        "special_microseconds": float(f"{1e6 * bound.special_seconds:.3g}"),
    }


def problems(report: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is wrong, in sentences that name the kernel, its target, its block sizes and a case."""
    case_of: dict[int, str] = {}
    for launch in report["launches"]:
        case_of.setdefault(launch["kernel"], launch["case"])
    return [
        f"{kernel['kernel'].strip('_')} on {kernel['target']} ({case_of[kernel['number']]}; "
        f"{', '.join(f'{name} {value}' for name, value in kernel['tile'].items())}): {problem}"
        for kernel in report["kernels"]
        for problem in kernel["problems"]
    ]


def as_table(report: dict[str, list[dict[str, Any]]]) -> str:
    """The launches for a person."""
    columns: list[tuple[str, int, Callable[[dict[str, Any], dict[str, Any]], str]]] = [
        ("case", 58, lambda launch, kernel: launch["case"]),
        ("kernel", 31, lambda launch, kernel: kernel["kernel"].strip("_").removesuffix("_kernel")),
        ("target", 7, lambda launch, kernel: kernel["target"]),
        ("regs", 5, lambda launch, kernel: str(kernel["registers"])),
        ("spill", 6, lambda launch, kernel: str(kernel["spilled"])),
        ("shared", 7, lambda launch, kernel: str(kernel["shared"])),
        ("occup.", 7, lambda launch, kernel: f"{kernel['occupancy']:.0%}"),
        ("matrix", 7, lambda launch, kernel: str(kernel["matrix_in_loops"])),
        ("128-bit", 8, lambda launch, kernel: f"{kernel['wide_share']:.0%}"),
        ("bytes", 12, lambda launch, kernel: f"{launch['bytes']:,}"),
        ("flops", 15, lambda launch, kernel: f"{launch['flops']:,}"),
        ("bound us", 9, lambda launch, kernel: f"{launch['bound_microseconds']:.3g}"),
        ("limit", 8, lambda launch, kernel: launch["limit"]),
        ("special us", 10, lambda launch, kernel: f"{launch['special_microseconds']:.3g}"),
    ]
    texts = 3
    lines = [
        " ".join(f"{name:<{width}}" if i < texts else f"{name:>{width}}" for i, (name, width, _) in enumerate(columns))
    ]
    for launch in report["launches"]:
        kernel = report["kernels"][launch["kernel"]]
        cells = [(read(launch, kernel), width) for _, width, read in columns]
        lines.append(
            " ".join(f"{cell:<{width}}" if i < texts else f"{cell:>{width}}" for i, (cell, width) in enumerate(cells))
        )
    return "\n".join(lines)


def as_json(report: dict[str, Any]) -> str:
    """One row per line, so that a change of one kernel is a change of its lines."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
