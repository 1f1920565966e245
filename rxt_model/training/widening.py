"""Wider feed-forward networks for a model that is already trained, without changing what it computes.

A narrow model learns faster per second; the same model, widened, learns on where the narrow one can learn no more
(function-preserving growth: Chen et al., *Net2Net*, section 2.2, with new units that start unread instead of copied).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_model.models import RxTAlpha

__all__ = ["widened"]

_FIRST_LINEAR = ("linear.weight", "linear.bias")
_BIASES = ("linear.bias", ".b1")
_FIRST_LAYERS = (*_FIRST_LINEAR, ".w1", ".b1")


def _gated_halves(name: str, old: Tensor, new: Tensor) -> None:
    """Copy the linear and the gate half of a first layer, each to the front of its half of the new one.

    New units are as large as the trained ones: at their usual start they would be too small to be noticed.
    """
    if name.endswith(_BIASES):
        new.zero_()
    else:
        new.normal_(std=float(old.std()))
    axis = 0 if name.endswith(_FIRST_LINEAR) else old.dim() - 1
    for half_old, half_new in zip(old.chunk(2, axis), new.chunk(2, axis), strict=True):
        half_new.narrow(axis, 0, half_old.shape[axis]).copy_(half_old)


def _second_layer(old: Tensor, new: Tensor) -> None:
    """Copy a second layer, whose new inputs are not read yet; they are the second axis in both layouts."""
    new.zero_()
    new.narrow(1, 0, old.shape[1]).copy_(old)


@torch.no_grad()
def widened(model: RxTAlpha, *, encoder_ff: int | None = None, expert_ff: int | None = None, seed: int = 0) -> RxTAlpha:
    """A model that computes the same with wider gated feed-forward networks.

    New units have fresh weights in front and zeros behind, so that training can take them into use.

    Args:
        model: a model with gated feed-forward networks; it is left as it is.
        encoder_ff: hidden width of the encoder's networks; None keeps it.
        expert_ff: hidden width of the decoder's networks or of each of its experts; None keeps it.
        seed: of the fresh weights.

    Returns:
        A new model, or ``model`` itself where it is as wide already.

    Raises:
        ValueError: a width smaller than the model's, or networks without gates.

    Example:
        >>> from rxt_model.training.demo import demo_model
        >>> from rxt_model.training.recipe import DemoShape
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> narrow = demo_model(train_tokenizer(["a b c"], 300), DemoShape(embed_dim=32, slots=4, encoder_ff=8))
        >>> wide = widened(narrow, encoder_ff=24)
        >>> wide.encoder.config.ff_dim, narrow.encoder.config.ff_dim
        (24, 8)
    """
    widths = {
        "encoder": encoder_ff or model.encoder.config.ff_dim,
        "decoder": expert_ff or model.decoder.config.ff_dim,
    }
    for (part, width), argument in zip(widths.items(), ("encoder_ff", "expert_ff"), strict=True):
        own, gated = getattr(model, part).config.ff_dim, getattr(model, part).config.use_gated
        if not gated:
            raise ValueError(f"model has a plain feed-forward network in its {part}; only gated ones can be widened.")
        if width < own:
            raise ValueError(f"{argument} must be at least {own}, the width of the model's {part}; it was {width}.")
    if all(width == getattr(model, part).config.ff_dim for part, width in widths.items()):
        return model
    config: dict[str, Any] = model._config()
    for part, width in widths.items():
        config[f"{part}_config"] = {**config[f"{part}_config"], "ff_dim": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = type(model)(**config, tokenizer=model.tokenizer)
    old = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        source = old[name]
        if source.shape == parameter.shape:
            parameter.copy_(source)
        elif name.endswith(_FIRST_LAYERS):
            _gated_halves(name, source, parameter)
        else:
            _second_layer(source, parameter)
    return wide
