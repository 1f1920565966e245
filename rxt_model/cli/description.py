"""What a model is, in numbers: from its configurations and from shapes alone, so the meta device is enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rxt_model.checkpoint.hub import PretrainedModel
from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, StatelessConfig, TransformerConfig
from rxt_model.presets import ParameterCounts, parameter_counts

__all__ = ["describe_model", "state_bytes"]

_PARTS = ("decoder", "encoder", "memory_attention")


def describe_model(model: PretrainedModel) -> dict[str, Any]:
    """Parameters, the shape of every component, and the memory of a model, ready for JSON.

    Args:
        model: a full model or a component, on any device.
    """
    counts = parameter_counts(model)
    kinds = _PARTS if counts.parts else (model.component,)
    components = {}
    for kind in kinds:
        component: Any = getattr(model, kind) if counts.parts else model
        own = counts.parts.get(kind, counts)
        components[kind] = {"parameters": _counts(own), **_shape(component.config, kind)}
    return {
        "component": model.component,
        "parameters": _counts(counts),
        "components": components,
        "memory": _memory(components),
    }


def state_bytes(layers: int, slots: int, width: int, bytes_per_value: int = 4) -> int:
    """Bytes of one conversation's memory, whatever its length.

    Example:
        >>> state_bytes(14, 1024, 256)
        14680064
    """
    return layers * slots * width * bytes_per_value


def _counts(counts: ParameterCounts) -> dict[str, int]:
    return {"total": counts.total, "active": counts.active}


def _shape(config: Any, kind: str) -> dict[str, Any]:
    if isinstance(config, MLMHeadConfig):
        return {"width": config.embed_dim, "vocabulary": config.vocab_size}
    if isinstance(config, MemoryAttentionConfig):
        return _memory_attention(config)
    if isinstance(config, StatelessConfig):
        config = config.transformer_config()
    return _transformer(config, kind)


def _heads(counts: tuple[int, int]) -> dict[str, int]:
    return {"query_heads": counts[0], "key_value_heads": counts[1]}


def _rotary(config: Any) -> dict[str, Any] | None:
    if getattr(config, "use_nope", False):
        return None
    return {"layout": config.rope_layout, "base": config.rope_base, "angle_dtype": config.rope_angle_dtype}


def _transformer(config: TransformerConfig, kind: str) -> dict[str, Any]:
    stateless = {
        name: list(kinds)
        for name, kinds in (
            ("stateless_layers", config.stateless_layers_config),
            ("final_stateless_layers", config.final_stateless_layers_config),
        )
        if kinds
    }
    reads = kind != "stateless" and not config.skip_memory_cross_attention and config.reads_memory
    has_experts = config.use_moe or any("moe" in kinds for kinds in stateless.values())
    return {
        "layers": config.num_layers,
        **stateless,
        "width": config.embed_dim,
        "vocabulary": config.vocab_size,
        "trained_length": config.seq_len,
        "head_width": config.head_dim,
        "self_attention": {**_heads(config.self_attention_heads), "gated": config.use_gated_attention},
        "memory_cross_attention": (
            {**_heads(config.cross_attention_heads), "gated": config.has_gated_cross_attention} if reads else None
        ),
        "feed_forward": {"hidden": config.ff_dim, "activation": config.ff_activation, "gated": config.use_gated},
        "mixture_of_experts": _experts(config) if has_experts else None,
        "rotary": _rotary(config),
        "padding": config.padding,
    }


def _experts(config: TransformerConfig) -> dict[str, Any]:
    return {
        "experts": config.num_experts,
        "active": config.moe_top_k,
        "shared": config.num_shared_experts,
        "shared_hidden": config.shared_expert_dim or config.ff_dim if config.num_shared_experts else None,
        "layout": "stacked" if config.use_vectorized_moe else "per expert",
        "bias": config.moe_bias_mode if config.use_vectorized_moe else "local",
    }


def _memory_attention(config: MemoryAttentionConfig) -> dict[str, Any]:
    gate = None
    if config.use_gated_residual:
        gate = {
            "type": config.residual_gate_type,
            "activation": "tanh" if config.use_tanh_residual_gate else "sigmoid",
            "per_slot": config.residual_per_slot_gate,
        }
    return {
        "variant": config.variant,
        "layers": config.num_layers,
        **({"groups": config.num_groups} if config.variant == "grouped-self-interlayer" else {}),
        "slots": config.stm_size,
        "width": config.embed_dim,
        "head_width": config.head_dim,
        "attention": _heads(config.attention_heads),
        "second_attention": None if config.variant == "simple" else _heads(config.context_attention_heads),
        "residual_gate": gate,
        "memory_norm": config.norm_type,
        "rotary": _rotary(config),
        "padding": config.padding,
    }


def _memory(components: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The memory that the components share; None for models that have none."""
    attention = components.get("memory_attention")
    if attention is None:
        return None
    layers, slots, width = attention["layers"], attention["slots"], attention["width"]
    return {
        "layers": layers,
        "slots": slots,
        "width": width,
        "state_bytes": {
            "float32": state_bytes(layers, slots, width),
            "bfloat16": state_bytes(layers, slots, width, 2),
        },
    }
