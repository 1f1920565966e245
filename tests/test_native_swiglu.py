"""SwiGLU by the native kernels against its definition, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxt_kernels import native_runtime, swiglu
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
# One value, odd widths, one past a vector of each instruction set, a published width, more rows than threads, nothing at all.
SHAPES = ((2,), (3, 14), (2, 18), (5, 34), (4, 66), (2, 3, 512), (70, 1536), (0, 8), (3, 0))


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return (3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = _draw(shape, dtype, 0)
    incoming = _draw((*shape[:-1], shape[-1] // 2), dtype, 1)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = values.to(dtype).requires_grad_()
        out = swiglu(x, backend=backend)
        return out.detach(), *torch.autograd.grad(out, x, incoming.to(dtype))

    actual, eager, exact = run("native", dtype), run("reference", dtype), run("reference", torch.float64)
    assert_accurate(actual[0], eager[0], exact[0])
    assert_accurate(actual[1], eager[1], exact[1], factor=GRADIENT_FACTOR)
    assert torch.equal(swiglu(values, backend="native"), actual[0])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(view: str, dtype: torch.dtype) -> None:
    values, incoming = _draw((3, 5, 44), dtype, 0), _draw((3, 5, 22), dtype, 1)

    def run(x: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = swiglu(x, backend="native")
        return out.detach(), *torch.autograd.grad(out, x, incoming)

    actual, expected = run(VIEWS[view](values), VIEWS[view](incoming)), run(values, incoming)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_columns_of_a_wider_tensor_and_a_gradient_of_one_value() -> None:
    """Rows that lie apart, and an incoming gradient that is the same memory for every row."""
    wide = _draw((6, 90), torch.float32, 0)
    x, copy = wide[:, 7:47].requires_grad_(), wide[:, 7:47].clone().requires_grad_()
    assert torch.equal(swiglu(x, backend="native"), swiglu(copy, backend="native"))
    found = [torch.autograd.grad(swiglu(side, backend="native").sum(), side)[0] for side in (x, copy)]
    assert torch.equal(*found)


def test_extreme_gates_and_not_a_number() -> None:
    """Far gates open and close without overflow on the way, in value and slope; NaN stays where it is."""
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, -1000.0, 1000.0, 0.0, -89.0, float("nan")]], requires_grad=True)
    out = swiglu(x, backend="native")
    assert out[0, :3].tolist() == [0.0, 1000.0, 0.0]
    assert abs(out[0, 3].item()) < 1e-36
    assert out[0, 4].isnan()
    (gradient,) = torch.autograd.grad(out[:, :3].sum(), x)
    assert gradient[0, [0, 1, 2, 5, 6, 7]].tolist() == [0.0, 1000.0, 0.0, 0.0, 1.0, 0.5]


def test_the_same_for_every_number_of_threads() -> None:
    x = _draw((999, 256), torch.float32, 0).requires_grad_()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        out = swiglu(x, backend="native")
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_traces_and_checks_as_an_operation() -> None:
    from rxt_kernels.swiglu import native

    x = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(native._swiglu, (x,))
    compiled = torch.compile(lambda x: swiglu(x, backend="native"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), swiglu(x, backend="native"))


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    x, out = torch.ones(2, 8), torch.empty(2, 4)
    extension.swiglu_forward(x, out)
    for change, error, message in [
        ({"x": x.double()}, TypeError, "x has a dtype"),
        ({"x": x.long()}, TypeError, "x is int64; accepted is float32 or bfloat16"),
        ({"x": x[:, :7]}, ValueError, r"x has shape \(2, 7\); accepted is an even last dimension"),
        ({"x": x[0]}, ValueError, "accepted are 2 dimensions"),
        ({"x": torch.ones(8, 2).t()}, ValueError, "x has stride"),
        ({"out": out.bfloat16()}, TypeError, "out is bfloat16; accepted is float32"),
        ({"out": x}, ValueError, r"out has shape \(2, 8\); accepted is \(2, 4\)"),
        ({"out": torch.empty(2, 8)[:, ::2]}, ValueError, "out of shape .* is not contiguous"),
    ]:
        with pytest.raises(error, match=message):
            extension.swiglu_forward(**{"x": x, "out": out, **change})
    good = {"gradient": out, "x": x, "x_gradient": torch.empty(2, 8)}
    extension.swiglu_backward(**good)
    for change, error, message in [
        ({"gradient": out.bfloat16()}, TypeError, "gradient is bfloat16; accepted is float32"),
        ({"gradient": out[:1]}, ValueError, r"gradient has shape \(1, 4\); accepted is \(2, 4\)"),
        ({"gradient": torch.empty(4, 2).t()}, ValueError, "gradient has stride"),
        ({"x_gradient": out}, ValueError, r"x_gradient has shape \(2, 4\); accepted is \(2, 8\)"),
    ]:
        with pytest.raises(error, match=message):
            extension.swiglu_backward(**{**good, **change})
