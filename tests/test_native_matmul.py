"""The native matrix product on packed weights, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxt_kernels.native_runtime import available

if available():
    from rxt_kernels.packed_weights import pack_weights, packed_product
from rxt_kernels.testing import assert_accurate, strided_view

pytestmark = pytest.mark.usefixtures("every_instruction_set")

# (rows, outputs, inputs): ones, odd sizes, one past a panel and a tile, decode and prefill of published shapes.
SHAPES = ((1, 1, 1), (2, 17, 3), (13, 33, 31), (7, 16, 64), (1, 200, 256), (25, 96, 128), (100, 40, 65), (0, 8, 8))


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    a, matrix, bias = _draw(rows, inputs, seed=0), _draw(outputs, inputs, seed=1), _draw(outputs, seed=2)
    actual = packed_product(a, pack_weights(matrix, "float32"), bias)
    assert_accurate(actual, a @ matrix.t() + bias, a.double() @ matrix.double().t() + bias.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_weights_are_exact_products_of_rounded_weights(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    a, matrix = _draw(rows, inputs, seed=0), _draw(outputs, inputs, seed=1).bfloat16()
    actual = packed_product(a, pack_weights(matrix, "bfloat16"))
    assert torch.equal(actual, packed_product(a, pack_weights(matrix.float(), "bfloat16")))
    assert_accurate(actual, a @ matrix.float().t(), a.double() @ matrix.double().t())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_have_half_a_step_of_error(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    matrix = _draw(outputs, inputs, seed=1)
    packed = pack_weights(matrix, "int8")
    assert packed.scales is not None
    unpacked = packed_product(torch.eye(inputs), packed).t()
    steps = matrix.abs().amax(dim=1, keepdim=True) / 127
    assert ((unpacked - matrix).abs() <= 0.501 * steps).all()
    a = _draw(rows, inputs, seed=0)
    assert_accurate(packed_product(a, packed), a @ unpacked.t(), a.double() @ unpacked.double().t())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_strides_of_the_source_do_not_matter(precision: str) -> None:
    matrix = _draw(19, 23, seed=3)
    expected = pack_weights(matrix, precision)
    for view in (matrix.t().contiguous().t(), strided_view(matrix)):
        packed = pack_weights(view, precision)
        assert torch.equal(packed.data, expected.data)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="precision is 'int4'"):
        pack_weights(torch.ones(2, 2), "int4")
    with pytest.raises(ValueError, match="matrix holds NaN or infinity"):
        pack_weights(torch.tensor([[1.0, float("nan")]]), "int8")
    with pytest.raises(ValueError, match=r"matrix has shape \(2,\)"):
        pack_weights(torch.ones(2), "int8")
    with pytest.raises(TypeError, match="source has a dtype"):
        pack_weights(torch.ones(2, 2, dtype=torch.float64), "float32")
    with pytest.raises(ValueError, match="weights has shape"):
        packed_product(torch.ones(1, 3), pack_weights(torch.ones(2, 2), "float32"))
