"""Rotary positions in Triton against their definition: both layouts, every way angles come, heads of any even size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import rotary
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 16), (1, 70, 2, 24), (3, 1, 2, 64), (1, 0, 2, 8)])
def test_forward_and_backward(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, gradient = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    angles = 50 * torch.rand(shape[1], shape[3] // 2, device=DEVICE)

    def run(x: Tensor, angles: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = rotary(leaf, angles, layout=layout, backend=backend)
        return out.detach(), torch.autograd.grad(out, leaf, gradient.to(out.dtype))[0]

    exact = run(x.double(), angles.double(), "reference")
    eager, fast = run(x, angles, "reference"), run(x, angles, "triton")
    assert_accurate(fast[0], eager[0], exact[0])
    assert_accurate(fast[1], eager[1], exact[1], factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("angles_dtype", [torch.float32, torch.bfloat16])
def test_angles_per_row_and_sines_in_their_dtype(angles_dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 2, 8, device=DEVICE).transpose(0, 1)[:, 1:]
    angles = (3 * torch.rand(4, 2, 4, device=DEVICE)).to(angles_dtype)
    expected = rotary(x, angles, backend="reference")
    torch.testing.assert_close(rotary(x, angles, backend="triton"), expected, rtol=1e-5, atol=1e-6)


def test_the_operator_is_well_made() -> None:
    x, angles = torch.randn(2, 3, 2, 8, device=DEVICE, requires_grad=True), torch.rand(3, 4, device=DEVICE)
    torch.library.opcheck(torch.ops.rxt_kernels.rotary_triton, (x, angles, True, False))


def test_angles_with_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="angles require a gradient"):
        rotary(torch.ones(1, 1, 1, 2), torch.ones(1, 1, requires_grad=True), backend="triton")
