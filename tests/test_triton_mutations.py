"""Kernels that are wrong on purpose, each of which the checks of its room must catch: a test of the tests.

Every mutation is one mistake that is easily made: a head map that is right for some ratios only, a mask that is forgotten,
an offset of 32 bits, a sum that leaves out a term. The check is first seen to pass with the right kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import test_triton_attention
import test_triton_attention_decode
import test_triton_memory_update
import test_triton_mixture_of_experts
import test_triton_offsets
import test_triton_rms_norm
import torch
from mutations import mutation
from triton_cases import needs_triton

from rxt_kernels import triton_runtime

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="mutations are made for the interpreter"),
]


class Mutation(NamedTuple):
    """One mistake: where, what is written instead of what, and the check that must fail."""

    module: str
    kernel: str
    old: str
    new: str
    check: Callable[[], object]


def attention(query_heads: int, key_heads: int, *, causal: bool = False, masked: bool = False) -> None:
    query, key = torch.randn(2, 5, query_heads, 16), torch.randn(2, 5, key_heads, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool) if masked else None
    test_triton_attention.compare(query, key, torch.randn_like(key), torch.float32, causal=causal, key_mask=mask)


ATTENTION = "rxt_kernels.sparse_query_attention"
EXPERTS = "rxt_kernels.mixture_of_experts"
MEMORY = "rxt_kernels.memory_update"
MUTATIONS = {
    "key head by remainder instead of by block": Mutation(
        f"{ATTENTION}.triton_forward", "_sqa_fwd_kernel", "head // (HEADS // KEY_HEADS)", "head % KEY_HEADS",
        lambda: attention(4, 2),
    ),
    "query heads in blocks instead of tiled": Mutation(
        f"{ATTENTION}.triton_forward", "_sqa_fwd_kernel", "head % QUERY_HEADS", "head // (HEADS // QUERY_HEADS)",
        lambda: attention(2, 4),
    ),
    "key mask forgotten": Mutation(
        f"{ATTENTION}.triton_forward", "visible_keys", "if HAS_MASK:", "if HAS_MASK and CAUSAL:",
        lambda: attention(2, 2, masked=True),
    ),
    "causal mask off by one": Mutation(
        f"{ATTENTION}.triton_forward", "visible_keys", "query_row[:, None] + offset", "query_row[:, None] + offset + 1",
        lambda: attention(2, 2, causal=True),
    ),
    "sum of exponentials not faded when the highest score rises": Mutation(
        f"{ATTENTION}.triton_forward", "fold", "total = total * fading", "total = total",
        lambda: test_triton_attention.test_times_that_differ_and_blocks_that_end_early(5, 70, False),
    ),
    "offsets of 32 bits": Mutation(
        f"{ATTENTION}.triton_forward", "tile_pointers", "row.to(tl.int64) * row_stride",
        "row.to(tl.int32) * tl.cast(row_stride, tl.int32)",
        lambda: test_triton_offsets.test_gradients_of_attention("key", 1),
    ),
    "splits of the keys added up as if they had seen equally much": Mutation(
        f"{ATTENTION}.triton_decode", "_sqa_decode_combine_kernel", "tl.exp2(logarithm - base)", "tl.exp2(base - base)",
        lambda: test_triton_attention_decode.test_around_the_edges_of_splits(129),
    ),
    "the wrong token gathered for an expert": Mutation(
        f"{EXPERTS}.triton_experts", "_moe_up_kernel", "// top_k", "// top_k // 2",
        lambda: test_triton_mixture_of_experts.test_forward_and_backward(5, 4, 2, torch.float32),
    ),
    "weights of experts not renormalised": Mutation(
        f"{EXPERTS}.triton_router", "_moe_route_kernel", "kept / (total + 1e-9)[:, None]", "kept",
        lambda: test_triton_mixture_of_experts.test_forward_and_backward(5, 4, 2, torch.float32),
    ),
    "the last row of an expert left out": Mutation(
        f"{EXPERTS}.triton_experts", "_block_of_choices", "row < end", "row < end - 1",
        lambda: test_triton_mixture_of_experts.test_forward_and_backward(40, 3, 1, torch.float32),
    ),
    "old memory kept whole beside the new": Mutation(
        f"{MEMORY}.triton_gate", "_open", "factor * tl.sigmoid(-factor * before)", "factor * tl.sigmoid(factor * before)",
        lambda: test_triton_memory_update.test_residual_gate("static", True, "mean", "sigmoid", torch.float32),
    ),
    "mean left out of the gradient of a norm": Mutation(
        "rxt_kernels.rms_norm.triton", "_rms_norm_bwd_kernel", "scaled - normed * mean[:, None]", "scaled",
        lambda: test_triton_rms_norm.test_forward_and_backward((3, 5, 33), torch.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_mistake_is_caught(name: str) -> None:
    wrong = MUTATIONS[name]
    wrong.check()
    module = importlib.import_module(wrong.module)
    with mutation(module, wrong.kernel, wrong.old, wrong.new), pytest.raises(AssertionError):
        wrong.check()


def test_a_mutation_has_to_follow_its_kernel() -> None:
    module = importlib.import_module("rxt_kernels.rms_norm.triton")
    with (
        pytest.raises(ValueError, match="has to follow the kernel"),
        mutation(module, "_rms_norm_fwd_kernel", "no such line", ""),
    ):
        pass
