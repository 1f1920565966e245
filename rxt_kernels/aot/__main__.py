"""``python -m rxt_kernels.aot``: compile every kernel for named GPUs, and fail if one is not as it should be."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rxt_kernels.aot.cases import all_cases
from rxt_kernels.aot.report import as_json, as_table, build, problems
from rxt_kernels.aot.targets import TARGETS
from rxt_kernels.triton_runtime import INTERPRETED

NOTE = "Compiled ahead of time and read from the code. Nothing was run, and no time here was measured."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rxt_kernels.aot",
        description="Compile the Triton kernels at the shapes of published models, without a GPU, and report what they "
        "cost. The exit status is 1 if a kernel spills, lacks a matrix instruction, loads a tile value by value in a loop, "
        "or wants more shared memory than there is.",
    )
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="a GPU; give it again for more (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="the shapes of one model only, in bfloat16")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="cases with this in their name or in that of a model of theirs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the report there")
    parser.add_argument("--quiet", action="store_true", help="print problems and the summary only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile at once (default: 1)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep compiled code there for the next time (default: it is not kept)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 if a kernel has a problem, and each is named."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; on Linux, pip install 'rxt-kernels[triton]' adds it.")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled; unset it.")
    if options.jobs < 1:
        parser.error(f"argument --jobs: {options.jobs} processes compile nothing; give at least 1.")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"argument --json: there is no directory {options.json.parent}; make it first.")
    cases = [
        case
        for case in all_cases()
        if (case.is_small or not options.small)
        and all(any(text in name for name in (case.name, *case.models)) for text in options.only or [])
    ]
    if not cases:
        parser.error(f"argument --only: no case and no model has {' and '.join(map(repr, options.only))} in its name.")
    targets = [TARGETS[name] for name in options.target or TARGETS]
    with tempfile.TemporaryDirectory() if options.cache is None else nullcontext(options.cache) as directory:
        report = build(cases, targets, directory, options.jobs)
    if not options.quiet:
        print(as_table(report))
    found = problems(report)
    kernels, launches = len(report["kernels"]), len(report["launches"])
    print(f"{kernels} kernels compiled for {len(targets)} targets, {launches} launches, {len(found)} problems. {NOTE}")
    if options.json is not None:
        _save(options.json, as_json({"note": NOTE, **_versions(), **report}))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}


def _save(path: Path, text: str) -> None:
    """All or nothing: a run that is cut off leaves the old report."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
