"""Counting and recording of launches: blocks inside of blocks, each with what happened while it was open."""

from __future__ import annotations

import torch
from triton_cases import DEVICE, needs_triton

from rxt_kernels import swiglu
from rxt_kernels.configs import block_config, observe_configs
from rxt_kernels.triton_runtime import count_launches, record_launches

pytestmark = needs_triton


def test_nested_counts_that_are_equal_are_told_apart() -> None:
    x = torch.randn(2, 8, device=DEVICE)
    with count_launches() as outer:
        with count_launches() as inner:
            swiglu(x, backend="triton")
        assert outer == inner
        swiglu(x, backend="triton")
    assert (outer.total(), inner.total()) == (2, 1)


def test_nested_records_that_are_equal_are_told_apart() -> None:
    x = torch.randn(2, 8, device=DEVICE)
    with record_launches() as outer:
        with record_launches() as inner:
            pass
        swiglu(x, backend="triton")
    assert (len(outer), len(inner)) == (1, 0)


def test_nested_observers_of_block_sizes_are_told_apart() -> None:
    with observe_configs() as outer:
        with observe_configs() as inner:
            block_config("sqa_fwd", torch.empty(0), 16)
        block_config("sqa_fwd", torch.empty(0), 16)
    assert (len(outer), len(inner)) == (2, 1)
