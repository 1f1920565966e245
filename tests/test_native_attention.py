"""Attention by the native kernels against its definition, on every instruction set.

Shapes are chosen for where the kernels cut their work: panels of 16 or 32 keys, tiles of 6 or 12 queries, blocks of 192
keys and 48 queries (48 or 192 and 24 or 48 in the backward pass), parts of 256 keys where queries are few.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels import memory_cross_attention, native_runtime, sparse_query_attention
from rxt_kernels.testing import GRADIENT_FACTOR, OUTPUT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
HEADS = [(1, 1), (4, 2), (6, 1), (2, 4), (3, 3)]
TIMES = [(1, 1), (1, 7), (5, 5), (7, 3), (13, 33), (1, 600), (3, 300), (66, 211), (100, 100)]


def compare(operation: Any, sides: list[Tensor], **options: Any) -> None:
    """Outputs and gradients of the kernels against the definition in float64, by what eager torch does at this dtype."""
    heads = max(sides[0].shape[2], sides[1].shape[2])
    incoming = torch.randn(*sides[0].shape[:2], heads, sides[0].shape[3])

    def run(dtype: torch.dtype, rounded: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [side.to(rounded).to(dtype).requires_grad_() for side in sides]
        own = {
            name: value.to(dtype if dtype is torch.float64 else value.dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in options.items()
        }
        out = operation(*leaves, backend=backend, **own)
        return [out.detach(), *torch.autograd.grad(out, leaves, incoming.to(rounded).to(dtype))]

    for dtype in DTYPES:
        found = run(dtype, dtype, "native"), run(dtype, dtype, "reference"), run(torch.float64, dtype, "reference")
        for index, (actual, eager, exact) in enumerate(zip(*found, strict=True)):
            assert_accurate(actual, eager, exact, factor=OUTPUT_FACTOR if index == 0 else GRADIENT_FACTOR)


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
    sides: list[dict[str, Any]] = [{"query_angles": query_angles}, {"key_angles": key_angles}]
    for angles in (*sides, {**sides[0], **sides[1]}):
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


@pytest.mark.parametrize("times", [(1, 2000), (150, 150), (20, 500)])
def test_the_same_for_every_number_of_threads(times: tuple[int, int]) -> None:
    sides = [side.requires_grad_() for side in draw(2, times, (4, 2), 16)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = sparse_query_attention(*sides, causal=True, backend="native")
        found.append([out, *torch.autograd.grad(out.square().sum(), sides)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_hidden_values_have_zero_gradients() -> None:
    sides = [side.requires_grad_() for side in draw(3, (5, 40), (4, 2), 16)]
    lengths = torch.tensor([0, 17, 40])
    out = sparse_query_attention(*sides, key_lengths=lengths, backend="native")
    to_query, *to_keys = torch.autograd.grad(out.square().sum(), sides)
    assert bool((to_query[0] == 0).all())
    assert all(bool((gradient[0] == 0).all()) and bool((gradient[1, 17:] == 0).all()) for gradient in to_keys)


def test_traces_and_checks_as_an_operation() -> None:
    from rxt_kernels.sparse_query_attention import native

    sides = [side.requires_grad_() for side in draw(2, (5, 7), (4, 2), 8)]
    tables = (torch.rand(5, 4), torch.rand(5, 4), None, None)
    torch.library.opcheck(native._attention, (*sides, True, None, None, *tables, True, 0.3))
    compiled = torch.compile(
        lambda *sides: sparse_query_attention(*sides, backend="native"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*sides), sparse_query_attention(*sides, backend="native"))


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    query, key, value = draw(2, (3, 5), (4, 2), 8)
    names = ("query", "key", "value", "causal", "key_mask", "key_lengths", "query_cosine", "query_sine", "key_cosine",
             "key_sine", "split", "scale", "out", "softmax_sums")  # fmt: skip
    values = (query, key, value, False, None, None, None, None, None, None, False, 1.0, torch.empty_like(query), None)
    good = dict(zip(names, values, strict=True))
    extension.attention_forward(**good)
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"query": query.double()}, TypeError, "query has a dtype"),
        ({"key": key.bfloat16()}, TypeError, "key is bfloat16; accepted is float32"),
        ({"key": key[:1]}, ValueError, r"key has shape \(1, 5, 2, 8\); accepted is \(2, any, any, 8\)"),
        ({"value": value[:, :4]}, ValueError, r"value has shape .* accepted is \(2, 5, 2, 8\)"),
        ({"value": value.transpose(1, 3).contiguous().transpose(1, 3)}, ValueError, "value has stride"),
        ({"key": key[:, :, :1].expand(2, 5, 3, 8), "value": value[:, :, :1].expand(2, 5, 3, 8)}, ValueError,
         "one divides the other"),
        ({"out": torch.empty(2, 3, 2, 8)}, ValueError, "out has shape"),
        ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, "key_lengths has shape"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask is float32; accepted is bool"),
        ({"query_cosine": torch.ones(3, 4)}, ValueError, "both or neither"),
        ({"query_cosine": torch.ones(3, 4), "query_sine": torch.ones(2, 4)}, ValueError, "query_sine has shape"),
        ({"softmax_sums": torch.ones(2, 2, 3, 4)}, ValueError, "softmax_sums has shape"),
    ]  # fmt: skip
    for change, error, message in changes:
        with pytest.raises(error, match=message):
            extension.attention_forward(**{**good, **change})


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
