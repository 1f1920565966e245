"""The one error every checkpoint problem is reported with."""

from __future__ import annotations

__all__ = ["CheckpointError", "CheckpointWarning"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written, or used: the message names the file and, where there is one, the key.

    Example:
        >>> from rxt_model.checkpoint import CheckpointError
        >>> issubclass(CheckpointError, ValueError)
        True
    """


class CheckpointWarning(UserWarning):
    """A checkpoint was loaded by a rule that cannot be proven from the file; the message names the override."""
