"""Which rotary layout a checkpoint was trained with (spec sections "Eras", 2.2 and 3.1).

Upstream changed where rotated pairs are written (release 0.3.40) without a word in its files. Weights read under the
wrong layout are wrong without looking wrong, so files written here say it in their metadata; for others it is told
from what only one of the eras writes, and where nothing tells, a warning names the override.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.checkpoint.inference import ComponentFile
from rxt_model.config import MEMORY_ATTENTION_VARIANTS

__all__ = ["METADATA_PREFIX", "own_field_metadata", "read_own_fields", "rope_layout_of_era"]

METADATA_PREFIX = "rxt."
_FORMAT_VERSION = "1"
_VERSION_KEY = "rxt.format_version"
_COMPONENT_KEY = "rxt.component"

#: Our own fields that each kind of component has.
_OWN_FIELDS_OF: Mapping[str, tuple[str, ...]] = {
    "decoder": ("padding", "reads_memory", "rope_angle_dtype", "rope_layout"),
    "encoder": ("padding", "reads_memory", "rope_angle_dtype", "rope_layout"),
    "memory_attention": ("padding", "rope_angle_dtype", "rope_layout", "variant"),
    "mlm_head": (),
    "stateless": ("padding", "rope_angle_dtype", "rope_layout"),
}

#: What each of them can be, as metadata spells it.
_ACCEPTED: Mapping[str, tuple[str, ...]] = {
    "padding": ("mask", "dilute"),
    "reads_memory": ("true", "false"),
    "rope_angle_dtype": ("float32", "match"),
    "rope_layout": ("split", "interleaved"),
    "variant": MEMORY_ATTENTION_VARIANTS,
}

#: Keys that no release before 0.3 knew.
_THIRD_ERA_KEYS = frozenset(
    {
        "use_vectorized_moe", "vectorized_moe_from_legacy", "num_shared_experts", "shared_expert_dim", "moe_bias_mode",
        "moe_shared_experts_bias_mode", "moe_use_weighted_shared_experts", "moe_grouped_gemm",
        "moe_use_cutlass_grouped_gemm", "use_gated_attention", "gated_attention_activation",
        "use_gated_cross_attention", "use_attention_output_bias", "legacy_stm_in_encoder", "num_groups",
    }
)  # fmt: skip


def own_field_metadata(component: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metadata entries a file written here carries.

    Args:
        component: what the file holds (`PretrainedModel.component`).
        configs: key prefix without its dot ("" for a single component) to a (kind-complete) configuration, whose
            `kind` entry names the component kind.

    Example:
        >>> fields = {"kind": "stateless", "padding": "mask", "rope_angle_dtype": "float32", "rope_layout": "split"}
        >>> own_field_metadata("stateless", {"": fields})["rxt.rope_layout"]
        'split'
    """
    metadata = {"format": "pt", _VERSION_KEY: _FORMAT_VERSION, _COMPONENT_KEY: component}
    for prefix, config in configs.items():
        for name in _OWN_FIELDS_OF[config["kind"]]:
            value = config[name]
            metadata[_metadata_key(prefix, name)] = value if isinstance(value, str) else json.dumps(value)
    return metadata


def read_own_fields(
    metadata: Mapping[str, str], kinds: Mapping[str, str], *, where: str, component: str
) -> dict[str, dict[str, Any]] | None:
    """Our own fields per component, or None for a file written elsewhere.

    Args:
        metadata: of the weights file.
        kinds: key prefix without its dot to component kind.
        where: the weights file, for messages.
        component: what is being loaded.

    Raises:
        CheckpointError: entries of ours are incomplete, unknown, of a newer format, or of another kind of model.
    """
    own = {key: value for key, value in metadata.items() if key.startswith(METADATA_PREFIX)}
    if not own:
        return None
    if own.get(_VERSION_KEY) != _FORMAT_VERSION:
        raise CheckpointError(
            f"{where}, metadata key {_VERSION_KEY!r}: the value is {own.get(_VERSION_KEY)!r}; this version reads "
            f"{_FORMAT_VERSION!r}."
        )
    stored = own.get(_COMPONENT_KEY)
    full = ("rxt_alpha", "rxt_beta")
    if stored != component and not (stored in full and component in full):
        raise CheckpointError(
            f"{where}, metadata key {_COMPONENT_KEY!r}: the file holds {stored!r}, and {component!r} is to be loaded."
        )
    wanted = {
        _metadata_key(prefix, name): (prefix, name) for prefix, kind in kinds.items() for name in _OWN_FIELDS_OF[kind]
    }
    fields: dict[str, dict[str, Any]] = {prefix: {} for prefix in kinds}
    for key, value in own.items():
        if key in (_VERSION_KEY, _COMPONENT_KEY):
            continue
        if key not in wanted:
            raise CheckpointError(f"{where}, metadata key {key!r}: unknown here; the file is damaged or newer.")
        prefix, name = wanted.pop(key)
        if value not in _ACCEPTED[name]:
            accepted = ", ".join(map(repr, _ACCEPTED[name]))
            raise CheckpointError(f"{where}, metadata key {key!r}: the value is {value!r}; accepted are {accepted}.")
        fields[prefix][name] = value == "true" if name == "reads_memory" else value
    if wanted:
        raise CheckpointError(f"{where}, metadata key {next(iter(wanted))!r}: this entry is missing.")
    return fields


def rope_layout_of_era(files: Sequence[ComponentFile], metadata: Mapping[str, str]) -> tuple[str, bool]:
    """(layout, whether that is certain) for a file written elsewhere, from all of its components together.

    1. A configuration with ``rope_base`` (release 0.3.61 and later) is newer than the switch: interleaved.
    2. Experts stacked in one tensor, or another key that only 0.3 knows: interleaved, uncertain, since 0.3.0 to 0.3.39
       still wrote split. That was a fortnight, and no model is known to have been published from it.
    3. Experts one by one, or a full model whose encoder keeps a memory it does not read: before 0.3, split.
    4. A full model whose encoder keeps none: 0.3 again, interleaved, uncertain as in 2.
    5. Nothing tells (dense single components): split, uncertain; such files with all defaults written are older than
       ``rope_base``.

    Where both sides of every attention are rotated the layout changes nothing, and there is no doubt to report.
    """
    sensitive = any(_is_sensitive(file) for file in files)
    keys = {key for file in files for key in file.config}
    names = [name for file in files for name in file.shapes]
    if "rope_base" in keys:
        return "interleaved", True
    if keys & _THIRD_ERA_KEYS or any(name.endswith(".ff.w1") for name in names):
        return "interleaved", not sensitive
    if any(".ff.experts." in name for name in names):
        return "split", True
    encoder = next((file for file in files if file.kind == "encoder"), None)
    if encoder is not None and len(files) > 1 and not encoder.has_under("model.layers.0.memory_cross_attention."):
        memory = "model.stm.memory"
        if encoder.has(memory) or encoder.prefix + memory in metadata:
            return "split", True
        return "interleaved", not sensitive
    return "split", not sensitive


def _is_sensitive(file: ComponentFile) -> bool:
    """Whether one side of an attention is rotated and the other is not."""
    if file.config.get("use_nope"):
        return False
    return file.kind == "memory_attention" or file.has_under("model.layers.0.memory_cross_attention.")


def _metadata_key(prefix: str, name: str) -> str:
    return f"{METADATA_PREFIX}{prefix}.{name}" if prefix else f"{METADATA_PREFIX}{name}"
