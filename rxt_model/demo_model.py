"""The small model that is shipped inside the package, and is the default of the command line."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rxt_model.models import RxTAlpha

__all__ = ["demo_model_directory", "load_demo_model"]

_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def demo_model_directory() -> Path:
    """Where the shipped model is: ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    ``RXT_DEMO_MODEL`` names another directory, for trying a model that was just trained.

    Raises:
        FileNotFoundError: this installation has no demo model, or only a part of it.
    """
    named = os.environ.get("RXT_DEMO_MODEL")
    directory = Path(named) if named else Path(__file__).parent / "assets" / "demo"
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo model is not in this installation: {directory} has no {', '.join(missing)}. Train it with `rxt "
            "train demo`, or name another model."
        )
    return directory


def load_demo_model() -> RxTAlpha:
    """The shipped model with its tokenizer, in evaluation mode, its memory freshly drawn.

    Its weights are stored in float16 and computed with in float32.

    Raises:
        FileNotFoundError: this installation has no demo model.
        CheckpointError: its files are damaged.

    Example:
        >>> model = load_demo_model()  # doctest: +SKIP
        >>> query = model.tokenize_query("my name is Anna")  # doctest: +SKIP
    """
    return RxTAlpha.from_pretrained(demo_model_directory(), dtype=torch.float32)
