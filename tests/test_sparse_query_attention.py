"""Sparse query attention against loops over batch, head and query; masks, lengths, views, gradients and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxt_kernels import rotary, sparse_query_attention
from rxt_kernels.sparse_query_attention import sparse_query_attention_reference
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One query of one head at a time, in float64, written from specification 2.4."""
    query, key, value = query.double(), key.double(), value.double()
    batch, query_time, query_heads, head_dim = query.shape
    key_time, key_heads = key.shape[1], key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    heads = max(query_heads, key_heads)
    out = torch.zeros(batch, query_time, heads, head_dim, dtype=torch.float64)
    for b, h, t in itertools.product(range(batch), range(heads), range(query_time)):
        if query_heads >= key_heads:
            own_query, own_key = h, h // (query_heads // key_heads)
        else:
            own_query, own_key = h % query_heads, h
        visible = []
        for s in range(key_time):
            hidden = (
                (causal and query_time > 1 and s > key_time - query_time + t)
                or (key_mask is not None and not bool(key_mask[b, s]))
                or (key_lengths is not None and s >= int(key_lengths[b]))
            )
            if not hidden:
                visible.append(s)
        if not visible:
            continue
        scores = torch.stack([scale * (query[b, t, own_query] @ key[b, s, own_key]) for s in visible])
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        for weight, s in zip(weights, visible, strict=True):
            out[b, t, h] += weight * value[b, s, own_key]
    return out


def make(batch: int, query_time: int, key_time: int, query_heads: int, key_heads: int, head_dim: int) -> list[Tensor]:
    return [
        torch.randn(batch, query_time, query_heads, head_dim),
        torch.randn(batch, key_time, key_heads, head_dim),
        torch.randn(batch, key_time, key_heads, head_dim),
    ]


HEADS = [(4, 4), (4, 2), (4, 1), (1, 1), (2, 4), (1, 3), (6, 3)]
TIMES = [(1, 1), (1, 7), (5, 5), (3, 7), (7, 3), (1, 33)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("causal", [False, True])
def test_formula(heads: tuple[int, int], times: tuple[int, int], causal: bool) -> None:
    query, key, value = make(2, *times, *heads, 6)
    actual = sparse_query_attention(query, key, value, causal=causal)
    torch.testing.assert_close(actual, oracle(query, key, value, causal=causal).float())


@pytest.mark.parametrize("heads", [(4, 2), (2, 4)])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hiding", ["mask", "lengths", "equal lengths", "full lengths"])
def test_hidden_keys(heads: tuple[int, int], times: tuple[int, int], causal: bool, hiding: str) -> None:
    query, key, value = make(3, *times, *heads, 4)
    key_time = times[1]
    key_mask = torch.rand(3, key_time) < 0.6
    key_mask[1] = False  # A fully masked row.
    lengths = {
        "lengths": torch.tensor([0, key_time, (key_time + 1) // 2]),
        "equal lengths": torch.full((3,), (key_time + 1) // 2),
        "full lengths": torch.full((3,), key_time),
    }
    hidden = {"key_mask": key_mask} if hiding == "mask" else {"key_lengths": lengths[hiding]}
    expected = oracle(query, key, value, causal=causal, **hidden)  # type: ignore[arg-type]
    actual = sparse_query_attention(query, key, value, causal=causal, **hidden)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected.float())


def test_angles_and_scale() -> None:
    query, key, value = make(2, 4, 4, 4, 2, 8)
    query_angles, key_angles = torch.randn(4, 4), torch.randn(2, 4, 4)
    for layout in ("interleaved", "split"):
        actual = sparse_query_attention(
            query,
            key,
            value,
            query_angles=query_angles,
            key_angles=key_angles,
            rotary_layout=layout,
            scale=0.3,
        )
        turned = rotary(query, query_angles, layout=layout), rotary(key, key_angles, layout=layout)
        torch.testing.assert_close(actual, oracle(*turned, value, scale=0.3).float())


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 3]])
@pytest.mark.parametrize("query_time", [1, 2])
def test_a_query_without_keys_gives_zeros_and_zero_gradients(lengths: list[int], query_time: int) -> None:
    leaves = [tensor.requires_grad_() for tensor in make(len(lengths), query_time, 4, 4, 2, 4)]
    out = sparse_query_attention(*leaves, key_lengths=torch.tensor(lengths))
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert not out[0].any()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[0].any()


@pytest.mark.parametrize("query_time", [1, 3])
@pytest.mark.parametrize("equal", [False, True])
def test_what_lies_past_the_lengths_is_not_read(query_time: int, equal: bool) -> None:
    """A preallocated cache holds anything there; NaN would show (a mask alone would let 0 * NaN through)."""
    query, key, value = make(2, query_time, 9, 4, 2, 4)
    lengths = torch.tensor([5, 5 if equal else 3])
    expected = sparse_query_attention(query, key, value, key_lengths=lengths)
    key[:, 5:], value[:, 5:] = float("nan"), float("nan")
    torch.testing.assert_close(sparse_query_attention(query, key, value, key_lengths=lengths), expected)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    query_time=st.integers(1, 4),
    causal=st.booleans(),
    heads=st.sampled_from([(4, 2), (2, 4), (3, 3)]),
)
def test_lengths_equal_the_mask_that_says_the_same(
    lengths: list[int], query_time: int, causal: bool, heads: tuple[int, int]
) -> None:
    query, key, value = make(len(lengths), query_time, 9, *heads, 4)
    length = torch.tensor(lengths)
    mask = torch.arange(9) < length[:, None]
    by_length = sparse_query_attention(query, key, value, causal=causal, key_lengths=length)
    by_mask = sparse_query_attention(query, key, value, causal=causal, key_mask=mask)
    torch.testing.assert_close(by_length, by_mask)


@given(mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), causal=st.booleans())
def test_a_batch_is_its_rows(mask: list[list[bool]], causal: bool) -> None:
    query, key, value = make(len(mask), 6, 6, 4, 2, 4)
    key_mask = torch.tensor(mask)
    together = sparse_query_attention(query, key, value, causal=causal, key_mask=key_mask)
    for row in range(len(mask)):
        part = slice(row, row + 1)
        alone = sparse_query_attention(query[part], key[part], value[part], causal=causal, key_mask=key_mask[part])
        torch.testing.assert_close(together[part], alone)


@given(length=st.integers(1, 8), padding=st.integers(1, 5), causal=st.booleans())
def test_right_padding_changes_nothing(length: int, padding: int, causal: bool) -> None:
    query, key, value = make(1, length + padding, length + padding, 4, 2, 4)
    mask = torch.arange(length + padding)[None] < length
    padded = sparse_query_attention(query, key, value, causal=causal, key_mask=mask)
    solo = sparse_query_attention(query[:, :length], key[:, :length], value[:, :length], causal=causal)
    torch.testing.assert_close(padded[:, :length], solo)


@given(prefix=st.integers(1, 6), steps=st.integers(1, 4))
def test_decoding_step_by_step_equals_the_whole(prefix: int, steps: int) -> None:
    """Also in chunks: the causal alignment is to the last key."""
    total = prefix + steps
    query, key, value = make(1, total, total, 4, 2, 4)
    whole = sparse_query_attention(query, key, value, causal=True)
    chunk = sparse_query_attention(query[:, prefix:], key, value, causal=True)
    torch.testing.assert_close(chunk, whole[:, prefix:])
    for step in range(prefix, total):
        one = sparse_query_attention(query[:, step : step + 1], key, value, key_lengths=torch.tensor([step + 1]))
        torch.testing.assert_close(one[:, 0], whole[:, step])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("query_time", [1, 5])
def test_views(view: str, query_time: int) -> None:
    tensors = make(2, query_time, 5, 4, 2, 6)
    mask = torch.tensor([[True, False, True, True, True], [True] * 5])
    expected = sparse_query_attention(*tensors, key_mask=mask)
    actual = sparse_query_attention(*(VIEWS[view](t) for t in tensors), key_mask=mask.t().contiguous().t())
    torch.testing.assert_close(actual, expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    torch.testing.assert_close(sparse_query_attention(*heads_first, key_mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype: torch.dtype, causal: bool) -> None:
    tensors = [t.to(dtype) for t in make(2, 17, 17, 4, 2, 8)]

    def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)) * 8**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.repeat_interleave(2, 2))

    def run(function: object, to: torch.dtype) -> list[Tensor]:
        leaves = [t.to(to).requires_grad_() for t in tensors]
        out = function(*leaves)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    actual = run(lambda q, k, v: sparse_query_attention(q, k, v, causal=causal), dtype)
    eager, exact = run(naive, dtype), run(naive, torch.float64)
    assert actual[0].dtype is dtype
    assert_accurate(actual[0], eager[0], exact[0])
    for one, two, three in zip(actual[1:], eager[1:], exact[1:], strict=True):
        assert_accurate(one, two, three, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("hiding", ["none", "causal", "mask", "lengths"])
def test_gradients(heads: tuple[int, int], hiding: str) -> None:
    leaves = [t.double().requires_grad_() for t in make(2, 3, 4, *heads, 4)]
    angles = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [False] * 4]) if hiding == "mask" else None
    lengths = torch.tensor([0, 3]) if hiding == "lengths" else None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sparse_query_attention_reference(
            query, key, value, hiding == "causal", mask, lengths, angles[0], angles[1], "split"
        )

    assert torch.autograd.gradcheck(run, leaves)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 400, 1, 4)
    value = torch.ones(1, 400, 1, 4)
    outs = torch.stack([sparse_query_attention(query, key, value, dropout=0.5) for _ in range(50)])
    assert outs.std() > 0.01
    assert outs.mean().item() == pytest.approx(1.0, abs=0.03)


def test_empty_batch_and_no_query() -> None:
    assert sparse_query_attention(*make(0, 3, 3, 4, 2, 4), causal=True).shape == (0, 3, 4, 4)
    assert sparse_query_attention(*make(2, 0, 3, 4, 2, 4)).shape == (2, 0, 4, 4)


Q, K = torch.ones(2, 3, 4, 8), torch.ones(2, 5, 2, 8)
MASK, LENGTHS = torch.ones(2, 5, dtype=torch.bool), torch.tensor([5, 5])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sparse_query_attention(Q[0], K, K), ValueError, "query has shape"),
        (lambda: sparse_query_attention(Q.int(), K, K), TypeError, "query is torch.int32"),
        (lambda: sparse_query_attention(Q, K.double(), K), TypeError, "key is torch.float64"),
        (lambda: sparse_query_attention(Q, K, K.half()), TypeError, "value is torch.float16"),
        (lambda: sparse_query_attention(Q, K.to("meta"), K), ValueError, "key is on meta"),
        (lambda: sparse_query_attention(Q, K[:1], K[:1]), ValueError, "key has shape"),
        (lambda: sparse_query_attention(Q, K[..., :4], K[..., :4]), ValueError, "key has shape .* head_dim 8"),
        (lambda: sparse_query_attention(Q, K, K[:, :4]), ValueError, "value has shape"),
        (lambda: sparse_query_attention(Q[:, :, :3], K, K), ValueError, "query has 3 heads and key has 2"),
        (lambda: sparse_query_attention(Q[:, :, :0], K, K), ValueError, "query has 0 heads"),
        (lambda: sparse_query_attention(Q, K, K, key_mask=MASK, key_lengths=LENGTHS), ValueError, "both given"),
        (lambda: sparse_query_attention(Q, K, K, key_mask=MASK.float()), TypeError, "key_mask is torch.float32"),
        (lambda: sparse_query_attention(Q, K, K, key_mask=MASK[:, :4]), ValueError, "key_mask has shape"),
        (lambda: sparse_query_attention(Q, K, K, key_mask=MASK[:1]), ValueError, "key_mask has shape"),
        (lambda: sparse_query_attention(Q, K, K, key_mask=MASK.to("meta")), ValueError, "key_mask is on meta"),
        (lambda: sparse_query_attention(Q, K, K, key_lengths=LENGTHS.int()), TypeError, "key_lengths is torch.int32"),
        (lambda: sparse_query_attention(Q, K, K, key_lengths=LENGTHS[:1]), ValueError, "key_lengths has shape"),
        (lambda: sparse_query_attention(Q, K, K, key_lengths=LENGTHS + 1), ValueError, "key_lengths is 6"),
        (lambda: sparse_query_attention(Q, K, K, key_lengths=LENGTHS - 6), ValueError, "key_lengths is -1"),
        (lambda: sparse_query_attention(Q, K, K, key_lengths=LENGTHS.to("meta")), ValueError, "key_lengths is on meta"),
        (lambda: sparse_query_attention(Q, K, K, query_angles=torch.ones(5, 4)), ValueError, "query_angles has shape"),
        (lambda: sparse_query_attention(Q, K, K, key_angles=torch.ones(3, 4)), ValueError, "key_angles has shape"),
        (lambda: sparse_query_attention(Q, K, K, rotary_layout="x"), ValueError, "rotary_layout is 'x'"),
        (lambda: sparse_query_attention(Q, K, K, dropout=1.0), ValueError, "dropout is 1.0"),
        (lambda: sparse_query_attention(Q, K, K, dropout=-0.1), ValueError, "dropout is -0.1"),
        (lambda: sparse_query_attention(Q, K, K, scale=0.0), ValueError, "scale is 0.0"),
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
