"""Rotary embedding against a loop, both layouts, angle dtypes, views, gradients and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxt_kernels import rotary
from rxt_kernels.rotary import rotary_reference
from rxt_kernels.testing import VIEWS, assert_accurate


def oracle(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """Pair by pair, in Python floats."""
    batch, time, heads, head_dim = x.shape
    half = head_dim // 2
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(batch):
        for t in range(time):
            for h in range(heads):
                for j in range(half):
                    angle = float(angles[b, t, j] if angles.dim() == 3 else angles[t, j])
                    first, second = float(x[b, t, h, 2 * j]), float(x[b, t, h, 2 * j + 1])
                    places = (2 * j, 2 * j + 1) if layout == "interleaved" else (j, half + j)
                    out[b, t, h, places[0]] = first * math.cos(angle) - second * math.sin(angle)
                    out[b, t, h, places[1]] = first * math.sin(angle) + second * math.cos(angle)
    return out


def angles_of(time: int, head_dim: int, base: float = 10_000.0) -> Tensor:
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(time, dtype=torch.float64)[:, None] * frequencies


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 7, 2, 16)])
@pytest.mark.parametrize("batched", [False, True])
def test_formula(layout: str, shape: tuple[int, ...], batched: bool) -> None:
    x = torch.randn(shape)
    angles = torch.randn(*shape[: 2 if batched else 0], *(() if batched else shape[1:2]), shape[3] // 2) * 10
    torch.testing.assert_close(rotary(x, angles, layout=layout), oracle(x, angles, layout).float())


def test_split_is_a_permutation_of_interleaved() -> None:
    """Exactly, by [0, 2, 4, ..., 1, 3, 5, ...] (specification 2.2)."""
    x, angles = torch.randn(2, 9, 3, 16), angles_of(9, 16).float()
    permutation = [*range(0, 16, 2), *range(1, 16, 2)]
    assert torch.equal(rotary(x, angles, layout="split"), rotary(x, angles, layout="interleaved")[..., permutation])


def test_layouts_agree_where_both_sides_are_rotated_and_only_there() -> None:
    query, key, angles = torch.randn(1, 9, 1, 16), torch.randn(1, 9, 1, 16), angles_of(9, 16).float()

    def scores(layout: str, rotate_key: bool) -> Tensor:
        other = rotary(key, angles, layout=layout) if rotate_key else key
        return torch.einsum("bqhd,bkhd->bhqk", rotary(query, angles, layout=layout), other)

    torch.testing.assert_close(scores("split", True), scores("interleaved", True), atol=1e-5, rtol=0)
    assert (scores("split", False) - scores("interleaved", False)).abs().max() > 1


def test_permuting_the_unrotated_side_converts_split_to_interleaved() -> None:
    query, key, angles = torch.randn(1, 9, 1, 16), torch.randn(1, 9, 1, 16), angles_of(9, 16).float()
    permutation = torch.tensor([*range(0, 16, 2), *range(1, 16, 2)])
    inverse = permutation.argsort()
    split = torch.einsum("bqhd,bkhd->bhqk", rotary(query, angles, layout="split"), key)
    interleaved = torch.einsum("bqhd,bkhd->bhqk", rotary(query, angles), key[..., inverse])
    torch.testing.assert_close(split, interleaved, atol=1e-5, rtol=0)


@given(shift=st.integers(0, 500), distance=st.integers(-40, 40))
def test_scores_depend_on_the_distance_only(shift: int, distance: int) -> None:
    table = angles_of(600, 8)
    query, key = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(start: int) -> Tensor:
        here, there = table[start : start + 1], table[start + distance : start + distance + 1]
        return (rotary(query, here) * rotary(key, there)).sum()

    torch.testing.assert_close(score(50), score(50 + shift))


def test_sine_and_cosine_are_taken_in_the_dtype_of_the_angles() -> None:
    """bfloat16 angles near 300 move in steps of 2 radians: models trained so saw these values (specification 2.2)."""
    x = torch.randn(1, 1, 1, 2)
    coarse = torch.tensor([[301.0]]).bfloat16()
    assert coarse.item() == 300.0
    cos, sin = coarse.cos().float().item(), coarse.sin().float().item()
    first, second = x.flatten().tolist()
    expected = torch.tensor([first * cos - second * sin, first * sin + second * cos])
    torch.testing.assert_close(rotary(x, coarse).flatten(), expected)
    assert (rotary(x, torch.tensor([[301.0]])).flatten() - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, angles = torch.randn(2, 33, 2, 8).to(dtype), angles_of(33, 8).float()
    cos, sin = angles.cos().unsqueeze(-2).to(dtype), angles.sin().unsqueeze(-2).to(dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    eager = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    actual = rotary(x, angles)
    assert actual.dtype is dtype
    assert_accurate(actual, eager, oracle(x, angles, "interleaved"))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_views(view: str, layout: str) -> None:
    x, angles = torch.randn(2, 5, 3, 6), torch.randn(5, 3)
    expected = rotary(x, angles, layout=layout)
    torch.testing.assert_close(rotary(VIEWS[view](x), VIEWS[view](angles), layout=layout), expected)
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(rotary(heads_first, angles, layout=layout), expected)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_gradients(layout: str) -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: rotary_reference(x, a, layout), (x, angles))
    strided = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: rotary_reference(x[..., ::2], a, layout), (strided, angles))


X = torch.ones(2, 3, 1, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: rotary(torch.ones(3, 1, 4), torch.ones(3, 2)), ValueError, "x has shape"),
        (lambda: rotary(torch.ones(2, 3, 1, 5), torch.ones(3, 2)), ValueError, "x has shape .* even head_dim"),
        (lambda: rotary(X.long(), torch.ones(3, 2)), TypeError, "x is torch.int64"),
        (lambda: rotary(X, torch.ones(3, 2).long()), TypeError, "angles is torch.int64"),
        (lambda: rotary(X, torch.ones(4, 2)), ValueError, r"angles has shape \(4, 2\)"),
        (lambda: rotary(X, torch.ones(1, 3, 2)), ValueError, r"angles has shape \(1, 3, 2\)"),
        (lambda: rotary(X, torch.ones(3, 4)), ValueError, r"angles has shape \(3, 4\)"),
        (lambda: rotary(X, torch.ones(3, 2, device="meta")), ValueError, "angles is on meta"),
        (lambda: rotary(X, torch.ones(3, 2), layout="halves"), ValueError, "layout is 'halves'"),
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
