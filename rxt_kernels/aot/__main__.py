"""``python -m rxt_kernels.aot``: compile every kernel for named GPUs, and fail if one is not as it should be."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rxt_kernels.aot.cases import CASES, Case
from rxt_kernels.aot.compiler import as_json, compile_launch, signature
from rxt_kernels.aot.targets import TARGETS, Target
from rxt_kernels.triton_runtime import INTERPRETED, record_launches


def report(cases: Sequence[Case], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """A row for every kernel of every case and target; the same code in two places is compiled once and listed twice."""
    known: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    work = []
    for case in cases:
        with record_launches() as launches:
            case.call()
        seen = set()
        for launch in launches:
            key = json.dumps([launch.kernel.fn.__name__, *map(str, signature(launch))])
            if key not in seen:
                seen.add(key)
                work += [(case, launch, target, f"{target.name} {key}") for target in targets]
    for case, launch, target, key in tqdm(work, unit="kernel", disable=not sys.stderr.isatty()):
        if key not in known:
            known[key] = compile_launch(launch, target).to_dict()
        rows.append({"case": case.name, **known[key]})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a person."""
    lines = [
        f"{'case':<40} {'kernel':<32} {'target':<7} {'regs':>4} {'spill':>5} {'shared':>7} {'occ':>4} {'matrix':>6} "
        f"{'128-bit':>7} {'bytes':>11} {'bound us':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['case']:<40} {row['kernel'].strip('_'):<32} {row['target']:<7} {row['registers']:>4} {row['spilled']:>5} "
            f"{row['shared']:>7} {100 * row['occupancy']:>3.0f}% {row['matrix_instructions']:>6} "
            f"{100 * row['wide_accesses']:>6.0f}% {row['traffic']:>11,} {1e6 * row['bound']:>8.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 if a kernel has a problem, and each is named."""
    parser = argparse.ArgumentParser(prog="python -m rxt_kernels.aot", description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="a GPU; give it again for more (all)"
    )
    parser.add_argument("--small", action="store_true", help="one model's shapes only")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the report there")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; on Linux, pip install 'rxt-kernels[triton]' adds it.")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled; unset it.")
    cases = [c for c in CASES if (c.is_small or not options.small) and (options.only or "") in c.name]
    if not cases:
        parser.error(f"argument --only: no case has {options.only!r} in its name; names are model/operation.")
    torch.manual_seed(0)
    rows = report(cases, [TARGETS[name] for name in options.target or TARGETS])
    print(table(rows))
    if options.json is not None:
        temporary = options.json.with_name(options.json.name + ".part")
        temporary.write_text(as_json(rows), encoding="utf-8")
        temporary.replace(options.json)
    problems = sorted({f"{row['kernel']} on {row['target']}: {problem}" for row in rows for problem in row["problems"]})
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
