"""Activation functions by the names configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,  # exact, not the tanh approximation (spec 2.7)
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
    "tanh": torch.tanh,  # gated attention only; upstream has no feed-forward with it
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called ``name``.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; known are {', '.join(map(repr, _ACTIVATIONS))}.")
    return _ACTIVATIONS[name]
