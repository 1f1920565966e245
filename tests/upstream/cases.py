"""The table of upstream models that our loader and our forward pass are held to.

A case is plain data (it crosses a process boundary as JSON): the upstream class and its arguments, the seed of its
random weights, what kind of thing it is (which decides what is asked of it) and, for complete models, whether the file
is saved before or after upstream shares the embedding. Sizes are tiny, so that a version's cases run in seconds.
"""

from __future__ import annotations

import itertools
from typing import Any

Case = dict[str, Any]

VERSIONS = ("0.2.31", "0.3.92")

VOCABULARY, DIM, SLOTS, LAYERS, LENGTH = 97, 32, 8, 3, 48
TOKENIZER = {"bos_token_id": 2, "eos_token_id": 3, "answer_token_id": 6, "query_token_id": 5, "pad_token_id": 0}
END = {"0.2.31": 3, "0.3.92": 79}
BETA_TOKENIZER = {
    **TOKENIZER,
    "think_token_id": 4,
    "tool_call_token_id": 1,
    "tool_use_token_id": 7,
    "internal_token_id": 8,
}

COMPONENT: dict[str, Any] = {
    "num_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "embed_dim": DIM,
    "ff_dim": 48,
    "att_heads": 4,
    "seq_len": LENGTH,
    "stm_size": SLOTS,
    "self_att_type": "sqa",
    "cross_att_type": "sqa",
    "att_groups": 2,
    "att_query_groups": 2,
}
ENCODER = {**COMPONENT, "skip_memory_cross_attention": True}
MOE = {"use_moe": True, "num_experts": 5, "moe_top_k": 2}
MEMORY: dict[str, Any] = {
    "num_layers": LAYERS,
    "embed_dim": DIM,
    "att_heads": 4,
    "seq_len": LENGTH,
    "stm_size": SLOTS,
    "att_type": "sqa",
    "att_groups": 2,
    "att_query_groups": 2,
}
INTERLAYER = {"interlayer_att_type": "sqa", "interlayer_att_groups": 2, "interlayer_att_query_groups": 2}
SELF = {"self_att_type": "sqa", "self_att_groups": 2, "self_att_query_groups": 2}
LANGUAGE_MODEL: dict[str, Any] = {
    "num_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "embed_dim": DIM,
    "ff_dim": 48,
    "att_heads": 4,
    "seq_len": LENGTH,
    "att_type": "sqa",
    "att_groups": 2,
    "att_num_query_groups": 2,
}

LINEAR = {"use_gated_residual": True, "residual_gate_type": "linear", "use_tanh_residual_gate": False}
ELEMENTWISE = {"use_gated_residual": True, "residual_gate_type": "elementwise", "use_tanh_residual_gate": False}
STATIC_TANH = {"use_gated_residual": True, "residual_gate_type": "static", "use_tanh_residual_gate": True}
REVERSED = {"embed_dim": 32, "att_heads": 8, "att_groups": 4, "att_query_groups": 2}

SIZES = {"layers": LAYERS, "slots": SLOTS, "dim": DIM, "vocabulary": VOCABULARY}

VARIANT_CLASSES = {
    "simple": "RxTSimpleMemoryAttention",
    "self": "RxTSelfMemoryAttention",
    "interlayer": "RxTInterlayerMemoryAttention",
    "gated-self-interlayer": "RxTSelfInterlayerMemoryAttention",
    "grouped-self-interlayer": "RxTGroupedSelfInterlayerMemoryAttention",
}
"""Upstream's single components, by the name that our configuration gives the variant."""


def full(
    name: str,
    decoder: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    *,
    variant: str | None = "self-interlayer",
    upstream_class: str = "RxTAlpha",
    saving: str = "shared",
    interaction: bool = False,
    end_token: int = TOKENIZER["eos_token_id"],
) -> Case:
    """A complete model: decoder, encoder and memory attention in one file."""
    arguments: dict[str, Any] = {
        "decoder_config": {**COMPONENT, **(decoder or {})},
        "encoder_config": {**ENCODER, **(encoder or {})},
        "memory_attention_config": {**MEMORY, **INTERLAYER, **(memory or {})},
        "tokenizer_config": {**TOKENIZER, "eos_token_id": end_token},
    }
    if variant is not None:
        arguments["memory_attention_variant"] = variant
    layers = arguments["decoder_config"]["num_layers"]
    return {
        "name": name,
        "kind": "full",
        "class": upstream_class,
        "arguments": arguments,
        "saving": saving,
        "interaction": interaction,
        "sizes": {**SIZES, "layers": layers, "dim": arguments["decoder_config"]["embed_dim"]},
        "seed": _seed(name),
    }


def part(name: str, kind: str, upstream_class: str, arguments: dict[str, Any]) -> Case:
    """A single component in a file of its own."""
    sizes = {**SIZES, "layers": arguments.get("num_layers", LAYERS), "dim": arguments["embed_dim"]}
    return {
        "name": name,
        "kind": kind,
        "class": upstream_class,
        "arguments": arguments,
        "sizes": sizes,
        "seed": _seed(name),
    }


def _seed(name: str) -> int:
    """The same number for the same name on every run (unlike `hash`)."""
    return sum((index + 1) * ord(letter) for index, letter in enumerate(name))


# memory attention, alone: the complete model can only build some of the variants


def gate_cases() -> list[Case]:
    """Every residual gate that upstream can build, on the variant with the fewest other parts."""
    cases = []
    for kind, tanh, per_slot, status in itertools.product(
        ("static", "elementwise", "linear"), (False, True), (True, False), ("mean", "linear")
    ):
        if status == "linear" and not per_slot and kind != "linear":
            continue  # upstream refuses it, and so do we
        name = f"gate-{kind}-{'tanh' if tanh else 'sigmoid'}-{'per-slot' if per_slot else 'shared'}-{status}"
        gate = {
            "use_gated_residual": True,
            "residual_gate_type": kind,
            "use_tanh_residual_gate": tanh,
            "residual_per_slot_gate": per_slot,
            "residual_gate_slot_status_type": status,
        }
        cases.append(part(name, "memory_attention", VARIANT_CLASSES["simple"], {**MEMORY, **gate}))
    cases.append(part("gate-none", "memory_attention", VARIANT_CLASSES["simple"], MEMORY))
    replacing = {**MEMORY, "disable_residual": True}
    cases.append(part("gate-replace", "memory_attention", VARIANT_CLASSES["simple"], replacing))
    return cases


def variant_arguments(variant: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the upstream component for `variant`."""
    second = {} if variant == "simple" else SELF if variant == "self" else INTERLAYER
    return {**MEMORY, **second, **changes}


def variant_cases(version: str) -> list[Case]:
    """Every variant with every family of gate, ordinary and reversed head ratios, and differing attentions."""
    cases = []
    for variant, upstream_class in VARIANT_CLASSES.items():
        if variant == "grouped-self-interlayer":
            if version == "0.3.92":
                for layers, groups in ((4, 2), (3, 3), (3, 1)):
                    for gate_name, gate in (("elementwise", ELEMENTWISE), ("linear", LINEAR), ("none", {})):
                        name = f"variant-grouped-{layers}-layers-{groups}-groups-{gate_name}"
                        arguments = variant_arguments(variant, num_layers=layers, num_groups=groups, **gate)
                        cases.append(part(name, "memory_attention", upstream_class, arguments))
            continue
        second = "self_att" if variant == "self" else "interlayer_att"
        settings: dict[str, dict[str, Any]] = {
            "none": {},
            "linear": LINEAR,
            "elementwise": ELEMENTWISE,
            "static-tanh": STATIC_TANH,
            "more-queries": {**LINEAR, "att_query_groups": 4, "att_groups": 1},
            "reversed": {**LINEAR, "att_query_groups": 1, "att_groups": 4},
            "mha": {**LINEAR, "att_type": "mha"},
        }
        if variant != "simple":
            settings["more-queries"].update({f"{second}_query_groups": 2, f"{second}_groups": 1})
            settings["reversed"].update({f"{second}_query_groups": 2, f"{second}_groups": 4})
            settings["mha"].update({f"{second}_type": "gqa"})
        if variant == "self":
            settings["gate-for-self-only"] = {"use_gate_for_self_attention": True, "residual_gate_type": "linear"}
            settings["both-gated"] = {**ELEMENTWISE, "use_gate_for_self_attention": True}
        for setting, changes in settings.items():
            arguments = variant_arguments(variant, **changes)
            cases.append(part(f"variant-{variant}-{setting}", "memory_attention", upstream_class, arguments))
    return cases


def norm_cases(version: str) -> list[Case]:
    """The memory norms beyond classic-rms, on the simplest variant and on one that uses all four places."""
    cases = []
    for kind, per_dim in (
        ("rms", False), ("adaptive", False), ("positional", False), ("positional", True), ("layer", False),
    ):  # fmt: skip
        for variant in ("simple", "self", "gated-self-interlayer"):
            name = f"norm-{kind}{'-per-dim' if per_dim else ''}-{variant}"
            changes = {**LINEAR, "norm_type": kind, "norm_per_dim_scale": per_dim, "norm_decay": 0.8}
            arguments = variant_arguments(variant, **changes)
            cases.append(part(name, "memory_attention", VARIANT_CLASSES[variant], arguments))
    if version == "0.3.92":
        grouped = {**LINEAR, "norm_type": "rms", "num_layers": 4, "num_groups": 2}
        arguments = variant_arguments("grouped-self-interlayer", **grouped)
        cases.append(
            part("norm-rms-grouped", "memory_attention", VARIANT_CLASSES["grouped-self-interlayer"], arguments)
        )
        arguments = variant_arguments("gated-self-interlayer", **LINEAR, rope_base=500)
        cases.append(part("rope-base", "memory_attention", VARIANT_CLASSES["gated-self-interlayer"], arguments))
    return cases


# decoders, encoders, heads and stateless models, alone


def component_cases(version: str) -> list[Case]:
    decoders: dict[str, dict[str, Any]] = {
        "sqa": {},
        "mha": {"self_att_type": "mha", "cross_att_type": "mha"},
        "gqa-mqa": {"self_att_type": "gqa", "cross_att_type": "mqa"},
        "more-queries": {"att_query_groups": 4, "att_groups": 2, "cross_att_query_groups": 2},
        "reversed": {**REVERSED, "cross_att_query_groups": 1},
        "relu-plain": {"use_gated": False, "ff_activation": "relu"},
        "gelu-gated": {"use_gated": True, "ff_activation": "gelu"},
        "sigmoid-plain": {"use_gated": False, "ff_activation": "sigmoid"},
        "linear-gated": {"use_gated": True, "ff_activation": "linear"},
        "layer-norm": {"use_rms_norm": False},
        "head-norm": {"use_head_norm": True},
        "identity-head-norm": {"use_head_norm": True, "init_identity_norm": True},
        "cross-groups": {"cross_att_groups": 1},  # ignored by 0.2.31
    }
    encoders: dict[str, dict[str, Any]] = {
        "plain": {},
        "reversed": REVERSED,
        "more-queries": {"att_query_groups": 4, "att_groups": 2},
        "with-cross-attention": {"skip_memory_cross_attention": False},
    }
    if version == "0.2.31":
        decoders["moe"] = MOE
        decoders["moe-top-1"] = {**MOE, "moe_top_k": 1}
        decoders["moe-all"] = {**MOE, "moe_top_k": 5}
        decoders["moe-relu-plain"] = {**MOE, "use_gated": False, "ff_activation": "relu"}
        encoders["moe"] = MOE
    else:
        gated = {"use_gated_attention": True}
        decoders.update(
            {
                "rms-head-norm": {"use_head_norm": True, "head_norm_type": "rms_norm"},
                "nope": {"use_nope": True},
                "rope-base": {"rope_base": 500},
                "no-output-bias": {"use_attention_output_bias": False},
                "gated": gated,
                "gated-more-queries": {**gated, "att_query_groups": 4, "att_groups": 2},
                "gated-reversed": {**gated, **REVERSED},
                "gated-self-only": {**gated, "use_gated_cross_attention": False},
                "gated-cross-only": {"use_gated_cross_attention": True},
                "stateless": {"stateless_layers_config": ["dense"], "dense_layer_dim": 40, "use_gated_attention": True},
                "stateless-moe": {
                    **MOE,
                    "stateless_layers_config": ["dense", "moe"],
                    "final_stateless_layers_config": ["moe", "dense"],
                    "dense_layer_dim": 40,
                },
            }
        )
        decoders.update(
            {f"gated-{a}": {**gated, "gated_attention_activation": a} for a in ("silu", "tanh", "relu", "gelu")}
        )
        for routed, shared in itertools.product(("local", "global", "off"), repeat=2):
            for count, weighted, plain in ((1, False, False), (1, True, False), (2, False, True), (2, True, False)):
                name = (
                    f"moe-{routed}-{count}-shared-{shared}{'-weighted' if weighted else ''}{'-plain' if plain else ''}"
                )
                decoders[name] = {
                    **MOE,
                    "num_layers": 1,
                    "num_shared_experts": count,
                    "moe_bias_mode": routed,
                    "moe_shared_experts_bias_mode": shared,
                    "moe_use_weighted_shared_experts": weighted,
                    "shared_expert_dim": 24 if weighted else None,
                    "use_gated": not plain,
                }
        for routed in ("local", "global", "off"):
            decoders[f"moe-{routed}-no-shared"] = {**MOE, "num_shared_experts": 0, "moe_bias_mode": routed}
        for count in (0, 1, 2):
            decoders[f"moe-per-expert-{count}-shared"] = {
                **MOE,
                "num_shared_experts": count,
                "use_vectorized_moe": False,
            }
        encoders.update(
            {
                "moe": {**MOE, "moe_bias_mode": "local"},
                "gated-no-bias": {**gated, "use_attention_output_bias": False},
                "kept-memory": {"legacy_stm_in_encoder": True},
            }
        )
    cases = [
        part(f"decoder-{name}", "decoder", "RxTDecoder", {**COMPONENT, **changes}) for name, changes in decoders.items()
    ]
    cases += [
        part(f"encoder-{name}", "encoder", "RxTEncoder", {**ENCODER, **changes}) for name, changes in encoders.items()
    ]
    cases.append(part("mlm-head", "mlm_head", "MLMHead", {"embed_dim": DIM, "vocab_size": VOCABULARY}))
    return cases


def language_model_cases(version: str) -> list[Case]:
    moe = {"use_moe_ff": True, "ff_num_experts": 5, "ff_moe_top_k": 2}
    models: dict[str, dict[str, Any]] = {
        "sqa": {},
        "mha": {"att_type": "mha"},
        "gqa": {"att_type": "gqa"},
        "mqa": {"att_type": "mqa"},
        "more-queries": {"att_num_query_groups": 4, "att_groups": 2},
        "reversed": {"att_heads": 8, "att_num_query_groups": 2, "att_groups": 4},
        "moe": moe,
        "moe-dense-first": {**moe, "num_initial_dense_layers": 1, "dense_ff_dim": 40},
        "moe-1-shared": {**moe, "ff_num_shared_experts": 1},
        "moe-2-shared": {**moe, "ff_num_shared_experts": 2},
        "tied": {"tie_embeddings": True},
        "head-norm": {"use_head_norm": True, "head_norm_type": "rms_norm"},
    }
    if version == "0.3.92":
        models["gated"] = {"use_gated_attention": True, "use_attention_output_bias": False}
        models["moe-per-expert"] = {**moe, "use_vectorized_moe": False}
        models["moe-per-expert-2-shared"] = {**moe, "use_vectorized_moe": False, "ff_num_shared_experts": 2}
        models["moe-local"] = {**moe, "moe_bias_mode": "local", "ff_num_shared_experts": 2}
    return [
        part(f"llm-{name}", "llm", "DecoderOnlyTransformer", {**LANGUAGE_MODEL, **changes})
        for name, changes in models.items()
    ]


# complete models


def full_cases(version: str) -> list[Case]:
    more_queries = {"att_query_groups": 4, "att_groups": 2, "cross_att_query_groups": 2}
    reversed_memory = {**REVERSED, "interlayer_att_query_groups": 2, "interlayer_att_groups": 4}
    cases = [
        full("alpha-gated-linear-moe", MOE, {}, LINEAR, interaction=True),
        full("alpha-elementwise-dense", more_queries, {}, ELEMENTWISE, saving="separate-equal", interaction=True),
        full(
            "alpha-static-tanh", {"self_att_type": "mha", "cross_att_type": "gqa"}, {}, STATIC_TANH, saving="separate"
        ),
        full("alpha-ungated", {}, {}, {}, saving="separate"),
        full("alpha-ungated-interlayer", {}, {}, {}, variant="interlayer"),
        full("alpha-reversed-heads", {**REVERSED, **MOE}, REVERSED, {**LINEAR, **reversed_memory}),
        full("alpha-ends-early", MOE, {}, ELEMENTWISE, interaction=True, end_token=END[version]),
        full("alpha-interlayer", MOE, {}, LINEAR, variant="interlayer", interaction=True),
        full("beta-elementwise", {**MOE, **more_queries}, {}, ELEMENTWISE, variant=None, upstream_class="RxTBeta"),
        full("alpha-norm-rms", {"use_head_norm": True}, {}, {**LINEAR, "norm_type": "rms"}),
    ]
    if version == "0.2.31":
        cases.append(full("alpha-encoder-reads-memory", MOE, {"skip_memory_cross_attention": False}, LINEAR))
    else:
        beta = {
            **MOE,
            "num_layers": 4,
            "att_query_groups": 4,
            "num_shared_experts": 2,
            "shared_expert_dim": 40,
            "moe_bias_mode": "global",
            "moe_shared_experts_bias_mode": "global",
            "moe_use_weighted_shared_experts": True,
            "stateless_layers_config": ["dense", "moe"],
            "final_stateless_layers_config": ["moe", "moe"],
            "dense_layer_dim": 56,
            "use_gated_attention": True,
            "use_gated_cross_attention": False,
            "use_attention_output_bias": False,
            "use_head_norm": True,
            "head_norm_type": "rms_norm",
            "rope_base": 100000,
        }
        beta_encoder = {
            "num_layers": 4,
            "use_gated_attention": True,
            "use_attention_output_bias": False,
            "rope_base": 100000,
            "ff_dim": 56,
        }
        beta_memory = {**ELEMENTWISE, "num_layers": 4, "num_groups": 2, "rope_base": 100000}
        beta_case = full(
            "beta-3b-shape", beta, beta_encoder, beta_memory,
            variant="grouped-self-interlayer", upstream_class="RxTBeta", interaction=True,
        )  # fmt: skip
        beta_case["arguments"]["tokenizer_config"] = BETA_TOKENIZER
        cases += [
            beta_case,
            full("alpha-grouped", MOE, {}, {**LINEAR, "num_groups": 3}, variant="grouped-self-interlayer"),
            full("alpha-per-expert-moe", {**MOE, "use_vectorized_moe": False, "num_shared_experts": 0}, {}, LINEAR),
            full("alpha-kept-encoder-memory", MOE, {"legacy_stm_in_encoder": True}, LINEAR),
        ]
        for case in cases:
            if case["class"] == "RxTBeta":
                case["arguments"]["tokenizer_config"] = BETA_TOKENIZER
    return cases


def cases(version: str) -> list[Case]:
    """All cases of one upstream version; names are unique within it."""
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}; the case table knows {', '.join(VERSIONS)}")
    return [
        *full_cases(version),
        *component_cases(version),
        *gate_cases(),
        *variant_cases(version),
        *norm_cases(version),
        *language_model_cases(version),
    ]
