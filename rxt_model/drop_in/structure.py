"""From a live upstream component to a component of this package with the same structure, on the meta device.

The rules are those of checkpoints (tensors first, configuration second, spec 3.1); what no file tells, a live component
answers when it is asked: which rotary layout it has is seen in what its rotation does to position 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rxt_model.checkpoint.fields import checked_fields
from rxt_model.checkpoint.inference import ComponentFile, infer_component, is_ignored_buffer
from rxt_model.checkpoint.rotary_base import settle_rotary_base
from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, TransformerConfig
from rxt_model.decoder import RxTDecoder
from rxt_model.drop_in.language_model import LanguageModel, language_model_config
from rxt_model.drop_in.recognition import VARIANTS, Component
from rxt_model.encoder import RxTEncoder
from rxt_model.heads import MLMHead
from rxt_model.memory_attention import RxTMemoryAttention

__all__ = ["OurComponent", "rotary_layout", "same_structure"]

OurComponent = RxTDecoder | RxTEncoder | RxTMemoryAttention | LanguageModel | MLMHead


class _LiveTensors:
    """The tensors of a component under the names of its checkpoint."""

    def __init__(self, component: Component) -> None:
        state = component.network.state_dict(keep_vars=True)
        self.tensors = {component.key_prefix + name: tensor for name, tensor in state.items()}

    def read(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU."""
        return self.tensors[name].detach().cpu()


def same_structure(component: Component, parity: str) -> OurComponent:
    """A component of this package with the structure of upstream's; its tensors are on the meta device.

    Args:
        component: upstream's.
        parity: "exact" or "upstream" (see :func:`rxt_model.drop_in.accelerate`).

    Raises:
        ValueError: the component is something this package does not build; the message says what.
    """
    if component.config is None:
        raise ValueError(
            "its configuration is not here but with the model it is a part of; accelerate that model, which includes it."
        )
    live = _LiveTensors(component)
    where = f"the configuration of {component.path or 'the model'}"
    file = ComponentFile(
        kind=component.kind,
        shapes={name: tuple(tensor.shape) for name, tensor in live.tensors.items()},
        config=_config(component, where),
        weights_file=f"the weights of {component.path or 'the model'}",
        config_where=where,
        forced_variant=VARIANTS.get(component.upstream_class.__name__),
    )
    fields = infer_component(file)
    settle_rotary_base(file, fields, live)
    own = _own_fields(component, fields, parity)
    with torch.device("meta"):
        ours = _build(file, {**fields, **own}, own)
    if parity == "upstream" and isinstance(ours, (RxTDecoder, LanguageModel)) and not ours.config.use_flash_attention:
        for layer, _ in ours.model.layers_in_order():
            layer.padding = "rows_of_zeros" if ours.config.rope_layout == "interleaved" else "nothing_read"
    _check_names(ours, live.tensors)
    _check_dropout(component.network, fields)
    return ours


def _config(component: Component, where: str) -> dict[str, Any]:
    """The stated fields; the size of a live memory counts, since it can be changed."""
    assert component.config is not None
    config = checked_fields(component.kind, component.config, where=where, notes=[])
    if component.kind == "stateless":  # what only upstream's has (see `language_model_config`)
        config = {**component.config, **config}
    memory = getattr(getattr(component.network, "stm", None), "memory", None)
    if isinstance(memory, Tensor):
        config["stm_size"] = memory.shape[2]
    return config


def _own_fields(component: Component, fields: Mapping[str, Any], parity: str) -> dict[str, Any]:
    """Rotary layout, angle type, padding and whether an encoder reads memory."""
    if component.kind == "mlm_head":
        return {}
    layout = rotary_layout(component.network)
    follows = parity == "upstream"
    if follows and fields.get("use_flash_attention") and layout == "split":
        raise ValueError(
            "it uses flash attention in a release that ran it across heads instead of tokens (specification 7, defect 39), "
            "which is not reproduced; use parity='exact'."
        )
    own: dict[str, Any] = {
        "rope_layout": layout,
        "rope_angle_dtype": "match" if follows else "float32",
        "padding": "dilute" if follows and fields.get("use_flash_attention") else "mask",
    }
    if component.kind == "encoder":
        # Releases of the interleaved era keep an encoder's cross-attention weights and skip them (spec 3.2).
        own["reads_memory"] = layout == "split" or fields["skip_memory_cross_attention"]
    return own


def rotary_layout(network: nn.Module) -> str:
    """Where a network writes rotated pairs: seen at position 0, where nothing is rotated and pairs are only written back.

    Raises:
        ValueError: neither layout that is known (spec 2.2).
    """
    rope = next((module for name, module in network.named_modules() if name.rpartition(".")[2] == "rope"), None)
    if rope is None:
        return "interleaved"  # rotates nothing
    frequencies = rope.get_buffer("inv_freq")
    width = 2 * frequencies.numel()
    pairs = torch.arange(width, dtype=torch.float32, device=frequencies.device)
    with torch.no_grad():
        written = rope(pairs.view(1, 1, 1, width), pairs.view(1, 1, 1, width))[0].flatten().float()
    if torch.equal(written, pairs):
        return "interleaved"
    if torch.equal(written, torch.cat([pairs[0::2], pairs[1::2]])):
        return "split"
    raise ValueError("its rotary embedding writes rotated pairs in neither of the two layouts that are known.")


def _build(file: ComponentFile, fields: Mapping[str, Any], own: Mapping[str, Any]) -> OurComponent:
    if file.kind == "decoder":
        return RxTDecoder(TransformerConfig.from_dict(fields))
    if file.kind == "encoder":
        return RxTEncoder(TransformerConfig.from_dict(fields))
    if file.kind == "memory_attention":
        return RxTMemoryAttention(MemoryAttentionConfig.from_dict(fields))
    if file.kind == "mlm_head":
        return MLMHead(MLMHeadConfig.from_dict(fields))
    return LanguageModel(language_model_config(file, own))


def _check_names(ours: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Every weight has its counterpart of the same shape, on both sides."""
    wanted = {name: tensor.shape for name, tensor in ours.state_dict(keep_vars=True).items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if not is_ignored_buffer(name)}
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            has = f"has shape {tuple(found[name])}" if name in found else "is missing"
            needs = f"{tuple(wanted[name])} is expected" if name in wanted else "nothing of that name is expected"
            raise ValueError(f"its weight {name!r} {has}, and {needs} of a model with this configuration.")


def _check_dropout(network: nn.Module, fields: Mapping[str, Any]) -> None:
    stated = {float(value) for name, value in fields.items() if name.endswith("dropout") and value is not None}
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout) and module.p not in {0.0, *stated}:
            raise ValueError(
                f"{name} drops {module.p} of its input, and its configuration knows {sorted(stated)} only."
            )
