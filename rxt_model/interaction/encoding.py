"""Encoding an interaction for the memory write: by the native encoder where it computes what the modules would."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rxt_kernels.decode import NativeEncoder
from rxt_model.checks import check_token_ids
from rxt_model.encoder import RxTEncoder
from rxt_model.interaction.plain_weights import State, look_at
from rxt_model.interaction.weights import encoder_weights

__all__ = ["encode", "explain_encoding"]


class _Kept:
    """The native encoder of an encoder, with the weights that it is made from when it is first needed."""

    def __init__(self, encoder: RxTEncoder, state: State) -> None:
        self.state = state
        self.weights = encoder_weights(encoder)
        self._native: NativeEncoder | None = None

    def encode(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The states, by the native encoder."""
        native = self._native = self._native or NativeEncoder(self.weights)
        return native.encode(input_ids, mask)


_kept: WeakKeyDictionary[RxTEncoder, _Kept] = WeakKeyDictionary()


def _choose(encoder: RxTEncoder) -> _Kept | str:
    """What encodes natively, or why the modules do, in one sentence."""
    reason, state = look_at(encoder)
    if reason is not None:
        return reason
    config, network = encoder.config, encoder.model
    if network.embedding.weight.device.type != "cpu":
        return f"it is on {network.embedding.weight.device}, and the native encoder works in CPU memory."
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters()):
        return "gradients are recorded."
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, which changes the dtype of products."
    if network.has_cross_attention:
        return "it has memory cross-attention, which the native encoder does not compute."
    if encoder.training and (config.att_dropout or config.ff_dropout):
        return "the encoder is in training mode and drops activations; call eval()."
    kept = _kept.get(encoder)
    if kept is None or kept.state != state:
        kept = _kept[encoder] = _Kept(encoder, state)
    return NativeEncoder.supports(kept.weights) or kept


def encode(encoder: RxTEncoder, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The states (L, B, T, D) of every layer, as ``encoder(input_ids, attention_mask)`` gives them.

    Where the native encoder is used, padded positions are zeros instead of numbers that nobody may read.

    Args:
        encoder: the encoder.
        input_ids: (B, T) integers.
        attention_mask: (B, T), not 0 at real tokens.

    Raises:
        TypeError, ValueError: ids or mask that do not fit.
    """
    if input_ids.device.type == "cpu":
        check_token_ids(input_ids, attention_mask, encoder.config.vocab_size)
        mask = None if attention_mask is None else attention_mask.bool()
        padded_inside = mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any())
        native = "tokens stand behind padding." if padded_inside else _choose(encoder)
        if isinstance(native, _Kept):
            return native.encode(input_ids.long(), mask)
    states: Tensor = encoder(input_ids, attention_mask)
    return states


def explain_encoding(encoder: RxTEncoder, by_modules: bool = False) -> str:
    """How interactions are encoded, and why, in one sentence; ``by_modules`` says that this was asked for."""
    found = "it was asked for." if by_modules else _choose(encoder)
    if isinstance(found, _Kept):
        return "Interactions are encoded by the native encoder."
    return f"Interactions are encoded operation by operation through the modules: {found}"
