"""Memory norms, residual gates and the memory update by the native kernels, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels import memory_norm, memory_update, native_runtime, residual_gate
from rxt_kernels.memory_update import native_gate, native_norm
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
    if isinstance(value, dict):
        return {name: _cast(entry, dtype) for name, entry in value.items()}
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


def _gradients(inputs: Any, call: Callable[[Any], Tensor], rounded: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of all tensors in `inputs` but running means; that of the output is random, and rounded first."""
    leaves: list[Tensor] = []

    def leaf(value: Any, name: str = "") -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or name in ("ema_rms", "key_angles"):
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(leaf, value, value._fields))
        if isinstance(value, dict):
            return {name: leaf(entry, name) for name, entry in value.items()}
        return [leaf(entry) for entry in value] if isinstance(value, list) else value

    out = call(leaf(inputs))
    weights = _draw(*out.shape, seed=9).to(rounded).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True))  # type: ignore[arg-type]


def _by_shape(gradients: list[Tensor]) -> list[Tensor]:
    """Those of one shape as one tensor."""
    shapes = sorted({gradient.shape for gradient in gradients})
    return [torch.stack([gradient for gradient in gradients if gradient.shape == shape]) for shape in shapes]


def _compare_gradients(
    inputs: Any, dtype: torch.dtype, call: Callable[[Any, str], Tensor], by_shape: bool = False
) -> None:
    """By shape: a scalar's gradient in an update sums rounded ones that cancel; it is compared beside all of its kind."""
    rounded = _cast(inputs, dtype)
    actual, eager, exact = (
        _gradients(_cast(rounded, kind), lambda value, backend=backend: call(value, backend), dtype)  # type: ignore[misc]
        for kind, backend in ((dtype, "native"), (dtype, "reference"), (torch.float64, "reference"))
    )
    if by_shape:
        actual, eager, exact = _by_shape(actual), _by_shape(eager), _by_shape(exact)
    for own, definition, wide in zip(actual, eager, exact, strict=True):
        if wide is not None:
            assert_accurate(own, definition, wide, factor=GRADIENT_FACTOR)


def _gate(inputs: Any, backend: str) -> Tensor:
    return residual_gate(*inputs, backend=backend)


def _norm(inputs: Any, backend: str) -> Tensor:
    return memory_norm(*inputs, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), GATES)
def test_gradients_of_gates(kind: str, per_slot: bool, status: str, activation: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        gate = make_gate(kind, *shape[1:], per_slot=per_slot, status=status, activation=activation)
        _compare_gradients([_draw(*shape), _draw(*shape, seed=1), gate], dtype, _gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "per_dim_scale"), [*((kind, False) for kind in NORMS), ("positional", True)])
def test_gradients_of_norms(kind: str, per_dim_scale: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        norm = make_norm(kind, *shape[1:], per_dim_scale=per_dim_scale)
        _compare_gradients([2.0 * _draw(*shape) + 0.5, norm], dtype, _norm)


@pytest.mark.parametrize("kind", ["adaptive", "positional"])
def test_gradients_in_training(kind: str) -> None:
    """The running mean is updated, and the backward pass uses the one of its own forward pass."""
    inputs = [_draw(2, 5, 7), make_norm(kind, 5, 7)]

    def twice(value: Any, backend: str) -> Tensor:
        x, norm = value
        norm = norm._replace(ema_rms=norm.ema_rms.clone())
        first = memory_norm(x, norm, training=True, backend=backend)
        return first + memory_norm(3.0 * x, norm, training=True, backend=backend)

    _compare_gradients(inputs, torch.float32, twice)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    """The root of the root of zero has no slope; whatever it is taken for, nothing may become NaN."""
    gradients = _gradients([torch.zeros(1, 2, 9), make_norm("rms", 2, 9)], lambda inputs: _norm(inputs, "native"))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_of_views_and_of_one_memory_for_a_batch() -> None:
    gate, norm = make_gate("linear", 5, 12), make_norm("layer", 5, 12)
    for make in VIEWS.values():

        def call(inputs: Any, backend: str, make: Callable[[Tensor], Tensor] = make) -> Tensor:
            old, new, *rest = inputs
            old = memory_norm(old, rest[1], backend=backend).expand_as(new)
            out = residual_gate(old, make(new), rest[0], backend=backend)
            return out.transpose(1, 2)

        _compare_gradients([_draw(1, 5, 12), _draw(2, 5, 12, seed=1), gate, norm], torch.float32, call)


def test_operations_are_registered_as_torch_expects() -> None:
    old, new = _draw(2, 5, 7).requires_grad_(), _draw(2, 5, 7, seed=1).requires_grad_()
    gate, norm = make_gate("linear", 5, 7, status="linear"), make_norm("layer", 5, 7)
    learned = gate.weight, gate.bias, gate.status_weight, gate.status_bias
    torch.library.opcheck(native_gate._gate, (old, new, *learned, "linear", True, "tanh"))
    torch.library.opcheck(native_norm._norm, (old, norm.scale, norm.gate, norm.weight, norm.bias, None, False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_an_update(variant: str) -> None:
    def call(inputs: Any, backend: str) -> Tensor:
        return memory_update(**inputs, backend=backend)

    _compare_gradients(_update(variant, gate="linear", norm="rms"), torch.float32, call, by_shape=True)


def test_the_same_for_every_number_of_threads() -> None:
    inputs = [_draw(2, 300, 64), _draw(2, 300, 64, seed=1), make_gate("linear", 300, 64, status="linear")]
    norm_inputs = [inputs[0], make_norm("layer", 300, 64)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        gradients = _gradients(inputs, lambda value: _gate(value, "native"))
        gradients += _gradients(norm_inputs, lambda value: _norm(value, "native"))
        found.append([_gate(inputs, "native"), _norm(norm_inputs, "native"), *gradients])
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_refusals() -> None:
    extension, x = native_runtime.extension, torch.ones(1, 2, 4)
    good = [x, x, "linear", False, True, torch.ones(4), torch.ones(2), None, 0.0, torch.ones(1, 2), None, x.clone()]
    extension.residual_gate(*good)
    for index, value, error, message in [
        (1, torch.ones(1, 2, 5), ValueError, "new has shape"),
        (2, "cubic", ValueError, "kind is 'cubic'"),
        (5, None, ValueError, "weight is given for every kind but add"),
        (5, torch.ones(3), ValueError, r"weight has shape \(3,\); accepted is \(4,\)"),
        (9, torch.ones(1, 3), ValueError, "status has shape"),
        (10, torch.ones(1, 3), ValueError, "before has shape"),
    ]:
        with pytest.raises(error, match=message):
            extension.residual_gate(*good[:index], value, *good[index + 1 :])
    for before, bias_gradient, message in [
        (None, torch.ones(2), "weight and before are given for a backward pass"),
        (torch.ones(1, 2), None, "gradients are given for every parameter that there is, and for no other"),
    ]:
        gradients = [x.clone(), x.clone(), torch.ones(4), bias_gradient, None, None]
        with pytest.raises(ValueError, match=message):
            extension.residual_gate_backward(*good[:10], before, x, *gradients)
    with pytest.raises(ValueError, match="scale and gate are given always"):
        extension.memory_norm(x, True, torch.ones(4), torch.ones(1), None, None, None, False, False, x.clone())


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_and_its_parts_agree(variant: str) -> None:
    """Without gradients all layers are written by one call, with them part by part."""
    for batch, slots, time, masked in ((1, 70, 130, False), (2, 9, 7, True), (1, 3, 1, False)):
        layers, mean_norm = make_memory_update_layers(
            variant, 4, slots, 32, query_heads=4, key_value_heads=2, generator=torch.Generator().manual_seed(3)
        )
        inputs = {
            "memory": _draw(4, 1, slots, 32), "encoded": _draw(4, batch, time, 32, seed=1), "layers": layers,
            "variant": variant, "mean_norm": mean_norm, "groups": 2 if variant == "grouped-self-interlayer" else 1,
            "key_mask": torch.arange(time) < torch.tensor([[time], [2]]) if masked else None,
        }  # fmt: skip
        with torch.no_grad():
            whole = memory_update(**inputs, backend="native")
        parts = memory_update(**{**inputs, "encoded": inputs["encoded"].requires_grad_()}, backend="native")
        assert parts.requires_grad
        torch.testing.assert_close(whole, parts.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["mask", "dilute"])
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), GATES)
def test_one_call_with_every_gate(kind: str, per_slot: bool, status: str, activation: str, padding: str) -> None:
    """One memory for a batch, so that every gate is called once per row of it."""
    layers, mean_norm = make_memory_update_layers(
        "gated-self-interlayer", 2, 9, 12, query_heads=2, key_value_heads=4,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    gate = make_gate(kind, 9, 12, per_slot=per_slot, status=status, activation=activation)
    inputs = _update("gated-self-interlayer", 3) | {
        "memory": _draw(2, 1, 9, 12), "encoded": _draw(2, 3, 7, 12, seed=1), "mean_norm": mean_norm, "padding": padding,
        "layers": [layer._replace(residual_gate=gate, context_gate=gate, interlayer_gate=gate) for layer in layers],
        "key_angles": None,
    }  # fmt: skip
    assert_accurate(
        _run(inputs, torch.float32, "native"),
        _run(inputs, torch.float32, "reference"),
        _run(inputs, torch.float64, "reference"),
    )


@pytest.mark.parametrize("gated_attention", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_written_for_an_empty_batch(variant: str, gated_attention: bool) -> None:
    inputs = _update(variant, 1, gated_attention=gated_attention)
    inputs |= {"encoded": inputs["encoded"][:, :0], "key_mask": None}
    assert _run(inputs, torch.float32, "native").shape == (4, 0, 9, 12)


def test_defaults_of_torch_do_not_matter() -> None:
    inputs = _update("interlayer")
    expected = _run(inputs, torch.float32, "native")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(_run(inputs, torch.float32, "native"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_bits_of_an_update_do_not_depend_on_threads() -> None:
    inputs = _update("gated-self-interlayer")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_run(inputs, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
