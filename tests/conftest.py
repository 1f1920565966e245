"""What every test starts from: few threads, fixed seeds, and fresh memory full of NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
