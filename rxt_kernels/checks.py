"""Refusals in sentences: each names the argument, what it was, and what is accepted.

The checks are written for the decode path: a passing check is a comparison or two, and only a failing one builds text.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def refuse_type(name: str, value: object, accepted: str) -> NoReturn:
    """Raise TypeError about an argument of the wrong Python type or dtype."""
    was = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{name} is {was}; accepted is {accepted}.")


def refuse_shape(name: str, value: Tensor, accepted: str) -> NoReturn:
    """Raise ValueError about a tensor of the wrong shape."""
    raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted is {accepted}.")


def refuse_value(name: str, value: object, accepted: str) -> NoReturn:
    """Raise ValueError about a value out of range or an unknown name."""
    raise ValueError(f"{name} is {value!r}; accepted is {accepted}.")


def floating(name: str, value: Tensor) -> None:
    """Require a floating point tensor."""
    if not isinstance(value, Tensor):
        refuse_type(name, value, "a torch.Tensor of a floating point dtype")
    if value.dtype not in FLOATING:
        refuse_type(name, value, "a tensor of dtype float16, bfloat16, float32 or float64")


def alike(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Require a floating point tensor with the dtype and device of `like`.

    Under autocast dtypes may differ: there linear layers answer in another dtype than their inputs have.
    """
    if not isinstance(value, Tensor):
        refuse_type(name, value, f"a torch.Tensor like {like_name}")
    if value.dtype is not like.dtype and not (value.dtype in FLOATING and torch.is_autocast_enabled(like.device.type)):
        refuse_type(name, value, f"the dtype of {like_name}, {like.dtype}; convert one of them with .to(dtype)")
    if value.device != like.device:
        refuse_device(name, value, like_name, like)


def refuse_device(name: str, value: Tensor, like_name: str, like: Tensor) -> NoReturn:
    """Raise ValueError about tensors on different devices."""
    raise ValueError(
        f"{name} is on {value.device}; accepted is the device of {like_name}, {like.device}: move one with .to(device)."
    )


def probability(name: str, value: float) -> None:
    """Require 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        refuse_value(name, value, "a number from 0 (included) to 1 (excluded)")
