"""Where a training keeps its state and leaves its model."""

from __future__ import annotations

from pathlib import Path

__all__ = ["checked_directory", "training_state", "training_states"]


def training_state(directory: Path, phase: int) -> Path:
    """The file in which an unfinished phase, counted from 1, is kept."""
    return directory / f"training-state-{phase}.safetensors"


def training_states(directory: Path) -> list[Path]:
    """The files in which an unfinished training is kept."""
    return sorted(directory.glob("training-state-*.safetensors"))


def checked_directory(output_directory: str | Path) -> Path:
    """The directory as a path; it is made when there is something to put there.

    Raises:
        ValueError: if it is a file.
    """
    directory = Path(output_directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_directory must be a directory; {directory} is a file.")
    return directory
