"""More memory slots for a model that is already trained.

Few slots train faster; a model that has learned to use them uses more of them at once. No weight of attention depends on the
number of slots. Memory gates do, being linear in the status of all slots: they are repeated, each copy of a slot listening to
all copies of another with its share of the weight, so that gates open as they did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_model.models import RxTAlpha

__all__ = ["with_slots"]

_PARTS = ("decoder_config", "encoder_config", "memory_attention_config")


def _repeated(old: Tensor, new: Tensor) -> Tensor:
    """A gate's weight (S, S) or (1, S), bias (S) or what is one value per slot (S, 1), for a multiple of the slots."""
    copies = [after // before for before, after in zip(old.shape, new.shape, strict=True)]
    listens = copies[1] if len(copies) == 2 else 1
    return old.repeat(copies) / listens


@torch.no_grad()
def with_slots(model: RxTAlpha, slots: int | None) -> RxTAlpha:
    """A model of the same weights with more slots in every layer's memory.

    Args:
        model: it is left as it is.
        slots: a multiple of the slots it has; None keeps them.

    Returns:
        A new model with a fresh memory, or ``model`` itself where it has as many slots already.

    Raises:
        ValueError: ``slots`` is not such a multiple.

    Example:
        >>> from rxt_model.training.demo import demo_model
        >>> from rxt_model.training.recipe import DemoShape
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> small = demo_model(train_tokenizer(["a b c"], 300), DemoShape(embed_dim=32, slots=4))
        >>> with_slots(small, 8).stm.memory.shape, small.stm.memory.shape
        (torch.Size([3, 1, 8, 32]), torch.Size([3, 1, 4, 32]))
    """
    own = model.stm.size
    if slots is None or slots == own:
        return model
    if slots < own or slots % own:
        raise ValueError(f"slots must be a multiple of {own}, the slots of the model; it was {slots}.")
    config: dict[str, Any] = model._config()
    for part in _PARTS:
        config[part] = {**config[part], "stm_size": slots}
    grown = type(model)(**config, tokenizer=model.tokenizer)
    old = model.state_dict()
    for name, new in grown.state_dict().items():
        new.copy_(old[name] if old[name].shape == new.shape else _repeated(old[name], new))
    return grown
