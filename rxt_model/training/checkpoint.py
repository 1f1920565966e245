"""The state of a training run in one safetensors file, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rxt_model.files import atomic_path

from .optimizer import NamedOptimizer
from .settings import TrainingSettings

__all__ = ["load_checkpoint", "save_checkpoint"]

CHECKPOINT_FORMAT = "rxt-training-4"


def _fingerprint(settings: TrainingSettings, episodes: str) -> str:
    """What decides the course of a run, to refuse resuming a different one."""
    values = asdict(settings)
    values.pop("checkpoint_every")
    return json.dumps({**values, "episodes": episodes}, sort_keys=True)


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: NamedOptimizer, settings: TrainingSettings, step: int, episodes: str
) -> None:
    """Write model and optimizer to one safetensors file, under a temporary name first.

    ``step`` steps are done, on the episodes of :meth:`EpisodeWriter.fingerprint`.
    """
    tensors = {f"model/{name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    tensors |= optimizer.state()
    metadata = {"format": CHECKPOINT_FORMAT, "step": str(step), "settings": _fingerprint(settings, episodes)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: NamedOptimizer, settings: TrainingSettings, episodes: str
) -> int:
    """Restore what :func:`save_checkpoint` wrote; returns the number of steps done.

    Raises:
        ValueError: if the file is not such a checkpoint, belongs to other settings, or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The training checkpoint {path} cannot be read ({error}); delete it to start again."
        ) from error
    if metadata.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a training checkpoint of this version; delete it to start again.")
    if metadata.get("settings") != _fingerprint(settings, episodes):
        raise ValueError(
            f"The training checkpoint {path} was made with other settings (steps, seed, rates, stages or wording); "
            "give the same settings, another output directory, or resume=False."
        )
    step = int(metadata["step"])
    parameters = dict(model.named_parameters())
    expected = {f"model/{name}" for name in parameters}
    found = {name for name in tensors if name.startswith("model/")}
    if expected != found or any(tensors[f"model/{name}"].shape != p.shape for name, p in parameters.items()):
        raise ValueError(
            f"The training checkpoint {path} belongs to a model of another shape; delete it to start again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
    optimizer.load_state(tensors, step)
    return step
