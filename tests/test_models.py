"""Decoder, encoder, heads and full systems: parameter names, gradients, positions, masks, every option (spec 2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BETA_TOKENS,
    EOS,
    VOCABULARY,
    alpha,
    decoder_config,
    encoder_config,
    left_padded,
    memory_config,
    messages,
    refusal,
    right_padded,
)
from torch import Tensor, nn

from rxt_model import (
    MLMHead,
    MLMHeadConfig,
    RxTBeta,
    RxTDecoder,
    RxTEncoder,
    RxTMemoryAttention,
    SparseQueryTransformer,
    StatelessConfig,
)
from rxt_model.layers.rotary import RotaryPositions

MOE: dict[str, Any] = {"use_moe": True, "num_experts": 3, "moe_top_k": 2}
STATELESS: dict[str, Any] = {
    "num_layers": 2, "vocab_size": VOCABULARY, "embed_dim": 32, "ff_dim": 48, "att_heads": 4, "att_groups": 2,
    "att_num_query_groups": 2,
}  # fmt: skip


def decoder(seed: int = 0, **changes: Any) -> RxTDecoder:
    torch.manual_seed(seed)
    return RxTDecoder(decoder_config(**changes)).eval()


def encoder(seed: int = 0, **changes: Any) -> RxTEncoder:
    torch.manual_seed(seed)
    return RxTEncoder(encoder_config(**changes)).eval()


def stateless(seed: int = 0, **changes: Any) -> SparseQueryTransformer:
    torch.manual_seed(seed)
    return SparseQueryTransformer(StatelessConfig(**{**STATELESS, **changes})).eval()


def ids_of(lengths: Iterable[int], seed: int = 0) -> Tensor:
    return torch.tensor(messages(list(lengths), seed))


# -- names of parameters (spec 3.3), written out ------------------------------------------------------------------------------

ATTENTION = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "out_proj.bias"]
SWIGLU = ["fc1.linear.weight", "fc1.linear.bias", "fc2.weight", "fc2.bias"]


def under(prefix: str, *groups: Iterable[str]) -> set[str]:
    return {f"{prefix}.{name}" for group in groups for name in group}


def layers(count: int, *groups: Iterable[str], of: str = "model.layers") -> set[str]:
    return {name for index in range(count) for name in under(f"{of}.{index}", *groups)}


SELF = sorted(under("attention", ATTENTION))
CROSS = sorted(under("memory_cross_attention", ATTENTION))
DENSE = sorted(under("ff", SWIGLU))
NORMS = ["norm1.weight", "norm2.weight", "norm3.weight", "stm_norm.weight"]
OUTER = {"model.embedding.weight", "model.head.weight", "model.head.bias"}
WITHOUT_OUT_BIAS = [name for name in SELF + CROSS if not name.endswith("out_proj.bias")]
LAYER_NORMS = [*NORMS, *(name.replace("weight", "bias") for name in NORMS)]

DECODERS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("dense", {}, OUTER | layers(2, SELF, CROSS, NORMS, DENSE)),
    ("layer norms", {"use_rms_norm": False}, OUTER | layers(2, SELF, CROSS, LAYER_NORMS, DENSE)),
    ("no output bias", {"use_attention_output_bias": False}, OUTER | layers(2, WITHOUT_OUT_BIAS, NORMS, DENSE)),
    (
        "not gated",
        {"use_gated": False, "ff_activation": "gelu"},
        OUTER | layers(2, SELF, CROSS, NORMS, ["ff.fc1.weight", "ff.fc1.bias", "ff.fc2.weight", "ff.fc2.bias"]),
    ),
    (
        "gated attention",
        {"use_gated_attention": True},
        OUTER
        | layers(2, SELF, CROSS, NORMS, DENSE)
        | layers(2, ["attention.gate_proj.weight", "memory_cross_attention.gate_proj.weight"]),
    ),
    (
        "gated self-attention only",
        {"use_gated_attention": True, "use_gated_cross_attention": False},
        OUTER | layers(2, SELF, CROSS, NORMS, DENSE, ["attention.gate_proj.weight"]),
    ),
    ("rms head norm", {"use_head_norm": True, "head_norm_type": "rms_norm"},
     OUTER | {"model.head_norm.weight"} | layers(2, SELF, CROSS, NORMS, DENSE)),
    ("layer head norm", {"use_head_norm": True},
     OUTER | {"model.head_norm.weight", "model.head_norm.bias"} | layers(2, SELF, CROSS, NORMS, DENSE)),
    ("no memory", {"skip_memory_cross_attention": True},
     OUTER | layers(2, SELF, ["norm1.weight", "norm3.weight"], DENSE)),
    (
        "stateless layers around",
        {**MOE, "num_shared_experts": 0, "stateless_layers_config": ("dense", "moe"),
         "final_stateless_layers_config": ("moe",)},
        OUTER
        | layers(2, SELF, CROSS, NORMS, ["ff.router.gate.weight", "ff.w1", "ff.w2", "ff.global_bias"])
        | layers(2, SELF, ["norm1.weight", "norm3.weight"], of="model.stateless_layers")
        | under("model.stateless_layers.0", DENSE)
        | under("model.stateless_layers.1.ff", ["router.gate.weight", "w1", "w2", "global_bias"])
        | layers(1, SELF, ["norm1.weight", "norm3.weight", "ff.router.gate.weight", "ff.w1", "ff.w2", "ff.global_bias"],
                 of="model.final_stateless_layers"),
    ),
]  # fmt: skip

SHARED_ONE = sorted(under("shared_expert", SWIGLU))
SHARED_FEW = ["shared_w1", "shared_w2", "shared_expert_gate.weight"]
ROUTED = ["router.gate.weight", "w1", "w2"]
EXPERTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no bias", {"moe_bias_mode": "off", "num_shared_experts": 0}, ROUTED),
    ("local", {"moe_bias_mode": "local", "num_shared_experts": 0}, [*ROUTED, "b1", "b2"]),
    ("global", {"moe_bias_mode": "global", "num_shared_experts": 0}, [*ROUTED, "global_bias"]),
    ("one shared", {"num_shared_experts": 1}, [*ROUTED, "global_bias", *SHARED_ONE]),
    (
        "one shared, global",
        {"num_shared_experts": 1, "moe_shared_experts_bias_mode": "global"},
        [*ROUTED, "global_bias", "shared_experts_bias", "shared_expert.fc1.linear.weight", "shared_expert.fc2.weight"],
    ),
    (
        "one shared, off",
        {"num_shared_experts": 1, "moe_shared_experts_bias_mode": "off", "moe_bias_mode": "off"},
        [*ROUTED, "shared_expert.fc1.linear.weight", "shared_expert.fc2.weight"],
    ),
    ("two shared", {"num_shared_experts": 2}, [*ROUTED, "global_bias", *SHARED_FEW, "shared_b1", "shared_b2"]),
    (
        "two shared, global, weighted",
        {"num_shared_experts": 2, "moe_shared_experts_bias_mode": "global", "moe_use_weighted_shared_experts": True,
         "shared_expert_dim": 20},
        [*ROUTED, "global_bias", *SHARED_FEW, "shared_experts_bias"],
    ),
    (
        "two shared, off",
        {"num_shared_experts": 2, "moe_shared_experts_bias_mode": "off", "moe_bias_mode": "local"},
        [*ROUTED, "b1", "b2", *SHARED_FEW],
    ),
    (
        "two shared, not gated",
        {"num_shared_experts": 2, "use_gated": False, "moe_bias_mode": "local", "ff_activation": "relu"},
        [*ROUTED, "b1", "b2", *SHARED_FEW, "shared_b1", "shared_b2"],
    ),
    (
        "one shared, not gated",
        {"num_shared_experts": 1, "use_gated": False},
        [*ROUTED, "global_bias", *under("shared_expert", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])],
    ),
    (
        "per expert",
        {"use_vectorized_moe": False, "num_shared_experts": 0},
        ["router.gate.weight", *(f"experts.{e}.{name}" for e in range(3) for name in SWIGLU)],
    ),
    (
        "per expert, one shared",
        {"use_vectorized_moe": False, "num_shared_experts": 1, "moe_bias_mode": "off"},
        ["router.gate.weight", *(f"{e}.{name}" for e in ("experts.0", "experts.1", "experts.2", "shared_experts.0")
                                 for name in SWIGLU)],
    ),
    (
        "per expert, two shared, not gated",
        {"use_vectorized_moe": False, "num_shared_experts": 2, "use_gated": False},
        ["router.gate.weight", "shared_expert_gate.weight",
         *(f"{e}.{name}" for e in ("experts.0", "experts.1", "experts.2", "shared_experts.0", "shared_experts.1")
           for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))],
    ),
]  # fmt: skip
ALL_DECODERS = [
    *DECODERS,
    *(
        (name, {**MOE, **changes}, OUTER | layers(2, SELF, CROSS, NORMS, under("ff", ff)))
        for name, changes, ff in EXPERTS
    ),
]
NAMED = [name for name, _, _ in ALL_DECODERS]


@pytest.mark.parametrize(("name", "changes", "expected"), ALL_DECODERS, ids=NAMED)
def test_parameter_names_of_decoders(name: str, changes: dict[str, Any], expected: set[str]) -> None:
    assert set(decoder(**changes).state_dict()) == expected


def test_parameter_names_of_encoders() -> None:
    plain = {"model.embedding.weight"} | layers(2, SELF, ["norm1.weight", "norm3.weight"], DENSE)
    assert set(encoder().state_dict()) == plain
    reading = {"model.embedding.weight"} | layers(2, SELF, CROSS, NORMS, DENSE)
    assert set(encoder(skip_memory_cross_attention=False).state_dict()) == reading


def test_parameter_names_of_the_stateless_model_and_the_head() -> None:
    norms = ["norm1.weight", "norm2.weight"]
    assert set(stateless().state_dict()) == OUTER | layers(2, SELF, norms, DENSE)
    experts = ["ff.router.gate.weight", *(f"ff.experts.{e}.{name}" for e in range(3) for name in SWIGLU)]
    moe = stateless(use_moe_ff=True, ff_num_experts=3, ff_moe_top_k=2)
    assert set(moe.state_dict()) == OUTER | layers(2, SELF, norms, experts)
    head = MLMHead(MLMHeadConfig(32, 50))
    assert set(head.state_dict()) == {
        f"{module}.{parameter}" for module in ("dense", "layer_norm", "decoder") for parameter in ("weight", "bias")
    }


def test_parameter_names_of_a_full_model_are_those_of_its_components() -> None:
    model = alpha()
    expected = {
        f"{component}.{name}"
        for component in ("decoder", "encoder", "memory_attention")
        for name in getattr(model, component).state_dict()
    }
    assert set(model.state_dict()) == expected


def test_shapes_of_stacked_and_shared_experts() -> None:
    ff = decoder(**MOE, num_shared_experts=2, shared_expert_dim=20, moe_bias_mode="local").model.layers[0].ff
    shapes = {name: tuple(value.shape) for name, value in ff.state_dict().items()}
    assert shapes == {
        "router.gate.weight": (3, 32), "w1": (3, 32, 96), "w2": (3, 48, 32), "b1": (3, 96), "b2": (3, 32),
        "shared_w1": (2, 32, 40), "shared_w2": (2, 20, 32), "shared_b1": (2, 40), "shared_b2": (2, 32),
        "shared_expert_gate.weight": (2, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "groups", "query", "shapes"),
    [
        ("sqa", 1, 2, [(16, 32), (8, 32), (32, 16)]),
        ("sqa", 4, 2, [(16, 32), (32, 32), (32, 32)]),  # reversed: the output is as wide as the keys
        ("mha", 1, None, [(32, 32), (32, 32), (32, 32)]),
        ("gqa", 2, None, [(32, 32), (16, 32), (32, 32)]),
        ("mqa", 2, None, [(32, 32), (8, 32), (32, 32)]),
    ],
)
def test_shapes_of_attention(kind: str, groups: int, query: int | None, shapes: list[tuple[int, int]]) -> None:
    model = decoder(
        self_att_type=kind, att_groups=groups, att_query_groups=query, cross_att_groups=2, cross_att_query_groups=2,
        use_gated_attention=True,
    )  # fmt: skip
    attention = model.model.layers[0].attention
    got = [tuple(getattr(attention, name).weight.shape) for name in ("q_proj", "k_proj", "out_proj")]
    assert got == shapes
    assert tuple(attention.gate_proj.weight.shape) == (shapes[2][1], 32)
    assert model(ids_of([3])).shape == (1, 5, VOCABULARY)


# -- gradients ----------------------------------------------------------------------------------------------------------------


def without_gradient(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}


@pytest.mark.parametrize(("name", "changes", "expected"), ALL_DECODERS, ids=NAMED)
def test_every_parameter_of_a_decoder_gets_a_gradient(name: str, changes: dict[str, Any], expected: set[str]) -> None:
    model = decoder(**changes).train()
    states = model.hidden_states(ids_of([12] * 4), memory=torch.randn(2, 4, 8, 32))
    loss = model.logits(states.hidden).logsumexp(-1).sum()
    if states.load_balance_loss is not None:
        loss = loss + states.load_balance_loss
    loss.backward()
    assert without_gradient(model) == set()
    assert (states.load_balance_loss is not None) == ("ff.w1" in str(expected) or "experts" in str(expected))


def test_gradients_reach_memory_and_through_it_the_writers() -> None:
    """One step of memory-aware training: the next answer's loss trains decoder, memory attention and encoder."""
    model = alpha(variant="gated-self-interlayer", memory={"use_gated_residual": True}).train()
    first, second = ids_of([7] * 2), ids_of([6] * 2, seed=1)
    memory = model.memory_attention(model.encoder(first), None, model.stm.memory)
    model(second, memory=memory).logsumexp(-1).sum().backward()
    # The last layer's state is read where it is written; the encoder has no layer behind it.
    assert without_gradient(model) == set()
    assert model.stm.memory.grad is None


def test_load_balance_loss_is_the_mean_over_every_layer_with_experts() -> None:
    model = decoder(
        **MOE,
        num_shared_experts=0,
        stateless_layers_config=("dense", "moe"),
        final_stateless_layers_config=("moe", "moe"),
    )
    losses: list[Tensor] = []
    for layer, _ in model.model.layers_in_order():
        layer.ff.register_forward_hook(
            lambda _m, _i, out: losses.append(out.load_balance_loss) if not isinstance(out, Tensor) else None
        )
    got = model.hidden_states(ids_of([9])).load_balance_loss
    assert len(losses) == 1 + 2 + 2
    assert got is not None
    torch.testing.assert_close(got, torch.stack(losses).mean())
    assert decoder().hidden_states(ids_of([9])).load_balance_loss is None


def test_expert_layouts_compute_the_same() -> None:
    stacked = decoder(**MOE, num_shared_experts=0, moe_bias_mode="local")
    separate = decoder(**MOE, num_shared_experts=0, use_vectorized_moe=False)
    with torch.no_grad():
        for layer in stacked.model.layers:
            layer.ff.b1.normal_()
            layer.ff.b2.normal_()
        state = {name: value for name, value in stacked.state_dict().items() if ".ff." not in name}
        for index, layer in enumerate(stacked.model.layers):
            prefix, ff = f"model.layers.{index}.ff", layer.ff
            state[f"{prefix}.router.gate.weight"] = ff.router.gate.weight
            for expert in range(3):
                own = f"{prefix}.experts.{expert}"
                state |= {f"{own}.fc1.linear.weight": ff.w1[expert].T, f"{own}.fc1.linear.bias": ff.b1[expert]}
                state |= {f"{own}.fc2.weight": ff.w2[expert].T, f"{own}.fc2.bias": ff.b2[expert]}
        separate.load_state_dict(state)
        memory = torch.randn(2, 1, 8, 32)
        ids = ids_of([11, 11])
        torch.testing.assert_close(separate(ids, memory=memory), stacked(ids, memory=memory), atol=1e-5, rtol=1e-5)


# -- what a token may see -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [decoder, stateless])
def test_causal_models_do_not_look_ahead(make: Callable[[], Any]) -> None:
    model, ids = make(), ids_of([10])
    changed = ids.clone()
    changed[0, 7:] = 50
    with torch.no_grad():
        first, second = model(ids), model(changed)
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7], second[:, 7])


def test_the_encoder_looks_both_ways_and_returns_every_layer() -> None:
    model, ids = encoder(), ids_of([10])
    changed = ids.clone()
    changed[0, -1] = 50
    with torch.no_grad():
        first, second = model(ids), model(changed)
    assert first.shape == (2, 1, 12, 32)
    assert not torch.allclose(first[:, :, 0], second[:, :, 0])
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("make", [decoder, stateless, encoder])
def test_right_padding_changes_nothing_for_real_tokens(make: Callable[[], Any]) -> None:
    model, rows = make(), messages([3, 9, 6])
    batch = right_padded(rows, filler=33)
    with torch.no_grad():
        together = model(batch["input_ids"], batch["attention_mask"])
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row]))
            got = together[..., index, : len(row), :] if make is encoder else together[index, : len(row)]
            torch.testing.assert_close(got, alone[..., 0, :, :], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all()


def test_left_padding_is_masked_in_self_attention() -> None:
    """Relative positions make self-attention the same; memory reads know absolute positions, so they are left out."""
    rows = messages([3, 9, 6])
    batch = left_padded(rows, filler=33)
    for model in (encoder(), stateless(), decoder(skip_memory_cross_attention=True)):
        with torch.no_grad():
            together = model(batch["input_ids"], batch["attention_mask"])
            for index, row in enumerate(rows):
                got = together[..., index, -len(row) :, :] if together.dim() == 4 else together[index, -len(row) :]
                torch.testing.assert_close(got, model(torch.tensor([row]))[..., 0, :, :], atol=1e-4, rtol=1e-4)
        assert torch.isfinite(together).all()


def test_masked_tokens_inside_a_message_are_not_seen() -> None:
    ids = ids_of([8])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, [3, 6]] = False
    changed = ids.clone()
    changed[0, [3, 6]] = 77
    for model in (encoder(), stateless(), decoder()):
        with torch.no_grad():
            first, second = model(ids, mask), model(changed, mask)
        assert torch.equal(first[..., mask[0], :], second[..., mask[0], :])
        assert not torch.equal(first, second)


def test_diluting_is_what_flash_attention_saw() -> None:
    batch = right_padded(messages([3, 9]))
    masked, diluted = encoder(), encoder(padding="dilute")
    with torch.no_grad():
        first, second = masked(*batch.values()), diluted(*batch.values())
        torch.testing.assert_close(diluted(batch["input_ids"]), masked(batch["input_ids"]))
    torch.testing.assert_close(first[:, 1], second[:, 1], atol=1e-5, rtol=1e-5)  # no padding in that row
    assert not torch.allclose(first[:, 0, :5], second[:, 0, :5], atol=1e-3)


def test_one_memory_serves_every_row() -> None:
    model, ids, memory = decoder(), ids_of([5, 5, 5]), torch.randn(2, 1, 8, 32)
    with torch.no_grad():
        expected = model(ids, memory=memory.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model(ids, memory=memory), expected)
        torch.testing.assert_close(model(ids, memory=model.project_memory(memory)), expected)
        model.stm.load(memory)
        torch.testing.assert_close(model(ids), expected)
        assert not torch.allclose(model(ids, memory=memory.flip(0)), expected, atol=1e-3)


# -- positions ----------------------------------------------------------------------------------------------------------------


def test_angles_are_positions_times_frequencies() -> None:
    rotary = RotaryPositions(8, 10_000, "float32")
    angles = rotary.angles(torch.tensor([0, 1, 700]), torch.bfloat16)
    assert angles.dtype is torch.float32
    expected = [[position * 10_000 ** (-2 * j / 8) for j in range(4)] for position in (0, 1, 700)]
    torch.testing.assert_close(angles, torch.tensor(expected))
    rounded = RotaryPositions(8, 10_000, "match").angles(torch.tensor([513]), torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    assert rounded[0, 0].item() in (512.0, 516.0), "from 512 on, bfloat16 moves in steps of four"


def test_layouts_agree_where_both_sides_are_rotated_and_differ_where_one_is() -> None:
    ids, memory = ids_of([9]), torch.randn(2, 1, 8, 32)
    for make, same in ((decoder, False), (stateless, True), (encoder, True)):
        split, interleaved = make(rope_layout="split"), make(rope_layout="interleaved")
        arguments = (ids, None, memory) if make is decoder else (ids,)
        with torch.no_grad():
            first, second = split(*arguments), interleaved(*arguments)
        assert torch.allclose(first, second, atol=1e-4) is same
    encoded = torch.randn(2, 1, 6, 32)
    written = []
    for layout in ("split", "interleaved"):
        torch.manual_seed(0)
        written.append(RxTMemoryAttention(memory_config(rope_layout=layout))(encoded, None, memory))
    assert not torch.allclose(*written, atol=1e-3)


def test_the_unrotated_projection_translates_between_layouts() -> None:
    """Permuting the rows of k_proj inside every head turns split weights of a memory read into interleaved ones."""
    split, interleaved = decoder(rope_layout="split"), decoder(rope_layout="interleaved")
    ids, memory = ids_of([9]), torch.randn(2, 1, 8, 32)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    inverse = order.argsort()
    with torch.no_grad():
        for layer in interleaved.model.layers:
            weight = layer.memory_cross_attention.k_proj.weight
            weight.copy_(weight.view(2, 8, 32)[:, inverse].reshape(16, 32))
        torch.testing.assert_close(interleaved(ids, memory=memory), split(ids, memory=memory), atol=1e-4, rtol=1e-4)


def test_position_base_and_absence_of_positions() -> None:
    ids = ids_of([9])
    with torch.no_grad():
        assert not torch.allclose(decoder(rope_base=100)(ids), decoder()(ids), atol=1e-3)
        model = encoder(use_nope=True)
        first, second = model(ids), model(ids.flip(1))
    torch.testing.assert_close(first, second.flip(2), atol=1e-5, rtol=1e-5)


def test_angles_on_the_meta_device_have_no_values_and_spoil_none() -> None:
    rotary = RotaryPositions(8, 10_000, "float32")
    expected = rotary.angles(torch.arange(3), torch.float32)
    assert rotary.angles(torch.arange(3, device="meta"), torch.float32).is_meta
    assert torch.equal(rotary.angles(torch.arange(3), torch.float32), expected)
    with torch.device("meta"):
        assert torch.equal(
            RotaryPositions(8, 10_000, "float32").angles(torch.arange(3, device="cpu"), torch.float32), expected
        )


def test_frequencies_are_not_rounded_with_the_weights() -> None:
    model = alpha()
    exact = model.decoder.model.rotary._inverse_frequencies.clone()
    model.bfloat16()
    for network in (model.decoder.model, model.encoder.model, model.memory_attention.model):
        assert network.rotary._inverse_frequencies.dtype is torch.float32
        assert torch.equal(network.rotary._inverse_frequencies, exact)
    assert exact[1].item() != exact[1].bfloat16().item(), "or this test shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_in_their_dtype_and_near_float32(dtype: torch.dtype) -> None:
    single, other = alpha(), alpha().to(dtype)
    memory, ids = torch.randn(2, 1, 8, 32), ids_of([9])
    with torch.no_grad():
        expected, got = single(ids, memory=memory), other(ids, memory=memory.to(dtype))
        encoded = other.encoder(ids)
        written = other.memory_attention(encoded, None, memory.to(dtype))
    assert got.dtype is encoded.dtype is written.dtype is dtype
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < (0.05 if dtype is torch.bfloat16 else 1e-5)
    tokens = list(other.interact(ids, temperature=0.0, max_seq_len=16))
    assert tokens[-1] == -2
    assert other.stm.memory.dtype is dtype


def test_angle_dtype_matters_in_half_precision_only() -> None:
    ids = ids_of([40])
    with torch.no_grad():
        assert torch.equal(decoder(rope_angle_dtype="match")(ids), decoder()(ids))
        half, matched = decoder().bfloat16(), decoder(rope_angle_dtype="match").bfloat16()
        assert not torch.equal(half(ids), matched(ids))


# -- blocks against their formulas --------------------------------------------------------------------------------------------


def test_masked_language_head_is_its_formula() -> None:
    head = MLMHead(MLMHeadConfig(embed_dim=16, vocab_size=50))
    hidden = torch.randn(2, 3, 16)
    dense = hidden @ head.dense.weight.T + head.dense.bias
    gelu = dense * 0.5 * (1 + torch.erf(dense / math.sqrt(2)))
    normed = F.layer_norm(gelu, (16,), head.layer_norm.weight, head.layer_norm.bias, 1e-5)
    torch.testing.assert_close(head(hidden), normed @ head.decoder.weight.T + head.decoder.bias)


def test_a_layer_is_its_formula() -> None:
    """One token, one slot: attention weights are 1, so a decoder layer can be written in a line."""
    model = decoder(
        num_layers=1, stm_size=1, use_gated_attention=True, use_head_norm=True, gated_attention_activation="tanh"
    )
    layer, memory = model.model.layers[0], torch.randn(1, 1, 1, 32)

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt() * module.weight

    def attention(x: Tensor, value_input: Tensor, module: Any) -> Tensor:
        return module.out_proj(module.v_proj(value_input) * torch.tanh(module.gate_proj(x)))

    with torch.no_grad():
        for module in layer.modules():
            if hasattr(module, "weight") and module.weight.dim() == 1:
                module.weight.normal_()
        x = model.model.embedding(torch.tensor([[42]]))
        a = norm(x, layer.norm1)
        x = x + attention(a, a, layer.attention)
        c = norm(x, layer.norm2)
        x = x + attention(c, norm(memory[0], layer.stm_norm), layer.memory_cross_attention)
        linear, gate = layer.ff.fc1.linear(norm(x, layer.norm3)).chunk(2, -1)
        x = x + layer.ff.fc2(linear * gate * torch.sigmoid(gate))
        expected = model.model.head(F.layer_norm(x, (32,), model.model.head_norm.weight, model.model.head_norm.bias))
        torch.testing.assert_close(model(torch.tensor([[42]]), memory=memory), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["swish", "silu", "relu", "gelu", "sigmoid", "linear"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_activations(name: str, gated: bool) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "swish": lambda x: x * torch.sigmoid(x), "silu": lambda x: x * torch.sigmoid(x), "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "sigmoid": torch.sigmoid, "linear": lambda x: x,
    }  # fmt: skip
    ff = encoder(use_gated=gated, ff_activation=name).model.layers[0].ff
    x = torch.randn(2, 3, 32)
    if gated:
        linear, gate = ff.fc1.linear(x).chunk(2, -1)
        hidden = linear * functions[name](gate)
    else:
        hidden = functions[name](ff.fc1(x))
    torch.testing.assert_close(ff(x), ff.fc2(hidden))


def test_dropout_acts_in_training_only() -> None:
    model, ids = decoder(att_dropout=0.5, ff_dropout=0.5), ids_of([9])
    plain = decoder()
    plain.load_state_dict(model.state_dict())
    memory = torch.randn(2, 1, 8, 32)
    assert torch.equal(model(ids, memory=memory), plain(ids, memory=memory))
    model.train()
    assert not torch.equal(model(ids, memory=memory), model(ids, memory=memory))


def test_an_encoder_of_the_first_era_reads_memory_and_a_later_one_skips_it() -> None:
    reading = encoder(skip_memory_cross_attention=False)
    skipping = encoder(skip_memory_cross_attention=False, reads_memory=False)
    assert set(reading.state_dict()) == set(skipping.state_dict())
    ids = ids_of([5])
    with torch.no_grad():
        first = reading(ids), skipping(ids)
        for model in (reading, skipping):
            model.model.stm.reset(seed=4)
        second = reading(ids), skipping(ids)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# -- whole systems ------------------------------------------------------------------------------------------------------------


def beta_3b_in_small() -> RxTBeta:
    """Every option of RxT-Beta 3B (spec 4) at tiny widths."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "num_layers": 6, "vocab_size": VOCABULARY, "embed_dim": 32, "att_heads": 4, "seq_len": 64, "stm_size": 8,
        "use_attention_output_bias": False, "use_gated_attention": True, "rope_base": 100_000, "rope_layout": "interleaved",
    }  # fmt: skip
    decoder_part = {
        **common, "ff_dim": 12, "att_groups": 1, "att_query_groups": 2, "use_gated_cross_attention": False,
        "use_moe": True, "num_experts": 12, "moe_top_k": 5, "num_shared_experts": 2, "shared_expert_dim": 24,
        "moe_bias_mode": "global", "moe_shared_experts_bias_mode": "global", "router_amp": True, "router_dtype": "bfloat16",
        "stateless_layers_config": ["dense", "moe"], "final_stateless_layers_config": ["moe", "moe"],
        "dense_layer_dim": 40, "use_head_norm": True, "head_norm_type": "rms_norm",
    }  # fmt: skip
    encoder_part = {**common, "ff_dim": 48, "att_groups": 2, "att_query_groups": 2, "skip_memory_cross_attention": True}
    memory_part = {
        "num_layers": 6, "embed_dim": 32, "att_heads": 4, "att_groups": 2, "att_query_groups": 2, "stm_size": 8,
        "num_groups": 3, "use_gated_residual": True, "residual_gate_type": "elementwise", "use_tanh_residual_gate": False,
        "rope_base": 100_000,
    }  # fmt: skip
    return RxTBeta(
        decoder_part, encoder_part, memory_part, BETA_TOKENS, memory_attention_variant="grouped-self-interlayer"
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shape_of_beta_3b_talks_and_remembers(dtype: torch.dtype) -> None:
    model = beta_3b_in_small().to(dtype)
    with torch.no_grad():
        model.decoder.model.head.bias[EOS] = -1e4  # so that the length of an answer is its budget
    assert model.decoder.model.depth == 2 + 6 + 2
    before = model.export_stm_state()
    prompt = ids_of([5])
    answers = [list(model.interact(prompt, temperature=0.0, max_seq_len=20)) for _ in range(2)]
    assert all(len(answer) == 20 - 7 + 2 and answer[-2:] == [-1, -2] for answer in answers)
    assert model.turns == 2
    assert torch.isfinite(model.stm.memory).all()
    assert not torch.equal(model.stm.memory, before)
    if dtype is torch.float32:
        twin = beta_3b_in_small()
        twin.load_state_dict(model.state_dict())
        twin.load_stm_state(before)
        uncached = list(twin.interact(prompt, temperature=0.0, max_seq_len=20, use_self_attn_cache=False))
        assert uncached == answers[0]


def test_the_shape_of_beta_3b_trains() -> None:
    model = beta_3b_in_small().train()
    memory = model.memory_attention(model.encoder(ids_of([20] * 3)), None, model.stm.memory)
    states = model.decoder.hidden_states(ids_of([20] * 3, seed=1), memory=memory)
    assert states.load_balance_loss is not None
    (model.decoder.logits(states.hidden).logsumexp(-1).sum() + states.load_balance_loss).backward()
    assert without_gradient(model) == set()


# -- refusals -----------------------------------------------------------------------------------------------------------------

IDS = ids_of([5, 5])
MASK = torch.ones(2, 7, dtype=torch.bool)
MEMORY = torch.zeros(2, 2, 8, 32)
INPUT_REFUSALS: list[tuple[Callable[[Any], Any], type[Exception], list[str]]] = [
    (lambda m: m([[1, 2]]), TypeError, ["input_ids", "list"]),
    (lambda m: m(IDS.float()), TypeError, ["input_ids", "float32"]),
    (lambda m: m(IDS.bool()), TypeError, ["input_ids", "bool"]),
    (lambda m: m(IDS[0]), ValueError, ["input_ids", "(7,)"]),
    (lambda m: m(IDS[:, :0]), ValueError, ["input_ids", "(2, 0)"]),
    (lambda m: m(IDS[:0]), ValueError, ["input_ids", "(0, 7)"]),
    (lambda m: m(IDS + VOCABULARY), ValueError, ["input_ids", "299"]),
    (lambda m: m(IDS - VOCABULARY), ValueError, ["input_ids", "-"]),
    (lambda m: m(IDS.to("meta")), ValueError, ["input_ids", "meta", "cpu"]),
    (lambda m: m(IDS, MASK.float()), TypeError, ["attention_mask", "float32"]),
    (lambda m: m(IDS, MASK.tolist()), TypeError, ["attention_mask", "list"]),
    (lambda m: m(IDS, MASK[:1]), ValueError, ["attention_mask", "(1, 7)"]),
    (lambda m: m(IDS, MASK[:, None]), ValueError, ["attention_mask", "(2, 1, 7)"]),
    (lambda m: m(IDS, MASK.to("meta")), ValueError, ["attention_mask", "meta"]),
]
MEMORY_REFUSALS: list[tuple[Callable[[Any], Any], type[Exception], list[str]]] = [
    (lambda m: m(IDS, memory=MEMORY[0]), ValueError, ["memory", "(2, 8, 32)"]),
    (lambda m: m(IDS, memory=MEMORY[:1]), ValueError, ["memory", "(1, 2, 8, 32)"]),
    (lambda m: m(IDS, memory=MEMORY[..., :16]), ValueError, ["memory", "16"]),
    (lambda m: m(IDS, memory=MEMORY[:, :, :0]), ValueError, ["memory", "(2, 2, 0, 32)"]),
    (lambda m: m(IDS, memory=MEMORY[:, [0, 0, 0]]), ValueError, ["memory", "3 rows"]),
    (lambda m: m(IDS, memory=MEMORY.long()), TypeError, ["memory", "int64"]),
    (lambda m: m(IDS, memory=MEMORY.to("meta")), ValueError, ["memory", "meta"]),
    (lambda m: m(IDS, memory=[]), ValueError, ["memory", "project_memory"]),
    (lambda m: m.project_memory(MEMORY[0]), ValueError, ["memory"]),
    (lambda m: m.project_memory([1.0]), TypeError, ["memory", "list"]),
    (lambda m: m.new_cache(0), ValueError, ["batch_size"]),
]


@pytest.mark.parametrize("make", [decoder, stateless, encoder])
@pytest.mark.parametrize(("call", "kind", "named"), INPUT_REFUSALS)
def test_input_refusals(make: Callable[[], Any], call: Any, kind: type[Exception], named: list[str]) -> None:
    model = make()
    with refusal(kind, *named):
        call(model)


@pytest.mark.parametrize(("call", "kind", "named"), MEMORY_REFUSALS)
def test_memory_refusals(call: Any, kind: type[Exception], named: list[str]) -> None:
    model = decoder()
    before = model.stm.export()
    with refusal(kind, *named):
        call(model)
    assert torch.equal(model.stm.memory, before)


def test_memory_of_another_dtype_is_refused() -> None:
    with refusal(TypeError, "float64"):
        decoder()(IDS, memory=MEMORY.double())


@pytest.mark.parametrize(
    ("hidden", "kind", "named"),
    [
        (torch.zeros(2, 15), ValueError, ["hidden", "15", "16"]),
        (torch.zeros(2, 16).long(), TypeError, ["hidden", "int64"]),
        (torch.zeros(()), ValueError, ["hidden", "()"]),
        ([0.0], TypeError, ["hidden", "list"]),
    ],
)
def test_head_refusals(hidden: Any, kind: type[Exception], named: list[str]) -> None:
    with refusal(kind, *named):
        MLMHead(MLMHeadConfig(embed_dim=16, vocab_size=50))(hidden)


def test_int32_ids_and_integer_masks_are_ids_and_masks() -> None:
    for model in (decoder(), encoder(), stateless()):
        with torch.no_grad():
            assert torch.equal(model(IDS.int(), MASK.int()), model(IDS, MASK))


# -- compilers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("component", ["decoder", "decoder with experts", "encoder", "memory attention"])
def test_compiled_in_one_graph_gives_the_same(component: str) -> None:
    batch = right_padded(messages([4, 9]))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    memory = torch.randn(2, 2, 8, 32)
    model: nn.Module
    arguments: tuple[Any, ...]
    if component == "memory attention":
        torch.manual_seed(0)
        config = memory_config(variant="gated-self-interlayer", use_gated_residual=True)
        model, arguments = RxTMemoryAttention(config).eval(), (torch.randn(2, 2, 11, 32), mask, memory)
    elif component == "encoder":
        model, arguments = encoder(), (ids, mask)
    else:
        experts = {**MOE, "num_shared_experts": 1} if "experts" in component else {}
        model, arguments = decoder(**experts), (ids, mask, memory)
    expected = model(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expected, atol=1e-5, rtol=1e-5)
    expected.sum().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled(*arguments).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own.get(name), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_decoder_is_exported() -> None:
    model, memory = decoder(), torch.randn(2, 1, 8, 32)
    time = torch.export.Dim("time", min=2, max=60)
    with torch.no_grad():
        program = torch.export.export(model, (ids_of([6]), None, memory), dynamic_shapes=({1: time}, None, None))
        for length in (6, 13):
            ids = ids_of([length], seed=length)
            torch.testing.assert_close(
                program.module()(ids, None, memory), model(ids, None, memory), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    ("field", "value"),
    [("stateless_layers_config", ("dense",)), ("final_stateless_layers_config", ("dense",)), ("use_head_norm", True)],
)
def test_encoders_refuse_what_only_decoders_have(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is .* only decoders"):
        RxTEncoder(encoder_config(**{field: value}))


def test_an_encoder_with_experts_tells_its_load_balance_loss() -> None:
    encoder = RxTEncoder(encoder_config(use_moe=True, num_experts=4, moe_top_k=2, num_shared_experts=0))
    states, loss, _ = encoder.hidden_states(ids_of([5]))
    assert torch.equal(states, encoder(ids_of([5])))
    assert loss is not None
    assert loss.requires_grad
    assert RxTEncoder(encoder_config()).hidden_states(ids_of([5])).load_balance_loss is None
