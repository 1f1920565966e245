"""Rotary positions: one table of frequencies per component, angles computed once per forward pass (spec 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_model.config import RopeAngleDtype, TransformerConfig


class RotaryPositions:
    """Angles ``position * base^(-2j / head_dim)`` in float32, optionally rounded to the model's dtype.

    Deliberately not a buffer: casting a model to bfloat16 must not round the frequencies. ``angle_dtype="match"``
    rounds the angles, as checkpoints of rxlm 0.1.0 and later saw when they were trained in half precision.

    Args:
        head_dim: width of a head, even.
        base: base of the frequencies, 10 000 unless the checkpoint says otherwise.
        angle_dtype: ``float32``, or ``match`` for the dtype of queries and keys.
    """

    def __init__(self, head_dim: int, base: int, angle_dtype: RopeAngleDtype) -> None:
        self.head_dim = head_dim
        self.base = base
        self.angle_dtype = angle_dtype
        with torch.device("cpu"):  # also when the model is built on the meta device
            self._inverse_frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self._copy: Tensor | None = None

    def _frequencies(self, device: torch.device) -> Tensor:
        """The frequencies on a device; the last copy is kept, because making one waits for an accelerator."""
        if self._inverse_frequencies.device == device or device.type == "meta" or torch.compiler.is_compiling():
            return self._inverse_frequencies.to(device)
        if self._copy is None or self._copy.device != device:
            self._copy = self._inverse_frequencies.to(device)
        return self._copy

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Angles in radians at integer positions.

        Args:
            positions: any shape, integer.
            dtype: dtype of the input that queries and keys are projected from. Where ``angle_dtype`` is ``match``, angles
                get the dtype of the projections, which under autocast is another.

        Returns:
            ``positions.shape + (head_dim / 2,)``, float32 or ``dtype``.
        """
        angles = positions[..., None].to(torch.float32) * self._frequencies(positions.device)
        return angles.to(_projected(dtype, angles.device)) if self.angle_dtype == "match" else angles


def _projected(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a linear layer on input of `dtype` answers in: autocast's, where it is on."""
    casts = dtype is not torch.float64 and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if casts else dtype


def rotary_positions(config: TransformerConfig) -> RotaryPositions | None:
    """The positions of a decoder or encoder; None where the configuration rotates nothing."""
    return None if config.use_nope else RotaryPositions(config.head_dim, config.rope_base, config.rope_angle_dtype)
