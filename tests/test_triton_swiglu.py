"""SwiGLU in Triton against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import swiglu
from rxt_kernels.swiglu import swiglu_reference
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (1, 6), (3, 5, 66), (70, 96), (2, 0, 4), (3, 4098)])
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    gradient = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE).to(dtype)

    def run(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = swiglu(leaf, backend=backend)
        return out.detach(), torch.autograd.grad(out, leaf, gradient.to(out.dtype))[0]

    exact, eager, fast = run(x.double(), "reference"), run(x, "reference"), run(x, "triton")
    assert_accurate(fast[0], eager[0], exact[0])
    assert_accurate(fast[1], eager[1], exact[1], factor=GRADIENT_FACTOR)


def test_large_gates_overflow_nothing() -> None:
    x = torch.tensor([[2.0, 2.0, -2e4, 2e4]], device=DEVICE, requires_grad=True)
    out = swiglu(x, backend="triton")
    torch.testing.assert_close(out, swiglu_reference(x))
    assert bool(torch.autograd.grad(out.sum(), x)[0].isfinite().all())


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x = torch.randn(3, 5, 12, device=DEVICE)
    torch.testing.assert_close(swiglu(VIEWS[view](x), backend="triton"), swiglu_reference(x))


def test_the_operator_is_well_made() -> None:
    torch.library.opcheck(torch.ops.rxt_kernels.swiglu_triton, (torch.randn(3, 4, device=DEVICE, requires_grad=True),))
