"""Memory update, residual gates and memory norms against a literal numpy version (memory_update_oracle.py)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_update_oracle import gate_oracle, memory_update_oracle, norm_oracle
from torch import Tensor

from rxt_kernels import (
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
    memory_norm,
    memory_update,
    residual_gate,
)
from rxt_kernels.memory_update.parameters import VARIANTS
from rxt_kernels.memory_update.reference import memory_update_reference
from rxt_kernels.testing import (
    VIEWS,
    assert_accurate,
    make_gate,
    make_memory_update_layers,
    make_norm,
)

GATES = [
    (kind, per_slot, status, activation)
    for kind, per_slot, status, activation in itertools.product(
        ("static", "elementwise", "linear"), (True, False), ("mean", "linear"), ("sigmoid", "tanh")
    )
    if per_slot or status == "mean" or kind == "linear"
]
NORMS = ["classic-rms", "rms", "adaptive", "positional", "layer"]


def close(actual: Tensor, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(np.asarray(expected)).to(dtype))


@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), GATES)
@pytest.mark.parametrize("slots", [1, 5])
def test_residual_gate(kind: str, per_slot: bool, status: str, activation: str, slots: int) -> None:
    gate = make_gate(kind, slots, 6, per_slot=per_slot, status=status, activation=activation)
    old, new = torch.randn(3, slots, 6), torch.randn(3, slots, 6)
    expected = np.stack([gate_oracle(old[b].double().numpy(), new[b].double().numpy(), gate) for b in range(3)])
    close(residual_gate(old, new, gate), expected)


def test_ungated_residuals() -> None:
    old, new = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(residual_gate(old, new, ResidualGateParameters("add")), old + new)
    assert torch.equal(residual_gate(old, new, ResidualGateParameters("replace")), new)


def test_static_gates_ignore_the_slot_status_they_own() -> None:
    """Checkpoints carry such weights (specification 2.10)."""
    old, new = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gate = make_gate("static", 3, 4, status="linear")
    without = gate._replace(status_weight=None, status_bias=None)
    assert torch.equal(residual_gate(old, new, gate), residual_gate(old, new, without))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_dim_scale", [False, True])
def test_memory_norm(kind: str, training: bool, per_dim_scale: bool) -> None:
    norm = make_norm(kind, 5, 6, per_dim_scale=per_dim_scale)._replace(decay=0.7)
    x = torch.randn(3, 5, 6) * 3
    means: dict[int, Any] = {}
    expected = norm_oracle(x.double().numpy(), norm, training, 1.1920929e-07, means)
    before = None if norm.ema_rms is None else norm.ema_rms.clone()
    close(memory_norm(x, norm, training=training), expected)
    if norm.ema_rms is not None:
        assert before is not None
        close(norm.ema_rms, means[id(norm.ema_rms)] if training else before)


@pytest.mark.parametrize("kind", ["adaptive", "positional"])
def test_running_means_are_updated_step_by_step(kind: str) -> None:
    norm = make_norm(kind, 4, 6)
    means: dict[int, Any] = {}
    for _ in range(3):
        x = torch.randn(2, 4, 6)
        expected = norm_oracle(x.double().numpy(), norm, True, 1e-7, means)
        close(memory_norm(x, norm, training=True), expected)
    assert norm.ema_rms is not None
    close(norm.ema_rms, means[id(norm.ema_rms)])


def test_backward_after_a_second_training_step() -> None:
    """The in-place update of a running mean must not spoil a graph that was built before it."""
    norm = make_norm("positional", 4, 6)
    x = torch.randn(2, 4, 6, requires_grad=True)
    first = memory_norm(x, norm, training=True)
    memory_norm(x.detach() * 2, norm, training=True)
    first.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def make(
    variant: str, batch: int = 2, time: int = 7, slots: int = 5, number: int = 4, **options: Any
) -> tuple[Tensor, Tensor, list[MemoryUpdateLayer], MemoryNormParameters | None]:
    """float64 unless told otherwise: nothing but the formula can differ then."""
    dtype = options.setdefault("dtype", torch.float64)
    layers, mean_norm = make_memory_update_layers(variant, number, slots, 8, **options)
    return (
        torch.randn(number, batch, slots, 8, dtype=dtype),
        torch.randn(number, batch, time, 8, dtype=dtype),
        layers,
        mean_norm,
    )


def mask_of(batch: int, time: int) -> Tensor:
    """One full row, one row of padding only, and left, right and inner padding in the others."""
    mask = torch.rand(batch, time) < 0.6
    mask[0] = True
    mask[-1] = False
    return mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kind", "per_slot", "status", "activation"), [*GATES, ("add", True, "mean", "sigmoid")])
def test_every_variant_with_every_gate(variant: str, kind: str, per_slot: bool, status: str, activation: str) -> None:
    memory, encoded, layers, mean_norm = make(
        variant, batch=3, gate=kind, per_slot=per_slot, status=status, activation=activation
    )
    options: dict[str, Any] = {
        "variant": variant,
        "mean_norm": mean_norm,
        "groups": 2 if variant == "grouped-self-interlayer" else 1,
        "key_mask": mask_of(3, 7),
        "key_angles": torch.randn(7, 2, dtype=torch.float64),
    }
    expected, _ = memory_update_oracle(memory, encoded, layers, **options)
    actual = memory_update(memory, encoded, layers, **options)
    torch.testing.assert_close(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_every_variant_with_every_norm(variant: str, norm: str, training: bool) -> None:
    """In training the running means advance too: once per norm, mean_norm once per group."""
    memory, encoded, layers, mean_norm = make(variant, norm=norm)
    options: dict[str, Any] = {
        "variant": variant,
        "mean_norm": mean_norm,
        "groups": 2 if variant == "grouped-self-interlayer" else 1,
        "training": training,
    }
    expected, means = memory_update_oracle(memory, encoded, layers, **options)
    actual = memory_update(memory, encoded, layers, **options)
    torch.testing.assert_close(actual, torch.from_numpy(expected))
    norms = [mean_norm, *(layer.memory_norm for layer in layers), *(layer.context_norm for layer in layers)]
    for one in norms:
        if one is not None and one.ema_rms is not None and training:
            close(one.ema_rms, means[id(one.ema_rms)], torch.float64)
    assert bool(means) is (training and norm in ("adaptive", "positional"))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups: int) -> None:
    memory, encoded, layers, mean_norm = make("grouped-self-interlayer", number=6)
    actual = memory_update(
        memory, encoded, layers, variant="grouped-self-interlayer", mean_norm=mean_norm, groups=groups
    )
    expected, _ = memory_update_oracle(
        memory, encoded, layers, "grouped-self-interlayer", mean_norm=mean_norm, groups=groups
    )
    torch.testing.assert_close(actual, torch.from_numpy(expected))
    if groups == 1:
        one = memory_update(memory, encoded, layers, variant="gated-self-interlayer", mean_norm=mean_norm)
        assert torch.equal(actual, one)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("gated_attention", [False, True])
def test_heads_layouts_and_gated_attention(heads: tuple[int, int], layout: str, gated_attention: bool) -> None:
    memory, encoded, layers, mean_norm = make(
        "interlayer", query_heads=heads[0], key_value_heads=heads[1], gated_attention=gated_attention
    )
    options: dict[str, Any] = {
        "variant": "interlayer",
        "mean_norm": mean_norm,
        "key_angles": torch.randn(2, 7, 2, dtype=torch.float64),
        "rotary_layout": layout,
        "key_mask": mask_of(2, 7),
    }
    expected, _ = memory_update_oracle(memory, encoded, layers, **options)
    actual = memory_update(memory, encoded, layers, **options)
    torch.testing.assert_close(actual, torch.from_numpy(expected))


@pytest.mark.parametrize(("slots", "time", "number"), [(1, 1, 1), (3, 1, 2), (1, 5, 3), (2, 33, 1)])
def test_odd_sizes(slots: int, time: int, number: int) -> None:
    for variant in VARIANTS:
        memory, encoded, layers, mean_norm = make(variant, slots=slots, time=time, number=number)
        expected, _ = memory_update_oracle(memory, encoded, layers, variant, mean_norm)
        actual = memory_update(memory, encoded, layers, variant=variant, mean_norm=mean_norm)
        torch.testing.assert_close(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dilution(variant: str) -> None:
    """Padded rows are zeroed and take their share of the softmax; whatever they held is gone (specification 2.5)."""
    memory, encoded, layers, mean_norm = make(variant, batch=3)
    options: dict[str, Any] = {
        "variant": variant,
        "mean_norm": mean_norm,
        "key_mask": mask_of(3, 7),
        "key_angles": torch.randn(7, 2, dtype=torch.float64),
    }
    expected, _ = memory_update_oracle(memory, encoded, layers, padding="dilute", **options)
    diluted = memory_update(memory, encoded, layers, padding="dilute", **options)
    torch.testing.assert_close(diluted, torch.from_numpy(expected))
    assert not torch.allclose(diluted[:, 1], memory_update(memory, encoded, layers, **options)[:, 1])
    poisoned = encoded.masked_fill(~options["key_mask"][None, :, :, None], float("nan"))
    assert torch.equal(memory_update(memory, poisoned, layers, padding="dilute", **options), diluted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["mask", "dilute"])
def test_rows_of_padding_keep_their_memory(variant: str, padding: str) -> None:
    """Bit for bit, and with finite gradients for the others (specification 7, defect 32)."""
    memory, encoded, layers, mean_norm = make(variant, batch=3)
    mask = torch.tensor([[True] * 7, [False] * 7, [True] + [False] * 6])
    encoded.requires_grad_()
    new = memory_update(memory, encoded, layers, variant=variant, mean_norm=mean_norm, key_mask=mask, padding=padding)
    assert torch.equal(new[:, 1], memory[:, 1])
    assert not torch.equal(new[:, 0], memory[:, 0])
    new.sum().backward()
    assert encoded.grad is not None
    assert encoded.grad.isfinite().all()
    assert not encoded.grad[:, 1].any()
    assert not encoded.grad[:, 2, 1:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_batch_one_is_shared(variant: str) -> None:
    memory, encoded, layers, mean_norm = make(variant, batch=3)
    shared = memory[:, :1]
    options: dict[str, Any] = {"variant": variant, "mean_norm": mean_norm, "key_mask": mask_of(3, 7)}
    actual = memory_update(shared, encoded, layers, **options)
    assert actual.shape == (4, 3, 5, 8)
    torch.testing.assert_close(actual, memory_update(shared.repeat(1, 3, 1, 1), encoded, layers, **options))
    expected, _ = memory_update_oracle(shared, encoded, layers, **options)
    torch.testing.assert_close(actual, torch.from_numpy(expected))


def test_the_old_memory_is_left_alone() -> None:
    memory, encoded, layers, mean_norm = make("interlayer")
    copies = memory.clone(), encoded.clone()
    new = memory_update(memory, encoded, layers, variant="interlayer", mean_norm=mean_norm)
    assert torch.equal(memory, copies[0])
    assert torch.equal(encoded, copies[1])
    assert new.data_ptr() != memory.data_ptr()


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    variant=st.sampled_from(VARIANTS),
    padding=st.sampled_from(["mask", "dilute"]),
)
def test_a_batch_is_its_rows(lengths: list[int], variant: str, padding: str) -> None:
    memory, encoded, layers, mean_norm = make(variant, batch=len(lengths))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    options: dict[str, Any] = {"variant": variant, "mean_norm": mean_norm, "padding": padding}
    together = memory_update(memory, encoded, layers, key_mask=mask, **options)
    for row in range(len(lengths)):
        part = slice(row, row + 1)
        alone = memory_update(memory[:, part], encoded[:, part], layers, key_mask=mask[part], **options)
        torch.testing.assert_close(together[:, part], alone)


@given(length=st.integers(1, 6), padding=st.integers(1, 4), variant=st.sampled_from(VARIANTS))
def test_right_padding_changes_nothing(length: int, padding: int, variant: str) -> None:
    memory, encoded, layers, mean_norm = make(variant, batch=1, time=length + padding)
    mask = torch.arange(length + padding)[None] < length
    angles = torch.randn(length + padding, 2)
    options: dict[str, Any] = {"variant": variant, "mean_norm": mean_norm}
    padded = memory_update(memory, encoded, layers, key_mask=mask, key_angles=angles, **options)
    solo = memory_update(memory, encoded[:, :, :length], layers, key_angles=angles[:length], **options)
    torch.testing.assert_close(padded, solo)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    memory, encoded, layers, mean_norm = make("gated-self-interlayer")
    options: dict[str, Any] = {"variant": "gated-self-interlayer", "mean_norm": mean_norm}
    expected = memory_update(memory, encoded, layers, **options)
    torch.testing.assert_close(memory_update(VIEWS[view](memory), VIEWS[view](encoded), layers, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision(dtype: torch.dtype, norm: str) -> None:
    """Against the textbook formula of one simple layer, written out in eager torch."""
    memory, encoded, layers, _ = make("simple", number=1, norm=norm, gate="elementwise", slots=9, time=17)

    def to(dtype: torch.dtype) -> tuple[Tensor, Tensor, MemoryUpdateLayer]:
        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype)
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*(convert(entry) for entry in value))
            return value

        return convert(memory.half()), convert(encoded.half()), convert(layers[0])

    def naive(memory: Tensor, encoded: Tensor, layer: MemoryUpdateLayer) -> Tensor:
        m, ed, own = memory[0], encoded[0], layer.memory_norm
        if norm == "classic-rms":
            q_in = m * torch.rsqrt(m.square().mean(-1, keepdim=True) + 1.2e-7) * own.weight
        else:
            assert own.gate is not None
            assert own.scale is not None
            if norm == "layer":
                spread = m.var(-1, keepdim=True, unbiased=False)
                y = (m - m.mean(-1, keepdim=True)) * torch.rsqrt(spread + 1e-5) * own.weight + own.bias
            else:
                r = own.ema_rms if norm == "positional" else m.square().mean(-1, keepdim=True).sqrt()
                assert r is not None
                y = m * torch.rsqrt(r + 1e-6)
            y = y * own.scale
            q_in = torch.sigmoid(own.gate) * y + (1 - torch.sigmoid(own.gate)) * m
        e = ed * torch.rsqrt(ed.square().mean(-1, keepdim=True) + 1.2e-7) * layer.input_norm_weight
        a = layer.attention
        q, k, v = ((x @ w.t()).unflatten(-1, (2, 4)) for x, w in ((q_in, a.query), (e, a.key), (e, a.value)))
        share = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", share, v).flatten(-2) @ a.output.t() + a.output_bias
        gate = torch.sigmoid(layer.residual_gate.weight * (m + out).mean(-1, keepdim=True))
        return (gate * out + (1 - gate) * m)[None]

    own_memory, own_encoded, layer = to(dtype)
    exact = naive(*to_double(own_memory, own_encoded, layer))
    actual = memory_update(own_memory, own_encoded, [layer], variant="simple")
    assert actual.dtype is dtype
    assert_accurate(actual, naive(own_memory, own_encoded, layer), exact)


def to_double(*values: Any) -> list[Any]:
    """The same rounded values in float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(convert(entry) for entry in value))
        return value

    return [convert(value) for value in values]


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of nested parameters, running means left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, MemoryNormParameters):
        value = value._replace(ema_rms=None)
    return [t for entry in value for t in tensors_of(entry)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("gate", "norm"), [("linear", "classic-rms"), ("elementwise", "rms"), ("static", "layer")])
def test_gradients(variant: str, gate: str, norm: str) -> None:
    """Of memory, encoded and every parameter; one row of padding among them."""
    layers, mean_norm = make_memory_update_layers(
        variant, 2, 2, 3, query_heads=1, key_value_heads=1, head_dim=2, gate=gate, norm=norm, dtype=torch.float64
    )
    memory = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    encoded = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [t.requires_grad_() for t in tensors_of([layers, mean_norm])]
    mask = torch.tensor([[True, True], [False, False]])

    def run(memory: Tensor, encoded: Tensor, *_: Tensor) -> Tensor:
        return memory_update_reference(memory, encoded, layers, variant, mean_norm, key_mask=mask)

    assert torch.autograd.gradcheck(run, (memory, encoded, *parameters), fast_mode=True)
    out = run(memory, encoded)
    assert all(gradient is not None for gradient in torch.autograd.grad(out.sum(), parameters))


@pytest.mark.parametrize("kind", ["rms", "adaptive", "positional", "layer"])
@pytest.mark.parametrize("training", [False, True])
def test_norm_gradients(kind: str, training: bool) -> None:
    norm = make_norm(kind, 3, 4, dtype=torch.float64)._replace(decay=1.0)  # 1: gradcheck calls it many times.
    leaves = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)]
    leaves += [t.requires_grad_() for t in tensors_of(norm)]
    assert torch.autograd.gradcheck(lambda x, *_: memory_norm(x, norm, training=training), leaves)


def test_dropout_acts_in_training_only() -> None:
    memory, encoded, layers, mean_norm = make("interlayer")
    options: dict[str, Any] = {"variant": "interlayer", "mean_norm": mean_norm, "attention_dropout": 0.5}
    resting = memory_update(memory, encoded, layers, **options)
    assert torch.equal(resting, memory_update(memory, encoded, layers, variant="interlayer", mean_norm=mean_norm))
    assert not torch.allclose(memory_update(memory, encoded, layers, training=True, **options), resting)


def test_autocast() -> None:
    """Parameters and memory stay float32, projections run in bfloat16, the new memory is float32."""
    memory, encoded, layers, mean_norm = make("gated-self-interlayer", dtype=torch.float32)
    options: dict[str, Any] = {"variant": "gated-self-interlayer", "mean_norm": mean_norm}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = memory_update(memory, encoded, layers, **options)
    assert new.dtype is torch.float32
    torch.testing.assert_close(new, memory_update(memory, encoded, layers, **options), atol=0.1, rtol=0.1)


M, ED, LAYERS, MEAN = make("gated-self-interlayer", dtype=torch.float32)
GATE, NORM = make_gate("linear", 5, 8), make_norm("positional", 5, 8)
OLD = torch.ones(2, 5, 8)


def update(memory: Tensor = M, encoded: Tensor = ED, **changes: Any) -> Any:
    options = {"layers": LAYERS, "variant": "gated-self-interlayer", "mean_norm": MEAN} | changes
    layers = options.pop("layers")
    return lambda: memory_update(memory, encoded, layers, **options)


def changed(**changes: Any) -> list[MemoryUpdateLayer]:
    return [*LAYERS[:3], LAYERS[3]._replace(**changes)]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: residual_gate(OLD[0], OLD[0], GATE), ValueError, "old has shape"),
        (lambda: residual_gate(OLD, OLD[:1], GATE), ValueError, "new has shape"),
        (lambda: residual_gate(OLD, OLD.double(), GATE), TypeError, "new is torch.float64"),
        (lambda: residual_gate(OLD, OLD, ("add",)), TypeError, "gate is tuple"),  # type: ignore[arg-type]
        (lambda: residual_gate(OLD, OLD, GATE._replace(kind="soft")), ValueError, "gate.kind is 'soft'"),
        (lambda: residual_gate(OLD, OLD, GATE._replace(activation="relu")), ValueError, "gate.activation is 'relu'"),
        (lambda: residual_gate(OLD, OLD, GATE._replace(weight=None)), ValueError, "gate.weight is None"),
        (lambda: residual_gate(OLD, OLD, GATE._replace(bias=None)), ValueError, "gate.bias is None"),
        (lambda: residual_gate(OLD, OLD, GATE._replace(per_slot=False)), ValueError, "gate.weight has shape"),
        (lambda: residual_gate(OLD, OLD, GATE._replace(kind="add")), ValueError, "gate.weight is given"),
        (
            lambda: residual_gate(OLD, OLD, GATE._replace(status_bias=torch.ones(1))),
            ValueError,
            "gate.status_bias is given",
        ),
        (
            lambda: residual_gate(OLD, OLD, GATE._replace(status_weight=torch.ones(8))),
            ValueError,
            "gate.status_weight has",
        ),
        (lambda: residual_gate(OLD, OLD, make_gate("elementwise", 4, 8)), ValueError, "gate.weight has shape"),
        (
            lambda: residual_gate(OLD, OLD, make_gate("elementwise", 5, 8, per_slot=False, status="linear")),
            ValueError,
            "gate.status_weight is given with per_slot=False",
        ),
        (lambda: memory_norm(OLD[0], NORM), ValueError, "x has shape"),
        (lambda: memory_norm(OLD, GATE), TypeError, "norm is ResidualGateParameters"),  # type: ignore[arg-type]
        (lambda: memory_norm(OLD, NORM._replace(kind="batch")), ValueError, "norm.kind is 'batch'"),
        (lambda: memory_norm(OLD, NORM._replace(decay=1.5)), ValueError, "norm.decay is 1.5"),
        (lambda: memory_norm(OLD, NORM._replace(ema_rms=None)), ValueError, "norm.ema_rms is None"),
        (lambda: memory_norm(OLD, NORM._replace(weight=torch.ones(8))), ValueError, "norm.weight is given"),
        (lambda: memory_norm(OLD, NORM._replace(gate=torch.ones(1))), ValueError, "norm.gate has shape"),
        (
            lambda: memory_norm(OLD, NORM._replace(scale=torch.ones(5, 1).half())),
            TypeError,
            "norm.scale is torch.float16",
        ),
        (lambda: memory_norm(OLD, make_norm("layer", 5, 8)._replace(bias=None)), ValueError, "norm.bias is None"),
        (update(M[0]), ValueError, "memory has shape"),
        (update(M[:3]), ValueError, "memory has shape"),
        (update(M[..., :4]), ValueError, "memory has shape"),
        (update(torch.cat((M, M), 1)), ValueError, "memory has shape"),
        (update(encoded=ED[0]), ValueError, "encoded has shape"),
        (update(encoded=ED.double()), TypeError, "encoded is torch.float64"),
        (update(encoded=ED.to("meta")), ValueError, "encoded is on meta"),
        (update(variant="double"), ValueError, "variant is 'double'"),
        (update(layers=LAYERS[:3]), ValueError, "layers has 3 entries"),
        (update(layers=[1, 2, 3, 4]), TypeError, r"layers\[0\] is int"),
        (update(mean_norm=None), ValueError, "mean_norm is None"),
        (update(variant="self"), ValueError, "mean_norm is given"),
        (update(variant="self", mean_norm=None), ValueError, r"layers\[0\].interlayer_gate is given"),
        (update(variant="interlayer"), ValueError, r"layers\[0\].interlayer_gate is given"),
        (update(layers=changed(interlayer_gate=None)), ValueError, r"layers\[3\].interlayer_gate is missing"),
        (update(layers=changed(context_norm=None)), ValueError, r"layers\[3\].context_norm is missing"),
        (update(layers=changed(input_norm_weight=torch.ones(4))), ValueError, "input_norm_weight has shape"),
        (
            update(layers=changed(memory_norm=NORM._replace(kind="x"))),
            ValueError,
            r"layers\[3\].memory_norm.kind is 'x'",
        ),
        (update(layers=changed(context_gate=GATE._replace(bias=None))), ValueError, "context_gate.bias is None"),
        (
            update(layers=changed(attention=LAYERS[3].attention._replace(head_dim=8))),
            ValueError,
            r"layers\[3\].attention.query has shape",
        ),
        (
            update(layers=changed(attention=LAYERS[3].attention._replace(query_heads=3))),
            ValueError,
            r"layers\[3\].attention has 3 query heads",
        ),
        (update(groups=2), ValueError, "groups is 2; accepted is 1"),
        (update(variant="grouped-self-interlayer", groups=3), ValueError, "groups is 3; accepted is a divisor"),
        (update(variant="grouped-self-interlayer", groups=0), ValueError, "groups is 0"),
        (update(key_mask=torch.ones(2, 7)), TypeError, "key_mask is torch.float32"),
        (update(key_mask=torch.ones(2, 6).bool()), ValueError, "key_mask has shape"),
        (update(key_mask=torch.ones(2, 7, device="meta").bool()), ValueError, "key_mask is on meta"),
        (update(key_angles=torch.ones(6, 2)), ValueError, "key_angles has shape"),
        (update(key_angles=torch.ones(7, 2).long()), TypeError, "key_angles is torch.int64"),
        (update(rotary_layout="half"), ValueError, "rotary_layout is 'half'"),
        (update(padding="zero"), ValueError, "padding is 'zero'"),
        (update(attention_dropout=1.0), ValueError, "attention_dropout is 1.0"),
    ],
)
def test_refusals(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
