"""RMSNorm against a loop in numpy, its epsilon rule, views, half precision, gradients and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rxt_kernels import add_rms_norm, rms_norm
from rxt_kernels.rms_norm import rms_norm_reference
from rxt_kernels.testing import VIEWS, assert_accurate


def oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Row by row, in float64."""
    rows = x.detach().double().numpy().reshape(-1, x.shape[-1])
    out = np.empty_like(rows)
    for index, row in enumerate(rows):
        out[index] = row / np.sqrt(sum(value * value for value in row) / len(row) + eps)
    return torch.from_numpy(out * weight.detach().double().numpy()).reshape(x.shape)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (1, 1, 16), (2, 5, 33), (3, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), oracle(x, weight, 1e-3).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [
        (torch.float64, 2.220446049250313e-16),
        (torch.float32, 1.1920929e-07),
        (torch.bfloat16, 1.1920929e-07),
        (torch.float16, 1.1920929e-07),
    ],
)
def test_epsilon_of_none(dtype: torch.dtype, eps: float) -> None:
    """With values far below sqrt(eps), the result shows which epsilon was added."""
    tiny = 1e-10 if dtype is torch.float64 else 1e-5
    x, weight = torch.full((1, 8), tiny, dtype=dtype), torch.ones(8, dtype=dtype)
    expected = x.double() / (x.double().square().mean() + eps).sqrt()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(rms_norm(x, weight).double(), expected, rtol=tolerance, atol=0)
    assert rms_norm(x, weight).dtype is dtype


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x, weight = torch.randn(3, 5, 12), torch.randn(12)
    expected = rms_norm(x, weight)
    torch.testing.assert_close(rms_norm(VIEWS[view](x), VIEWS["strided"](weight)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 96).to(dtype), torch.randn(96).to(dtype)
    eager = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-7) * weight
    exact = oracle(x, weight, 1.1920929e-07)
    assert_accurate(rms_norm(x, weight), eager, exact)


def test_add_rms_norm() -> None:
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    normed, total = add_rms_norm(x, residual, weight, eps=1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, oracle(x + residual, weight, 1e-6).float())


def test_inputs_are_left_alone() -> None:
    x, residual, weight = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    copies = x.clone(), residual.clone(), weight.clone()
    add_rms_norm(x, residual, weight)
    assert all(torch.equal(now, before) for now, before in zip((x, residual, weight), copies, strict=True))


def test_gradients() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, eps=1e-6), (x, residual, weight))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: rms_norm([1.0], torch.ones(1)), TypeError, "x is list"),  # type: ignore[arg-type]
        (lambda: rms_norm(torch.ones(2, dtype=torch.int64), torch.ones(2)), TypeError, "x is torch.int64"),
        (lambda: rms_norm(torch.ones(2), torch.ones(3)), ValueError, r"weight has shape \(3,\)"),
        (lambda: rms_norm(torch.ones(2), torch.ones(1, 2)), ValueError, r"weight has shape \(1, 2\)"),
        (lambda: rms_norm(torch.tensor(1.0), torch.ones(1)), ValueError, "weight has shape"),
        (lambda: rms_norm(torch.ones(2), torch.ones(2).double()), TypeError, "weight is torch.float64"),
        (lambda: rms_norm(torch.ones(2), torch.ones(2, device="meta")), ValueError, "weight is on meta"),
        (lambda: rms_norm(torch.ones(2), torch.ones(2), eps=-1.0), ValueError, "eps is -1.0"),
        (lambda: rms_norm(torch.ones(2), torch.ones(2), eps=float("nan")), ValueError, "eps is nan"),
        (lambda: add_rms_norm(torch.ones(2), torch.ones(1, 2), torch.ones(2)), ValueError, "residual has shape"),
        (
            lambda: add_rms_norm(torch.ones(2), torch.ones(2).half(), torch.ones(2)),
            TypeError,
            "residual is torch.float16",
        ),
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]


def test_mixed_dtypes_under_autocast() -> None:
    """Linear layers answer in bfloat16 there, weights stay float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rms_norm(torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8))
    assert out.dtype is torch.bfloat16
