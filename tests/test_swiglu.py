"""SwiGLU against a loop, views, half precision, gradients and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rxt_kernels import swiglu
from rxt_kernels.testing import VIEWS, assert_accurate


def oracle(x: Tensor) -> Tensor:
    """Value by value: the first half is linear, the second is the gate."""
    rows = x.reshape(-1, x.shape[-1]).tolist()
    half = x.shape[-1] // 2
    values = [[row[j] * row[half + j] / (1 + math.exp(-row[half + j])) for j in range(half)] for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(*x.shape[:-1], half)


@pytest.mark.parametrize("shape", [(2,), (1, 1, 14), (3, 5, 66), (0, 4)])
def test_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(swiglu(x), oracle(x).float())


def test_extreme_gates() -> None:
    out = swiglu(torch.tensor([1.0, 1.0, 1.0, -1000.0, 1000.0, 0.0]))
    assert out.tolist() == [0.0, 1000.0, 0.0]


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(swiglu(VIEWS[view](x)), swiglu(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(33, 64).to(dtype)
    linear, gate = x[:, :32], x[:, 32:]
    assert_accurate(swiglu(x), linear * (gate * torch.sigmoid(gate)), oracle(x))


def test_gradients() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: swiglu(torch.ones(3)), ValueError, r"x has shape \(3,\)"),
        (lambda: swiglu(torch.tensor(1.0)), ValueError, "x has shape"),
        (lambda: swiglu(torch.ones(2).int()), TypeError, "x is torch.int32"),
        (lambda: swiglu(None), TypeError, "x is NoneType"),  # type: ignore[arg-type]
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
