"""Counting launches: what is counted, that structure alone decides, and that a memory update does not grow with layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import refusal
from rxt_benchmarks import launches
from rxt_benchmarks.launches import Counts, count_model, stand_in
from triton_cases import DEVICE, needs_triton

from rxt_kernels import rms_norm, use_backend
from rxt_kernels.dispatch import available_backends
from rxt_model import MemoryAttentionConfig, RxTMemoryAttention


@needs_triton
def test_views_and_allocations_launch_nothing_and_kernels_count_once() -> None:
    x, weight = torch.randn(3, 4, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with launches._counting() as counted:
        x.transpose(0, 1).flatten(1)[:, :5].unsqueeze(0).expand(2, -1, -1).detach()
        torch.empty(3, device=DEVICE)
    assert counted() == Counts(0, 1)  # flatten of a transposed tensor copies
    with launches._counting() as counted, torch.no_grad():
        F.linear(x, torch.ones(5, 8, device=DEVICE))
    assert counted() == Counts(0, 2)  # the weight is made, too
    with launches._counting() as counted, torch.no_grad(), use_backend("triton"):
        rms_norm(x, weight)
    assert counted() == Counts(1, 0)


@needs_triton
@pytest.mark.skipif("triton" not in available_backends("memory_update"), reason="memory updates are not in Triton here")
@pytest.mark.parametrize("variant", ["interlayer", "gated-self-interlayer", "grouped-self-interlayer"])
def test_a_memory_update_launches_as_much_for_many_layers_as_for_few(variant: str) -> None:
    counts = []
    for layers in (2, 4):
        network = RxTMemoryAttention(
            MemoryAttentionConfig(
                num_layers=layers, embed_dim=16, att_heads=2, att_query_groups=2, stm_size=3, variant=variant,
                use_gated_residual=True, residual_gate_type="elementwise", num_groups=2 if "grouped" in variant else 1,
            )
        ).to(DEVICE).eval()  # fmt: skip
        encoded = torch.randn(layers, 1, 5, 16, device=DEVICE)
        with torch.no_grad(), use_backend("triton"), launches._counting() as counted:
            network(encoded)
        counts.append(counted())
    assert counts[0] == counts[1]


@needs_triton
def test_a_model_is_counted_on_every_path() -> None:
    counted = count_model(stand_in("rxt-alpha-micro").to(DEVICE))
    assert {work: tuple(paths) for work, paths in counted.items()} == dict(launches.WORK)
    token = counted["decode token"]
    assert token["eager"].triton == 0
    assert token["engine"].triton > 0
    assert token["engine"].total < token["triton"].total < token["eager"].total


def test_refusals() -> None:
    with refusal(ValueError, "rxt-alpha-huge", "rxt-beta-3b"):
        stand_in("rxt-alpha-huge")
