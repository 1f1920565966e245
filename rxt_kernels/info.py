"""What this machine and this build can do: ``python -m rxt_kernels.info [--json]``.

Machine, versions, and for every operation each backend with the reason why it is on or off.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

import rxt_kernels
from rxt_kernels import native_runtime
from rxt_kernels.dispatch import BACKENDS, available_backends, explain, operations

__all__ = ["collect", "main", "report_text"]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    # Where the process may run is what matters, not what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def collect() -> dict[str, Any]:
    """Everything that :func:`main` prints, ready for JSON.

    Example:
        >>> collect()["operations"]["swiglu"]["reference"]["available"]
        True
    """
    return {
        "rxt_kernels": rxt_kernels.__version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": _cores(),
            "torch_threads": torch.get_num_threads(),
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "gpus": _devices(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "native_kernels": {
            "available": native_runtime.available(),
            "reason": native_runtime.unavailable(),
            "instruction_set": native_runtime.instruction_set(),
            "instruction_sets": list(native_runtime.instruction_sets()),
        },
        "operations": {
            name: {
                backend: {"available": backend in available_backends(name), "reason": explain(name, backend)}
                for backend in BACKENDS
            }
            for name in sorted(operations())
        },
    }


def _native_text(native: dict[str, Any]) -> str:
    if not native["available"]:
        return f"off: {native['reason']}"
    return f"use {native['instruction_set']} (this machine and this build have {', '.join(native['instruction_sets'])})"


def report_text(report: dict[str, Any]) -> str:
    """What :func:`collect` found, as lines for a person; operations that share a backend's state share its lines."""
    machine = report["machine"]
    gpus = ", ".join(machine["gpus"]) or "none that torch can use"
    lines = [f"rxt_kernels {report['rxt_kernels']}"]
    lines += [f"  {name:<16} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += [
        f"  {'machine':<16} {machine['system']} {machine['architecture']}, {machine['cores']} cores, "
        f"torch uses {machine['torch_threads']} threads and {machine['torch_instruction_set']}",
        f"  {'GPU':<16} {gpus}",
        f"  {'native kernels':<16} {_native_text(report['native_kernels'])}",
        "",
        "Backends",
    ]
    for backend in BACKENDS:
        groups: dict[tuple[bool, str], list[str]] = {}
        for operation, states in report["operations"].items():
            state = states[backend]
            groups.setdefault((state["available"], state["reason"]), []).append(operation)
        for (available, reason), names in sorted(groups.items(), reverse=True):
            lines.append(f"  {backend:<10} {'on' if available else 'off':<4} {reason}")
            lines += textwrap.wrap(", ".join(names), 100, initial_indent=" " * 18, subsequent_indent=" " * 18)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m rxt_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else report_text(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
