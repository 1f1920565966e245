"""``rxt bench``: run a benchmark; without a name, list them."""

from __future__ import annotations

import argparse
import importlib
import json
from types import ModuleType

from rxt_model.cli.arguments import ArgumentParser
from rxt_model.cli.errors import UserError

__all__ = ["add_arguments", "known_benchmarks", "load_benchmark", "run", "run_benchmark"]

_EPILOG = """\
Arguments behind the name belong to the benchmark; `rxt bench NAME --help` shows them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt bench``."""
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="list the benchmarks as JSON")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which benchmark; left out, they are listed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the benchmark's own arguments")


def run(options: argparse.Namespace) -> int:
    """List the benchmarks, or run one."""
    benchmarks = known_benchmarks()
    if options.name is not None:
        if options.json:
            raise UserError(
                f"bench: --json stands in front of {options.name}; put the benchmark's own arguments behind it."
            )
        return run_benchmark(options.name, options.arguments)
    if options.json:
        print(json.dumps(benchmarks, indent=2))
        return 0
    width = max(map(len, benchmarks), default=0)
    for name, summary in benchmarks.items():
        print(f"{name:<{width}}  {summary}")
    return 0


def run_benchmark(name: str, arguments: list[str]) -> int:
    """Run one benchmark with its own arguments.

    Raises:
        UserError: there is no such benchmark, it cannot run here, or an argument is wrong.
    """
    module = load_benchmark(name)
    parser = ArgumentParser(
        prog=f"rxt bench {name}",
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments)))
    except ImportError as error:  # a package that only some arguments need
        raise UserError(f"bench {name}: {error}") from error


def load_benchmark(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        UserError: it is not known, not installed, or needs a package that is not.
    """
    known = known_benchmarks()
    if name not in known:
        raise UserError(f"bench: there is no benchmark {name!r}; known are {', '.join(known)}.")
    try:
        return importlib.import_module(f"rxt_benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("rxt_benchmarks"):
            raise UserError(f"bench: the benchmark {name} is not in this installation.") from None
        raise UserError(
            f"bench: the benchmark {name} needs the package {error.name}, which is not installed; pip install {error.name}."
        ) from None


def known_benchmarks() -> dict[str, str]:
    """Name and one-line description of every benchmark of this installation, and of what is done with results."""
    try:
        package = importlib.import_module("rxt_benchmarks")
    except ModuleNotFoundError:
        raise UserError(
            "bench: this installation has no benchmarks (package rxt_benchmarks); install rxt-kernels from its source tree."
        ) from None
    return {**getattr(package, "BENCHMARKS", {}), **getattr(package, "COMMANDS", {})}
