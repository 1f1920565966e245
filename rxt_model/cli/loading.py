"""Models by the names that the command line takes: ``demo``, a directory, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxt_model.cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from rxt_model.checkpoint.protocol import Component
    from rxt_model.models import ReactiveTransformer

__all__ = ["COMPONENT_NAMES", "DEMO", "checkpoint_directory", "component_of", "load_full_model"]

DEMO = "demo"

COMPONENT_NAMES: Mapping[str, str] = {
    "decoder": "an RxT decoder",
    "encoder": "an RxT encoder",
    "memory_attention": "a memory attention network",
    "mlm_head": "a masked-language-modelling head",
    "stateless": "a stateless language model",
    "rxt_alpha": "RxT-Alpha",
    "rxt_beta": "RxT-Beta",
}
"""What each kind of checkpoint is called."""


def checkpoint_directory(name: str, *, local_files_only: bool = False) -> Path:
    """The directory with ``config.json`` and ``model.safetensors`` that a name means; hub ids are downloaded.

    Args:
        name: ``demo``, a directory, or ``owner/name`` on the hub.
        local_files_only: look for hub ids among earlier downloads only.

    Raises:
        FileNotFoundError: ``demo``, and this installation has no demo model.
        CheckpointError: there is nothing of that name.
    """
    from rxt_model.checkpoint.hub import _download, _local_directory
    from rxt_model.demo_model import demo_model_directory

    if name == DEMO:
        return demo_model_directory()
    directory = _local_directory(name)
    if directory is not None:
        return directory
    return _download(
        name,
        ["config.json", "model.safetensors"],
        ["tokenizer.json"],
        revision=None,
        token=None,
        cache_dir=None,
        local_files_only=local_files_only,
        force_download=False,
    )


def component_of(directory: Path) -> Component:
    """Which kind of model a checkpoint holds: what its metadata says, else what its tensors are called.

    Raises:
        CheckpointError: one of the two files is absent or damaged.
        UserError: the tensors are of no kind that is known here.
    """
    from rxt_model.checkpoint.loading import find_weights
    from rxt_model.checkpoint.reader import CONFIG_NAME, SafetensorsFile, read_json_object

    with SafetensorsFile(find_weights(directory)) as weights:
        stated = weights.metadata.get("rxt.component")
        names = list(weights.entries)
    if stated in COMPONENT_NAMES:
        return stated  # type: ignore[return-value]  # checked on this line
    config = read_json_object(directory / CONFIG_NAME)
    component = _component_by_names(names, config)
    if component is None:
        raise UserError(
            f"{directory} holds none of the models that rxt knows; its first tensor is called {names[0]!r}."
            if names
            else f"{directory} holds a model file without tensors."
        )
    return component


def _component_by_names(names: list[str], config: Mapping[str, Any]) -> Component | None:
    def some(part: str) -> bool:
        return any(part in name for name in names)

    if any(name.startswith("memory_attention.model.") for name in names):
        # The first RxT-Beta files name no variant, later ones a title of system prompts; RxT-Alpha is the opposite in both
        # (spec 3.1).
        is_beta = "system_prompt_title" in config or "memory_attention_variant" not in config
        return "rxt_beta" if is_beta else "rxt_alpha"
    if some("model.attention_layers."):
        return "memory_attention"
    if "dense.weight" in names and "decoder.weight" in names:
        return "mlm_head"
    if "model.head.weight" in names:
        return "decoder" if some(".memory_cross_attention.") or some("model.stm.memory") else "stateless"
    return "encoder" if "model.embedding.weight" in names else None


def _dtype(directory: Path, device: torch.device) -> torch.dtype | None:
    """The type to compute in where it is not the file's: processors multiply float16 slowly and round every sum to it."""
    import torch

    from rxt_model.checkpoint.loading import find_weights
    from rxt_model.checkpoint.reader import SafetensorsFile

    if device.type != "cpu":
        return None
    with SafetensorsFile(find_weights(directory)) as weights:
        is_half = any(entry.dtype is torch.float16 for entry in weights.entries.values())
    return torch.float32 if is_half else None


def load_full_model(
    name: str, *, device: str | None = None, rope_layout: str = "auto", local_files_only: bool = False
) -> ReactiveTransformer:
    """Load a model that can hold a conversation.

    Args:
        name: as in :func:`checkpoint_directory`.
        device: a torch device such as ``cuda``; None is the processor.
        rope_layout: ``auto``, ``split`` or ``interleaved``; see ``PretrainedModel.from_pretrained``.
        local_files_only: use no network.

    Raises:
        UserError: it is a component, or has no tokenizer, or the device does not exist.
        CheckpointError, FileNotFoundError: it cannot be loaded.
    """
    import torch

    from rxt_model.models import RxTAlpha, RxTBeta

    try:
        target = torch.device("cpu" if device is None else device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"--device is {device!r}, which this torch cannot use; it can use cpu"
            + (" and cuda" if torch.cuda.is_available() else "")
            + "."
        ) from None
    directory = checkpoint_directory(name, local_files_only=local_files_only)
    component = component_of(directory)
    if component not in ("rxt_alpha", "rxt_beta"):
        raise UserError(
            f"{name} is {COMPONENT_NAMES[component]}, a part of a system; a conversation needs a full RxT-Alpha or RxT-Beta."
        )
    kind = RxTBeta if component == "rxt_beta" else RxTAlpha
    model: ReactiveTransformer = kind.from_pretrained(
        directory,
        device=target,
        rope_layout=rope_layout,  # type: ignore[arg-type]  # checked by from_pretrained
        dtype=_dtype(directory, target),
    )
    if model.tokenizer is None:
        raise UserError(f"{name} has no tokenizer.json beside its weights, so it cannot be talked to; put one there.")
    return model
