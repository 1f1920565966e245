"""Threads of the command line sleep soon where another program has their core; what the user has said counts more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rxt_model.cli.waiting import wait_briefly

SEEN = "import os; from rxt_model.cli import main; main(['doctor']); print('SPINS', os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_the_command_line_sets_it_before_torch_is_loaded(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"SPINS {expected}"


def test_it_leaves_a_program_alone_that_has_loaded_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "torch" in sys.modules
    wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
