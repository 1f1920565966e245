"""Linear cross-entropy against a loop, ignored targets, half precision, gradients and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels import linear_cross_entropy
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate


def oracle(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> list[float]:
    """One loss per position, 0 where it is ignored."""
    losses = []
    rows = hidden.double().reshape(-1, hidden.shape[-1])
    for row, wanted in zip(rows, target.flatten().tolist(), strict=True):
        if wanted == ignore_index:
            losses.append(0.0)
            continue
        logits = [
            sum(a * b for a, b in zip(row.tolist(), w.tolist(), strict=True))
            + (0.0 if bias is None else float(bias[v]))
            for v, w in enumerate(weight.double())
        ]
        largest = max(logits)
        losses.append(largest + math.log(sum(math.exp(logit - largest) for logit in logits)) - logits[wanted])
    return losses


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 0, 2])
def test_formula(with_bias: bool, ignore_index: int) -> None:
    hidden, weight, bias = torch.randn(2, 5, 6), torch.randn(7, 6), torch.randn(7) if with_bias else None
    target = torch.randint(0, 7, (2, 5))
    target[0, 1] = target[1, 4] = ignore_index
    losses = oracle(hidden, weight, target, bias, ignore_index)
    counted = int((target != ignore_index).sum())

    def call(reduction: str) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction)

    torch.testing.assert_close(call("none"), torch.tensor(losses).view(2, 5))
    torch.testing.assert_close(call("sum"), torch.tensor(sum(losses)))
    torch.testing.assert_close(call("mean"), torch.tensor(sum(losses) / counted))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_but_ignored_targets(reduction: str) -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), -100), reduction=reduction)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits() -> None:
    loss = linear_cross_entropy(torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    hidden, weight, target = torch.randn(3, 6), torch.randn(7, 6), torch.tensor([1, -100, 6])
    actual = linear_cross_entropy(VIEWS[view](hidden), VIEWS[view](weight), target)
    torch.testing.assert_close(actual, linear_cross_entropy(hidden, weight, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(40, 32).to(dtype), (torch.randn(50, 32) / 6).to(dtype)
    target = torch.randint(0, 50, (40,))

    def run(loss_of: object, to: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.to(to).requires_grad_(), weight.to(to).requires_grad_()
        loss = loss_of(h, w)  # type: ignore[operator]
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    actual = run(lambda h, w: linear_cross_entropy(h, w, target), dtype)
    eager = run(lambda h, w: F.cross_entropy(h @ w.t(), target), dtype)
    exact = run(lambda h, w: F.cross_entropy(h @ w.t(), target), torch.float64)
    assert_accurate(actual[0], eager[0], exact[0])
    for index in (1, 2):
        assert_accurate(actual[index], eager[index], exact[index], factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(reduction: str) -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, reduction=reduction), (hidden, weight, bias)
    )


H, W, T = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: linear_cross_entropy(H[0], W, T), ValueError, "hidden has shape"),
        (lambda: linear_cross_entropy(H, W.t(), T), ValueError, "weight has shape"),
        (lambda: linear_cross_entropy(H, W.double(), T), TypeError, "weight is torch.float64"),
        (lambda: linear_cross_entropy(H, W.to("meta"), T), ValueError, "weight is on meta"),
        (lambda: linear_cross_entropy(H, W, T, bias=torch.ones(3)), ValueError, "bias has shape"),
        (lambda: linear_cross_entropy(H, W, T, bias=torch.ones(4).half()), TypeError, "bias is torch.float16"),
        (lambda: linear_cross_entropy(H, W, T.int()), TypeError, "target is torch.int32"),
        (lambda: linear_cross_entropy(H, W, T[:1]), ValueError, "target has shape"),
        (lambda: linear_cross_entropy(H, W, T.to("meta")), ValueError, "target is on meta"),
        (lambda: linear_cross_entropy(H, W, T + 4), ValueError, "target is 4"),
        (lambda: linear_cross_entropy(H, W, T - 1), ValueError, "target is -1"),
        (lambda: linear_cross_entropy(H, W, T, reduction="max"), ValueError, "reduction is 'max'"),
    ],
)
def test_refusals(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]
