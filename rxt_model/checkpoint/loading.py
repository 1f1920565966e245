"""From two files to a model: everything is checked before the first weight is assigned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rxt_model.checkpoint.era import read_own_fields, rope_layout_of_era
from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.checkpoint.fields import checked_fields
from rxt_model.checkpoint.inference import ComponentFile, infer_component, is_ignored_buffer
from rxt_model.checkpoint.protocol import LoadableModule, OwnsBuffers
from rxt_model.checkpoint.reader import CONFIG_NAME, WEIGHTS_NAME, SafetensorsFile, read_json_object
from rxt_model.checkpoint.rotary_base import settle_rotary_base
from rxt_model.config import canonical_variant

__all__ = ["LoadOptions", "load_model"]

Model = TypeVar("Model", bound=LoadableModule)

_FULL = ("rxt_alpha", "rxt_beta")
_PARTS = ("decoder", "encoder", "memory_attention")
_DECODER_EMBEDDING = "decoder.model.embedding.weight"
_ENCODER_EMBEDDING = "encoder.model.embedding.weight"
_EMBEDDINGS = (_DECODER_EMBEDDING, _ENCODER_EMBEDDING)
#: Stateless layers of rxlm 0.2.38 called their second norm norm2 (spec 3.3).
_OLD_STATELESS_NORM = re.compile(r"^(?P<layer>(?:.*\.)?model\.(?:final_)?stateless_layers\.\d+)\.norm2\.(?P<part>\w+)$")


@dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` was asked to decide instead of the files; None or "auto" leaves it to them."""

    rope_layout: str = "auto"
    rope_angle_dtype: str | None = None
    padding: str | None = None
    memory_attention_variant: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def check(self) -> None:
        """Refuses values that no checkpoint could make sense of."""
        _choice("rope_layout", self.rope_layout, ("auto", "split", "interleaved"))
        _choice("rope_angle_dtype", self.rope_angle_dtype, (None, "float32", "match"))
        _choice("padding", self.padding, (None, "mask", "dilute"))
        if self.memory_attention_variant is not None:
            canonical_variant(self.memory_attention_variant)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype is {self.dtype!r}; a floating point torch.dtype, or None for the file's own.")


def load_model(
    cls: type[Model], directory: Path, options: LoadOptions, *, tokenizer: Any = None
) -> tuple[Model, list[str]]:
    """Loads a model of class `cls` from `config.json` and `model.safetensors` in `directory`.

    Returns:
        The model, and what its user should be warned about.

    Raises:
        CheckpointError: anything about the two files, in one sentence that names file and key.
        ValueError: an option is none of the accepted values.
    """
    options.check()
    weights_path = find_weights(directory)
    config = read_json_object(directory / CONFIG_NAME)
    notes: list[str] = []
    with SafetensorsFile(weights_path) as weights:
        sources = _sources(weights, cls.component, notes)
        resolved = _resolve(cls.component, config, sources, weights, directory / CONFIG_NAME, options, notes)
        model = _build(cls, resolved, directory / CONFIG_NAME, tokenizer)
        _check_keys(model, sources, weights)
        device = torch.get_default_device() if options.device is None else options.device
        tensors = {key: _read(weights, sources[key], device, options.dtype) for key in model.state_dict()}
    model.load_state_dict(tensors, strict=True, assign=True)
    _reset_buffers(model, device)
    model._after_load()
    return model.eval(), notes


def _read(weights: SafetensorsFile, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if device.type == "meta":  # the file has been checked as far as its header goes; its data is not needed
        entry = weights.entries[name]
        return torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device)
    return weights.read(name).to(device=device, dtype=dtype)


def find_weights(directory: Path) -> Path:
    """The weights file of a directory, or an error that says what is there instead."""
    path = directory / WEIGHTS_NAME
    if path.exists():
        return path
    for name, reason in (
        ("model.safetensors.index.json", "the weights are split over several files, which is not supported"),
        ("pytorch_model.bin", "it is a pickle, which is never opened; convert it to safetensors first"),
    ):
        if (directory / name).exists():
            raise CheckpointError(f"{path}: there is no such file. There is {name}: {reason}.")
    raise CheckpointError(f"{path}: there is no such file.")


def _choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}.")


# which stored tensor becomes which weight


def _sources(weights: SafetensorsFile, component: str, notes: list[str]) -> dict[str, str]:
    """Name in the model to name in the file, for everything that is a weight."""
    sources: dict[str, str] = {}
    for name, entry in weights.entries.items():
        if is_ignored_buffer(name):
            continue
        if not entry.dtype.is_floating_point:
            raise CheckpointError(
                f"{weights.path}, key {name!r}: the tensor is of type {entry.dtype}; weights are floating point."
            )
        target = name
        match = _OLD_STATELESS_NORM.match(name)
        if match is not None and f"{match['layer']}.norm3.{match['part']}" not in weights.entries:
            target = f"{match['layer']}.norm3.{match['part']}"
        sources[target] = name
    if component in _FULL:
        _alias_embeddings(sources, weights, notes)
    return sources


def _alias_embeddings(sources: dict[str, str], weights: SafetensorsFile, notes: list[str]) -> None:
    """Both embedding names, whichever of them the file kept; they are one tensor in every full model.

    A file that has both with different values was saved before its components were shared. Sharing keeps the encoder's
    upstream, so that is the embedding the model was used with.
    """
    stored = [name for name in _EMBEDDINGS if name in sources]
    if not stored:
        raise CheckpointError(
            f"{weights.path}, key {_DECODER_EMBEDDING!r}: this tensor is missing, and so is {_ENCODER_EMBEDDING!r}."
        )
    if len(stored) == 2:
        first, second = (weights.entries[sources[name]] for name in _EMBEDDINGS)
        if first.shape != second.shape:
            raise CheckpointError(
                f"{weights.path}, key {_ENCODER_EMBEDDING!r}: its shape is {second.shape}, that of {_DECODER_EMBEDDING!r} "
                f"{first.shape}; encoder and decoder share one embedding."
            )
        if torch.equal(weights.read(sources[_DECODER_EMBEDDING]), weights.read(sources[_ENCODER_EMBEDDING])):
            return
        notes.append(
            f"{weights.path}: {_DECODER_EMBEDDING!r} and {_ENCODER_EMBEDDING!r} differ, and a full model has one "
            "embedding; the encoder's is used, as upstream does when it shares them."
        )
        stored = [_ENCODER_EMBEDDING]
    sources.update(dict.fromkeys(_EMBEDDINGS, sources[stored[0]]))


def _check_keys(model: LoadableModule, sources: Mapping[str, str], weights: SafetensorsFile) -> None:
    """Every weight is in the file with its shape, and the file has nothing else."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in sources]
    surplus = [name for key, name in sources.items() if key not in wanted]
    if missing:
        also = f" The file has {surplus[0]!r}, which the model does not." if surplus else ""
        raise CheckpointError(f"{weights.path}, key {missing[0]!r}: this tensor is missing{_more(missing)}.{also}")
    if surplus:
        raise CheckpointError(
            f"{weights.path}, key {surplus[0]!r}: the model has no such weight{_more(surplus)}; its structure follows from "
            "the other tensors and config.json."
        )
    for key, tensor in wanted.items():
        shape = weights.entries[sources[key]].shape
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{weights.path}, key {sources[key]!r}: the shape is {shape}, the model needs {tuple(tensor.shape)}."
            )


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


# what kind of model the files describe


def _resolve(
    component: str,
    config: Mapping[str, Any],
    sources: Mapping[str, str],
    weights: SafetensorsFile,
    config_path: Path,
    options: LoadOptions,
    notes: list[str],
) -> dict[str, Any]:
    """The dictionary for `_from_config`, complete."""
    prefixes = {part: part for part in _PARTS} if component in _FULL else {"": component}
    shapes = {key: weights.entries[name].shape for key, name in sources.items()}
    shapes.update({name: entry.shape for name, entry in weights.entries.items() if is_ignored_buffer(name)})
    own = read_own_fields(weights.metadata, prefixes, where=str(weights.path), component=component)
    files = []
    for prefix, kind in prefixes.items():
        where, part = str(config_path), config
        if prefix:
            where, part = f"{config_path}, key '{prefix}_config'", config.get(f"{prefix}_config")  # type: ignore[assignment]
            if not isinstance(part, dict):
                raise CheckpointError(f"{where}: a JSON object is needed; it is {type(part).__name__}.")
        fields_stated = checked_fields(kind, part, where=where, notes=notes)
        files.append(_component_file(kind, prefix, shapes, fields_stated, weights, where))
    _set_variant(files, config, config_path, own, weights, options)
    fields = {file.prefix.rstrip("."): infer_component(file) for file in files}
    for file in files:
        settle_rotary_base(file, fields[file.prefix.rstrip(".")], weights)
    _settle_memory_size(fields, files)
    _set_own_fields(fields, files, own, weights, options, notes)
    _note_doubts(files, options, notes)
    if component not in _FULL:
        return fields[""]
    resolved: dict[str, Any] = {f"{part}_config": fields[part] for part in _PARTS}
    resolved["memory_attention_variant"] = fields["memory_attention"]["variant"]
    resolved["tokenizer_config"] = _token_ids(config, config_path, notes)
    if component == "rxt_beta" and "system_prompt_title" in config:
        title = config["system_prompt_title"]
        if not isinstance(title, str):
            raise CheckpointError(
                f"{config_path}, key 'system_prompt_title': the value is {title!r}, a string is needed."
            )
        resolved["system_prompt_title"] = title
    return resolved


def _component_file(
    kind: str,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    fields: dict[str, Any],
    weights: SafetensorsFile,
    where: str,
) -> ComponentFile:
    start = f"{prefix}." if prefix else ""
    own_shapes = {key[len(start) :]: shape for key, shape in shapes.items() if key.startswith(start)}
    return ComponentFile(
        kind=kind, shapes=own_shapes, config=fields, weights_file=str(weights.path), config_where=where, prefix=start
    )


def _settle_memory_size(fields: dict[str, dict[str, Any]], files: list[ComponentFile]) -> None:
    """One size of memory for a full model, where only some of its components tell it; memory attention is asked first."""
    if len(files) == 1:
        return
    tells = {file.kind: "stm_size" in {**file.config, **file.fields} for file in files}
    size = next((fields[kind]["stm_size"] for kind in reversed(_PARTS) if tells[kind]), None)
    for kind in _PARTS:
        if size is not None and not tells[kind]:
            fields[kind]["stm_size"] = size


def _set_variant(
    files: list[ComponentFile],
    config: Mapping[str, Any],
    config_path: Path,
    own: Mapping[str, Mapping[str, Any]] | None,
    weights: SafetensorsFile,
    options: LoadOptions,
) -> None:
    third_era = rope_layout_of_era(files, weights.metadata)[0] == "interleaved"
    for file in files:
        if file.kind != "memory_attention":
            continue
        file.third_era = third_era
        stated = config.get("memory_attention_variant") if file.prefix else None
        if stated is not None:
            try:
                file.stated_variant = canonical_variant(stated)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{config_path}, key 'memory_attention_variant': {error}") from error
        if own is not None:
            file.forced_variant = own[file.prefix.rstrip(".")]["variant"]
        if options.memory_attention_variant is not None:
            file.forced_variant = canonical_variant(options.memory_attention_variant)


def _set_own_fields(
    fields: dict[str, dict[str, Any]],
    files: list[ComponentFile],
    own: Mapping[str, Mapping[str, Any]] | None,
    weights: SafetensorsFile,
    options: LoadOptions,
    notes: list[str],
) -> None:
    """Rotary layout, angle type, padding and whether an encoder reads memory."""
    layout, certain = rope_layout_of_era(files, weights.metadata)
    if own is None and options.rope_layout == "auto" and not certain:
        other = "interleaved" if layout == "split" else "split"
        notes.append(
            f"{weights.path}: the files do not say which rotary layout the model was trained with; {layout!r} is assumed. "
            f"If its answers are worse than they should be, pass rope_layout={other!r}."
        )
    for file in files:
        values = fields[file.prefix.rstrip(".")]
        if "rope_layout" not in values:
            continue
        if own is not None:
            values.update({name: value for name, value in own[file.prefix.rstrip(".")].items() if name != "variant"})
        else:
            values["rope_layout"] = layout
        if options.rope_layout != "auto":
            values["rope_layout"] = options.rope_layout
        if options.rope_angle_dtype is not None:
            values["rope_angle_dtype"] = options.rope_angle_dtype
        if options.padding is not None:
            values["padding"] = options.padding
        if file.kind == "encoder" and own is None:
            # Releases of the interleaved era keep an encoder's cross-attention weights and skip them (spec 3.2).
            values["reads_memory"] = values["rope_layout"] == "split" or values["skip_memory_cross_attention"]


def _note_doubts(files: list[ComponentFile], options: LoadOptions, notes: list[str]) -> None:
    for file in files:
        if "variant" in file.doubts and options.memory_attention_variant is None:
            notes.append(
                f"{file.weights_file}: without gates, the tensors are the same for memory attention 'interlayer' and "
                f"'gated-self-interlayer'; {file.fields['variant']!r} is assumed. Pass memory_attention_variant= for the "
                "other."
            )


def _token_ids(config: Mapping[str, Any], config_path: Path, notes: list[str]) -> dict[str, Any]:
    """The control-token ids that are there; which of them are needed is the model's to say."""
    stored = config.get("tokenizer_config") or {}
    where = f"{config_path}, key 'tokenizer_config'"
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: a JSON object is needed; it is {type(stored).__name__}.")
    present = {key: value for key, value in stored.items() if value is not None}
    return checked_fields("tokens", present, where=where, notes=notes)


# building


def _build(cls: type[Model], config: dict[str, Any], config_path: Path, tokenizer: Any) -> Model:
    try:
        with torch.device("meta"):
            return cls._from_config(config, tokenizer=tokenizer)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config_path}: the model cannot be built. {error}") from error


def _reset_buffers(model: LoadableModule, device: torch.device) -> None:
    """Makes the buffers that no file holds, and proves that nothing was left behind on the meta device."""
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.get_default_dtype())
    for module in model.modules():
        if isinstance(module, OwnsBuffers):
            module.reset_buffers(device, dtype)
    if device.type == "meta":
        return
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(
                f"{name} of {type(model).__name__} has no data after loading: its module must implement reset_buffers."
            )
