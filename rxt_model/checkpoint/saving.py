"""From a model to two files that this package and the upstream library both read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rxt_model.checkpoint.convert import convert_rope_layout
from rxt_model.checkpoint.era import own_field_metadata
from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.checkpoint.protocol import LoadableModule
from rxt_model.checkpoint.reader import CONFIG_NAME, WEIGHTS_NAME
from rxt_model.checkpoint.writer import write_safetensors
from rxt_model.config import OWN_FIELDS
from rxt_model.files import atomic_path

__all__ = ["save_model", "upstream_config"]

_FULL = ("rxt_alpha", "rxt_beta")
_PARTS = ("decoder", "encoder", "memory_attention")

#: What a key that releases before 0.3 did not know has to be for such a release to compute the same.
_BEFORE_THIRD_ERA: Mapping[str, Any] = {
    "use_vectorized_moe": False,
    "vectorized_moe_from_legacy": False,
    "num_shared_experts": 0,
    "shared_expert_dim": None,
    "moe_bias_mode": "local",
    "moe_shared_experts_bias_mode": "local",
    "moe_use_weighted_shared_experts": False,
    "router_amp": False,
    "router_dtype": "float32",
    "head_norm_type": "layer_norm",
    "stateless_layers_config": None,
    "final_stateless_layers_config": None,
    "use_nope": False,
    "rope_base": 10000,
    "use_gated_attention": False,
    "gated_attention_activation": "sigmoid",
    "use_gated_cross_attention": None,
    "use_attention_output_bias": True,
    "legacy_stm_in_encoder": False,
    "num_groups": 1,
    "tie_embeddings": False,
}
#: Choices of a kernel, which no release needs to be told.
_KERNEL_CHOICES = frozenset({"moe_grouped_gemm", "moe_use_cutlass_grouped_gemm"})
_EXPERT_FIELDS = frozenset(
    {
        "use_vectorized_moe", "vectorized_moe_from_legacy", "num_shared_experts", "shared_expert_dim", "moe_bias_mode",
        "moe_shared_experts_bias_mode", "moe_use_weighted_shared_experts", "num_experts", "moe_top_k", "router_amp",
        "router_dtype", "ff_num_shared_experts", "ff_num_experts", "ff_moe_top_k", "num_initial_dense_layers",
        "dense_ff_dim",
    }
)  # fmt: skip
#: Without any meaning for experts that are stored one by one, in every release.
_IGNORED_PER_EXPERT = frozenset(
    {"moe_bias_mode", "moe_shared_experts_bias_mode", "moe_use_weighted_shared_experts", "shared_expert_dim"}
)
#: Arguments that only one variant's constructor has.
_VARIANT_FIELDS = {
    "disable_residual": ("simple",),
    "use_gate_for_self_attention": ("self",),
    "num_groups": ("grouped-self-interlayer",),
}
_DEFAULT_TITLE = "SYSTEM INSTRUCTIONS"
_UPSTREAM_VARIANTS = {"gated-self-interlayer": "self-interlayer"}


def save_model(
    model: LoadableModule,
    directory: Path,
    *,
    rope_layout: Literal["split", "interleaved"] | None = None,
    embedding: Literal["both", "once"] = "both",
) -> None:
    """Writes `config.json` and `model.safetensors`; see `PretrainedModel.save_pretrained`."""
    if rope_layout not in (None, "split", "interleaved"):
        raise ValueError(f"rope_layout is {rope_layout!r}; accepted are None (as it is), 'split' and 'interleaved'.")
    if embedding not in ("both", "once"):
        raise ValueError(f"embedding is {embedding!r}; accepted are 'both' and 'once'.")
    config = model._config()
    tensors = dict(model.state_dict())
    if rope_layout is not None and model.component != "mlm_head":
        tensors = convert_rope_layout(tensors, config, to=rope_layout)
        config = _with_rope_layout(config, rope_layout)
    if embedding == "once" and model.component in _FULL:
        del tensors["encoder.model.embedding.weight"]
    _refuse_meta(tensors, model)
    metadata = own_field_metadata(model.component, _configs_by_prefix(model.component, config))
    text = json.dumps(upstream_config(model.component, config), indent=2, sort_keys=True, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Both are complete before either takes its name, so a failing save leaves the old pair as it was.
        weights_path, config_path = directory / WEIGHTS_NAME, directory / CONFIG_NAME
        with atomic_path(weights_path) as weights_file, atomic_path(config_path) as config_file:
            write_safetensors(tensors, weights_file, metadata=metadata)
            config_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory}: the model cannot be saved there ({error}).") from error


def upstream_config(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` content for a model's complete configuration: only keys that upstream constructors know.

    Weights of the split rotary layout can only be computed right by releases before 0.3.40, so keys that those do not
    need are left out, and the file looks like one of that time (`rope_layout_of_era` relies on it should the metadata
    of the weights be lost). Everything else is written for current releases, defaults included.

    Args:
        component: `PretrainedModel.component`.
        config: what `_config()` returns.

    Example:
        >>> upstream_config("mlm_head", {"embed_dim": 128, "vocab_size": 7500})
        {'embed_dim': 128, 'vocab_size': 7500}
    """
    if component not in _FULL:
        fields = _upstream_fields(config)
        if component == "stateless" and fields.get("rope_base") == _BEFORE_THIRD_ERA["rope_base"]:
            del fields["rope_base"]  # no release's stateless model has this argument; all of them compute with 10000
        return fields
    result: dict[str, Any] = {f"{part}_config": _upstream_fields(config[f"{part}_config"]) for part in _PARTS}
    variant = config["memory_attention_variant"]
    early = config["decoder_config"].get("rope_layout") == "split"
    # RxTBeta of that time has one variant and no title, and refuses both arguments.
    if not (early and component == "rxt_beta" and variant == "gated-self-interlayer"):
        result["memory_attention_variant"] = _UPSTREAM_VARIANTS.get(variant, variant)
    result["tokenizer_config"] = {key: value for key, value in config["tokenizer_config"].items() if value is not None}
    result["tokenizer"] = None
    if component == "rxt_beta" and not (early and config["system_prompt_title"] == _DEFAULT_TITLE):
        result["system_prompt_title"] = config["system_prompt_title"]
    return result


def _upstream_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {}
    for name, value in config.items():
        if name in OWN_FIELDS or name in _KERNEL_CHOICES:
            continue
        if name in _VARIANT_FIELDS and config.get("variant") not in _VARIANT_FIELDS[name]:
            continue
        if config.get("rope_layout") == "split" and _is_understood(name, value, config):
            continue
        if value is not None or name not in _BEFORE_THIRD_ERA:
            fields[name] = list(value) if isinstance(value, tuple) else value
    _write_second_attention(fields, config)
    return fields


def _is_understood(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a release before 0.3 computes the same without being told this."""
    if name in _EXPERT_FIELDS and not _has_experts(config):
        return True
    if name in _IGNORED_PER_EXPERT and not config.get("use_vectorized_moe", True):
        return True
    if name == "dense_layer_dim" and not config.get("stateless_layers_config"):
        return not config.get("final_stateless_layers_config")
    return name in _BEFORE_THIRD_ERA and bool(value == _BEFORE_THIRD_ERA[name])


def _has_experts(config: Mapping[str, Any]) -> bool:
    kinds = (*(config.get("stateless_layers_config") or ()), *(config.get("final_stateless_layers_config") or ()))
    return bool(config.get("use_moe") or config.get("use_moe_ff") or "moe" in kinds)


def _write_second_attention(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Explicit values for memory attention's second attention: upstream's defaults are not those of the main one."""
    variant = config.get("variant")
    if variant is None:
        return
    used = None if variant == "simple" else "self_att" if variant == "self" else "interlayer_att"
    for prefix in ("self_att", "interlayer_att"):
        for name in ("dropout", "groups", "type", "query_groups"):
            key = f"{prefix}_{name}"
            fields.pop(key, None)
            if prefix == used:
                fields[key] = config[f"att_{name}"] if config[key] is None else config[key]


def _configs_by_prefix(component: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if component not in _FULL:
        return {"": {**config, "kind": component}}
    return {part: {**config[f"{part}_config"], "kind": part} for part in _PARTS}


def _with_rope_layout(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    if "decoder_config" not in config:
        return {**config, "rope_layout": layout}
    return {**config, **{f"{part}_config": {**config[f"{part}_config"], "rope_layout": layout} for part in _PARTS}}


def _refuse_meta(tensors: Mapping[str, Tensor], model: LoadableModule) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"key {name!r}: this {type(model).__name__} is on the meta device and has no weights to save."
            )
