"""Memory norms, residual gates and the memory update by the native kernels, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels import memory_norm, memory_update, native_runtime, residual_gate
from rxt_kernels.memory_update.parameters import VARIANTS
from rxt_kernels.testing import (
    GRADIENT_FACTOR,
    VIEWS,
    assert_accurate,
    make_gate,
    make_memory_update_layers,
    make_norm,
)

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
NORMS = ("classic-rms", "rms", "adaptive", "positional", "layer")
GATES = [
    (kind, per_slot, status, activation)
    for kind, per_slot, status, activation in itertools.product(
        ("add", "replace", "static", "elementwise", "linear"), (True, False), ("mean", "linear"), ("sigmoid", "tanh")
    )
    if per_slot or status == "mean" or kind == "linear"
]
# One value, odd sizes, one past a vector, a width below a vector.
SHAPES = ((1, 1, 1), (2, 5, 7), (1, 17, 33), (3, 8, 16))


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same parameters with another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(entry, dtype) for entry in value))
    return [_cast(entry, dtype) for entry in value] if isinstance(value, list) else value


def _compare(call: Callable[..., Tensor], dtype: torch.dtype, *arguments: Any) -> None:
    rounded = [_cast(argument, dtype) for argument in arguments]
    exact = call(*(_cast(argument, torch.float64) for argument in rounded), backend="reference")
    eager, actual = call(*rounded, backend="reference"), call(*rounded, backend="native")
    assert_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), GATES)
def test_gate(kind: str, per_slot: bool, status: str, activation: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        gate = make_gate(kind, *shape[1:], per_slot=per_slot, status=status, activation=activation)
        _compare(residual_gate, dtype, _draw(*shape), _draw(*shape, seed=1), gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_dim_scale", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_norm(kind: str, per_dim_scale: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        norm = make_norm(kind, *shape[1:], per_dim_scale=per_dim_scale)
        # bfloat16 eager rounds in between, which the definition in float64 does not: small widths would be all rounding.
        _compare(memory_norm, dtype, 2.0 * _draw(*shape) + 0.5, norm)


@pytest.mark.parametrize("view", VIEWS)
def test_layout_does_not_matter(view: str) -> None:
    old, new, gate, norm = _draw(2, 5, 12), _draw(2, 5, 12, seed=1), make_gate("linear", 5, 12), make_norm("rms", 5, 12)
    make = VIEWS[view]
    expected = residual_gate(old, new, gate, backend="native"), memory_norm(old, norm, backend="native")
    actual = residual_gate(make(old), make(new), gate, backend="native"), memory_norm(make(old), norm, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def _update(variant: str, batch: int = 2, **options: Any) -> dict[str, Any]:
    layers, mean_norm = make_memory_update_layers(
        variant, 4, 9, 12, query_heads=4, key_value_heads=2, generator=torch.Generator().manual_seed(3), **options
    )
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])[:batch]
    return {
        "memory": _draw(4, batch, 9, 12),
        "encoded": _draw(4, batch, 7, 12, seed=1),
        "layers": layers,
        "variant": variant,
        "mean_norm": mean_norm,
        "groups": 2 if variant == "grouped-self-interlayer" else 1,
        "key_mask": mask,
        "key_angles": _draw(7, 2, seed=2).abs(),
    }


def _run(inputs: dict[str, Any], dtype: torch.dtype, backend: str) -> Tensor:
    return memory_update(**{name: _cast(value, dtype) for name, value in inputs.items()}, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated_attention", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_update(variant: str, gated_attention: bool, dtype: torch.dtype) -> None:
    for batch, padding in ((3, "mask"), (3, "dilute"), (1, "mask")):
        inputs = _update(variant, batch, gate="linear", gated_attention=gated_attention) | {"padding": padding}
        inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
        assert_accurate(
            _run(inputs, dtype, "native"), _run(inputs, dtype, "reference"), _run(inputs, torch.float64, "reference")
        )


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("norm", NORMS)
def test_update_with_every_norm_and_one_memory_for_a_batch(norm: str, layout: str) -> None:
    inputs = _update("gated-self-interlayer", norm=norm, gate="elementwise") | {"rotary_layout": layout}
    inputs["memory"] = inputs["memory"][:, :1]
    assert_accurate(
        _run(inputs, torch.float32, "native"),
        _run(inputs, torch.float32, "reference"),
        _run(inputs, torch.float64, "reference"),
    )


def test_what_padding_holds_is_never_seen() -> None:
    inputs = _update("interlayer")
    expected = _run(inputs, torch.float32, "native")
    inputs["encoded"] = torch.where(inputs["key_mask"][None, :, :, None], inputs["encoded"], float("nan"))
    assert torch.equal(_run(inputs, torch.float32, "native"), expected)


def test_training_updates_running_means_like_the_definition() -> None:
    found = {}
    for backend in ("native", "reference"):
        inputs = _update("self", norm="positional")
        out = memory_update(**inputs, training=True, backend=backend)
        found[backend] = [out, *(layer.memory_norm.ema_rms for layer in inputs["layers"])]
    for actual, expected in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str) -> None:
    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = {name: _cast(value, dtype) for name, value in _update(variant, gate="linear").items()}
        inputs["memory"].requires_grad_()
        inputs["encoded"].requires_grad_()
        weights = [layer.attention.query.requires_grad_() for layer in inputs["layers"]]
        out = memory_update(**inputs, backend=backend)
        found = torch.autograd.grad(out.square().sum(), [inputs["memory"], inputs["encoded"], *weights])
        return [found[0], found[1], torch.stack(found[2:])]

    results = [gradients(torch.float32, "native"), gradients(torch.float32, "reference")]
    for actual, eager, exact in zip(*results, gradients(torch.float64, "reference"), strict=True):
        assert_accurate(actual, eager, exact, factor=GRADIENT_FACTOR)


def test_the_same_for_every_number_of_threads() -> None:
    old, new, gate = _draw(2, 300, 64), _draw(2, 300, 64, seed=1), make_gate("linear", 300, 64)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(residual_gate(old, new, gate, backend="native"))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_refusals() -> None:
    extension, x = native_runtime.extension, torch.ones(1, 2, 4)
    good = [x, x, "linear", False, True, torch.ones(4), torch.ones(2), None, 0.0, torch.ones(1, 2), x.clone()]
    extension.residual_gate(*good)
    for index, value, error, message in [
        (1, torch.ones(1, 2, 5), ValueError, "new has shape"),
        (2, "cubic", ValueError, "kind is 'cubic'"),
        (5, None, ValueError, "weight is given for every kind but add"),
        (5, torch.ones(3), ValueError, r"weight has shape \(3,\); accepted is \(4,\)"),
        (9, torch.ones(1, 3), ValueError, "status has shape"),
    ]:
        with pytest.raises(error, match=message):
            extension.residual_gate(*good[:index], value, *good[index + 1 :])
    with pytest.raises(ValueError, match="scale and gate are given always"):
        extension.memory_norm(x, True, torch.ones(4), torch.ones(1), None, None, None, False, False, x.clone())
