"""Linear layer and cross-entropy in Triton against their definition: reductions, ignored rows, chunks, half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import linear_cross_entropy
from rxt_kernels.configs import override_config
from rxt_kernels.linear_cross_entropy import triton as kernels
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate

pytestmark = needs_triton


def compare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype, reduction: str
) -> None:
    tensors = [tensor.to(dtype) for tensor in (hidden, weight, bias) if tensor is not None]
    gradient = torch.randn(target.shape, device=DEVICE) if reduction == "none" else torch.ones((), device=DEVICE)

    def run(tensors: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        own_bias = leaves[2] if bias is not None else None
        out = linear_cross_entropy(leaves[0], leaves[1], target, bias=own_bias, reduction=reduction, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype).to(out.dtype)))

    exact = run([tensor.double() for tensor in tensors], "reference")
    eager, fast = run(tensors, "reference"), run(tensors, "triton")
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "classes"), [((1,), 1), ((2, 3), 7), ((5,), 1500)])
def test_forward_and_backward(shape: tuple[int, ...], classes: int, dtype: torch.dtype, reduction: str) -> None:
    target = torch.randint(classes, shape, device=DEVICE)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    hidden, weight = torch.randn(*shape, 12, device=DEVICE), torch.randn(classes, 12, device=DEVICE)
    compare(hidden, weight, torch.randn(classes, device=DEVICE), target, dtype, reduction)
    compare(hidden, weight, None, target, dtype, reduction)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(9, 12, device=DEVICE), torch.randn(20, 12, device=DEVICE)
    target = torch.randint(20, (9,), device=DEVICE)
    monkeypatch.setattr(kernels, "LARGEST_CHUNK", 40)
    assert len(kernels._chunks(9, 20)) == 5
    compare(hidden, weight, None, target, torch.float32, "mean")


@pytest.mark.parametrize("classes", [15, 16, 17, 32, 33])
def test_whole_blocks_and_the_rest(classes: int) -> None:
    hidden, weight = torch.randn(3, 12, device=DEVICE), torch.randn(classes, 12, device=DEVICE)
    target = torch.tensor([0, classes - 1, classes // 2], device=DEVICE)
    row = {"BLOCK": 16, "num_warps": 1, "num_stages": 1}
    with override_config("linear_cross_entropy_fwd", row), override_config("linear_cross_entropy_bwd", row):
        compare(hidden, weight, torch.randn(classes, device=DEVICE), target, torch.float32, "mean")


def test_no_target_counts() -> None:
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    target = torch.full((3,), -100, device=DEVICE)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4, device=DEVICE), target, backend="triton")
    assert float(loss.detach()) == 0.0
    assert bool((torch.autograd.grad(loss, hidden)[0] == 0).all())


def test_a_target_that_is_no_class_is_no_number() -> None:
    arguments = torch.randn(2, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE), torch.tensor([1, 5], device=DEVICE)
    losses = kernels.linear_cross_entropy_triton(*arguments, reduction="none")
    assert bool(losses.isfinite()[0])
    assert bool(losses.isnan()[1])


def test_large_logits_and_minus_infinity_in_the_bias() -> None:
    bias = torch.zeros(6, device=DEVICE)
    bias[2:5] = -torch.inf
    hidden, weight = 1e3 * torch.randn(4, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    target = torch.tensor([0, 1, 5, 0], device=DEVICE)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, target, bias=bias, backend="triton"),
        linear_cross_entropy(hidden, weight, target, bias=bias, backend="reference"),
    )


def test_the_operator_is_well_made() -> None:
    hidden, weight = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((3, 4), (5, 4)))
    arguments = (hidden, weight, torch.tensor([0, 4, -100], device=DEVICE), None, -100)
    torch.library.opcheck(torch.ops.rxt_kernels.linear_cross_entropy_triton, arguments)
