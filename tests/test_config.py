"""Configurations: derived values by hand, and a sentence for everything that cannot work (spec 2.4, 2.10, 3.2)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from helpers import MEMORY_SIZES, SIZES, refusal

from rxt_model import MemoryAttentionConfig, MLMHeadConfig, RxTDecoder, RxTEncoder, StatelessConfig, TransformerConfig
from rxt_model.config import TokenIds, canonical_variant, head_counts


@pytest.mark.parametrize(
    ("kind", "groups", "query_groups", "expected"),
    [
        ("mha", 4, 8, (16, 16)),
        ("gqa", 4, 8, (16, 4)),
        ("mqa", 4, 8, (16, 1)),
        ("sqa", 4, 8, (8, 4)),
        ("sqa", 8, 8, (8, 8)),
        ("sqa", 8, 4, (4, 8)),
    ],
)
def test_head_counts(kind: str, groups: int, query_groups: int, expected: tuple[int, int]) -> None:
    assert head_counts(kind, 16, groups, query_groups) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sqa", 16, 4, None), ["query groups", "None"]),
        (("sqa", 16, 4, 6), ["6 query", "4 key/value", "divide"]),
        (("sqa", 16, 4, 32), ["32 query", "16"]),
        (("gqa", 16, 0, None), ["0 key/value"]),
        (("sqa", 16, 4.0, 8), ["4.0", "integers"]),
        (("linear", 16, 4, 8), ["'linear'", "'sqa'"]),
    ],
)
def test_head_counts_that_cannot_work(arguments: tuple[Any, ...], named: list[str]) -> None:
    with refusal(ValueError, *named):
        head_counts(*arguments)


def test_head_width_does_not_depend_on_query_heads() -> None:
    config = TransformerConfig(**{**SIZES, "att_query_groups": 1, "att_groups": 1})
    assert config.head_dim == 8
    assert config.cross_attention_heads == (1, 1)
    config = config.replace(cross_att_groups=2, cross_att_query_groups=4)
    assert config.self_attention_heads == (1, 1)
    assert config.cross_attention_heads == (4, 2)


def test_cross_attention_gate_follows_self_attention_unless_set() -> None:
    for own, cross, expected in ((True, None, True), (False, None, False), (True, False, False), (False, True, True)):
        config = TransformerConfig(**SIZES, use_gated_attention=own, use_gated_cross_attention=cross)
        assert config.has_gated_cross_attention is expected


def test_second_attention_falls_back_to_the_first() -> None:
    config = MemoryAttentionConfig(**MEMORY_SIZES, att_dropout=0.1)
    assert config.context_attention_heads == config.attention_heads == (2, 2)
    assert config.context_att_dropout == 0.1
    changed = config.replace(interlayer_att_groups=1, interlayer_att_query_groups=4, interlayer_att_dropout=0.2)
    assert changed.context_attention_heads == (4, 1)
    assert changed.context_att_dropout == 0.2
    assert changed.replace(variant="self").context_attention_heads == (2, 2)
    assert changed.replace(variant="self", self_att_type="mha").context_attention_heads == (4, 4)


@pytest.mark.parametrize("config", [TransformerConfig(**SIZES, stateless_layers_config=("moe",)), StatelessConfig(
    att_num_query_groups=4), MemoryAttentionConfig(**MEMORY_SIZES), MLMHeadConfig(), TokenIds(1, 2, 3, 4)])  # fmt: skip
def test_configurations_survive_json(config: Any) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert type(config).of(config) is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.embed_dim = 3


def test_variants_have_one_spelling() -> None:
    assert canonical_variant("self-interlayer") == canonical_variant("gated") == "gated-self-interlayer"
    assert MemoryAttentionConfig(**MEMORY_SIZES, variant="self-interlayer").variant == "gated-self-interlayer"
    with refusal(ValueError, "memory_attention_variant", "'inter'", "simple"):
        canonical_variant("inter")


TRANSFORMER = [
    ({"num_layers": 0}, ["num_layers", "0"]),
    ({"embed_dim": 32.0}, ["embed_dim", "32.0"]),
    ({"vocab_size": True}, ["vocab_size", "True"]),
    ({"embed_dim": 30}, ["embed_dim", "att_heads"]),
    ({"embed_dim": 36, "att_heads": 12, "att_groups": 2}, ["even"]),
    ({"ff_activation": "tanh"}, ["ff_activation", "'gelu'"]),
    ({"gated_attention_activation": "exp"}, ["gated_attention_activation"]),
    ({"att_dropout": 1.0}, ["att_dropout"]),
    ({"ff_dropout": "0.1"}, ["ff_dropout"]),
    ({"ff_dropout": float("nan")}, ["ff_dropout"]),
    ({"use_moe": "false"}, ["use_moe", "'false'"]),
    ({"use_rms_norm": 1}, ["use_rms_norm", "1"]),
    ({"use_moe": True, "num_experts": 2, "moe_top_k": 3}, ["moe_top_k", "3", "2"]),
    ({"stateless_layers_config": ["moe"], "num_experts": 2, "moe_top_k": 3}, ["moe_top_k"]),
    ({"stateless_layers_config": "moe"}, ["stateless_layers_config", "'moe'"]),
    ({"final_stateless_layers_config": ["sparse"]}, ["final_stateless_layers_config", "'sparse'"]),
    ({"num_shared_experts": -1}, ["num_shared_experts"]),
    ({"shared_expert_dim": 0}, ["shared_expert_dim"]),
    ({"moe_bias_mode": "none"}, ["moe_bias_mode"]),
    ({"router_dtype": "int8"}, ["router_dtype"]),
    ({"rope_layout": "half"}, ["rope_layout", "'split'"]),
    ({"rope_angle_dtype": "float16"}, ["rope_angle_dtype"]),
    ({"padding": "left"}, ["padding"]),
    ({"head_norm_type": "rms"}, ["head_norm_type"]),
    ({"self_att_type": "sqa", "att_query_groups": None}, ["self-attention", "query groups"]),
    ({"cross_att_query_groups": 3}, ["cross-attention", "3"]),
    ({"use_gated_cross_attention": "yes"}, ["use_gated_cross_attention"]),
]
MEMORY = [
    ({"stm_size": 0}, ["stm_size"]),
    ({"embed_dim": 36, "att_heads": 12}, ["even"]),
    ({"norm_type": "batch"}, ["norm_type"]),
    ({"norm_decay": 1.5}, ["norm_decay"]),
    ({"residual_gate_type": "dynamic"}, ["residual_gate_type"]),
    ({"variant": "other"}, ["variant"]),
    ({"variant": "grouped-self-interlayer", "num_groups": 3}, ["num_layers", "num_groups"]),
    (
        {"use_gated_residual": True, "residual_gate_slot_status_type": "linear", "residual_per_slot_gate": False},
        ["slot"],
    ),
    ({"interlayer_att_query_groups": 3}, ["second attention", "3"]),
    ({"interlayer_att_dropout": 2.0}, ["att_dropout", "2.0"]),
    ({"use_gated_residual": "true"}, ["use_gated_residual"]),
]


@pytest.mark.parametrize(("changes", "named"), TRANSFORMER)
def test_transformer_refusals(changes: dict[str, Any], named: list[str]) -> None:
    with refusal(ValueError, *named):
        TransformerConfig.from_dict({**SIZES, **changes})


@pytest.mark.parametrize(("changes", "named"), MEMORY)
def test_memory_attention_refusals(changes: dict[str, Any], named: list[str]) -> None:
    with refusal(ValueError, *named):
        MemoryAttentionConfig.from_dict({**MEMORY_SIZES, **changes})


def test_odd_heads_work_without_rotary_positions() -> None:
    RxTEncoder({**SIZES, "embed_dim": 20, "use_nope": True, "skip_memory_cross_attention": True})


def test_unknown_and_missing_fields() -> None:
    with refusal(ValueError, "TransformerConfig", "'embed_dims'", "embed_dim"):
        TransformerConfig.from_dict({"embed_dims": 3})
    with refusal(ValueError, "TokenIds", "query_token_id"):
        TokenIds.from_dict({"bos_token_id": 1, "eos_token_id": 2, "answer_token_id": 3})
    with refusal(ValueError, "eos_token_id", "-1"):
        TokenIds(1, -1, 2, 3)
    for wrong in (5, "config", None, MLMHeadConfig()):
        with refusal(TypeError, "config", "TransformerConfig"):
            RxTDecoder(wrong)  # type: ignore[arg-type]


def test_an_encoders_switch_is_refused_by_a_decoder() -> None:
    with refusal(ValueError, "reads_memory", "skip_memory_cross_attention"):
        RxTDecoder({**SIZES, "reads_memory": False})


def test_the_stateless_model_that_matches_a_decoder() -> None:
    decoder = TransformerConfig(
        **{**SIZES, "att_query_groups": 4}, use_moe=True, num_experts=4, moe_top_k=2, num_shared_experts=0,
        moe_bias_mode="local", use_vectorized_moe=False, rope_layout="split",
    )  # fmt: skip
    stateless = StatelessConfig.like(decoder, seq_len=99)
    layers = stateless.transformer_config()
    assert layers.self_attention_heads == decoder.self_attention_heads == (4, 2)
    for name in ("embed_dim", "num_layers", "ff_dim", "use_moe", "num_experts", "moe_top_k", "use_vectorized_moe"):
        assert getattr(layers, name) == getattr(decoder, name)
    assert layers.seq_len == 99
    for name, value in (
        ("num_shared_experts", 1), ("use_gated_attention", True), ("use_nope", True), ("use_head_norm", True),
        ("use_attention_output_bias", False), ("stateless_layers_config", ("dense",)), ("router_amp", True),
    ):  # fmt: skip
        with refusal(ValueError, name):
            StatelessConfig.like(decoder.replace(**{name: value}))
    assert StatelessConfig.like(decoder.replace(use_moe=False, num_shared_experts=1)).padding == "mask"
