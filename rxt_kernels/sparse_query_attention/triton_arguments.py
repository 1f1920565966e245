"""One call of attention, as the launchers of the forward, backward and decode kernels see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634
SMALLEST_TILE = 16
"""Rows and columns that a matrix instruction needs at least."""


@dataclass(frozen=True)
class AttentionArguments:
    """The tensors and options of a call; what is to be rotated on load is given with its angles.

    Attributes:
        query: (B, Tq, Hq, dh).
        key, value: (B, Tk, Hkv, dh), or with batch 1, which every row of the query reads in place.
        causal: whether a query sees only the keys before it.
        key_mask: (B, Tk) bool, or None.
        key_lengths: (B,) int64, or None.
        query_angles: (Tq, dh / 2) or (B, Tq, dh / 2), or None.
        split_layout: whether the one side that is rotated on load is laid out as two halves. Never set where none or both are.
        scale: factor on the scores.
        key_angles: like those of the query, for the forward kernel alone; None for keys that are rotated already.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    key_mask: Tensor | None
    key_lengths: Tensor | None
    query_angles: Tensor | None
    split_layout: bool
    scale: float
    key_angles: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_time(self) -> int:
        return self.query.shape[1]

    @property
    def key_time(self) -> int:
        return self.key.shape[1]

    @property
    def query_heads(self) -> int:
        return self.query.shape[2]

    @property
    def key_heads(self) -> int:
        return self.key.shape[2]

    @property
    def heads(self) -> int:
        """Of the output."""
        return max(self.query_heads, self.key_heads)

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def is_shared(self) -> bool:
        """Whether all rows of the query read the same keys."""
        return self.key.shape[0] < self.batch

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.query_time, self.heads, self.head_dim

    @property
    def scale_log2(self) -> float:
        """The scale of scores whose exponentials are powers of two."""
        return self.scale * LOG2_E

    @property
    def strides(self) -> tuple[int, ...]:
        """Of query, key and value, four each."""
        key, value = ((0 if self.is_shared else side.stride(0), *side.stride()[1:]) for side in (self.key, self.value))
        return *self.query.stride(), *key, *value

    @property
    def angles(self) -> tuple[Tensor, int, int, int]:
        """The angles of the query and their strides."""
        return self._with_strides(self.query_angles)

    @property
    def angles_of_keys(self) -> tuple[Tensor, int, int, int]:
        """The same of the keys."""
        return self._with_strides(self.key_angles)

    @property
    def angles_adjacent(self) -> bool:
        """Whether the angles of the keys stand side by side, as models make them."""
        angles = self.key_angles
        return angles is not None and angles.stride(-1) == 1 and angles.stride(-2) == self.head_dim // 2

    def _with_strides(self, angles: Tensor | None) -> tuple[Tensor, int, int, int]:
        """Angles and their strides; a stand-in for angles that are not given, since no kernel reads it."""
        if angles is None:
            return self.query, 0, 0, 0
        return angles, angles.stride(0) if angles.dim() == 3 else 0, angles.stride(-2), angles.stride(-1)

    @property
    def visibility(self) -> tuple[Tensor, int, int, Tensor, int]:
        """The mask with its strides and the lengths with theirs, or stand-ins."""
        mask, lengths, mask_strides, length_stride = self.query, self.query, (0, 0), 0
        if self.key_mask is not None:
            mask, mask_strides = self.key_mask.view(torch.uint8), (self.key_mask.stride(0), self.key_mask.stride(1))
        if self.key_lengths is not None:
            lengths, length_stride = self.key_lengths, self.key_lengths.stride(0)
        return mask, *mask_strides, lengths, length_stride

    def heads_adjacent(self, *tensors: Tensor) -> bool:
        """Whether heads stand side by side in all of these, as projections leave them."""
        return all(tensor.stride(2) == self.head_dim for tensor in tensors)

    @property
    def switches(self) -> dict[str, Any]:
        """What is compiled into every kernel: the shape of a model's heads, and what is read."""
        return {
            "HEADS": self.heads,
            "QUERY_HEADS": self.query_heads,
            "KEY_HEADS": self.key_heads,
            "HEAD_DIM": self.head_dim,
            "HEADS_ADJACENT": self.heads_adjacent(self.query, self.key, self.value),
            "CAUSAL": self.causal and self.query_time > 1,  # a single query is the newest token and sees every key
            "HAS_MASK": self.key_mask is not None,
            "HAS_LENGTHS": self.key_lengths is not None,
            "BLOCK_D": max(SMALLEST_TILE, triton.next_power_of_2(self.head_dim)),
        }
