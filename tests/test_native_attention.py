"""Attention by the native kernels against its definition, on every instruction set.

Shapes are chosen for where the kernels cut their work: panels of 16 or 32 keys, tiles of 6 or 12 queries, key blocks of 192,
query blocks of 48, parts of 256 keys where queries are few.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels import memory_cross_attention, sparse_query_attention
from rxt_kernels.testing import VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
HEADS = [(1, 1), (4, 2), (6, 1), (2, 4), (3, 3)]
TIMES = [(1, 1), (1, 7), (5, 5), (7, 3), (13, 33), (1, 600), (3, 300), (66, 211), (100, 100)]


def compare(operation: Any, sides: list[Tensor], **options: Any) -> None:
    """The output of the kernels against the definition in float64, by what eager torch does at this dtype."""
    for dtype in DTYPES:
        given = [side.to(dtype) for side in sides]
        exact_options = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in options.items()
        }
        exact = operation(*(side.double() for side in given), backend="reference", **exact_options)
        eager = operation(*given, backend="reference", **options)
        assert_accurate(operation(*given, backend="native", **options), eager, exact)


def draw(
    batch: int, times: tuple[int, int], heads: tuple[int, int], head_dim: int, keys: int | None = None
) -> list[Tensor]:
    key_shape = (batch if keys is None else keys, times[1], heads[1], head_dim)
    return [torch.randn(batch, times[0], heads[0], head_dim), torch.randn(key_shape), torch.randn(key_shape)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("heads", HEADS)
def test_head_ratios_and_times(heads: tuple[int, int], times: tuple[int, int], causal: bool) -> None:
    compare(sparse_query_attention, draw(2, times, heads, 16), causal=causal)


@pytest.mark.parametrize("head_dim", [1, 2, 5, 8, 24, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("times", [(9, 17), (60, 40)])
def test_head_sizes(head_dim: int, times: tuple[int, int]) -> None:
    compare(sparse_query_attention, draw(3, times, (4, 2), head_dim), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("times", TIMES)
def test_hidden_keys(times: tuple[int, int], causal: bool) -> None:
    sides, key_time = draw(4, times, (4, 2), 16), times[1]
    lengths = torch.tensor([key_time, 0, key_time // 2 + 1, max(key_time - 1, 0)])
    compare(sparse_query_attention, sides, causal=causal, key_lengths=lengths)
    mask = torch.rand(4, key_time) < 0.5
    mask[1] = False
    mask[2, key_time // 2 :] = False
    compare(sparse_query_attention, sides, causal=causal, key_mask=mask)
    out = sparse_query_attention(*sides, causal=causal, key_mask=mask, backend="native")
    assert bool((out[1] == 0).all())


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("times", [(1, 7), (7, 7), (40, 60), (1, 300)])
@pytest.mark.parametrize("head_dim", [16, 10])
def test_rotation(layout: str, times: tuple[int, int], head_dim: int) -> None:
    query_angles, key_angles = 9 * torch.rand(times[0], head_dim // 2), 9 * torch.rand(2, times[1], head_dim // 2)
    for angles in (
        {"query_angles": query_angles},
        {"key_angles": key_angles},
        {"query_angles": query_angles, "key_angles": key_angles},
    ):
        compare(
            sparse_query_attention, draw(2, times, (4, 2), head_dim), causal=True, rotary_layout=layout, **angles
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sines_are_taken_in_the_dtype_of_the_angles(dtype: torch.dtype) -> None:
    query, key, value = draw(2, (9, 9), (4, 2), 16)
    angles = (300 * torch.rand(9, 8)).to(dtype)
    options: dict[str, Any] = {"query_angles": angles, "key_angles": angles, "causal": True}
    torch.testing.assert_close(
        sparse_query_attention(query, key, value, backend="native", **options),
        sparse_query_attention(query, key, value, backend="reference", **options), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("times", [(1, 9), (1, 600), (20, 50)])
def test_memory_reads(times: tuple[int, int], memories: int) -> None:
    for angles in (None, 9 * torch.rand(times[0], 8), 9 * torch.rand(3, times[0], 8)):
        compare(
            memory_cross_attention, draw(3, times, (4, 2), 16, memories), query_angles=angles, rotary_layout="split",
            scale=0.4,
        )  # fmt: skip


@pytest.mark.parametrize("times", [(1, 9), (30, 50)])
@pytest.mark.parametrize("view", [*VIEWS, "heads first"])
def test_layout_does_not_matter(view: str, times: tuple[int, int]) -> None:
    sides = draw(2, times, (4, 2), 16)
    mask = torch.rand(2, times[1]) < 0.7
    make = VIEWS.get(view, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    views = [make(side) for side in sides]
    for expected_mask, mask_view in ((None, None), (mask, mask.t().contiguous().t())):
        expected = sparse_query_attention(*sides, key_mask=expected_mask, backend="native")
        assert torch.equal(sparse_query_attention(*views, key_mask=mask_view, backend="native"), expected)


@pytest.mark.parametrize("query_time", [1, 40])
def test_what_is_hidden_is_not_read(query_time: int) -> None:
    """NaN behind the lengths, under the mask, and in other rows, heads and queries does not spread."""
    query, key, value = draw(2, (query_time, 300), (4, 2), 16)
    lengths = torch.tensor([150, 150])
    expected = sparse_query_attention(query, key, value, key_lengths=lengths, backend="native")
    key[:, 150:], value[:, 150:] = float("nan"), float("nan")
    assert torch.equal(sparse_query_attention(query, key, value, key_lengths=lengths, backend="native"), expected)
    mask = (torch.arange(300) < 150).expand(2, 300)
    torch.testing.assert_close(sparse_query_attention(query, key, value, key_mask=mask, backend="native"), expected)
    query[0, 0, 0], key[1, 3, 1] = float("nan"), float("nan")
    out = sparse_query_attention(query, key, value, key_lengths=lengths, backend="native")
    assert bool(out[0, 0, 0].isnan().all())
    assert bool(out[1, :, 2:].isnan().all())
    out[0, 0, 0], out[1, :, 2:] = expected[0, 0, 0], expected[1, :, 2:]
    assert torch.equal(out, expected)


def test_large_scores_stay_finite() -> None:
    query, key, value = draw(1, (15, 40), (2, 1), 16)
    compare(sparse_query_attention, [40 * query, 40 * key, value])


@pytest.mark.parametrize("times", [(1, 2000), (150, 150)])
def test_the_same_for_every_number_of_threads(times: tuple[int, int]) -> None:
    sides = draw(2, times, (4, 2), 16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(sparse_query_attention(*sides, causal=True, backend="native"))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_to_do() -> None:
    assert sparse_query_attention(*draw(0, (3, 3), (4, 2), 16), backend="native").shape == (0, 3, 4, 16)
    assert sparse_query_attention(*draw(2, (0, 3), (4, 2), 16), backend="native").shape == (2, 0, 4, 16)
    out = sparse_query_attention(*draw(2, (3, 0), (4, 2), 16), backend="native")
    assert bool((out == 0).all())


def test_refusals() -> None:
    query, key, value = draw(1, (3, 3), (2, 2), 4)
    with pytest.raises(ValueError, match=r"dropout is 0\.5"):
        sparse_query_attention(query, key, value, dropout=0.5, backend="native")
    with pytest.raises(ValueError, match="take 1 to 256"):
        sparse_query_attention(*draw(1, (3, 3), (2, 2), 258), backend="native")
    angles = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="query_angles require a gradient"):
        memory_cross_attention(query, key, value, query_angles=angles, backend="native")
