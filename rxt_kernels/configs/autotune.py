"""Measure block sizes on the GPU at hand: ``python -m rxt_kernels.configs.autotune --kernel all --output tuned.json``.

Every row of a kernel's table is tried with its sizes halved and doubled, in the calls of :mod:`rxt_kernels.aot.cases` that
the row serves. A candidate is timed only after its outputs agreed with those of the row as it stands. What is written has
the form of the tables of this package, and holds if ``RXT_KERNELS_CONFIGS`` names it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from rxt_kernels.configs.tables import (
    LARGEST_BLOCK,
    MOST_STAGES,
    MOST_WARPS,
    Row,
    architecture_of,
    kernel_names,
    observe_configs,
    override_config,
    rows_of,
    save_table,
)
from rxt_kernels.triton_runtime import INTERPRETED, record_launches

__all__ = ["agree", "candidates", "main", "time_on_gpu", "tune_kernel", "tune_row", "widths_of"]

LEAST_GAIN = 0.03
"""A candidate replaces a row if it takes so much less of the row's time; anything less may be noise."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""By how much of its largest value a result may differ when only the order of additions does."""
REPETITIONS, WARM_UP = 30, 3

Timer = Callable[[Callable[[], object]], float]


class Call(Protocol):
    """What is timed: a case of :mod:`rxt_kernels.aot.cases`."""

    @property
    def name(self) -> str: ...

    def call(self, device: str, seed: int | None) -> list[Tensor]: ...


def candidates(row: Row) -> list[Row]:
    """The row itself, then its neighbours: every size halved, kept or doubled, every pipeline a stage shorter or longer.

    Example:
        >>> [row["ROWS"] for row in candidates({"up_to": 64, "ROWS": 1, "num_warps": 32, "num_stages": 8})][:4]
        [1, 1, 1, 1]
    """
    choices: dict[str, list[int]] = {}
    for name, value in row.items():
        if name == "up_to":
            choices[name] = [value]
        elif name == "num_stages":
            choices[name] = [stages for stages in (value - 1, value, value + 1) if 1 <= stages <= MOST_STAGES]
        else:
            most = MOST_WARPS if name == "num_warps" else LARGEST_BLOCK
            choices[name] = [size for size in (value // 2, value, value * 2) if 1 <= size <= most]
    found = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [dict(row), *(one for one in found if one != dict(row))]


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results differ by no more than another order of additions explains; NaN agrees with NaN alone."""
    if len(found) != len(expected):
        return False
    for own, other in zip(found, expected, strict=True):
        if own.shape != other.shape or own.dtype is not other.dtype or not torch.equal(own.isnan(), other.isnan()):
            return False
        if other.numel() == 0:
            continue
        wide, reference = own.double().nan_to_num(), other.double().nan_to_num()
        allowed = TOLERANCES.get(other.dtype, 0.0) * reference.abs().max()
        if bool((wide - reference).abs().max() > allowed):
            return False
    return True


def time_on_gpu(call: Callable[[], object]) -> float:
    """Median seconds of a call, by events on the current stream of the GPU."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000.0)
    return statistics.median(times)


def widths_of(cases: Iterable[Call], device: str) -> dict[str, dict[int, list[Call]]]:
    """For every kernel the widths that cases ask for, with these cases; no kernel runs for it."""
    found: dict[str, dict[int, list[Call]]] = {}
    for case in cases:
        with observe_configs() as asked, record_launches():
            case.call(device, None)
        for kernel, width in sorted(set(asked)):
            found.setdefault(kernel, {}).setdefault(width, []).append(case)
    return found


def tune_kernel(
    kernel: str, rows: Sequence[Row], widths: Mapping[int, Sequence[Call]], timer: Timer, device: str
) -> list[Row]:
    """The rows of a kernel, each that a case asks for replaced by its fastest candidate; see :func:`tune_row`."""
    served: dict[int, list[Call]] = {}
    for width, cases in widths.items():
        index = next((index for index, row in enumerate(rows) if width <= row["up_to"]), None)
        if index is not None:
            own = served.setdefault(index, [])
            own += [case for case in cases if case not in own]
    return [
        tune_row(kernel, row, served[index], timer, device) if index in served else row
        for index, row in enumerate(rows)
    ]


def tune_row(kernel: str, row: Row, cases: Sequence[Call], timer: Timer, device: str) -> Row:
    """The fastest candidate for a row, over the cases that it serves, or the row itself.

    Args:
        kernel: whose row it is.
        row: as it stands.
        cases: that ask for it.
        timer: seconds of a call.
        device: where the cases run.

    Returns:
        A row with the same names.
    """
    with override_config(kernel, row):
        expected = [case.call(device, 0) for case in cases]
        standing = [timer(lambda case=case: case.call(device, 0)) for case in cases]  # type: ignore[misc]
    best, best_time = row, float(len(cases)) * (1.0 - LEAST_GAIN)
    for candidate in candidates(row)[1:]:
        with override_config(kernel, candidate):
            # A candidate that the compiler or the GPU refuses is none; which errors say so is Triton's affair.
            try:
                if not all(agree(case.call(device, 0), one) for case, one in zip(cases, expected, strict=True)):
                    continue
                times = [timer(lambda case=case: case.call(device, 0)) for case in cases]  # type: ignore[misc]
            except Exception:
                continue
        # Every case counts the same, however long it takes.
        total = sum(own / other for own, other in zip(times, standing, strict=True))
        if total < best_time:
            best, best_time = candidate, total
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write the table; the exit status is 2 where nothing can be measured."""
    from rxt_kernels.aot.cases import all_cases

    parser = argparse.ArgumentParser(
        prog="python -m rxt_kernels.configs.autotune",
        description="Measure block sizes on this GPU and write them as a table for RXT_KERNELS_CONFIGS.",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        choices=["all", *kernel_names()],
        required=True,
        metavar="NAME",
        help="all, or one; repeatable",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the table to write")
    parser.add_argument(
        "--model", action="append", metavar="TEXT", help="only shapes of models with this in their name; repeatable"
    )
    options = parser.parse_args(arguments)
    if not options.output.parent.is_dir():
        parser.error(f"argument --output: there is no directory {options.output.parent}; make it first.")
    if INTERPRETED or not torch.cuda.is_available():
        reason = "TRITON_INTERPRET=1 is set" if INTERPRETED else "torch sees no GPU"
        print(f"Block sizes can only be measured on a GPU, and {reason}; nothing was written.", file=sys.stderr)
        return 2
    cases = [
        case
        for case in all_cases()
        if not options.model or any(text in model for text in options.model for model in case.models)
    ]
    if not cases:
        parser.error(f"argument --model: no model has {' or '.join(map(repr, options.model))} in its name.")
    architecture = architecture_of(torch.empty(0, device="cuda"))
    table: dict[str, list[Row]] = {}
    kernels = kernel_names() if "all" in options.kernel else tuple(dict.fromkeys(options.kernel))
    widths = widths_of(cases, "cuda")
    for kernel in tqdm(kernels, unit="kernel", disable=not sys.stderr.isatty()):
        table[kernel] = tune_kernel(
            kernel, rows_of(kernel, architecture), widths.get(kernel, {}), time_on_gpu, "cuda"
        )  # fmt: skip
        # After every kernel, so that what was measured survives an interruption.
        save_table(options.output, architecture, table)
    print(f"Wrote {options.output}; to use it, set RXT_KERNELS_CONFIGS={options.output}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
