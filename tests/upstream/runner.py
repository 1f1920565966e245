"""Runs `oracle.py` once per upstream version and direction, and keeps what it said for the whole test session."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from tests.upstream.cases import Case, cases
from tests.upstream.install import is_installed, upstream_directory

ORACLE = pathlib.Path(__file__).with_name("oracle.py")
TIMEOUT_SECONDS = 800


@dataclasses.dataclass(frozen=True)
class Answer:
    """What upstream did with one case: the directory it saved, its inputs and its outputs."""

    case: Case
    directory: pathlib.Path
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    @property
    def model_directory(self) -> pathlib.Path:
        """What upstream's `save_pretrained` wrote."""
        return self.directory / "model"


def why_absent(version: str) -> str | None:
    """The reason why a version cannot be compared with, or None when it can."""
    directory = upstream_directory()
    if not is_installed(directory, version):
        return f"rxlm {version} is not in {directory}; `python tests/upstream/install.py` puts it there"
    return None


def run_oracle(version: str, requests: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """Run the oracle in a process of its own, with only that version of upstream on the path.

    Raises:
        RuntimeError: the process failed; the end of what it printed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    listing = directory / "requests.json"
    listing.write_text(json.dumps(requests))
    environment = {
        **os.environ,
        "PYTHONPATH": str((upstream_directory() / version).resolve()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, str(ORACLE), str(listing), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"the oracle for rxlm {version} failed:\n{process.stderr[-2000:]}")


def failure(directory: pathlib.Path, name: str) -> str | None:
    """Upstream's own message where it failed on a request, else None."""
    error = directory / name / "error.txt"
    return f"upstream failed on {name}: {error.read_text()[-1000:]}" if error.exists() else None


def read_answer(case: Case, directory: pathlib.Path, name: str) -> Answer:
    """The answer to the request called `name`, which was about `case`, out of a finished oracle run.

    Raises:
        RuntimeError: upstream failed on this request, with its own message.
    """
    message = failure(directory, name)
    if message is not None:
        raise RuntimeError(message)
    tensors = load_file(directory / name / "tensors.safetensors")
    return Answer(
        case,
        directory / name,
        {key[len("in.") :]: value for key, value in tensors.items() if key.startswith("in.")},
        {key[len("out.") :]: value for key, value in tensors.items() if key.startswith("out.")},
    )


class UpstreamRuns:
    """What upstream makes of every case, and of what else it is asked; one process per version, when first needed."""

    def __init__(self, directory: pathlib.Path, others: Callable[[str], list[dict[str, Any]]]) -> None:
        self._directory = directory
        self._others = others
        self._finished: dict[str, dict[str, Case]] = {}

    def directory(self, version: str) -> pathlib.Path:
        """Where the answers of a version are; they are there when this returns."""
        directory = self._directory / version
        if version not in self._finished:
            work = cases(version)
            requests = [{**case, "task": "produce"} for case in work]
            run_oracle(version, [*requests, *self._others(version)], directory)
            self._finished[version] = {case["name"]: case for case in work}
        return directory

    def answer(self, version: str, name: str) -> Answer:
        """What this upstream version made of the case called `name`."""
        directory = self.directory(version)
        return read_answer(self._finished[version][name], directory, name)
