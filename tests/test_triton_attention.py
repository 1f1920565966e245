"""Attention in Triton against its definition: head ratios, order, masks, lengths, rotation, odd sizes, half precision."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import memory_cross_attention, sparse_query_attention
from rxt_kernels.configs import override_config
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate
from rxt_kernels.triton_runtime import available, count_launches

if available():
    from rxt_kernels.sparse_query_attention import triton

pytestmark = needs_triton

HEADS = [(1, 1), (4, 2), (6, 1), (2, 4), (3, 3)]
SMALL_BLOCKS = {
    kernel: {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 4, "num_stages": 1}
    for kernel, rows, columns in [("sqa_fwd", 32, 16), ("sqa_bwd_dq", 16, 32), ("sqa_bwd_dkdv", 16, 32)]
}
"""Blocks of queries and keys that differ, so that walks are cut in all ways: into whole blocks, diagonals and ends."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def compare(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """Outputs and gradients of the kernels against the definition in float64, by what eager torch does at this dtype."""
    heads = max(query.shape[2], key.shape[2])
    gradient = draw(*query.shape[:2], heads, query.shape[3]).to(dtype)
    sides = [side.to(dtype) for side in (query, key, value)]

    def run(sides: list[Tensor], backend: str, angle_dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [side.clone().requires_grad_() for side in sides]
        own = {
            name: value.to(angle_dtype) if name.endswith("angles") and value is not None else value
            for name, value in options.items()
        }
        out = sparse_query_attention(*leaves, backend=backend, **own)  # type: ignore[misc]
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))

    exact = run([side.double() for side in sides], "reference", torch.float64)
    eager, fast = run(sides, "reference", torch.float32), run(sides, "triton", torch.float32)
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_heads", "key_heads"), HEADS)
def test_head_ratios(query_heads: int, key_heads: int, causal: bool, dtype: torch.dtype) -> None:
    compare(
        draw(2, 9, query_heads, 16), draw(2, 9, key_heads, 16), draw(2, 9, key_heads, 16), dtype, causal=causal
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_time", "key_time"), [(1, 1), (1, 70), (5, 70), (65, 66), (66, 3)])
def test_times_that_differ_and_blocks_that_end_early(query_time: int, key_time: int, causal: bool) -> None:
    compare(
        draw(1, query_time, 2, 16), draw(1, key_time, 1, 16), draw(1, key_time, 1, 16), torch.float32, causal=causal
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [2, 8, 24, 64, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    compare(draw(1, 5, 2, head_dim), draw(1, 7, 2, head_dim), draw(1, 7, 2, head_dim), torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_rows_that_see_nothing(causal: bool) -> None:
    query, key, value = draw(3, 6, 2, 16), draw(3, 6, 2, 16), draw(3, 6, 2, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=DEVICE)
    compare(query, key, value, torch.float32, causal=causal, key_mask=mask)
    out = sparse_query_attention(query, key, value, key_mask=mask, backend="triton")
    assert bool((out[2] == 0).all())
    lengths = torch.tensor([6, 2, 0], device=DEVICE)
    compare(query, key, value, torch.float32, causal=causal, key_lengths=lengths)


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("sides", ["query", "key", "both"])
def test_rotation(sides: str, layout: str, head_dim: int) -> None:
    angles = 9 * torch.rand(2, 7, head_dim // 2, device=DEVICE)
    compare(
        draw(2, 7, 4, head_dim), draw(2, 7, 2, head_dim), draw(2, 7, 2, head_dim), torch.float32, causal=True,
        query_angles=None if sides == "key" else angles, key_angles=None if sides == "query" else angles[0],
        rotary_layout=layout,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("sides", ["key", "both"])
def test_keys_turned_on_load_or_before(
    sides: str, layout: str, head_dim: int, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients a few keys are turned as they are loaded, by no launch of their own; many by one."""
    monkeypatch.setattr(triton, "MOST_KEYS_TURNED_ON_LOAD", most)
    query, key, value = (draw(2, time, heads, head_dim).to(dtype) for time, heads in ((33, 4), (41, 2), (41, 2)))
    query_angles, key_angles = (9 * torch.rand(*shape, head_dim // 2, device=DEVICE) for shape in ((33,), (2, 41)))
    mask = torch.rand(2, 41, device=DEVICE) < 0.8

    def attend(backend: str, exactly: bool = False) -> Tensor:
        wide = torch.float64 if exactly else dtype
        return sparse_query_attention(
            query.to(wide), key.to(wide), value.to(wide), key_mask=mask, rotary_layout=layout, backend=backend,
            query_angles=(query_angles.double() if exactly else query_angles) if sides == "both" else None,
            key_angles=key_angles.double() if exactly else key_angles,
        )  # fmt: skip

    with count_launches() as launches:
        fast = attend("triton")
    on_load = most > 0 and dtype is not torch.float32
    assert dict(launches) == {"_sqa_fwd_kernel": 1, **({} if on_load else {"_rotary_kernel": 1})}
    assert_accurate(fast, attend("reference"), attend("reference", exactly=True))


@torch.no_grad()
def test_angles_of_keys_that_do_not_stand_side_by_side() -> None:
    query, key, value = (draw(1, time, heads, 16).half() for time, heads in ((33, 2), (41, 1), (41, 1)))
    angles = draw(41, 16)
    found = [
        sparse_query_attention(query, key, value, key_angles=one, backend="triton")
        for one in (angles[:, ::2], angles[:, ::2].contiguous())
    ]
    assert torch.equal(*found)


def test_views_and_a_scale() -> None:
    key, value = draw(2, 2, 9, 16).transpose(1, 2)[:, 1:7], draw(2, 9, 2, 32)[:, 1:7, :, ::2]
    query = draw(3, 5, 2, 2, 16)[:, :, :, 1].transpose(0, 1)[:2, :, :, :]
    options: dict[str, Any] = {"scale": 0.7, "causal": False}
    torch.testing.assert_close(
        sparse_query_attention(query, key, value, backend="triton", **options),
        sparse_query_attention(query, key, value, backend="reference", **options),
    )


def test_large_scores_stay_finite() -> None:
    query, key, value = 100 * draw(1, 5, 1, 16), 100 * draw(1, 5, 1, 16), draw(1, 5, 1, 16)
    torch.testing.assert_close(
        sparse_query_attention(query, key, value, backend="triton"),
        sparse_query_attention(query, key, value, backend="reference"), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_memory_reads(layout: str, shared: bool) -> None:
    query, angles = draw(3, 4, 4, 16), 5 * torch.rand(3, 4, 8, device=DEVICE)
    memory = [draw(1 if shared else 3, 10, 2, 16) for _ in range(2)]
    gradient = draw(3, 4, 4, 16)

    def run(backend: str) -> tuple[Tensor, ...]:
        leaves = [side.clone().requires_grad_() for side in (query, *memory)]
        out = memory_cross_attention(*leaves, query_angles=angles, rotary_layout=layout, backend=backend)  # type: ignore[arg-type]
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient))

    for fast, slow in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_the_operator_is_well_made() -> None:
    query, key, value = (draw(1, 3, heads, 16).requires_grad_() for heads in (2, 1, 1))
    arguments = (query, key, value, True, None, None, None, False, 0.25)
    torch.library.opcheck(torch.ops.rxt_kernels.sparse_query_attention_triton, arguments)


def test_dropout_and_odd_heads_are_refused_by_name() -> None:
    query = draw(1, 2, 1, 16)
    with pytest.raises(ValueError, match=r"dropout is 0\.1"):
        sparse_query_attention(query, query, query, dropout=0.1, backend="triton")
    wide = draw(1, 2, 1, 258)
    with pytest.raises(ValueError, match="heads have 258 values"):
        sparse_query_attention(wide, wide, wide, backend="triton")


@pytest.mark.parametrize("visible", ["all", "lengths", "mask"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_time", "key_time"), [(66, 66), (35, 80), (80, 35)])
def test_walks_in_two_parts(query_time: int, key_time: int, causal: bool, visible: str) -> None:
    options: dict[str, Any] = {"causal": causal}
    if visible == "lengths":
        options["key_lengths"] = torch.tensor([key_time - 1, 0], device=DEVICE)
    if visible == "mask":
        options["key_mask"] = torch.rand(2, key_time, device=DEVICE) < 0.7
    with ExitStack() as stack:
        for kernel, row in SMALL_BLOCKS.items():
            stack.enter_context(override_config(kernel, row))
        key, value = draw(2, key_time, 1, 16), draw(2, key_time, 1, 16)
        compare(draw(2, query_time, 1, 16), key, value, torch.float32, **options)


def test_two_runs_are_equal() -> None:
    sides = [draw(2, 40, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    gradient = draw(2, 40, 4, 16)
    runs = []
    for _ in range(2):
        out = sparse_query_attention(*sides, causal=True, backend="triton")
        runs.append((out, *torch.autograd.grad(out, sides, gradient)))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
