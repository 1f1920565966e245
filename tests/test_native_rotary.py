"""Rotary positions by the native kernels against their definition, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxt_kernels import native_runtime, rotary
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("interleaved", "split")
# One pair, halves that are odd, a vector long and one past it, published heads, more tokens than threads, nothing at all.
SHAPES = (
    (1, 1, 1, 2),
    (2, 3, 2, 6),
    (1, 7, 3, 16),
    (2, 5, 1, 18),
    (1, 4, 2, 34),
    (3, 130, 4, 64),
    (2, 0, 1, 4),
    (1, 2, 2, 0),
)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _gradient_of(x: Tensor, angles: Tensor, incoming: Tensor, layout: str, backend: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = rotary(x, angles, layout=layout, backend=backend)
    return out.detach(), *torch.autograd.grad(out, x, incoming.to(x.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], batched: bool, layout: str) -> None:
    angles = 10.0 * _draw(
        (*shape[: 2 if batched else 0], *(() if batched else shape[1:2]), shape[3] // 2), torch.float32, 0
    )
    for dtype in DTYPES:
        x, incoming = _draw(shape, dtype, 1), _draw(shape, dtype, 2)
        actual = _gradient_of(x, angles, incoming, layout, "native")
        eager = _gradient_of(x, angles, incoming, layout, "reference")
        # The rotation by the same sines in float64: they are part of the input, taken in the dtype of the angles.
        exact = _gradient_of(x.double(), angles, incoming, layout, "reference")
        assert_accurate(actual[0], eager[0], exact[0])
        assert_accurate(actual[1], eager[1], exact[1], factor=GRADIENT_FACTOR)
        assert torch.equal(rotary(x, angles, layout=layout, backend="native"), actual[0])


@pytest.mark.parametrize("view", [*VIEWS, "heads first"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_memory_does_not_matter(dtype: torch.dtype, layout: str, view: str) -> None:
    x, incoming, angles = (
        _draw((2, 5, 3, 22), dtype, 0),
        _draw((2, 5, 3, 22), dtype, 1),
        _draw((5, 11), torch.float32, 2),
    )
    make = VIEWS[view] if view in VIEWS else lambda t: t.transpose(1, -2).contiguous().transpose(1, -2)
    expected = _gradient_of(x, angles, incoming, layout, "native")
    angles = VIEWS[view](angles) if view in VIEWS else angles
    actual = _gradient_of(make(x), angles, make(incoming), layout, "native")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    shared = torch.autograd.grad(rotary(x.requires_grad_(), angles, layout=layout, backend="native").sum(), x)[0]
    assert torch.equal(shared[0], shared[1])


def test_layouts_are_permutations_of_each_other_bit_by_bit() -> None:
    x, angles = _draw((2, 9, 3, 38), torch.float32, 0), _draw((9, 19), torch.float32, 1)
    permutation = [*range(0, 38, 2), *range(1, 38, 2)]
    interleaved = rotary(x, angles, backend="native")
    assert torch.equal(rotary(x, angles, layout="split", backend="native"), interleaved[..., permutation])


def test_sines_are_taken_in_the_dtype_of_the_angles() -> None:
    x, coarse = (
        _draw((1, 3, 2, 4), torch.float32, 0),
        torch.tensor([[301.0, 7.3], [0.3, 511.0], [2.2, 90.1]]).bfloat16(),
    )
    expected = rotary(x, coarse, backend="reference")
    torch.testing.assert_close(rotary(x, coarse, backend="native"), expected)


def test_not_a_number_stays_in_its_pair() -> None:
    x = torch.ones(1, 1, 1, 40)
    x[..., 21] = float("nan")
    out = rotary(x, torch.zeros(1, 20), backend="native")
    assert out.isnan().flatten().nonzero().flatten().tolist() == [20, 21]


def test_the_same_for_every_number_of_threads() -> None:
    x, angles = _draw((2, 999, 4, 32), torch.float32, 0), _draw((999, 16), torch.float32, 1)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(_gradient_of(x, angles, x, "split", "native"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_left_to_the_definition() -> None:
    x, angles = torch.ones(1, 3, 1, 4), torch.ones(3, 2)
    with pytest.raises(ValueError, match="the angles require a gradient"):
        rotary(x, angles.clone().requires_grad_(), backend="native")
    with pytest.raises(ValueError, match=r"the angles are torch\.float64"):
        rotary(x, angles.double(), backend="native")
    with pytest.raises(ValueError, match=r"a tensor is torch\.float64"):
        rotary(x.double(), angles, backend="native")


def test_traces_and_checks_as_an_operation() -> None:
    from rxt_kernels.rotary import native

    x, angles = torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(3, 4)
    torch.library.opcheck(native._rotary, (x, angles.cos(), angles.sin(), True, False))
    compiled = torch.compile(lambda x: rotary(x, angles, backend="native"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), rotary(x, angles, backend="native"))


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    x, table = torch.ones(2, 3, 1, 4), torch.ones(3, 2)
    good = {"x": x, "cosine": table, "sine": table, "split": False, "inverse": False, "out": torch.empty(2, 3, 1, 4)}
    extension.rotary(**good)
    extension.rotary(**{**good, "cosine": torch.ones(2, 3, 2), "sine": torch.ones(2, 3, 2)})
    for change, error, message in [
        ({"x": x.double()}, TypeError, "x has a dtype"),
        ({"x": x[0]}, ValueError, "accepted are 4 dimensions"),
        ({"x": torch.ones(2, 3, 1, 5)}, ValueError, "accepted is an even last dimension"),
        ({"x": torch.ones(2, 3, 1, 8)[..., ::2]}, ValueError, "x has stride"),
        ({"cosine": table.double()}, TypeError, "cosine has a dtype"),
        ({"cosine": table.bfloat16()}, TypeError, "cosine is bfloat16; accepted is float32"),
        ({"sine": torch.ones(3, 3)}, ValueError, r"sine has shape \(3, 3\); accepted is \(3, 2\)"),
        ({"sine": torch.ones(2, 3, 2)}, ValueError, r"sine has shape \(2, 3, 2\); accepted is \(3, 2\)"),
        ({"sine": torch.ones(2, 3).t()}, ValueError, "sine of shape .* is not contiguous"),
        ({"out": x.bfloat16()}, TypeError, "out is bfloat16; accepted is float32"),
        ({"out": torch.empty(3, 2, 1, 4).transpose(0, 1)}, ValueError, "out of shape .* is not contiguous"),
    ]:
        with pytest.raises(error, match=message):
            extension.rotary(**{**good, **change})
