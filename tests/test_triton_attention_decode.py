"""Few queries over many keys in Triton: keys split over programs, one memory read by a batch, lengths on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from test_triton_attention import HEADS, draw
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import memory_cross_attention, sparse_query_attention
from rxt_kernels.configs import override_config
from rxt_kernels.testing import assert_accurate
from rxt_kernels.triton_runtime import count_launches

pytestmark = needs_triton

BLOCK = 16
SMALL_BLOCKS = {
    "sqa_decode": {"BLOCK_M": 16, "BLOCK_N": BLOCK, "PROGRAMS": 64, "num_warps": 4, "num_stages": 1},
    "sqa_decode_combine": {"BLOCK_S": 2, "num_warps": 1, "num_stages": 1},
}
"""So that few keys take several splits, and few queries several tiles."""


@pytest.fixture
def _small_blocks() -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, row in SMALL_BLOCKS.items():
            stack.enter_context(override_config(kernel, row))
        yield


def compare(operation: Callable[..., Tensor], *sides: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """The kernels' output against the definition in float64, by what eager torch does at this dtype; without gradients."""
    sides = tuple(side.to(dtype) for side in sides)
    doubled = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    with torch.no_grad():
        exact = operation(*(side.double() for side in sides), backend="reference", **doubled)
        eager = operation(*sides, backend="reference", **options)
        fast = operation(*sides, backend="triton", **options)
    assert_accurate(fast, eager, exact)
    return fast


def launches_of(call: Callable[[], Tensor]) -> dict[str, int]:
    with count_launches() as launches, torch.no_grad():
        call()
    return dict(launches)


SPLIT = {"_sqa_decode_kernel": 1, "_sqa_decode_combine_kernel": 1}
ALONE = {"_sqa_decode_kernel": 1}
PREFILL = {"_sqa_fwd_kernel": 1}


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "dtype"),
    [*((*heads, torch.float32) for heads in HEADS), (4, 2, torch.bfloat16), (4, 2, torch.float16)],
)
@pytest.mark.usefixtures("_small_blocks")
def test_lengths_on_the_device(query_heads: int, key_heads: int, dtype: torch.dtype) -> None:
    """A row of no keys, of one, of a block and one more, and of all: most splits of most rows have nothing to read."""
    query, key, value = draw(4, 1, query_heads, 16), draw(4, 35, key_heads, 16), draw(4, 35, key_heads, 16)
    lengths = torch.tensor([0, 1, BLOCK + 1, 35], device=DEVICE)
    out = compare(sparse_query_attention, query, key, value, dtype=dtype, key_lengths=lengths)
    assert bool((out[0] == 0).all())


@pytest.mark.parametrize("time", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1, 7 * BLOCK])
@pytest.mark.usefixtures("_small_blocks")
def test_around_the_edges_of_splits(time: int) -> None:
    compare(sparse_query_attention, draw(1, 1, 4, 16), draw(1, time, 2, 16), draw(1, time, 2, 16), dtype=torch.float32)


def test_a_long_cache_with_the_blocks_of_the_table() -> None:
    query, key, value = draw(1, 1, 4, 16), draw(1, 257, 1, 16), draw(1, 257, 1, 16)
    compare(sparse_query_attention, query, key, value, dtype=torch.float32)
    assert launches_of(lambda: sparse_query_attention(query, key, value, backend="triton")) == SPLIT


@pytest.mark.usefixtures("_small_blocks")
def test_a_view_of_a_cache_whose_rest_was_never_written() -> None:
    """NaN in the slots that are not in use, within the slice and beyond it, must not be seen."""
    query, cache = draw(2, 1, 4, 16), torch.full((2, 2, 60, 2, 16), float("nan"), device=DEVICE)
    lengths = torch.tensor([37, 20], device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        cache[:, row, :length] = draw(2, length, 2, 16)
    key, value = cache[:, :, :45]
    out = sparse_query_attention(query, key, value, key_lengths=lengths, backend="triton")
    key, value = cache.nan_to_num()[:, :, :45]
    torch.testing.assert_close(out, sparse_query_attention(query, key, value, key_lengths=lengths, backend="reference"))


@pytest.mark.usefixtures("_small_blocks")
def test_transposed_caches() -> None:
    key, value = draw(2, 2, 40, 16).transpose(1, 2), draw(2, 40, 2, 32)[..., ::2]
    compare(sparse_query_attention, draw(2, 1, 4, 16), key, value, dtype=torch.float32)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "query_time"), [(4, 2, 2), (8, 1, 5), (2, 4, 5), (2, 1, 16), (2, 1, 17)]
)
@pytest.mark.usefixtures("_small_blocks")
def test_few_queries_at_once(query_heads: int, key_heads: int, query_time: int) -> None:
    """Causal, at the end of a cache: one and several tiles of queries, and one query more than is split."""
    query, key, value = draw(1, query_time, query_heads, 16), draw(1, 24, key_heads, 16), draw(1, 24, key_heads, 16)
    lengths = torch.tensor([20], device=DEVICE)
    with count_launches() as launches:
        compare(sparse_query_attention, query, key, value, dtype=torch.float32, causal=True, key_lengths=lengths)
    assert dict(launches) == (SPLIT if query_time <= 16 else PREFILL)


@pytest.mark.usefixtures("_small_blocks")
def test_more_queries_than_keys() -> None:
    """The first queries see nothing."""
    query, key, value = draw(1, 5, 2, 16), draw(1, 3, 2, 16), draw(1, 3, 2, 16)
    compare(sparse_query_attention, query, key, value, dtype=torch.float32, causal=True)


@pytest.mark.parametrize("query_time", [1, 3])
@pytest.mark.usefixtures("_small_blocks")
def test_masks_and_rows_that_see_nothing(query_time: int) -> None:
    query, key, value = draw(3, query_time, 2, 16), draw(3, 40, 2, 16), draw(3, 40, 2, 16)
    mask = torch.rand(3, 40, device=DEVICE) < 0.5
    mask[1, :33], mask[2] = False, False
    out = compare(sparse_query_attention, query, key, value, dtype=torch.float32, causal=True, key_mask=mask)
    assert bool((out[2] == 0).all())


@pytest.mark.parametrize("head_dim", [2, 24, 256])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.usefixtures("_small_blocks")
def test_rotated_queries(layout: str, head_dim: int) -> None:
    """Over rotated keys of a cache the layout is that of the keys; over memory, which has no position, it shows."""
    query, angles = draw(2, 1, 4, head_dim), 9 * torch.rand(2, 1, head_dim // 2, device=DEVICE)
    key, value = draw(2, 20, 2, head_dim), draw(2, 20, 2, head_dim)
    options: dict[str, Any] = {"query_angles": angles, "rotary_layout": layout}
    compare(memory_cross_attention, query, key, value, dtype=torch.float32, **options)
    key_angles = 9 * torch.rand(20, head_dim // 2, device=DEVICE)
    compare(sparse_query_attention, query, key, value, dtype=torch.float32, key_angles=key_angles, **options)


@pytest.mark.parametrize(
    ("batch", "query_heads", "key_heads", "dtype"),
    [*((2, *heads, torch.float32) for heads in HEADS), (2, 4, 2, torch.bfloat16), (20, 2, 1, torch.float32)],
)
@pytest.mark.usefixtures("_small_blocks")
def test_one_memory_for_a_batch(batch: int, query_heads: int, key_heads: int, dtype: torch.dtype) -> None:
    """Also of more rows than a tile has."""
    query, angles = draw(batch, 1, query_heads, 16), 5 * torch.rand(batch, 1, 8, device=DEVICE)
    key, value = draw(1, 33, key_heads, 16), draw(1, 33, key_heads, 16)
    options: dict[str, Any] = {"query_angles": angles, "rotary_layout": "split"}
    compare(memory_cross_attention, query, key, value, dtype=dtype, **options)


@pytest.mark.usefixtures("_small_blocks")
def test_one_memory_for_several_queries_of_a_batch() -> None:
    query, angles = draw(3, 4, 4, 16), 5 * torch.rand(3, 4, 8, device=DEVICE)
    key, value = draw(1, 33, 2, 16), draw(1, 33, 2, 16)
    compare(memory_cross_attention, query, key, value, dtype=torch.float32, query_angles=angles)


def test_launches() -> None:
    """A prefill of memory reads is one launch, and so is a decode step that needs no second stage."""
    memory, short_memory = draw(1, 200, 2, 16), draw(1, 9, 2, 16)
    one, many = draw(2, 1, 4, 16), draw(2, 20, 4, 16)
    assert launches_of(lambda: memory_cross_attention(many, memory, memory, backend="triton")) == PREFILL
    assert launches_of(lambda: memory_cross_attention(one, memory, memory, backend="triton")) == SPLIT
    assert launches_of(lambda: memory_cross_attention(one, short_memory, short_memory, backend="triton")) == ALONE


def test_a_query_with_gradients_goes_the_ordinary_way() -> None:
    query, memory = draw(1, 1, 4, 16).requires_grad_(), draw(1, 70, 2, 16)
    with count_launches() as launches:
        memory_cross_attention(query, memory, memory, backend="triton")
    assert dict(launches) == PREFILL
    assert launches_of(lambda: memory_cross_attention(query, memory, memory, backend="triton")) == SPLIT


@pytest.mark.usefixtures("_small_blocks")
def test_two_runs_are_equal() -> None:
    query, key, value = draw(3, 1, 4, 16), draw(3, 60, 2, 16), draw(3, 60, 2, 16)
    lengths = torch.tensor([60, 17, 0], device=DEVICE)
    one, two = (sparse_query_attention(query, key, value, key_lengths=lengths, backend="triton") for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.usefixtures("_small_blocks")
def test_no_keys_and_no_rows() -> None:
    key = draw(2, 0, 2, 16)
    assert bool((sparse_query_attention(draw(2, 1, 4, 16), key, key, backend="triton") == 0).all())
    assert sparse_query_attention(draw(0, 1, 4, 16), key[:0], key[:0], backend="triton").shape == (0, 1, 4, 16)


@pytest.mark.usefixtures("_small_blocks")
def test_the_operator_is_well_made() -> None:
    query, key = draw(2, 1, 2, 16), draw(2, 20, 1, 16)
    arguments = (query, key, key, False, None, torch.tensor([20, 3], device=DEVICE), None, None, False, 0.25)
    torch.library.opcheck(torch.ops.rxt_kernels.sparse_query_attention_inference_triton, arguments)


@pytest.mark.usefixtures("_small_blocks")
def test_compiled_once_for_all_lengths() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, angles: Tensor, lengths: Tensor) -> Tensor:
        own = sparse_query_attention(
            query, key, value, key_lengths=lengths, query_angles=angles, rotary_layout="split", backend="triton"
        )
        return own + memory_cross_attention(query, key[:1], value[:1], query_angles=angles, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for time in (20, 37):
            inputs = (
                draw(2, 1, 4, 16), draw(2, time, 2, 16), draw(2, time, 2, 16), torch.rand(1, 8, device=DEVICE),
                torch.tensor([time, 3], device=DEVICE),
            )  # fmt: skip
            with torch._dynamo.config.patch(error_on_recompile=time != 20):
                torch.testing.assert_close(compiled(*inputs), step(*inputs))
