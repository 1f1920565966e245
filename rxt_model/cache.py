"""Key/value caches: one per self-attention layer that grows with the message, one per memory read that never grows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxt_kernels import rotary, sparse_query_attention
from rxt_model.config import RopeLayout


class MemoryKeyValue(NamedTuple):
    """Projected keys and values of one memory layer, each (1 or B, S, key/value heads, head_dim)."""

    key: Tensor
    value: Tensor


class LayerCache:
    """Rotated keys and values of one layer, preallocated and grown by doubling.

    Rows may have different lengths: new tokens of row ``b`` are written at ``lengths[b]``, and a query sees the first
    ``lengths[b]`` keys of its own row and nothing else, so a batched conversation computes what each would alone.
    """

    def __init__(self, owner: SelfAttentionCache) -> None:
        self._owner = owner
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Tensor | None,
        *,
        rotary_layout: RopeLayout,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Append rotated keys and values of (B, T) new tokens and attend causally over all that is stored."""
        owner = self._owner
        if angles is not None:
            key = rotary(key, angles, layout=rotary_layout)
        stored_key, stored_value = self._append(key, value)
        if owner.is_prefill:
            return sparse_query_attention(
                query, key, value, causal=True, key_mask=key_mask, query_angles=angles, rotary_layout=rotary_layout
            )
        visible = owner.longest + query.shape[1]
        return sparse_query_attention(
            query,
            stored_key[:, :visible],
            stored_value[:, :visible],
            causal=query.shape[1] > 1,
            key_lengths=None if owner.is_uniform else owner.lengths + query.shape[1],
            query_angles=angles,
            rotary_layout=rotary_layout,
        )

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        owner = self._owner
        batch, new, heads, head_dim = key.shape
        if self.key is None or self.value is None:
            self.key = key.new_zeros(batch, owner.capacity, heads, head_dim)
            self.value = value.new_zeros(batch, owner.capacity, heads, head_dim)
        elif self.key.shape[1] < owner.capacity:
            self.key, self.value = (
                torch.cat([old, old.new_zeros(batch, owner.capacity - old.shape[1], heads, head_dim)], dim=1)
                for old in (self.key, self.value)
            )
        if owner.is_uniform:
            self.key[:, owner.longest : owner.longest + new] = key
            self.value[:, owner.longest : owner.longest + new] = value
        else:
            row = torch.arange(batch, device=key.device)[:, None]
            column = owner.lengths[:, None] + torch.arange(new, device=key.device)
            self.key[row, column] = key
            self.value[row, column] = value
        return self.key, self.value


class SelfAttentionCache:
    """Caches of all self-attention layers of a decoder.

    Args:
        num_layers: layers with self-attention, stateless ones included.
        batch_size: rows.
        capacity: tokens to make room for at first; it doubles when it is full, up to ``limit``.
        limit: most tokens a row may hold, or None.
        device: where the lengths live.

    Use: ``begin(new)`` before the layers see ``new`` tokens per row, ``advance`` after.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        *,
        capacity: int = 64,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_layers < 1 or batch_size < 1 or capacity < 1:
            raise ValueError(
                f"num_layers, batch_size and capacity are {num_layers}, {batch_size} and {capacity}; each must be at "
                "least 1."
            )
        self.batch_size = batch_size
        self.limit = limit
        self.capacity = capacity if limit is None else min(capacity, limit)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.longest = 0
        self.is_uniform = True
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def is_prefill(self) -> bool:
        """Whether nothing is stored yet, so that the new tokens attend to each other only."""
        return self.longest == 0

    def begin(self, new: int) -> None:
        """Make room for ``new`` more tokens per row.

        Raises:
            ValueError: the limit would be passed, or rows of different lengths were given several tokens at once.
        """
        if new > 1 and not self.is_uniform:
            raise ValueError(
                f"rows of the cache have different lengths and {new} tokens per row were given; after a ragged prefill a "
                "batch takes one token at a time."
            )
        needed = self.longest + new
        if self.limit is not None and needed > self.limit:
            raise ValueError(
                f"the cache holds {self.longest} tokens and {new} more were given; its limit is {self.limit}. Build it "
                "with a larger limit, or end the message earlier."
            )
        while self.capacity < needed:
            self.capacity = self.capacity * 2 if self.limit is None else min(self.capacity * 2, self.limit)

    def advance(self, new: int, valid: Tensor | None = None) -> None:
        """Count ``new`` tokens per row, of which the first ``valid[b]`` are real in row ``b``.

        Args:
            new: tokens written per row.
            valid: (B,) int64, or None when all are real. Reads it on the host once, at the end of a prefill.
        """
        if valid is None:
            self.lengths = self.lengths + new
            self.longest += new
            return
        self.lengths = self.lengths + valid
        lengths = self.lengths.tolist()
        self.longest = max(lengths)
        self.is_uniform = min(lengths) == self.longest

    def positions(self, new: int) -> Tensor:
        """Positions of the next ``new`` tokens: (new,) when all rows are equally long, else (B, new)."""
        offsets = torch.arange(new, device=self.lengths.device)
        return offsets + self.longest if self.is_uniform else self.lengths[:, None] + offsets

    def state_bytes(self) -> int:
        """Bytes of keys and values that are in use."""
        used = 0
        for layer in self.layers:
            for stored in (layer.key, layer.value):
                if stored is not None:
                    used += self.batch_size * self.longest * stored.shape[2] * stored.shape[3] * stored.element_size()
        return used
