"""RMSNorm by the native kernels against its definition, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxt_kernels import add_rms_norm, native_runtime, rms_norm
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
# One value, odd widths, one past a vector of each instruction set, the widths of published models, more rows than threads.
SHAPES = ((1, 1), (3, 7), (2, 9), (5, 17), (4, 33), (1, 128), (2, 3, 256), (70, 1024), (0, 8))


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return (2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = _draw(shape, dtype, 0), _draw(shape[-1:], dtype, 1)
    actual = rms_norm(x, weight, backend="native")
    eager = rms_norm(x, weight, backend="reference")
    assert_accurate(actual, eager, rms_norm(x.double(), weight.double(), eps=torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_norm_equal_their_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = _draw(shape, dtype, 0), _draw(shape, dtype, 1), _draw(shape[-1:], dtype, 2)
    normed, total = add_rms_norm(x, residual, weight, backend="native")
    eager = add_rms_norm(x, residual, weight, backend="reference")
    assert torch.equal(total, eager[1])
    exact = rms_norm(eager[1].double(), weight.double(), eps=torch.finfo(torch.float32).eps)
    assert_accurate(normed, eager[0], exact)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(view: str, dtype: torch.dtype) -> None:
    x, residual, weight = _draw((3, 5, 20), dtype, 0), _draw((3, 5, 20), dtype, 1), _draw((20,), dtype, 2)
    expected = add_rms_norm(x, residual, weight, backend="native")
    make = VIEWS[view]
    actual = add_rms_norm(make(x), make(residual), make(weight), backend="native")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = [_draw(shape, dtype, 0), _draw(shape, dtype, 1), _draw(shape[-1:], dtype, 2)]
    incoming = [_draw(shape, dtype, 3), _draw(shape, dtype, 4)]

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [value.to(dtype).detach().requires_grad_() for value in values]
        eps = torch.finfo(torch.float32).eps
        outputs = [*add_rms_norm(*inputs, eps=eps, backend=backend)]
        return torch.autograd.grad(outputs, inputs, [side.to(dtype) for side in incoming])

    found = zip(
        gradients("native", dtype), gradients("reference", dtype), gradients("reference", torch.float64), strict=True
    )
    for actual, eager, exact in found:
        assert_accurate(actual, eager, exact, factor=GRADIENT_FACTOR)


def test_not_a_number_goes_through() -> None:
    x = torch.ones(3, 40)
    x[1, 39] = float("nan")
    normed = rms_norm(x, torch.ones(40), backend="native")
    assert normed[1].isnan().all()
    assert torch.allclose(normed[0], torch.ones(40))


def test_the_same_for_every_number_of_threads() -> None:
    x, weight = _draw((999, 256), torch.float32, 0).requires_grad_(), _draw((256,), torch.float32, 1).requires_grad_()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(rms_norm(x, weight, backend="native").square().sum(), (x, weight)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_traces_and_checks_as_an_operation() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    from rxt_kernels.rms_norm import native

    torch.library.opcheck(native._rms_norm, (x, weight, 1e-6))
    torch.library.opcheck(native._add_rms_norm, (x, x.detach().clone(), weight, 1e-6))
    compiled = torch.compile(lambda x: rms_norm(x, weight, backend="native"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), rms_norm(x, weight, backend="native"))


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    x, weight = torch.ones(2, 4), torch.ones(4)
    names = ("x", "residual", "weight", "epsilon", "normed", "total", "inverse_rms")
    good = dict(zip(names, (x, None, weight, 0.0, x.clone(), None, None), strict=True))
    extension.rms_norm_forward(**good)
    for change, error, message in [
        ({"x": x.double()}, TypeError, "x has a dtype"),
        ({"x": x.long()}, TypeError, "x is int64; accepted is float32 or bfloat16"),
        ({"x": [1.0]}, TypeError, "x must be a dense torch.Tensor"),
        ({"x": x.to("meta")}, (TypeError, ValueError), "x"),
        ({"x": x.t()}, ValueError, "x has stride"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\); accepted is \(4,\)"),
        ({"weight": weight.bfloat16()}, TypeError, "weight is bfloat16; accepted is float32"),
        ({"normed": torch.ones(2, 8)[:, ::2]}, ValueError, "normed of shape .* is not contiguous"),
        ({"residual": x}, ValueError, "both or neither"),
    ]:
        with pytest.raises(error, match=message):
            extension.rms_norm_forward(**{**good, **change})
