"""RMSNorm in Triton against its definition: forward, backward, views, odd sizes, half precision, torch.library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import add_rms_norm, rms_norm
from rxt_kernels.rms_norm import rms_norm_reference
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = needs_triton

SHAPES = [(1,), (7,), (1, 1), (3, 5, 33), (40, 256), (2, 3, 130), (3, 0, 8), (5, 1, 4097)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, gradient = draw(shape, dtype), draw(shape[-1:], dtype), draw(shape, dtype)

    def run(inputs: tuple[Tensor, Tensor], **options: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        # A large epsilon: without it the gradient of a row of one value is zero, and all that is compared is rounding.
        out = rms_norm(*leaves, eps=0.1, **options)  # type: ignore[arg-type]
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))

    exact = run((x.double(), weight.double()), backend="reference")
    eager = run((x, weight), backend="reference")
    fast = run((x, weight), backend="triton")
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_addition(dtype: torch.dtype) -> None:
    x, residual, weight = draw((4, 9, 48), dtype), draw((4, 9, 48), dtype), draw((48,), dtype)
    gradients = draw((4, 9, 48), dtype), draw((4, 9, 48), dtype)

    def run(inputs: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = add_rms_norm(*leaves, backend=backend)  # type: ignore[arg-type]
        grads = torch.autograd.grad(out, leaves, tuple(g.to(out[0].dtype) for g in gradients))
        return tuple(tensor.detach() for tensor in (*out, *grads))

    inputs = (x, residual, weight)
    exact = run(tuple(tensor.double() for tensor in inputs), "reference")
    eager, fast = run(inputs, "reference"), run(inputs, "triton")
    assert torch.equal(fast[1], x + residual)
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index < 2 else GRADIENT_FACTOR)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x, weight = draw((3, 5, 12)), draw((12,))
    expected = rms_norm_reference(x, weight)
    torch.testing.assert_close(rms_norm(VIEWS[view](x), VIEWS["strided"](weight), backend="triton"), expected)
    cut = draw((3, 7, 2, 24))[:, :5, :, 6:18]
    torch.testing.assert_close(rms_norm(cut, weight, backend="triton"), rms_norm_reference(cut, weight))


def test_gradients_of_expanded_outputs() -> None:
    x, weight = draw((4, 8)).requires_grad_(), draw((8,)).requires_grad_()
    fast = torch.autograd.grad(rms_norm(x, weight, backend="triton").sum(), (x, weight))
    slow = torch.autograd.grad(rms_norm(x, weight, backend="reference").sum(), (x, weight))
    torch.testing.assert_close(fast, slow)


def test_operators_are_well_made() -> None:
    x, weight = draw((3, 5, 8)).requires_grad_(), draw((8,)).requires_grad_()
    torch.library.opcheck(torch.ops.rxt_kernels.rms_norm_triton, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.rxt_kernels.add_rms_norm_triton, (x, draw((3, 5, 8)), weight, 1e-6))


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float64.*float16, bfloat16 and float32"):
        rms_norm(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="at most 32768"):
        rms_norm(torch.ones(1, 32769, device=DEVICE), torch.ones(32769, device=DEVICE), backend="triton")
