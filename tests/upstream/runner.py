"""Runs `oracle.py` once per upstream version and direction, and keeps what it said for the whole test session."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.upstream.cases import Case, cases
from tests.upstream.install import is_installed, upstream_directory

ORACLE = pathlib.Path(__file__).with_name("oracle.py")
TIMEOUT_SECONDS = 280


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


def run_oracle(version: str, mode: str, work: list[Case], directory: pathlib.Path) -> None:
    """Run the oracle in a process of its own, with only that version of upstream on the path.

    Raises:
        RuntimeError: the process failed; the end of what it printed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    listing = directory / f"{mode}.json"
    listing.write_text(json.dumps(work))
    environment = {
        **os.environ,
        "PYTHONPATH": str((upstream_directory() / version).resolve()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, str(ORACLE), mode, str(listing), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"the oracle for rxlm {version} failed:\n{process.stderr[-2000:]}")


def read_answer(case: Case, directory: pathlib.Path) -> Answer:
    """The answer to one case out of a finished oracle run.

    Raises:
        RuntimeError: upstream failed on this case, with its own message.
    """
    error = directory / case["name"] / "error.txt"
    if error.exists():
        raise RuntimeError(f"upstream failed on {case['name']}: {error.read_text()[-1000:]}")
    tensors = load_file(directory / case["name"] / "tensors.safetensors")
    return Answer(
        case,
        directory / case["name"],
        {name[len("in.") :]: value for name, value in tensors.items() if name.startswith("in.")},
        {name[len("out.") :]: value for name, value in tensors.items() if name.startswith("out.")},
    )


class UpstreamRuns:
    """All answers of all versions, each computed when it is first asked for."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self._produced: dict[str, dict[str, Case]] = {}

    def answer(self, version: str, name: str) -> Answer:
        """What this upstream version made of the case called `name`."""
        if version not in self._produced:
            work = cases(version)
            run_oracle(version, "produce", work, self.directory / version)
            self._produced[version] = {case["name"]: case for case in work}
        return read_answer(self._produced[version][name], self.directory / version)

    def answers(self, version: str) -> list[Answer]:
        """All of them."""
        return [self.answer(version, case["name"]) for case in cases(version)]
