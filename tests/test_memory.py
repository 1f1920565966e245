"""Short-term memory, and the networks that write it (spec 2.9 to 2.12; spec 7, defects 17 to 21 and 32)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import alpha, encoder_config, memory_config, refusal
from torch import Tensor

from rxt_model import RxTMemoryAttention
from rxt_model.memory import ShortTermMemory

VARIANTS = ("simple", "self", "interlayer", "gated-self-interlayer", "grouped-self-interlayer")

# -- the state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mean", "deviation"),
    [
        ("standard", 0.0, 1.0),
        ("normal", 0.0, 0.01),
        ("uniform", 0.005, 0.01 / 12**0.5),
        ("ones", 1.0, 0.0),
        ("zeros", 0.0, 0.0),
    ],
)
def test_initialisations(kind: str, mean: float, deviation: float) -> None:
    stm = ShortTermMemory(4, 64, 64, init_type=kind)
    assert stm.memory.shape == (4, 1, 64, 64)
    count = stm.memory.numel()
    assert abs(stm.memory.mean().item() - mean) <= 5 * deviation / count**0.5 + 1e-6
    assert abs(stm.memory.std().item() - deviation) <= 0.03 * deviation
    if kind == "uniform":
        assert stm.memory.min() >= 0.0
        assert stm.memory.max() < 0.01
    for layer in range(3):
        assert deviation == 0.0 or not torch.equal(stm.memory[layer], stm.memory[layer + 1])


def test_reset_draws_anew_repeats_by_seed_and_keeps_what_is_not_asked_for() -> None:
    stm = ShortTermMemory(2, 8, 16)
    first = stm.export()
    stm.reset()
    assert not torch.equal(stm.memory, first)
    stm.reset(seed=5)
    seeded = stm.export()
    stm.reset(seed=5)
    assert torch.equal(stm.memory, seeded)
    stm.reset(seed=6)
    assert not torch.equal(stm.memory, seeded)
    stm.reset(batch_size=3, init_type="ones")
    assert stm.memory.shape == (2, 3, 8, 16)
    stm.reset()
    assert stm.batch_size == 3
    assert (stm.memory == 1).all()
    before = torch.get_rng_state()
    stm.reset(init_type="standard", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    half = ShortTermMemory(2, 8, 16).bfloat16()
    half.reset(seed=5)
    assert torch.equal(half.memory, seeded.bfloat16())


def test_rows_of_a_reset_batch_differ() -> None:
    stm = ShortTermMemory(2, 8, 16)
    stm.reset(batch_size=2, seed=0)
    assert not torch.equal(stm.memory[:, 0], stm.memory[:, 1])


def test_a_bigger_batch_copies_one_conversation() -> None:
    stm = ShortTermMemory(2, 8, 16)
    single = stm.export()
    stm.set_batch_size(3)
    assert torch.equal(stm.memory, single.expand(-1, 3, -1, -1))
    stm.memory[:, 0] += 1.0
    assert torch.equal(stm.memory[:, 1:2], single), "rows do not share storage"
    for size in (2, 1, 4):
        with refusal(ValueError, "batch_size", "3", str(size)):
            stm.set_batch_size(size)
    stm.set_batch_size(3)


def test_average_and_select_are_over_conversations_only() -> None:
    stm = ShortTermMemory(2, 8, 16)
    stm.reset(batch_size=3, seed=1)
    before = stm.export()
    stm.average()
    torch.testing.assert_close(stm.memory, (before[:, :1] + before[:, 1:2] + before[:, 2:]) / 3)
    stm.load(before)
    stm.select(1)
    assert torch.equal(stm.memory, before[:, 1:2])
    for row in (1, -1, 0.0):
        with refusal(ValueError, "row"):
            stm.select(row)  # type: ignore[arg-type]


def test_load_casts_copies_and_takes_any_batch() -> None:
    stm = ShortTermMemory(2, 8, 16).bfloat16()
    state = torch.randn(2, 5, 8, 16, dtype=torch.float64)
    stm.load(state)
    assert stm.batch_size == 5
    assert stm.memory.dtype is torch.bfloat16
    same = torch.randn(2, 1, 8, 16).bfloat16()
    stm.load(same)
    same.zero_()
    assert stm.memory.abs().sum() > 0


def test_load_refuses_and_keeps_what_it_has() -> None:
    stm = ShortTermMemory(2, 8, 16).half()
    before = stm.export()
    good = torch.zeros(2, 1, 8, 16)
    for wrong, kind, named in (
        ([1.0], TypeError, "list"),
        (good.int(), TypeError, "int32"),
        (good[0], ValueError, "(1, 8, 16)"),
        (good[:1], ValueError, "(1, 1, 8, 16)"),
        (good[:, :, :4], ValueError, "(2, 1, 4, 16)"),
        (good[:, :0], ValueError, "(2, 0, 8, 16)"),
        (good + 70_000.0, ValueError, "float16"),  # finite, but not in half precision
        (good.to("meta"), ValueError, "meta"),
    ):
        with refusal(kind, "memory", named):
            stm.load(wrong)  # type: ignore[arg-type]
    assert torch.equal(stm.memory, before)


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda s: s.reset(batch_size=0), ValueError, ["batch_size"]),
        (lambda s: s.reset(batch_size="2"), ValueError, ["batch_size"]),
        (lambda s: s.reset(init_type="noise"), ValueError, ["init_type", "'noise'"]),
        (lambda s: s.reset(seed="a"), TypeError, ["seed"]),
        (lambda s: s.set_batch_size(0), ValueError, ["batch_size"]),
        (lambda s: s.set_batch_size(True), ValueError, ["batch_size"]),
        (lambda s: ShortTermMemory(2, 8, 16, init_type="big"), ValueError, ["init_type"]),
        (lambda s: ShortTermMemory(2, 0, 16), ValueError, ["size"]),
    ],
)
def test_refusals(call: Callable[[ShortTermMemory], Any], kind: type[Exception], named: list[str]) -> None:
    stm = ShortTermMemory(2, 8, 16)
    before = stm.export()
    with refusal(kind, *named):
        call(stm)
    assert torch.equal(stm.memory, before)
    assert stm.init_type == "standard"


# -- one memory between components --------------------------------------------------------------------------------------------


def test_components_share_one_embedding_and_one_memory_whatever_happens() -> None:
    model = alpha()
    model.stm.reset(batch_size=2, seed=3)
    before = model.export_stm_state()

    def check(own: Any) -> None:
        assert own.encoder.model.embedding is own.decoder.model.embedding
        assert own.memory_attention.model.stm is own.decoder.model.stm is own.stm
        assert torch.equal(own.stm.memory.float(), before.to(own.stm.memory.dtype).float())

    for _ in range(2):
        model.share_components()
        check(model)
    check(copy.deepcopy(model))
    check(copy.deepcopy(model).bfloat16())
    check(copy.deepcopy(model).to(torch.float64))
    twin = alpha(seed=1)
    twin.stm.load(before)
    twin.load_state_dict(model.state_dict())
    check(twin)
    assert torch.equal(twin.encoder.model.embedding.weight, model.decoder.model.embedding.weight)


def test_an_encoder_that_reads_memory_reads_the_shared_one() -> None:
    model = alpha(encoder={"skip_memory_cross_attention": False})
    assert model.encoder.model.stm is model.stm
    ids = torch.tensor([[2, 5, 20]])
    with torch.no_grad():
        first = model.encoder(ids)
        model.stm.reset(seed=9)
        assert not torch.equal(model.encoder(ids), first)


def test_memory_moves_with_the_model_and_is_never_saved() -> None:
    model = alpha()
    before = model.export_stm_state()
    model.to(torch.float64)
    assert model.stm.memory.dtype is torch.float64
    assert torch.equal(model.stm.memory, before.double())
    assert not [name for name in model.state_dict() if "stm.memory" in name or "rope" in name or "rotary" in name]
    assert not [name for name, _ in model.named_parameters() if name.split(".")[-1] == "memory"]


# -- the networks -------------------------------------------------------------------------------------------------------------


def network(variant: str = "interlayer", **changes: Any) -> RxTMemoryAttention:
    torch.manual_seed(0)
    groups = {"num_layers": 4, "num_groups": 2} if variant == "grouped-self-interlayer" else {}
    return RxTMemoryAttention(memory_config(variant=variant, **{**groups, **changes})).eval()


def inputs(net: RxTMemoryAttention, batch: int = 2, time: int = 6) -> tuple[Tensor, Tensor]:
    layers = net.config.num_layers
    return torch.randn(layers, batch, time, 32), torch.randn(layers, batch, 8, 32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", [None, "static", "elementwise", "linear"])
def test_an_update_is_pure_finite_and_separate_for_every_conversation(variant: str, gate: str | None) -> None:
    net = network(variant, use_gated_residual=gate is not None, residual_gate_type=gate or "static")
    encoded, memory = inputs(net)
    copies, own = (encoded.clone(), memory.clone()), net.stm.export()
    with torch.no_grad():
        new = net(encoded, None, memory)
        assert new.shape == memory.shape
        assert torch.isfinite(new).all()
        assert not torch.equal(new, memory)
        assert torch.equal(encoded, copies[0])
        assert torch.equal(memory, copies[1])
        assert torch.equal(net.stm.memory, own)
        for row in range(2):
            alone = net(encoded[:, row : row + 1], None, memory[:, row : row + 1])
            torch.testing.assert_close(new[:, row : row + 1], alone, atol=1e-5, rtol=1e-5)
        # A memory of one conversation serves every row; the own memory is used when none is given.
        torch.testing.assert_close(net(encoded), net(encoded, None, own.expand(-1, 2, -1, -1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_writes_nothing_and_empty_rows_keep_their_memory(variant: str) -> None:
    net = network(variant)
    encoded, memory = inputs(net, batch=3)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6, [True] * 6])
    with torch.no_grad():
        new = net(encoded, mask, memory)
        changed = encoded.clone()
        changed[:, 0, 4:] = 1e4
        changed[:, 1] = float("nan")
        assert torch.equal(net(changed, mask.long(), memory), new)
        torch.testing.assert_close(new[:, :1], net(encoded[:, :1, :4], None, memory[:, :1]), atol=1e-5, rtol=1e-5)
    assert torch.equal(new[:, 1], memory[:, 1])
    assert not torch.equal(new[:, 2], memory[:, 2])


def test_diluted_padding_is_another_result() -> None:
    net = network()
    encoded, memory = inputs(net, batch=1)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    diluting = network(padding="dilute")
    with torch.no_grad():
        got = diluting(encoded, mask, memory)
        zeroed = encoded * mask[None, :, :, None]
        torch.testing.assert_close(got, net(zeroed, None, memory))
        assert not torch.allclose(got, net(encoded, mask, memory), atol=1e-3)


def test_variants_look_where_they_should() -> None:
    """Which layers of the old memory a new layer depends on."""
    reach = {"simple": 1, "self": 1, "interlayer": 4, "gated-self-interlayer": 4, "grouped-self-interlayer": 2}
    for variant, layers in reach.items():
        net = network(variant, num_layers=4)
        encoded, memory = inputs(net, batch=1)
        memory.requires_grad_()
        net(encoded, None, memory)[0].pow(2).sum().backward()
        assert memory.grad is not None
        touched = [bool(memory.grad[layer].abs().sum() > 0) for layer in range(4)]
        assert touched == [layer < layers for layer in range(4)], variant


def test_gates_interpolate_between_old_and_new() -> None:
    """A closed sigmoid gate keeps the memory; an open one replaces it; tanh of zero adds."""
    for value, activation, expected in ((-40.0, "sigmoid", "old"), (40.0, "sigmoid", "new"), (0.0, "tanh", "sum")):
        net = network("simple", use_gated_residual=True, use_tanh_residual_gate=activation == "tanh")
        added = network("simple")
        replacing = network("simple", disable_residual=True)
        encoded, memory = inputs(net)
        with torch.no_grad():
            for gate in net.model.residual_gate_layers:
                gate.gate.fill_(value)
            new = replacing(encoded, None, memory)
            results = {"old": memory, "new": new, "sum": added(encoded, None, memory)}
            torch.testing.assert_close(net(encoded, None, memory), results[expected], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(results["sum"], memory + new, atol=1e-5, rtol=1e-5)


def test_running_means_move_in_training_only_and_are_saved() -> None:
    for kind in ("adaptive", "positional"):
        net = network("interlayer", norm_type=kind)
        encoded, memory = inputs(net)
        names = [name for name in net.state_dict() if name.endswith("ema_rms")]
        assert len(names) == 2 + 2 + 1
        before = {name: net.state_dict()[name].clone() for name in names}
        net(encoded, None, memory * 3)
        assert all(torch.equal(net.state_dict()[name], before[name]) for name in names)
        net.train()(encoded, None, memory * 3)
        assert all(not torch.equal(net.state_dict()[name], before[name]) for name in names)


PROJECTIONS = ["k_proj.weight", "out_proj.bias", "out_proj.weight", "q_proj.weight", "v_proj.weight"]


def names_of(layers: int, attentions: list[str], norms: list[str], others: list[str]) -> set[str]:
    names = set(others)
    for index in range(layers):
        names |= {f"model.{module}.{index}.{name}" for module in attentions for name in PROJECTIONS}
        names |= {f"model.{module}.{index}.weight" for module in norms}
    return names


MAIN_NORMS = ["memory_norm_layers", "memory_input_norm_layers"]
GATES = ["residual_gate_layers", "mean_residual_gate_layers", "interlayer_gate_layers"]


@pytest.mark.parametrize(
    ("variant", "changes", "expected"),
    [
        ("simple", {}, names_of(2, ["attention_layers"], MAIN_NORMS, [])),
        (
            "self",
            {"use_gate_for_self_attention": True},
            names_of(2, ["attention_layers", "self_attention_layers"], [*MAIN_NORMS, "self_memory_norm_layers"], [
                "model.self_residual_gate_layers.0.gate", "model.self_residual_gate_layers.1.gate",
            ]),
        ),
        (
            "interlayer",
            {"use_gated_residual": True, "residual_gate_type": "linear"},
            names_of(2, ["attention_layers", "mean_attention_layers"], [*MAIN_NORMS, "mean_memory_norm_layers"], [
                "model.mean_stm_norm.weight",
                *(f"model.{gates}.{i}.gate.{p}" for gates in GATES[:2] for i in (0, 1) for p in ("weight", "bias")),
            ]),
        ),
        (
            "gated-self-interlayer",
            {"use_gated_residual": True, "residual_gate_slot_status_type": "linear"},
            names_of(2, ["attention_layers", "mean_attention_layers"], [*MAIN_NORMS, "mean_memory_norm_layers"], [
                "model.mean_stm_norm.weight",
                *(f"model.{gates}.{i}.{p}" for gates in GATES for i in (0, 1)
                  for p in ("gate", "slot_status.weight", "slot_status.bias")),
            ]),
        ),
        (
            "grouped-self-interlayer",
            {"num_layers": 2},
            names_of(2, ["attention_layers", "mean_attention_layers"], [*MAIN_NORMS, "mean_memory_norm_layers"], [
                "model.mean_stm_norm.weight",
            ]),
        ),
    ],
)  # fmt: skip
def test_parameter_names_of_every_variant(variant: str, changes: dict[str, Any], expected: set[str]) -> None:
    assert set(network(variant, **changes).state_dict()) == expected


@pytest.mark.parametrize(
    ("kind", "per_dim", "names"),
    [
        ("classic-rms", False, {"weight": (32,)}),
        ("rms", False, {"scale": (32,), "gate": (1,)}),
        ("adaptive", False, {"scale": (32,), "gate": (1,), "ema_rms": (1,)}),
        ("positional", False, {"scale": (8, 1), "gate": (8, 1), "ema_rms": (8, 1)}),
        ("positional", True, {"scale": (32,), "gate": (8, 1), "ema_rms": (8, 1)}),
        ("layer", False, {"scale": (32,), "gate": (1,), "norm.weight": (32,), "norm.bias": (32,)}),
    ],
)
def test_parameters_of_memory_norms(kind: str, per_dim: bool, names: dict[str, tuple[int, ...]]) -> None:
    net = network("self", norm_type=kind, norm_per_dim_scale=per_dim)
    for module in ("memory_norm_layers.1", "self_memory_norm_layers.0"):
        prefix = f"model.{module}."
        state = net.state_dict()
        own = {name[len(prefix) :]: tuple(value.shape) for name, value in state.items() if name.startswith(prefix)}
        assert own == names
    assert {name for name in state if "memory_input_norm" in name} == {
        f"model.memory_input_norm_layers.{i}.weight" for i in (0, 1)
    }, "the input norm is always RMSNorm"


@pytest.mark.parametrize(
    ("kind", "per_slot", "shapes"),
    [
        ("static", True, {"gate": (8, 1)}),
        ("static", False, {"gate": (1,)}),
        ("elementwise", True, {"gate": (8, 1)}),
        ("elementwise", False, {"gate": (1,)}),
        ("linear", True, {"gate.weight": (8, 8), "gate.bias": (8,)}),
        ("linear", False, {"gate.weight": (1, 8), "gate.bias": (1,)}),
    ],
)
def test_parameters_of_gates(kind: str, per_slot: bool, shapes: dict[str, tuple[int, ...]]) -> None:
    net = network(
        "simple",
        use_gated_residual=True,
        residual_gate_type=kind,
        residual_per_slot_gate=per_slot,
        residual_gate_init=2.5,
    )
    prefix = "model.residual_gate_layers.0."
    own = {name[len(prefix) :]: value for name, value in net.state_dict().items() if name.startswith(prefix)}
    assert {name: tuple(value.shape) for name, value in own.items()} == shapes
    if kind != "linear":
        assert (own["gate"] == 2.5).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", ["classic-rms", "rms", "adaptive", "positional", "layer"])
@pytest.mark.parametrize(("gate", "status"), [("static", "linear"), ("elementwise", "linear"), ("linear", "mean")])
def test_every_parameter_gets_a_gradient(variant: str, norm: str, gate: str, status: str) -> None:
    net = network(
        variant, norm_type=norm, use_gated_residual=True, use_gate_for_self_attention=True, residual_gate_type=gate,
        residual_gate_slot_status_type=status, use_tanh_residual_gate=False,
    )  # fmt: skip
    encoded, memory = inputs(net)
    net.train()(encoded, None, memory).pow(2).sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # A static gate owns these weights in checkpoints and never uses them (spec 2.10).
    expected = {n for n, _ in net.named_parameters() if "slot_status" in n} if gate == "static" else set()
    assert without == expected


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda n, e, m: n([1]), TypeError, ["encoded", "list"]),
        (lambda n, e, m: n(e.long()), TypeError, ["encoded", "int64"]),
        (lambda n, e, m: n(e[0]), ValueError, ["encoded", "(2, 6, 32)"]),
        (lambda n, e, m: n(e[:1]), ValueError, ["encoded", "(1, 2, 6, 32)"]),
        (lambda n, e, m: n(e[..., :31]), ValueError, ["encoded", "31"]),
        (lambda n, e, m: n(e[:, :, :0]), ValueError, ["encoded"]),
        (lambda n, e, m: n(e.double()), TypeError, ["encoded", "float64"]),
        (lambda n, e, m: n(e, torch.ones(2, 6)), TypeError, ["attention_mask", "float32"]),
        (lambda n, e, m: n(e, torch.ones(2, 5).bool()), ValueError, ["attention_mask", "(2, 5)"]),
        (lambda n, e, m: n(e, None, m[:1]), ValueError, ["memory"]),
        (lambda n, e, m: n(e, None, m[:, [0, 0, 0]]), ValueError, ["memory"]),
        (lambda n, e, m: n(e, None, m.double()), TypeError, ["float32"]),
        (lambda n, e, m: n(e.to("meta"), None, m), ValueError, ["encoded", "meta"]),
    ],
)
def test_network_refusals(call: Callable[..., Any], kind: type[Exception], named: list[str]) -> None:
    net = network()
    with refusal(kind, *named):
        call(net, *inputs(net))


def test_encoder_config_has_no_memory() -> None:
    assert alpha().encoder.model.stm is None
    assert encoder_config().skip_memory_cross_attention
