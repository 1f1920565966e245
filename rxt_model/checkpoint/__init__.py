"""Checkpoints: reading, checking, inferring, converting and writing model files (spec section 3)."""

from rxt_model.checkpoint.errors import CheckpointError, CheckpointWarning
from rxt_model.checkpoint.hub import OwnsBuffers, PretrainedModel

__all__ = ["CheckpointError", "CheckpointWarning", "OwnsBuffers", "PretrainedModel"]
