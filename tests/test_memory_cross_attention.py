"""Memory cross-attention against loops; shared memory, layouts, views, gradients and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rxt_kernels import memory_cross_attention, rotary
from rxt_kernels.testing import VIEWS, assert_accurate


def oracle(query: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float | None = None) -> Tensor:
    """One query of one head at a time over all slots, in float64, written from specification 2.4."""
    batch, time, query_heads, head_dim = query.shape
    slots, key_heads = memory_key.shape[1], memory_key.shape[2]
    heads = max(query_heads, key_heads)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = torch.zeros(batch, time, heads, head_dim, dtype=torch.float64)
    for b in range(batch):
        row = b if memory_key.shape[0] > 1 else 0
        for t in range(time):
            for h in range(heads):
                own_query = h if query_heads >= key_heads else h % query_heads
                own_key = h * key_heads // query_heads if query_heads >= key_heads else h
                vector = query[b, t, own_query].double()
                scores = [scale * float(vector @ memory_key[row, s, own_key].double()) for s in range(slots)]
                largest = max(scores)
                total = sum(math.exp(score - largest) for score in scores)
                for s, score in enumerate(scores):
                    out[b, t, h] += math.exp(score - largest) / total * memory_value[row, s, own_key].double()
    return out


def make(batch: int, memory_batch: int, time: int, slots: int, heads: tuple[int, int], head_dim: int) -> list[Tensor]:
    memory = [torch.randn(memory_batch, slots, heads[1], head_dim) for _ in range(2)]
    return [torch.randn(batch, time, heads[0], head_dim), *memory]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (2, 4), (1, 1)])
@pytest.mark.parametrize("batches", [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (5, 3)])
def test_formula(heads: tuple[int, int], batches: tuple[int, int], sizes: tuple[int, int]) -> None:
    tensors = make(*batches, *sizes, heads, 6)
    torch.testing.assert_close(memory_cross_attention(*tensors), oracle(*tensors).float())


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("memory_batch", [1, 2])
def test_only_the_query_is_rotated(layout: str, memory_batch: int) -> None:
    query, key, value = make(2, memory_batch, 3, 5, (4, 2), 8)
    for angles in (torch.randn(3, 4), torch.randn(2, 3, 4)):
        actual = memory_cross_attention(query, key, value, query_angles=angles, rotary_layout=layout, scale=0.4)
        expected = oracle(rotary(query, angles, layout=layout), key, value, 0.4)
        torch.testing.assert_close(actual, expected.float())


def test_shared_memory_equals_its_copies() -> None:
    query, key, value = make(3, 1, 4, 7, (4, 2), 4)
    copies = key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1)
    torch.testing.assert_close(memory_cross_attention(query, key, value), memory_cross_attention(query, *copies))


def test_a_batch_is_its_rows() -> None:
    query, key, value = make(3, 3, 4, 7, (4, 2), 4)
    together = memory_cross_attention(query, key, value)
    for row in range(3):
        part = slice(row, row + 1)
        torch.testing.assert_close(together[part], memory_cross_attention(query[part], key[part], value[part]))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("memory_batch", [1, 2])
def test_views(view: str, memory_batch: int) -> None:
    tensors = make(2, memory_batch, 3, 5, (4, 2), 6)
    expected = memory_cross_attention(*tensors)
    torch.testing.assert_close(memory_cross_attention(*(VIEWS[view](t) for t in tensors)), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    torch.testing.assert_close(memory_cross_attention(*heads_first), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    query, key, value = (t.to(dtype) for t in make(2, 1, 9, 33, (4, 2), 8))
    scores = torch.einsum("bqhd,xkhd->bhqk", query, key.repeat_interleave(2, 2)) * 8**-0.5
    eager = torch.einsum("bhqk,xkhd->bqhd", scores.softmax(-1), value.repeat_interleave(2, 2))
    assert_accurate(memory_cross_attention(query, key, value), eager, oracle(query, key, value))


@pytest.mark.parametrize("batches", [(2, 2), (2, 1)])
def test_gradients(batches: tuple[int, int]) -> None:
    leaves = [t.double().requires_grad_() for t in make(*batches, 3, 4, (4, 2), 4)]
    angles = torch.randn(2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: memory_cross_attention(q, k, v, query_angles=angles), leaves)


Q, M = torch.ones(2, 3, 4, 8), torch.ones(1, 5, 2, 8)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: memory_cross_attention(Q[0], M, M), ValueError, "query has shape"),
        (lambda: memory_cross_attention(Q, M.expand(3, -1, -1, -1), M), ValueError, "memory_key has shape"),
        (lambda: memory_cross_attention(Q, M, M[:, :3]), ValueError, "memory_value has shape"),
        (lambda: memory_cross_attention(Q, M.double(), M), TypeError, "memory_key is torch.float64"),
        (lambda: memory_cross_attention(Q, M, M.to("meta")), ValueError, "memory_value is on meta"),
        (lambda: memory_cross_attention(Q[:, :, :3], M, M), ValueError, "query has 3 heads and memory_key has 2"),
        (lambda: memory_cross_attention(Q, M, M, query_angles=torch.ones(3, 3)), ValueError, "query_angles has shape"),
        (lambda: memory_cross_attention(Q, M, M, rotary_layout=""), ValueError, "rotary_layout is ''"),
        (lambda: memory_cross_attention(Q, M, M, dropout=2.0), ValueError, "dropout is 2.0"),
        (lambda: memory_cross_attention(Q, M, M, scale=-1.0), ValueError, "scale is -1.0"),
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
