"""What changed between two results of one benchmark, beyond noise; with --check, whether a ratio got worse.

    rxt bench compare before.json after.json
    rxt bench compare benchmarks/results/decode.json new.json --check      # exit status 1 if a ratio worsened by over 15%

Ratios of one run are compared: times over their floors, speed of one system over another's. Absolute times are shown too,
and mean something on one machine only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .comparing import WORSE, check, report
from .results import read_results
from .running import main as common_main

__all__ = ["add_arguments", "main", "run"]

NAME = "compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench compare``."""
    parser.add_argument("before", metavar="A.json", help="the earlier result")
    parser.add_argument("after", metavar="B.json", help="the later one, of the same benchmark")
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 if a ratio worsened by more than the tolerance"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=100 * WORSE,
        metavar="PERCENT",
        help="how much worse a ratio may be (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; the exit status is 1 if a check fails.

    Raises:
        OSError, ValueError: a file that is not there or no result, or results that cannot be compared.
    """
    if arguments.tolerance < 0:
        raise ValueError(f"tolerance is {arguments.tolerance}; it must be a share of at least 0 percent.")
    before, after = read_results(arguments.before), read_results(arguments.after)
    print(report(before, after))
    if not arguments.check:
        return 0
    passed, said = check(before, after, worse=arguments.tolerance / 100)
    print(said)
    return int(not passed)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.compare``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
