"""What every test starts from: few threads, fixed seeds, fresh memory full of NaN, and Triton's kernels at hand.

Without a GPU, kernels run in Triton's interpreter. It is chosen when they are defined, so the package is imported here
with the variable set, which is then taken back: processes that tests start are as they would be for a user.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import rxt_kernels  # noqa: F401

    if importlib.util.find_spec("triton") is not None:
        import triton.experimental.gluon  # noqa: F401  (Triton imports it at its first launch)

    del os.environ["TRITON_INTERPRET"]

from rxt_kernels import native_runtime

# A shell lets what it starts in the background ignore Ctrl-C, and Python then leaves it so; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# The same examples in every run, and no limit per example: a busy machine is no failure.
hypothesis.settings.register_profile("rxt", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("rxt")


@pytest.fixture(autouse=True)
def _fixed_seed_and_poisoned_memory() -> Iterator[None]:
    """Seed torch; `torch.empty` gives NaN (the largest integer), so that reading what was never written shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=native_runtime.instruction_sets() or ("none",))
def every_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of native kernels once for each instruction set that this machine has."""
    if request.param == "none":
        pytest.skip(native_runtime.unavailable() or "")
    with native_runtime.use_instruction_set(request.param):
        yield request.param
