"""What compilers make of the GPU kernels: the saved report of ahead-of-time compilation, as tables and plots.

**Nothing here was run or timed on a GPU.** Every kernel was compiled for four GPUs on a machine without one, and its code was
read; that the kernels compute the right numbers is held by the tests, which run them in Triton's interpreter on a CPU. A time
in this report is arithmetic: bytes and operations of a launch over a data sheet's rates, the least that it could take.

    make test-aot                                                  # compiles again, and writes benchmarks/results/aot.json
    rxt bench gpu_static --json gpu_static.json --plot gpu_static.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .environment import describe_environment
from .results import Results, write_results
from .running import main as common_main

__all__ = ["TARGETS", "add_arguments", "by_case", "by_kernel", "by_target", "main", "read_report", "run"]

NAME = "gpu_static"
TARGETS: Mapping[str, str] = {
    "sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X",
}  # fmt: skip
"""Architectures that kernels are compiled for, and a GPU that has each."""
NEVER_TIMED = "Compiled on a machine without a GPU, and interpreted on a CPU by the tests; never run or timed on a GPU."
_SAVED = Path(__file__).parent / "results" / "aot.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench gpu_static``."""
    parser.add_argument(
        "--report",
        type=Path,
        default=_SAVED,
        metavar="FILE",
        help="report of python -m rxt_kernels.aot (default: the saved one)",
    )
    parser.add_argument("--json", metavar="FILE", help="save the tables")
    parser.add_argument("--plot", metavar="FILE", help="draw FILE.png and FILE-dark.png")


def read_report(path: Path) -> dict[str, Any]:
    """The report of ``python -m rxt_kernels.aot``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no report at {path}; `make test-aot` writes one, in twenty minutes.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); `make test-aot` writes a report.") from None
    if not isinstance(content, dict) or not content.get("kernels") or not content.get("launches"):
        raise ValueError(f"{path} is no report of python -m rxt_kernels.aot; `make test-aot` writes one.")
    return content


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "least": round(min(values), 4), "median": round(statistics.median(values), 4), "most": round(max(values), 4),
    }  # fmt: skip


def by_kernel(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per kernel and GPU, over all tiles and switches it was compiled with."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault((kernel["kernel"], kernel["target"]), []).append(kernel)
    rows = []
    for (name, target), group in sorted(groups.items()):
        compiled = [one for one in group if one["failure"] is None]
        rows.append(
            {
                "name": NAME,
                "kernel": name.strip("_").removesuffix("_kernel"),
                "target": target,
                "backend": "triton",
                "dtype": "every one",
                "shape": {"variants": len(group)},
                "failed": len(group) - len(compiled),
                "spilled": sum(bool(one["spilled"]) for one in compiled),
                "problems": sum(bool(one["problems"]) for one in compiled),
                **{
                    measure: _spread([one[measure] for one in compiled])
                    for measure in ("registers", "occupancy", "shared", "wide_share")
                    if compiled
                },
                "matrix_instructions": sorted({name for one in compiled for name in one["matrix_instructions"]}),
            }
        )
    return rows


def by_target(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A summary per GPU."""
    found = []
    for target in sorted({kernel["target"] for kernel in kernels}, key=lambda name: (list(TARGETS).index(name), name)):
        own = [kernel for kernel in kernels if kernel["target"] == target]
        compiled = [kernel for kernel in own if kernel["failure"] is None]
        instructions = Counter(name for kernel in compiled for name in kernel["matrix_instructions"])
        found.append(
            {
                "target": target,
                "gpu": TARGETS[target],
                "compiled": len(compiled),
                "failed": len(own) - len(compiled),
                "spilled": sum(bool(kernel["spilled"]) for kernel in compiled),
                "problems": sum(bool(kernel["problems"]) for kernel in compiled),
                "registers": _spread([kernel["registers"] for kernel in compiled]),
                "occupancy": _spread([kernel["occupancy"] for kernel in compiled]),
                "wide_share": _spread([kernel["wide_share"] for kernel in compiled]),
                "matrix_instructions": dict(sorted(instructions.items())),
            }
        )
    return found


def by_case(launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the launches of each kind of work imply: how many there are, and which limit binds how often."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for launch in launches:
        groups.setdefault((launch["case"].partition("/")[0], launch["target"]), []).append(launch)
    return [
        {
            "work": work,
            "target": target,
            "launches": len(group),
            "bound_microseconds": _spread([launch["bound_microseconds"] for launch in group]),
            "limits": dict(Counter(launch["limit"] for launch in group)),
        }
        for (work, target), group in sorted(groups.items())
    ]


def text_report(report: Mapping[str, Any]) -> str:
    """The tables, for a terminal."""
    kernels, launches = report["kernels"], report["launches"]
    lines = [
        f"{len(kernels):,} kernels compiled ahead of time by Triton {report['triton']}. {NEVER_TIMED}",
        "",
        f"{'GPU':<16}{'kernels':>8}{'failed':>8}{'spill':>7}{'problems':>10}{'registers':>14}{'occupancy':>14}{'wide loads':>12}"
        "  kernels with matrix instructions",
    ]
    for one in by_target(kernels):
        registers, occupancy = one["registers"], one["occupancy"]
        instructions = ", ".join(f"{name} {count}" for name, count in one["matrix_instructions"].items())
        lines.append(
            f"{one['gpu'] + ' (' + one['target'] + ')':<16}{one['compiled']:>8}{one['failed']:>8}{one['spilled']:>7}"
            f"{one['problems']:>10}{registers['median']:>8g} <= {registers['most']:<3g}{occupancy['median']:>8.0%} >= "
            f"{occupancy['least']:<3.0%}{one['wide_share']['median']:>9.0%}    {instructions}"
        )
    lines += [
        "",
        "Least time of a launch by arithmetic, in microseconds (median, largest), and the share bound by memory:",
        f"{'work':<26}" + "".join(f"{TARGETS[target]:>26}" for target in TARGETS),
    ]
    cells: dict[str, dict[str, str]] = {}
    for one in by_case(launches):
        bound, share = one["bound_microseconds"], one["limits"].get("bytes", 0) / one["launches"]
        cells.setdefault(one["work"], {})[one["target"]] = f"{bound['median']:.3g}, {bound['most']:.4g}  {share:.0%}"
    lines += [
        f"{work:<26}" + "".join(f"{found.get(target, ''):>26}" for target in TARGETS) for work, found in cells.items()
    ]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, save and draw them; the exit status is 1 if a kernel failed to compile or has a problem.

    Raises:
        OSError, ValueError: no report, or something else.
    """
    report = read_report(arguments.report)
    kernels = report["kernels"]
    rows = by_kernel(kernels)
    results = Results(
        NAME,
        {"note": NEVER_TIMED, "triton": report["triton"], "torch": report["torch"]},
        describe_environment(),
        {},
        rows,
        {"kernels": len(kernels), "targets": by_target(kernels), "work": by_case(report["launches"])},
        True,
    )
    print(text_report(report))
    if arguments.json is not None:
        print(f"Results: {write_results(results, arguments.json)}")
    if arguments.plot is not None:
        from .plotting import plot_results

        print("Plots: " + ", ".join(str(path) for path in plot_results(results, arguments.plot)))
    return int(any(row["failed"] or row["problems"] or row["spilled"] for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.gpu_static``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
