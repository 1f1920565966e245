"""From options to a file, a table and a plot: what the benchmarks of native kernels have in common around measuring."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rxt_kernels.dispatch import available_backends, operations
from rxt_model.presets import PRESETS

from .comparing import add_check_argument, checked
from .environment import cores, describe_environment, use_threads
from .limits import Machine
from .measuring import REFERENCE, Case, Measured, measure_case
from .results import Results, read_results, write_results

__all__ = [
    "DTYPES",
    "Options",
    "add_check_argument",
    "add_common_arguments",
    "checked",
    "main",
    "run_benchmark",
    "table",
    "threads_of",
]

BETA, ALPHA = "rxt-beta-micro", "rxt-alpha-micro-plus"
DTYPES = ("float32", "bfloat16", "int8")
BACKENDS = ("reference", "native", "native engine", "torch.compile", "padded bmm", "grouped_mm", "upstream")
_SAME_MACHINE = ("cpu", "python", "torch", "rxt_kernels", "commit")
_SHORT_REPEATS, _REPEATS = 5, 20


@dataclass(frozen=True)
class Options:
    """What is asked of every one of these benchmarks.

    Attributes:
        models: presets of full models; weights are random, because cost does not depend on them.
        threads: numbers of threads, measured one after the other.
        dtypes: which of :data:`DTYPES`.
        backends: who is measured, or None for everyone; the reference always is.
        repeats: rounds per size.
        time_limit: seconds of measuring per size, or None.
        short: whether to keep to what takes about a minute.
        seed: of weights, memories and tokens.
    """

    models: tuple[str, ...]
    threads: tuple[int, ...]
    dtypes: tuple[str, ...] = DTYPES
    backends: tuple[str, ...] | None = None
    repeats: int = _REPEATS
    time_limit: float | None = None
    short: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        full = [name for name, item in PRESETS.items() if item.component in ("rxt_alpha", "rxt_beta")]
        for name in self.models:
            if name not in full:
                raise ValueError(f"model is {name!r}; accepted are the full models {', '.join(full)}.")
        for count in self.threads:
            if not 1 <= count <= cores():
                raise ValueError(
                    f"threads is {count}; it must lie between 1 and the {cores()} cores this process may use."
                )
        if self.repeats < 3:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 3, for percentiles.")
        if self.time_limit is not None and self.time_limit <= 0:
            raise ValueError(f"time limit is {self.time_limit}; it must be a positive number of seconds.")

    def wants(self, backend: str, dtype: str) -> bool:
        """Whether a system is to be measured; the reference in float32 always is."""
        if backend == REFERENCE:
            return dtype in self.dtypes or dtype == "float32"
        return dtype in self.dtypes and (self.backends is None or backend.split(" 0.")[0] in self.backends)


def add_common_arguments(
    parser: argparse.ArgumentParser,
    *,
    models: Sequence[str],
    repeats: int = _REPEATS,
    dtypes: Sequence[str] = DTYPES,
    backends: Sequence[str] = BACKENDS,
    with_one_thread: bool = True,
) -> None:
    """The options that all of these benchmarks take.

    Args:
        parser: gets the options.
        models: default of ``--model``; without any there is no such option.
        repeats: default of ``--repeats``.
        dtypes, backends: what may be chosen.
        with_one_thread: whether one thread is measured by default beside all cores.
    """
    if models:
        summary = f"full models (default: {' '.join(models)})"
        parser.add_argument("--model", nargs="+", default=list(models), metavar="PRESET", help=summary)
    else:
        parser.set_defaults(model=[])
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N",
        help=f"numbers of threads (default: {'1 and ' if with_one_thread else ''}all cores)",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=list(dtypes), help="(default: every one)")
    parser.add_argument(
        "--backend", nargs="+", choices=backends, help="who is measured beside the reference (default: everyone)"
    )
    parser.add_argument("--repeats", type=int, help=f"rounds per size (default: {repeats}; short: {_SHORT_REPEATS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, memories and tokens (default: 0)")
    parser.add_argument(
        "--short", action="store_true", help="about a minute: all cores, smallest size, no torch.compile"
    )
    parser.add_argument("--time-limit", type=float, metavar="S", help="no new round of a size after S seconds")
    parser.add_argument("--json", metavar="FILE", help="save the results, after every size")
    parser.add_argument("--add", action="store_true", help="keep the rows of --json FILE that are not measured again")
    parser.add_argument("--plot", metavar="FILE", help="draw FILE.png and FILE-dark.png")
    add_check_argument(parser)
    parser.set_defaults(default_repeats=repeats, with_one_thread=with_one_thread)


def threads_of(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The numbers of threads that were asked for."""
    if arguments.threads is not None:
        return tuple(dict.fromkeys(arguments.threads))
    return (cores(),) if arguments.short or not arguments.with_one_thread else tuple(dict.fromkeys((1, cores())))


def options_of(arguments: argparse.Namespace) -> Options:
    """The common options.

    Raises:
        ValueError: one of them is not accepted.
    """
    repeats = _SHORT_REPEATS if arguments.short else arguments.default_repeats
    return Options(
        models=tuple(dict.fromkeys(arguments.model)),
        threads=threads_of(arguments),
        dtypes=tuple(arguments.dtype),
        backends=None if arguments.backend is None else tuple(arguments.backend),
        repeats=repeats if arguments.repeats is None else arguments.repeats,
        time_limit=arguments.time_limit,
        short=arguments.short,
        seed=arguments.seed,
    )


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What the dispatcher says about calls that a backend could not take; it says each once."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message not in said:
                said.append(message)

    logger, handler = logging.getLogger("rxt_kernels"), Collector()
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@dataclass
class _Run:
    """The state of one run, so that it can be saved at any moment."""

    name: str
    path: str | None
    settings: Mapping[str, Any]
    conclude: Callable[[Sequence[Mapping[str, Any]]], tuple[Mapping[str, Any], str]] | None = None
    kept: Sequence[Mapping[str, Any]] = ()
    measured: Measured = field(default_factory=Measured)
    skipped: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=describe_environment)
    limits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, found: Measured, threads: int) -> None:
        """Take over what came of one case."""
        self.measured.rows += found.rows
        self.measured.absent += found.absent
        self.measured.refused += found.refused
        self.measured.complete &= found.complete
        for row in found.rows:
            self._limit(str(threads), row["limits"])

    def _limit(self, threads: str, limits: Mapping[str, Any]) -> None:
        known = self.limits.setdefault(threads, dict(limits))
        for name, value in limits.items():
            if isinstance(value, float):
                known[name] = max(known[name], value)

    def results(self, *, complete: bool) -> Results:
        """Everything so far, rows of an earlier run that were not measured again included."""
        new = {_key(row) for row in self.measured.rows}
        rows = [*(row for row in self.kept if _key(row) not in new), *self.measured.rows]
        most = max(self.limits, key=int)
        return Results(
            self.name,
            self.settings,
            self.environment,
            {**self.limits[most], "by_threads": self.limits},
            rows,
            {
                "native_operations": [name for name in operations() if "native" in available_backends(name)],
                "fallbacks": self.fallbacks,
                "absent": _shortened(self.measured.absent),
                "refused": self.measured.refused,
                "skipped": self.skipped,
                **({} if self.conclude is None else self.conclude(rows)[0]),
            },
            complete and self.measured.complete,
        )

    def save(self, *, complete: bool) -> None:
        """Write what has been measured, if there is a file to write to."""
        if self.path is not None and self.measured.rows:
            write_results(self.results(complete=complete), self.path)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["model"], row["backend"], row["dtype"], row["threads"], tuple(sorted(row["shape"].items())))


def _shortened(absent: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Who is absent, once per reason."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in absent:
        key = (one["backend"], one["dtype"], one["reason"])
        found.setdefault(key, {name: one[name] for name in ("backend", "dtype", "reason")})
    return list(found.values())


def _kept_rows(run: _Run) -> None:
    """Rows of the file that this run adds to.

    Raises:
        ValueError: they were measured on something else.
    """
    assert run.path is not None
    if not Path(run.path).is_file():
        return
    found = read_results(run.path, name=run.name)
    for name in _SAME_MACHINE:
        if found.environment.get(name) != run.environment.get(name):
            raise ValueError(
                f"{run.path} was measured with {name} = {found.environment.get(name)!r} and now it is "
                f"{run.environment.get(name)!r}; timings of two environments are not mixed. Leave --add out, or write to "
                "another file."
            )
    run.kept = found.rows
    for threads, limits in found.limits["by_threads"].items():
        run._limit(threads, limits)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one case for a person, with what the machine could do in the same rounds."""
    limits = rows[0]["limits"]
    has_models = len({row["model"] for row in rows}) > 1
    times = "".join(f"{name:>10}" for name in ("p20", "p50", "p80", "floor"))
    header = f"{'backend':<25}{'dtype':<10}{times}  {'p50/floor':>9}{'paired':>9}{'speed':>9}"
    reference = next((row["p50"] for row in rows if (row["backend"], row["dtype"]) == (REFERENCE, "float32")), None)
    lines = [
        f"  limits ({limits['source']}): {limits['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s read, "
        f"{limits['fma_flops_per_second'] / 1e9:.0f} GFLOP/s float32, "
        f"{limits['bfloat16_flops_per_second'] / 1e9:.0f} GFLOP/s bfloat16",
        "  " + (f"{'model':<12}" if has_models else "") + header,
    ]
    for row in rows:
        speed = "" if reference is None else f"{reference / row['p50']:.2f}x"
        times = "".join(f"{1e3 * row[name]:>10.3f}" for name in ("p20", "p50", "p80", "floor"))
        model = f"{row['model']:<12}" if has_models else ""
        ratios = f"{row['ratio']:>9.2f}{row['paired_ratio']['p50']:>9.2f}"
        lines.append(f"  {model}{row['backend']:<25}{row['dtype']:<10}{times}  {ratios}{speed:>9}")
    return "\n".join(lines)


def _report(case: Case, found: Measured) -> str:
    lines = [case.title]
    if found.rows:
        lines.append(table(found.rows))
    lines += [f"  refused: {one['backend']} {one['dtype']}: {one['reason']}" for one in found.refused]
    return "\n".join(lines)


def run_benchmark(
    name: str,
    arguments: argparse.Namespace,
    cases: Callable[[Options, Callable[[str], None]], Iterator[Case]],
    settings: Mapping[str, Any],
    conclude: Callable[[Sequence[Mapping[str, Any]]], tuple[Mapping[str, Any], str]] | None = None,
) -> int:
    """Measure every case, print each, save after each, draw at the end.

    Args:
        name: of the benchmark.
        arguments: the common ones of its command line.
        cases: makes the cases one after the other, given the options and a function that takes down what is skipped.
        settings: what the benchmark was asked for besides.
        conclude: makes of the rows what the summary holds besides, and the sentences that say it.

    Returns:
        The exit status: 0; 1 if a system was refused, a ratio is worse than that of ``--check``, or nothing was measured;
        130 if interrupted, what was measured being saved.

    Raises:
        ValueError, OSError: arguments that do not fit, before anything is measured.
    """
    options = options_of(arguments)
    if arguments.plot is not None:
        from .plotting import require_matplotlib

        require_matplotlib()
    if arguments.add and arguments.json is None:
        raise ValueError("--add is given without --json; name the file to add to.")
    earlier = None if arguments.check is None else read_results(arguments.check, name=name)
    recorded = {"models": options.models, "repeats": options.repeats, "seed": options.seed, **settings}
    run = _Run(name, arguments.json, {key: _plain(value) for key, value in recorded.items()}, conclude)
    if arguments.add:
        _kept_rows(run)
    status = _measure(run, options, cases)
    if not run.measured.rows:
        print("Nothing was measured.", file=sys.stderr)
        return status or 1
    results = run.results(complete=status == 0)
    for one in results.summary["absent"]:
        print(f"absent: {one['backend']} {one['dtype']}: {one['reason']}")
    for sentence in (*run.skipped, *run.fallbacks):
        print(f"note: {sentence}")
    print("Times in milliseconds; floor: the least that the limits allow; speed: against the reference in float32.")
    if conclude is not None:
        print(conclude(results.rows)[1])
    if run.path is not None:
        print(f"Results: {run.path}")
    if arguments.plot is not None:
        from .plotting import plot_results

        print("Plots: " + ", ".join(str(path) for path in plot_results(results, arguments.plot)))
    return status or int(bool(run.measured.refused)) or checked(results, earlier)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _measure(run: _Run, options: Options, cases: Callable[[Options, Callable[[str], None]], Iterator[Case]]) -> int:
    threads_before = torch.get_num_threads()
    status = 0
    with _collected_warnings() as said:
        run.fallbacks = said
        try:
            for case in cases(options, run.skipped.append):
                use_threads(case.threads)
                machine = Machine(case.threads)
                stop_at = None if options.time_limit is None else time.monotonic() + options.time_limit
                with tqdm(total=options.repeats, disable=None, unit="round", leave=False) as progress:
                    found = measure_case(case, machine, options.repeats, stop_at=stop_at, progress=progress.update)
                run.add(found, case.threads)
                print(_report(case, found), flush=True)
                run.save(complete=False)
        except KeyboardInterrupt:
            status = 130
        finally:
            torch.set_num_threads(threads_before)
    run.save(complete=status == 0)
    return status


def main(module: Any, arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.NAME`` of the benchmark in this module."""
    parser = argparse.ArgumentParser(
        prog=f"python -m rxt_benchmarks.{module.NAME}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments)))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
