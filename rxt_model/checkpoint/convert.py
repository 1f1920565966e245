"""Rewriting weights between the two expert layouts and the two rotary layouts, without changing what they compute."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rxt_model.checkpoint.errors import CheckpointError

__all__ = ["convert_experts", "convert_rope_layout"]

_LAYOUTS = ("split", "interleaved")
_EXPERT_LAYOUTS = ("stacked", "per-expert")
_EXPERT_KEY = re.compile(r"^(?P<layer>.*\bff)\.(?P<kind>experts|shared_experts)\.(?P<index>\d+)\.(?P<part>.+)$")


def convert_experts(state_dict: Mapping[str, Tensor], *, to: Literal["stacked", "per-expert"]) -> dict[str, Tensor]:
    """The same mixture-of-experts layers in the other weight layout (spec 2.8 and 3.3).

    A stacked tensor holds all experts of a layer, transposed: ``w1[e] = fc1.linear.weight.T`` (or ``fc1.weight.T``
    without gating). Layers already in the wanted layout, and all other keys, are passed through. The result of
    ``to="stacked"`` needs ``moe_bias_mode="local"`` and ``moe_shared_experts_bias_mode="local"``; the per-expert layout
    has no weighted shared experts (``moe_use_weighted_shared_experts``), which a state dict does not show: convert
    only where it is off.

    Args:
        state_dict: weights of a component or of a full model, any prefix.
        to: ``"stacked"`` or ``"per-expert"``.

    Returns:
        A new dictionary; converted tensors are copies, the others are the same objects.

    Raises:
        ValueError: `to` is neither of the two.
        CheckpointError: a layer has a global bias, shared experts of another width than the routed ones (neither
            exists per expert), or experts that are incomplete or of unequal shapes.

    Example:
        >>> weights = {"ff.experts.0.fc1.weight": torch.ones(3, 2), "ff.experts.0.fc1.bias": torch.ones(3),
        ...            "ff.experts.0.fc2.weight": torch.ones(2, 3), "ff.experts.0.fc2.bias": torch.ones(2)}
        >>> {name: tuple(tensor.shape) for name, tensor in convert_experts(weights, to="stacked").items()}
        {'ff.w1': (1, 2, 3), 'ff.b1': (1, 3), 'ff.w2': (1, 3, 2), 'ff.b2': (1, 2)}
    """
    if to not in _EXPERT_LAYOUTS:
        raise ValueError(f"to is {to!r}; accepted are 'stacked' and 'per-expert'.")
    return _stack(state_dict) if to == "stacked" else _unstack(state_dict)


def _stack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    groups: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
    for key, tensor in state_dict.items():
        match = _EXPERT_KEY.match(key)
        if match is None:
            result[key] = tensor
            continue
        group = groups.setdefault((match["layer"], match["kind"]), {})
        group.setdefault(int(match["index"]), {})[match["part"]] = tensor
    for (layer, kind), experts in groups.items():
        prefix = f"{layer}.{kind}"
        if sorted(experts) != list(range(len(experts))):
            missing = next(index for index in range(len(experts)) if index not in experts)
            raise CheckpointError(f"key '{prefix}.{missing}': this expert is missing, others of its layer exist.")
        if kind == "shared_experts" and len(experts) == 1:
            for part, tensor in experts[0].items():
                result[f"{layer}.shared_expert.{part}"] = tensor
            continue
        name = "" if kind == "experts" else "shared_"
        for target, part, transpose in (
            ("w1", "fc1.linear.weight", True),
            ("w1", "fc1.weight", True),
            ("b1", "fc1.linear.bias", False),
            ("b1", "fc1.bias", False),
            ("w2", "fc2.weight", True),
            ("b2", "fc2.bias", False),
        ):
            if part in experts[0]:
                result[f"{layer}.{name}{target}"] = _stack_part(prefix, experts, part, transpose)
    return result


def _stack_part(prefix: str, experts: dict[int, dict[str, Tensor]], part: str, transpose: bool) -> Tensor:
    parts = []
    for index in range(len(experts)):
        key = f"{prefix}.{index}.{part}"
        if set(experts[index]) != set(experts[0]):
            raise CheckpointError(f"key '{prefix}.{index}': this expert has other tensors than expert 0 of its layer.")
        tensor = experts[index][part]
        if tensor.shape != experts[0][part].shape:
            raise CheckpointError(
                f"key '{key}': the shape is {tuple(tensor.shape)}, expert 0 has {tuple(experts[0][part].shape)}."
            )
        parts.append(tensor.T if transpose else tensor)
    return torch.stack(parts).contiguous()


def _unstack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state_dict)
    for layer in [key[: -len(".w1")] for key in state_dict if key.endswith("ff.w1")]:
        _refuse_unstackable(layer, state_dict)
        routed_width = state_dict[f"{layer}.w2"].shape[1]
        _unstack_group(result, layer, "", "experts", routed_width)
        if f"{layer}.shared_w1" in state_dict:
            _unstack_group(result, layer, "shared_", "shared_experts", routed_width)
        for key in [key for key in result if key.startswith(f"{layer}.shared_expert.")]:
            part = key[len(f"{layer}.shared_expert.") :]
            tensor = result.pop(key)
            if part == "fc2.weight" and tensor.shape[1] != routed_width:
                raise _width_error(key, tensor.shape[1], routed_width)
            result[f"{layer}.shared_experts.0.{part}"] = tensor
    return result


def _refuse_unstackable(layer: str, state_dict: Mapping[str, Tensor]) -> None:
    if f"{layer}.w2" not in state_dict:
        raise CheckpointError(f"key '{layer}.w2': this tensor is missing, '{layer}.w1' exists.")
    for name in ("global_bias", "shared_experts_bias"):
        if f"{layer}.{name}" in state_dict:
            raise CheckpointError(
                f"key '{layer}.{name}': a bias common to all experts does not exist in the per-expert layout; "
                "keep the stacked layout."
            )


def _unstack_group(result: dict[str, Tensor], layer: str, name: str, kind: str, routed_width: int) -> None:
    w1, w2 = result.pop(f"{layer}.{name}w1"), result.pop(f"{layer}.{name}w2")
    b1, b2 = result.pop(f"{layer}.{name}b1", None), result.pop(f"{layer}.{name}b2", None)
    count, width = w2.shape[0], w2.shape[1]
    if width != routed_width:
        raise _width_error(f"{layer}.{name}w2", width, routed_width)
    if w1.shape[2] not in (width, 2 * width):
        raise CheckpointError(f"key '{layer}.{name}w1': the shape {tuple(w1.shape)} does not fit width {width}.")
    first = "fc1.linear" if w1.shape[2] == 2 * width else "fc1"
    if b1 is None:  # bias mode "off": a bias of zero changes nothing
        b1 = w1.new_zeros(count, w1.shape[2])
    if b2 is None:
        b2 = w2.new_zeros(count, w2.shape[2])
    for index in range(count):
        prefix = f"{layer}.{kind}.{index}"
        result[f"{prefix}.{first}.weight"] = w1[index].T.contiguous()
        result[f"{prefix}.{first}.bias"] = b1[index].clone()
        result[f"{prefix}.fc2.weight"] = w2[index].T.contiguous()
        result[f"{prefix}.fc2.bias"] = b2[index].clone()


def _width_error(key: str, width: int, routed_width: int) -> CheckpointError:
    return CheckpointError(
        f"key '{key}': shared experts of width {width} do not exist in the per-expert layout, where they have the "
        f"routed width {routed_width}; keep the stacked layout."
    )


#: Projections whose output is *not* rotated while the other side of the same attention is (spec 2.2). The second
#: attentions of memory attention (`mean_attention_layers`, `self_attention_layers`) rotate nothing and do not match.
_UNROTATED = (
    re.compile(r"(^|\.)memory_cross_attention\.k_proj\.weight$"),
    re.compile(r"(^|\.)attention_layers\.\d+\.q_proj\.weight$"),
)


def convert_rope_layout(
    state_dict: Mapping[str, Tensor], config: Any, *, to: Literal["split", "interleaved"]
) -> dict[str, Tensor]:
    """The same weights for the other rotary output layout (spec 2.2).

    Both layouts rotate the same pairs and differ in where the results are written: split output is interleaved output
    under the permutation ``[0, 2, 4, …, 1, 3, 5, …]`` of each head. Where query and key are both rotated (self-attention)
    that cancels. Where one side is (memory cross-attention rotates queries, memory attention keys), the rows of the
    *other* side's projection are permuted to follow: ``k_proj`` of memory cross-attention and ``q_proj`` of memory
    attention's main step. The converted model computes the same values under ``rope_layout=to``.

    Args:
        state_dict: weights of a component or of a full model.
        config: its configuration, a dataclass of `rxt_model.config` or a mapping; a full model's mapping holds
            ``decoder_config``, ``encoder_config`` and ``memory_attention_config``. Read are ``rope_layout``,
            ``embed_dim``, ``att_heads`` and ``use_nope`` (nothing is rotated, nothing to convert).
        to: the layout to convert to; components that already have it are passed through.

    Returns:
        A new dictionary; converted tensors are copies. The configuration is the caller's to update.

    Raises:
        ValueError: `to` or a configuration's ``rope_layout`` is unknown, or a weight does not fit the configuration.

    Example:
        >>> config = {"embed_dim": 4, "att_heads": 1, "rope_layout": "split"}
        >>> key = "model.layers.0.memory_cross_attention.k_proj.weight"
        >>> weights = {key: torch.arange(4.0).view(4, 1)}
        >>> convert_rope_layout(weights, config, to="interleaved")[key].flatten()
        tensor([0., 2., 1., 3.])
    """
    if to not in _LAYOUTS:
        raise ValueError(f"to is {to!r}; accepted are 'split' and 'interleaved'.")
    result = dict(state_dict)
    for prefix, part in _component_configs(config):
        layout = part.get("rope_layout")
        if layout not in _LAYOUTS:
            raise ValueError(f"rope_layout of the configuration is {layout!r}; accepted are 'split' and 'interleaved'.")
        if layout == to or part.get("use_nope", False):
            continue
        head_dim = int(part["embed_dim"]) // int(part["att_heads"])
        split_order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
        order = split_order if to == "split" else torch.argsort(split_order)
        for key, tensor in state_dict.items():
            if not key.startswith(prefix):
                continue
            if any(pattern.search(key) for pattern in _UNROTATED):
                if tensor.dim() != 2 or tensor.shape[0] % head_dim:
                    raise ValueError(
                        f"key {key!r}: the shape {tuple(tensor.shape)} does not hold heads of {head_dim} "
                        "(embed_dim / att_heads of the configuration)."
                    )
                heads = tensor.unflatten(0, (-1, head_dim))
                result[key] = heads[:, order.to(tensor.device)].flatten(0, 1).contiguous()
    return result


def _component_configs(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key prefix, configuration) of every component in a configuration."""
    mapping = _as_mapping(config)
    names = {"decoder_config": "decoder.", "encoder_config": "encoder.", "memory_attention_config": "memory_attention."}
    if any(name in mapping for name in names):
        for name, prefix in names.items():
            if name in mapping:
                yield prefix, _as_mapping(mapping[name])
    else:
        yield "", mapping


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        values: Mapping[str, Any] = config.to_dict()
        return values
    raise TypeError(f"config is a {type(config).__name__}; a configuration or a mapping is needed.")
