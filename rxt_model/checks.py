"""What every model refuses before it computes: token ids, masks and devices that do not fit."""

from __future__ import annotations

import torch
from torch import Tensor


def check_token_ids(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
    """Refuse token ids and masks that no model of this vocabulary can take.

    Raises:
        TypeError: ids are not integers, or the mask is neither bool nor integer.
        ValueError: wrong number of dimensions, an empty message, a mask of another shape. Ids outside of the vocabulary
            are refused by value on the CPU, where looking costs nothing.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.long, torch.int):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids is of type {kind}; it must be an int64 or int32 tensor of shape (batch, time).")
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, time) with at least one token."
        )
    if attention_mask is not None:
        check_attention_mask(attention_mask, "input_ids", tuple(input_ids.shape))
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids holds ids from {low} to {high}; the vocabulary has ids 0 to {vocab_size - 1}.")


def check_attention_mask(attention_mask: Tensor, of: str, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is no (batch, time) tensor of True and False for ``of``.

    Raises:
        TypeError: not a tensor of bool, or of integers 0 and 1.
        ValueError: another shape.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype not in (torch.bool, torch.long, torch.int):
        kind = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(f"attention_mask is of type {kind}; it must be a tensor of bool, or of integers 0 and 1.")
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for {of} it must have shape {shape}."
        )


def check_device(name: str, value: Tensor | None, weights: Tensor) -> None:
    """Refuse a tensor that is somewhere else than the weights.

    Raises:
        ValueError: another device.
    """
    if value is not None and value.device != weights.device:
        raise ValueError(f"{name} is on {value.device} and the weights on {weights.device}; move one with .to(device).")
