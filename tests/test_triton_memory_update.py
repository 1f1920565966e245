"""Memory update, residual gates and memory norms in Triton against their definition, and how many launches they take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, needs_triton

from rxt_kernels import MemoryNormParameters, ResidualGateParameters, memory_norm, memory_update, residual_gate
from rxt_kernels.configs import override_config
from rxt_kernels.memory_update import memory_norm_reference, residual_gate_reference
from rxt_kernels.memory_update.parameters import VARIANTS
from rxt_kernels.testing import (
    GRADIENT_FACTOR,
    VIEWS,
    assert_accurate,
    make_attention,
    make_gate,
    make_memory_update_layers,
    make_norm,
)
from rxt_kernels.triton_runtime import available, count_launches, record_launches

if available():
    from rxt_kernels.memory_update import triton_rows
    from rxt_kernels.memory_update.triton import memory_update_stacked, stack_layers
    from rxt_kernels.memory_update.triton_gate import stacked_gate
    from rxt_kernels.memory_update.triton_norm import shared_norm, stacked_norm
    from rxt_kernels.memory_update.triton_stacked import stack_parameters

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = [
    (kind, per_slot, status, activation)
    for kind, per_slot, status, activation in itertools.product(
        ("static", "elementwise", "linear"), (True, False), ("mean", "linear"), ("sigmoid", "tanh")
    )
    if per_slot or status == "mean" or kind == "linear"
]
NORMS = ["classic-rms", "rms", "adaptive", "positional", "layer"]
SMALL_BLOCKS = {"ROWS": 2, "num_warps": 4, "num_stages": 1}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def convert(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same lists and parameters with other floating point tensors."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(entry, change) for entry in value))
    if isinstance(value, (list, tuple)):
        return [convert(entry, change) for entry in value]
    return value


def leaves_of(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every floating point tensor but running means, with its name."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not name.endswith(("ema_rms", "key_angles")):
            yield name, value
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, entry in zip(value._fields, value, strict=True):
            yield from leaves_of(entry, f"{name}.{field}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from leaves_of(entry, f"{name}[{index}]")


def run(call: Callable[..., Tensor], inputs: dict[str, Any], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The output, the running means after it, and the gradient of everything that can have one, by name."""
    own = {name: convert(value, lambda tensor: tensor.detach().to(dtype).clone()) for name, value in inputs.items()}
    leaves = dict(leaf for name, value in own.items() for leaf in leaves_of(value, name))
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = call(**own, backend=backend)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(out.shape, generator=generator).to(DEVICE, torch.float16).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), gradient, allow_unused=True)
    results = {"out": out.detach()}
    for norm in norms_of(own):
        if norm.ema_rms is not None:
            results[f"running mean {len(results)}"] = norm.ema_rms
    # The gradient of a parameter is that of all layers: of one number alone, the error of eager torch says little.
    gradients: dict[str, list[Tensor]] = {}
    for (name, leaf), gradient_of_leaf in zip(leaves.items(), found, strict=True):
        own_gradient = torch.zeros_like(leaf) if gradient_of_leaf is None else gradient_of_leaf
        gradients.setdefault(re.sub(r"\[\d+\]", "", name), []).append(own_gradient.flatten())
    results |= {f"gradient of {name}": torch.cat(parts) for name, parts in gradients.items()}
    return results


def norms_of(value: Any) -> Iterator[MemoryNormParameters]:
    if isinstance(value, MemoryNormParameters):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from norms_of(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from norms_of(entry)


def compare(call: Callable[..., Tensor], inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """All results of the kernels against the definition in float64, by what eager torch does at this dtype."""
    inputs = {name: convert(value, lambda tensor: tensor.detach().to(dtype)) for name, value in inputs.items()}
    exact = run(call, inputs, torch.float64, "reference")
    eager, fast = run(call, inputs, dtype, "reference"), run(call, inputs, dtype, "triton")
    for name, own in fast.items():
        try:
            assert_accurate(own, eager[name], exact[name], factor=GRADIENT_FACTOR if "gradient" in name else 2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def update_inputs(
    variant: str, *, number: int = 2, batch: int = 2, memory_batch: int | None = None, slots: int = 5, dim: int = 16,
    time: int = 7, masked: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a memory update; a mask has a full row, rows with padding anywhere, and one of padding only."""
    settings = {
        key: options.pop(key) for key in ("padding", "training", "groups", "rotary_layout") if key in options
    }  # fmt: skip
    heads = {"query_heads": 2, "key_value_heads": 1, "head_dim": 8}
    layers, mean_norm = make_memory_update_layers(variant, number, slots, dim, **{**heads, **options})
    mask = torch.rand(batch, time) < 0.6
    mask[0], mask[-1] = True, False
    return {
        "memory": torch.randn(number, batch if memory_batch is None else memory_batch, slots, dim),
        "encoded": torch.randn(number, batch, time, dim),
        "layers": layers,
        "variant": variant,
        "mean_norm": mean_norm,
        "key_mask": mask if masked else None,
        "key_angles": 3 * torch.rand(time, 4),
        **settings,
    }


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Except where a graph is traced, which would take the choice of the device for a part of it."""
    with nullcontext() if request.function is test_compiles_as_one_graph else torch.device(DEVICE):
        yield


def half_open_gate(kind: str, slots: int, dim: int, **options: Any) -> ResidualGateParameters:
    """With small weights: the slope of a gate that is wide open or shut, and so every gradient, is nothing but rounding."""
    made: ResidualGateParameters = convert(make_gate(kind, slots, dim, **options), lambda tensor: 0.4 * tensor)
    return made


def gates_one_by_one(old: Tensor, new: Tensor, gates: list[ResidualGateParameters], backend: str) -> Tensor:
    return torch.stack(
        [residual_gate(*sides, gate, backend=backend) for *sides, gate in zip(old, new, gates, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), GATES)
def test_residual_gate(kind: str, per_slot: bool, status: str, activation: str, dtype: torch.dtype) -> None:
    """Several gates, because a gate may have but one number of a kind, and one error of eager torch is no measure."""
    gates = [half_open_gate(kind, 5, 12, per_slot=per_slot, status=status, activation=activation) for _ in range(4)]
    compare(gates_one_by_one, {"old": draw(4, 2, 5, 12), "new": draw(4, 2, 5, 12), "gates": gates}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "per_slot", "status"), [("elementwise", True, "linear"), ("linear", True, "mean")])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 9, 24)])
def test_residual_gate_sizes_and_dtypes(
    shape: tuple[int, ...], kind: str, per_slot: bool, status: str, dtype: torch.dtype
) -> None:
    gate = make_gate(kind, shape[1], shape[2], per_slot=per_slot, status=status)
    compare(residual_gate, {"old": draw(*shape), "new": draw(*shape), "gate": gate}, dtype)


def test_ungated_residuals() -> None:
    old, new = draw(2, 3, 4), draw(2, 3, 4)
    assert torch.equal(residual_gate(old, new, ResidualGateParameters("add"), backend="triton"), old + new)
    assert torch.equal(residual_gate(old, new, ResidualGateParameters("replace"), backend="triton"), new)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_memory_norm(kind: str, training: bool) -> None:
    compare(
        memory_norm, {"x": 3 * draw(3, 5, 12), "norm": make_norm(kind, 5, 12)._replace(decay=0.7), "training": training}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_memory_norm_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    compare(memory_norm, {"x": draw(2, 3, 24), "norm": make_norm(kind, 3, 24, per_dim_scale=True)}, dtype)


def gates_of_layers(old: Tensor, new: Tensor, gates: list[ResidualGateParameters], backend: str) -> Tensor:
    """old (L, B | 1, S, D), new (G, B, S, D) -> (L, B, S, D): one gate per layer, groups of neighbours share their new."""
    if backend == "triton":
        return stacked_gate(old, new, stack_parameters(gates))
    sides = [(old[i].expand_as(new[0]), new[i * len(new) // len(gates)]) for i in range(len(gates))]
    return torch.stack([residual_gate_reference(*pair, gate) for pair, gate in zip(sides, gates, strict=True)])


@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float32), (4, torch.bfloat16), (4, torch.float16)])
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), [*GATES, ("add", True, "mean", "sigmoid")])
def test_residual_gates_of_all_layers(
    kind: str, per_slot: bool, status: str, activation: str, groups: int, dtype: torch.dtype
) -> None:
    gates = [half_open_gate(kind, 5, 8, per_slot=per_slot, status=status, activation=activation) for _ in range(4)]
    sides = {"old": draw(4, 1 if groups == 4 else 2, 5, 8), "new": draw(groups, 2, 5, 8)}
    compare(gates_of_layers, {**sides, "gates": gates}, dtype)


def norms_of_layers(x: Tensor, norms: list[MemoryNormParameters], training: bool, backend: str) -> Tensor:
    """x (L, B, S, D) -> (L, B, S, D): one norm per layer, or one for all, which is used by one layer after the other."""
    if backend == "reference":
        return torch.stack(
            [memory_norm_reference(layer, norms[i % len(norms)], training) for i, layer in enumerate(x)]
        )  # fmt: skip
    if len(norms) == 1:
        return shared_norm(x, norms[0], training)
    stacked = stack_parameters(norms)
    out = stacked_norm(x, stacked, training)
    for index, norm in enumerate(norms):
        if stacked.ema_rms is not None and norm.ema_rms is not None:
            norm.ema_rms.copy_(stacked.ema_rms[index])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("number", [1, 3])
def test_memory_norms_of_all_layers(number: int, kind: str, training: bool, dtype: torch.dtype) -> None:
    norms = [make_norm(kind, 5, 8)._replace(decay=0.7) for _ in range(number)]
    compare(norms_of_layers, {"x": 2 * draw(3, 2, 5, 8), "norms": norms, "training": training}, dtype)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    """The root of the root of zero has no slope; whatever it is taken for, nothing may become NaN."""
    x = torch.zeros(1, 2, 8, requires_grad=True)
    for kind in NORMS:
        out = memory_norm(x, make_norm(kind, 2, 8), backend="triton")
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_many_blocks_and_programs_that_walk_over_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "MOST_BACKWARD_PROGRAMS", 2)
    with (
        override_config("memory_update_gate_fwd", SMALL_BLOCKS),
        override_config("memory_update_gate_bwd", SMALL_BLOCKS),
    ):
        for kind, status in (("elementwise", "linear"), ("linear", "linear")):
            gate = make_gate(kind, 5, 12, status=status)
            compare(residual_gate, {"old": draw(3, 5, 12), "new": draw(3, 5, 12), "gate": gate})
    with (
        override_config("memory_update_norm_fwd", SMALL_BLOCKS),
        override_config("memory_update_norm_bwd", SMALL_BLOCKS),
    ):
        for kind in NORMS:
            compare(memory_norm, {"x": draw(3, 5, 12), "norm": make_norm(kind, 5, 12)})


@pytest.mark.parametrize("kind", ["adaptive", "positional"])
def test_backward_after_a_second_training_step(kind: str) -> None:
    """The in-place update of a running mean must not spoil a graph that was built before it."""
    norm = make_norm(kind, 4, 8)
    x = draw(2, 4, 8).requires_grad_()
    for training in (True, False):
        first = memory_norm(x, norm, training=training, backend="triton")
        memory_norm(2 * x.detach(), norm, training=True, backend="triton")
        assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, dtype: torch.dtype) -> None:
    groups = {"groups": 2, "number": 4} if variant.startswith("grouped") else {"number": 3}
    compare(memory_update, update_inputs(variant, **groups), dtype)


def test_every_layer_replaced() -> None:
    inputs = update_inputs("grouped-self-interlayer", number=4, groups=2, dim=8, time=3)
    replace = ResidualGateParameters("replace")
    inputs["layers"] = [
        layer._replace(residual_gate=replace, context_gate=replace, interlayer_gate=replace)
        for layer in inputs["layers"]
    ]
    compare(memory_update, inputs)


@pytest.mark.parametrize(("norm", "gate"), [("positional", "linear"), ("adaptive", "static")])
def test_training_updates_running_means(norm: str, gate: str) -> None:
    """Once per norm; that of the mean memory once per group."""
    options = {"norm": norm, "gate": gate, "activation": "tanh", "training": True}
    compare(memory_update, update_inputs("grouped-self-interlayer", number=4, groups=2, time=3, **options))


@pytest.mark.parametrize("padding", ["mask", "dilute"])
@pytest.mark.parametrize("variant", ["simple", "interlayer"])
def test_padding(variant: str, padding: str) -> None:
    compare(memory_update, update_inputs(variant, batch=3, masked=True, padding=padding))


@pytest.mark.parametrize("padding", ["mask", "dilute"])
@pytest.mark.parametrize("variant", ["simple", "gated-self-interlayer"])
def test_what_padding_holds_is_gone_and_rows_of_padding_keep_their_memory(variant: str, padding: str) -> None:
    inputs = update_inputs(variant, batch=3, masked=True, padding=padding)
    hidden = ~inputs["key_mask"][None, :, :, None].expand(2, 3, 7, 1)
    inputs["encoded"].requires_grad_()
    clean = memory_update(**inputs, backend="triton")
    inputs["encoded"] = inputs["encoded"].detach().masked_fill(hidden, float("nan")).requires_grad_()
    poisoned = memory_update(**inputs, backend="triton")
    assert torch.equal(poisoned, clean)
    assert torch.equal(poisoned[:, -1], inputs["memory"][:, -1])
    gradient = torch.autograd.grad(poisoned.sum(), inputs["encoded"])[0]
    assert gradient.isfinite().all()
    assert not gradient.masked_select(hidden).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_batch_one_is_shared(variant: str) -> None:
    inputs = update_inputs(variant, batch=3, memory_batch=1, masked=True, gated_attention=True)
    compare(memory_update, inputs)
    alone = memory_update(**inputs, backend="triton")
    inputs["memory"] = inputs["memory"].expand(-1, 3, -1, -1)
    torch.testing.assert_close(memory_update(**inputs, backend="triton"), alone)


@pytest.mark.parametrize(
    ("variant", "layout", "heads"),
    [("self", "split", (4, 2)), ("self", "interleaved", (1, 2)), ("interlayer", "split", (1, 2))],
)
def test_heads_layouts_and_gated_attention(variant: str, layout: str, heads: tuple[int, int]) -> None:
    inputs = update_inputs(
        variant, query_heads=heads[0], key_value_heads=heads[1], gated_attention=True, rotary_layout=layout, masked=True
    )
    inputs["key_angles"] = 3 * torch.rand(2, 7, 4)
    compare(memory_update, inputs)


def test_attention_without_output_bias() -> None:
    inputs = update_inputs("simple", masked=True)
    inputs["layers"] = [layer._replace(attention=make_attention(16, 2, 2, 8, bias=False)) for layer in inputs["layers"]]
    compare(memory_update, inputs)


@pytest.mark.parametrize(("slots", "time", "number"), [(1, 1, 1), (3, 1, 2), (9, 9, 1)])
@pytest.mark.parametrize("variant", ["simple", "self", "gated-self-interlayer"])
def test_odd_sizes(variant: str, slots: int, time: int, number: int) -> None:
    inputs = update_inputs(variant, slots=slots, time=time, number=number, dim=24)
    torch.testing.assert_close(
        memory_update(**inputs, backend="triton"), memory_update(**inputs, backend="reference"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    inputs = update_inputs("gated-self-interlayer", masked=True, norm="layer")
    expected = memory_update(**inputs, backend="reference")
    strided = {
        name: convert(inputs[name], VIEWS[view]) for name in ("memory", "encoded", "key_angles", "layers", "mean_norm")
    }
    torch.testing.assert_close(memory_update(**{**inputs, **strided}, backend="triton"), expected)
    gate, norm = convert(make_gate("linear", 5, 16, status="linear"), VIEWS[view]), make_norm("positional", 5, 16)
    old, new = VIEWS[view](draw(2, 5, 16)), draw(5, 2, 16).transpose(0, 1)
    torch.testing.assert_close(residual_gate(old, new, gate, backend="triton"), residual_gate(old, new, gate))
    norm = convert(norm, VIEWS[view])
    torch.testing.assert_close(memory_norm(old, norm, backend="triton"), memory_norm(old, norm))


def test_gradients_of_expanded_outputs() -> None:
    inputs = update_inputs("interlayer", memory_batch=1)
    memory = inputs["memory"].requires_grad_()
    fast = torch.autograd.grad(memory_update(**inputs, backend="triton").sum(), memory)
    slow = torch.autograd.grad(memory_update(**inputs, backend="reference").sum(), memory)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_layers_stacked_once_are_used_again() -> None:
    inputs = update_inputs("interlayer", masked=True)
    stacked = stack_layers(inputs["layers"])
    own = [inputs[name] for name in ("memory", "encoded")]
    rest = {name: inputs[name] for name in ("mean_norm", "key_mask", "key_angles")}
    expected = memory_update(**inputs, backend="triton")
    for _ in range(2):
        assert torch.equal(memory_update_stacked(*own, stacked, **rest), expected)


def test_under_autocast() -> None:
    inputs = update_inputs("gated-self-interlayer")
    exact = memory_update(
        **{name: convert(value, Tensor.double) for name, value in inputs.items()}, backend="reference"
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        eager = memory_update(**inputs, backend="reference")
        fast = memory_update(**inputs, backend="triton")
    assert_accurate(fast, eager, exact)


class CountOperations(TorchDispatchMode):
    """Counts torch's operations that are no views; one of this package's counts as one, its kernels are counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [
    {"gate": "elementwise"},
    {"gate": "linear", "status": "linear", "norm": "positional", "training": True, "gated_attention": True},
    {"gate": "elementwise", "per_slot": False, "norm": "adaptive", "training": True},
])  # fmt: skip
@pytest.mark.parametrize("variant", VARIANTS)
def test_launches_do_not_grow_with_layers(variant: str, options: dict[str, Any]) -> None:
    """Neither those of Triton nor those of torch, neither forward nor backward; nor with groups of layers."""
    counts = []
    for number in (4, 6) if variant.startswith("grouped") else (2, 5):
        groups = {"groups": number // 2} if variant.startswith("grouped") else {}
        inputs = update_inputs(variant, number=number, slots=3, dim=8, time=2, masked=True, **groups, **options)
        leaves = [leaf.requires_grad_() for name, value in inputs.items() for _, leaf in leaves_of(value, name)]
        with record_launches(), count_launches() as forward, CountOperations() as operations:
            out = memory_update(**inputs, backend="triton")
        gradient = torch.ones_like(out)
        with record_launches(), count_launches() as backward, CountOperations() as operations_backward:
            torch.autograd.grad(out, leaves, gradient)
        counts.append((forward, backward, operations.total, operations_backward.total))
    assert counts[0] == counts[1]


def test_launches_of_an_update() -> None:
    """The figure of merit: kernels of this room in an update of the published configuration, for any number of layers."""
    inputs = update_inputs("interlayer", number=3)
    with record_launches(), count_launches() as launches:
        memory_update(**inputs, backend="triton")
    own = {name: count for name, count in launches.items() if name.startswith("_memory_update")}
    assert own == {"_memory_update_norm_fwd_kernel": 4, "_memory_update_gate_fwd_kernel": 2}


def test_operators_are_well_made() -> None:
    old, new, weight = (draw(*shape).requires_grad_() for shape in ((2, 2, 3, 8), (1, 2, 3, 8), (2, 3)))
    status_weight, status_bias = draw(2, 8).requires_grad_(), draw(2, 1).requires_grad_()
    operator = torch.ops.rxt_kernels.residual_gate_triton
    torch.library.opcheck(
        operator, (old, new, weight, None, status_weight, status_bias, "elementwise", True, "sigmoid")
    )
    torch.library.opcheck(operator, (old, new, weight, None, None, None, "static", True, "tanh"))
    matrix, bias = draw(2, 3, 3).requires_grad_(), draw(2, 3).requires_grad_()
    torch.library.opcheck(operator, (old, new, matrix, bias, status_weight, status_bias, "linear", True, "tanh"))
    one = draw(2, 1).requires_grad_()
    torch.library.opcheck(operator, (old, new, one, None, None, None, "elementwise", False, "tanh"))
    scale, mask = draw(2, 8).requires_grad_(), torch.tensor([[True, False, True], [True, True, True]])
    operator = torch.ops.rxt_kernels.memory_norm_triton
    torch.library.opcheck(operator, (old, scale, None, None, None, None, mask, "classic-rms"))
    torch.library.opcheck(operator, (old, scale, one, status_weight, draw(2, 8).requires_grad_(), None, None, "layer"))
    slot_scale, rms = draw(2, 3, 1).requires_grad_(), draw(2, 3).abs()
    torch.library.opcheck(operator, (old, slot_scale, weight, None, None, rms, None, "positional"))


def test_backward_operators_are_well_made() -> None:
    gradient, old, new = draw(2, 2, 3, 8), draw(2, 2, 3, 8), draw(1, 2, 3, 8)
    before, status, weight = draw(2, 2, 3), draw(2, 2, 3), draw(2, 3)
    tests = ("test_schema", "test_faketensor")
    operator = torch.ops.rxt_kernels.residual_gate_backward_triton
    arguments = (gradient, before, status, old, new)
    torch.library.opcheck(
        operator, (*arguments, weight, None, draw(2, 8), draw(2, 1), "elementwise", True, "tanh"), test_utils=tests
    )
    torch.library.opcheck(
        operator, (*arguments, draw(2, 3, 3), draw(2, 3), None, None, "linear", True, "tanh"), test_utils=tests
    )
    operator = torch.ops.rxt_kernels.memory_norm_backward_triton
    columns = [draw(2, 8) for _ in range(3)]
    torch.library.opcheck(
        operator, (gradient, old, columns[0], draw(2, 1), *columns[1:], None, None, "layer"), test_utils=tests
    )
    torch.library.opcheck(
        operator, (gradient, old, columns[0], None, None, None, None, None, "classic-rms"), test_utils=tests
    )


def test_compiles_as_one_graph() -> None:
    with torch.device(DEVICE):
        inputs = update_inputs("gated-self-interlayer", masked=True, norm="positional", training=True)
    rest = {name: value for name, value in inputs.items() if name not in ("memory", "encoded")}

    def update(memory: Tensor, encoded: Tensor) -> Tensor:
        return memory_update(memory, encoded, **rest, backend="triton")

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    before = [norm.ema_rms.clone() for norm in norms_of(rest) if norm.ema_rms is not None]
    actual = compiled(inputs["memory"], inputs["encoded"])
    after = [norm.ema_rms for norm in norms_of(rest) if norm.ema_rms is not None]
    advanced = [mean.clone() for mean in after]
    for mean, start in zip(after, before, strict=True):
        mean.copy_(start)
    torch.testing.assert_close(actual, update(inputs["memory"], inputs["encoded"]))
    torch.testing.assert_close(advanced, after)


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    inputs = update_inputs("simple")
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        memory_update(**inputs, attention_dropout=0.1, training=True, backend="triton")
    layers = inputs["layers"]
    mixed = [layers[0], layers[1]._replace(residual_gate=make_gate("linear", 5, 16))]
    with pytest.raises(ValueError, match=r"layers\[1\]\.residual_gate\.kind is 'linear' where layers\[0\] has"):
        memory_update(**{**inputs, "layers": mixed}, backend="triton")
    mixed = [layers[0], layers[1]._replace(attention=make_attention(16, 4, 2, 8))]
    with pytest.raises(ValueError, match=r"layers\[1\]\.attention\."):
        memory_update(**{**inputs, "layers": mixed}, backend="triton")
    shared = make_norm("adaptive", 5, 16)
    same = [layer._replace(memory_norm=shared) for layer in layers]
    with pytest.raises(ValueError, match="layers share a running mean"):
        memory_update(**{**inputs, "layers": same}, training=True, backend="triton")
    wide = draw(1, 1, 16385)
    with pytest.raises(ValueError, match="at most 16384"):
        residual_gate(wide, wide, ResidualGateParameters("add"), backend="triton")
    assert shared.ema_rms is not None
    with pytest.raises(ValueError, match="ema_rms requires a gradient"):
        memory_norm(draw(1, 5, 16), shared._replace(ema_rms=shared.ema_rms.clone().requires_grad_()), backend="triton")
