"""Typed reading of `config.json`: known fields, their types, and what upstream keys mean nothing here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.config import (
    OWN_FIELDS,
    MemoryAttentionConfig,
    MLMHeadConfig,
    StatelessConfig,
    TokenIds,
    TransformerConfig,
)

__all__ = ["CONFIG_CLASSES", "checked_fields"]

#: The configuration of every kind of component.
CONFIG_CLASSES: Mapping[str, type[Any]] = {
    "decoder": TransformerConfig,
    "encoder": TransformerConfig,
    "memory_attention": MemoryAttentionConfig,
    "mlm_head": MLMHeadConfig,
    "stateless": StatelessConfig,
    "tokens": TokenIds,
}

#: Upstream keys that select something this package does not build (spec 3.2). Switched off, they are ignored.
_OUT_OF_SCOPE = {
    "att_experts": "mixture-of-experts attention",
    "att_query_experts": "mixture-of-experts attention",
    "att_num_experts": "mixture-of-experts attention",
    "att_num_query_experts": "mixture-of-experts attention",
    "cross_att_experts": "mixture-of-experts attention",
    "cross_att_query_experts": "mixture-of-experts attention",
    "interlayer_att_experts": "mixture-of-experts attention",
    "interlayer_att_query_experts": "mixture-of-experts attention",
    "self_att_experts": "mixture-of-experts attention",
    "self_att_query_experts": "mixture-of-experts attention",
    "attn_layer_types": "hybrid linear attention",
    "stateless_attn_layer_types": "hybrid linear attention",
    "final_stateless_attn_layer_types": "hybrid linear attention",
    "use_relative_embeddings": "relative position embeddings",
    "use_moe_att": "mixture-of-experts attention",
}

#: Upstream keys that change nothing here: those of kernels and logging, those of attention types that are refused by
#: name, and those that only say how tensors look whose presence and shape is checked anyway.
_WITHOUT_EFFECT = frozenset(
    {
        "debug_mode", "debug_interval", "att_num_global_tokens", "att_window_size", "moe_grouped_gemm",
        "moe_use_cutlass_grouped_gemm", "vectorized_moe_from_legacy", "init_identity_norm", "dense_ff_dim",
        "head_norm_type", "gated_attention_activation", "moe_bias_mode", "moe_shared_experts_bias_mode",
        "use_attention_output_bias", "router_dtype",
    }
)  # fmt: skip

_OFF = (None, False, 0, "", "null")


def checked_fields(kind: str, config: Mapping[str, Any], *, where: str, notes: list[str]) -> dict[str, Any]:
    """The known fields of one component's part of a `config.json`, with their types checked.

    Args:
        kind: a name of `CONFIG_CLASSES`.
        config: that part, as parsed.
        where: the file (and part) for messages.
        notes: gets a sentence about unknown keys with values other than "off", which may change what upstream computes.

    Returns:
        The fields that are present and known; nothing is filled in.

    Raises:
        CheckpointError: a value has the wrong type, or a key switches on what this package does not implement.
    """
    cls = CONFIG_CLASSES[kind]
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    fields: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in config.items():
        if key in names:
            if key in OWN_FIELDS:
                raise CheckpointError(
                    f"{where}, key {key!r}: this field does not belong into config.json; it is kept in the metadata of "
                    "the weights file, and from_pretrained takes it as an argument where it can be overridden."
                )
            if not _fits(value, hints[key]):
                raise CheckpointError(
                    f"{where}, key {key!r}: the value is {_short(value)}, {_wanted(hints[key])} is needed."
                )
            fields[key] = tuple(value) if isinstance(value, list) else value
        elif key in _OUT_OF_SCOPE and value not in _OFF and value != []:
            raise CheckpointError(
                f"{where}, key {key!r}: the value {_short(value)} asks for {_OUT_OF_SCOPE[key]}, which is not implemented."
            )
        elif key in _OUT_OF_SCOPE or key in _WITHOUT_EFFECT or key.startswith("linear_attn_"):
            continue
        elif value not in _OFF and value not in ([], {}):
            unknown.append(f"{key!r} = {_short(value)}")
    if unknown:
        notes.append(f"{where}: unknown keys are ignored: {', '.join(unknown)}.")
    return fields


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(option).replace(" is needed", "") for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin is tuple:
        return "a list of strings"
    words = {type(None): "null", float: "a number", int: "an integer", bool: "true or false", str: "a string"}
    return words.get(hint, str(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
