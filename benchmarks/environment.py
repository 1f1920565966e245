"""What a result was measured on, and the machine's own limits measured in the same run.

Absolute times drift from machine to machine and from hour to hour; a figure means something beside the bandwidth and the
arithmetic rate that the same processor showed in the same minute.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rxt_kernels

from .devices import make_timer

__all__ = ["cores", "describe_environment", "fastest", "machine_limits", "use_threads"]

_MEGABYTE = 1 << 20


def cores() -> int:
    """Processor cores this process may run on."""
    # Where the process may run is what matters, not what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def use_threads(threads: int | None) -> int:
    """Make torch compute with this many threads, or one per core; returns the number.

    Raises:
        ValueError: fewer than one thread, or more than there are cores, which would measure the scheduler.
    """
    available = cores()
    chosen = available if threads is None else threads
    if not 1 <= chosen <= available:
        raise ValueError(f"threads is {threads}; it must lie between 1 and the {available} cores this process may use.")
    torch.set_num_threads(chosen)
    return chosen


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Output of git about the checkout this package is in, or None outside of one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(rxt_kernels.__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> dict[str, Any]:
    # An installed copy may lie inside of somebody else's repository: only a tracked file says that this is ours.
    if not _git("ls-files", "__init__.py"):
        return {"commit": None, "uncommitted_changes": None}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", ":/")),
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _waiting() -> str:
    """How OpenMP's threads wait for each other, which what else a machine does makes matter."""
    told = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    return ", ".join(told) or "default"


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, versions, threads, commit, and the GPU if it is the device; no paths, no names of machines or people.

    ``load_average`` is the machine's, over the minute in front of the run: far above 0, and something else was running.

    Example:
        >>> sorted(describe_environment())[:3]
        ['commit', 'cores', 'cpu']
    """
    return {
        "cpu": _processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": _load(),
        "openmp_waiting": _waiting(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rxt_kernels": rxt_kernels.__version__,
        **_commit(),
    }


def fastest(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of several runs: a limit is what the machine can do, not what it usually does."""
    work()
    timer, times = make_timer(device), []
    for _ in range(repeats):
        timer.start()
        work()
        timer.mark("end")
        times.append(timer.seconds()["end"])
    return min(times)


def machine_limits(
    device: torch.device | str = "cpu", *, megabytes: int = 512, matrix: int = 2048, repeats: int = 7
) -> dict[str, float]:
    """Read bandwidth and float32 multiply-add rate of the device; of the CPU with the threads torch uses now.

    Bandwidth: a float32 array far larger than the caches, read once by a matrix-vector product. Rate: a square float32
    matrix product, two operations per multiply-add.

    Args:
        device: what is measured.
        megabytes: size of the array.
        matrix: rows and columns of the square matrices.
        repeats: runs, of which the fastest counts.

    Returns:
        ``read_bandwidth_bytes_per_second`` and ``fma_flops_per_second``.
    """
    where = torch.device(device)
    with torch.no_grad(), where:
        return {
            "read_bandwidth_bytes_per_second": _read_bandwidth(megabytes, repeats, where),
            "fma_flops_per_second": _multiply_add_rate(matrix, repeats, where),
        }


def _read_bandwidth(megabytes: int, repeats: int, device: torch.device) -> float:
    columns = 4096
    array, vector = torch.ones(max(1, megabytes * _MEGABYTE // (4 * columns)), columns), torch.ones(columns)
    # Two ways of reading an array in order; whichever comes closer to the memory's limit.
    seconds = min(fastest(lambda: torch.mv(array, vector), repeats, device), fastest(array.sum, repeats, device))
    return array.numel() * array.element_size() / seconds


def _multiply_add_rate(matrix: int, repeats: int, device: torch.device) -> float:
    left, right = torch.ones(matrix, matrix), torch.ones(matrix, matrix)
    return 2 * matrix**3 / fastest(lambda: left @ right, repeats, device)
