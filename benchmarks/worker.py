"""Another library as a black box: a script in a process of its own, asked for one piece of work at a time by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Worker"]


class Worker:
    """A process that answers every request, a line of JSON, with another.

    Args:
        whose: what runs in it, for messages.
        script: the program.
        packages: folder that it imports from, besides those of this environment.
        environment: further variables.
        at_end: called when the process has ended.
    """

    def __init__(
        self,
        whose: str,
        script: Path,
        packages: Path,
        *,
        environment: Mapping[str, str] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self._whose = whose
        variables = {"PYTHONPATH": str(packages.resolve()), "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._end = weakref.finalize(self, _stop, self._process, at_end)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RuntimeError: the process failed, in its own words.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self._whose} ended with status {process.wait()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RuntimeError(f"{self._whose} answered {line.strip()!r}, which is not JSON") from None
        if "error" in answer:
            raise RuntimeError(f"{self._whose} failed: {answer['error']}")
        return answer


def _stop(process: subprocess.Popen[str], at_end: Callable[[], None] | None) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if at_end is not None:
        at_end()
