"""Key/value caches: one per self-attention layer that grows with the message, one per memory read that never grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rxt_kernels import rotary, sparse_query_attention
from rxt_model.config import RopeLayout


class MemoryKeyValue(NamedTuple):
    """Projected keys and values of one memory layer, each (1 or B, S, key/value heads, head_dim)."""

    key: Tensor
    value: Tensor


@dataclass
class _Progress:
    """How far the rows of a cache are filled, on the device for the layers and on the host for everybody else."""

    lengths: Tensor
    counts: list[int]
    capacity: int

    @property
    def longest(self) -> int:
        return max(self.counts)

    @property
    def is_uniform(self) -> bool:
        return min(self.counts) == self.longest


class LayerCache:
    """Rotated keys and values of one layer, preallocated and grown by doubling.

    Layers share the progress of their cache and do not know the cache itself: without a cycle of references the tensors
    are freed as soon as the cache is.

    Rows may have different lengths: new tokens of row ``b`` are written at ``lengths[b]``, and a query sees the first
    ``lengths[b]`` keys of its own row and nothing else, so a batched conversation computes what each would alone.
    """

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
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
        progress = self._progress
        if angles is not None:
            key = rotary(key, angles, layout=rotary_layout)
        stored_key, stored_value = self._append(key, value)
        if progress.longest == 0:
            return sparse_query_attention(
                query, key, value, causal=True, key_mask=key_mask, query_angles=angles, rotary_layout=rotary_layout
            )
        visible = progress.longest + query.shape[1]
        return sparse_query_attention(
            query,
            stored_key[:, :visible],
            stored_value[:, :visible],
            causal=query.shape[1] > 1,
            key_lengths=None if progress.is_uniform else progress.lengths + query.shape[1],
            query_angles=angles,
            rotary_layout=rotary_layout,
        )

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        progress = self._progress
        batch, new, heads, head_dim = key.shape
        if self.key is None or self.value is None:
            self.key = key.new_zeros(batch, progress.capacity, heads, head_dim)
            self.value = value.new_zeros(batch, progress.capacity, heads, head_dim)
        elif self.key.shape[1] < progress.capacity:
            self.key, self.value = (
                torch.cat([old, old.new_zeros(batch, progress.capacity - old.shape[1], heads, head_dim)], dim=1)
                for old in (self.key, self.value)
            )
        if progress.is_uniform:
            self.key[:, progress.longest : progress.longest + new] = key
            self.value[:, progress.longest : progress.longest + new] = value
        else:
            row = torch.arange(batch, device=key.device)[:, None]
            column = progress.lengths[:, None] + torch.arange(new, device=key.device)
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
        sizes = {"num_layers": num_layers, "batch_size": batch_size, "capacity": capacity, "limit": limit}
        for name, value in sizes.items():
            if (type(value) is not int or value < 1) and not (name == "limit" and value is None):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
        self.batch_size = batch_size
        self.limit = limit
        self._progress = _Progress(
            lengths=torch.zeros(batch_size, dtype=torch.long, device=device),
            counts=[0] * batch_size,
            capacity=capacity if limit is None else min(capacity, limit),
        )
        self.layers = [LayerCache(self._progress) for _ in range(num_layers)]

    @property
    def capacity(self) -> int:
        """Tokens per row that there is room for without growing."""
        return self._progress.capacity

    @property
    def lengths(self) -> Tensor:
        """Tokens stored in each row, (B,) int64."""
        return self._progress.lengths

    @property
    def longest(self) -> int:
        """Tokens stored in the longest row."""
        return self._progress.longest

    @property
    def is_uniform(self) -> bool:
        """Whether all rows hold equally many tokens."""
        return self._progress.is_uniform

    @property
    def is_prefill(self) -> bool:
        """Whether nothing is stored yet, so that the new tokens attend to each other only."""
        return self.longest == 0

    def check(self, depth: int, batch: int, attention_mask: Tensor | None) -> None:
        """Refuse a forward pass that this cache cannot follow.

        Args:
            depth: self-attention layers of the model.
            batch: rows of its input.
            attention_mask: (B, T), or None.

        Raises:
            ValueError: another model's or another batch's cache; a mask that is not right-padded, whose first tokens
                would not be the real ones; a mask on later tokens, which all count.
        """
        if len(self.layers) != depth or self.batch_size != batch:
            raise ValueError(
                f"cache is for {len(self.layers)} layers and {self.batch_size} rows; the model has {depth} layers and "
                f"input_ids {batch} rows. Make one with new_cache."
            )
        if attention_mask is None:
            return
        if not self.is_prefill:
            raise ValueError(
                "attention_mask is given with a cache that already holds tokens; it masks the first tokens only. Leave it "
                "out, and say in cache.advance which rows go on."
            )
        if attention_mask.shape[1] > 1 and bool((attention_mask[:, 1:].bool() > attention_mask[:, :-1].bool()).any()):
            raise ValueError(
                "attention_mask has padding in front of real tokens, which a cache cannot hold; pad on the right, or leave "
                "the cache out."
            )

    def begin(self, new: int) -> None:
        """Make room for ``new`` more tokens per row.

        Raises:
            ValueError: the limit would be passed, or rows of different lengths were given several tokens at once.
        """
        if type(new) is not int or new < 1:
            raise ValueError(f"new is {new!r}; it must be an integer of at least 1.")
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
            doubled = self.capacity * 2
            self._progress.capacity = doubled if self.limit is None else min(doubled, self.limit)

    def advance(self, new: int, valid: Sequence[int] | Tensor | None = None) -> None:
        """Count ``new`` tokens per row, of which the first ``valid[b]`` are real in row ``b``.

        Args:
            new: tokens written per row.
            valid: a number per row, or None when all are real. As a (B,) int64 tensor on an accelerator it has to be
                waited for; a list costs nothing.

        Raises:
            ValueError: ``valid`` has another shape, or counts below 0 or above ``new``; or more is counted than
                ``begin`` made room for.
        """
        progress = self._progress
        if self.longest + new > self.capacity:
            raise ValueError(
                f"new is {new} and the cache holds {self.longest} of {self.capacity}; call begin before the layers run."
            )
        if valid is None:
            progress.lengths = progress.lengths + new
            progress.counts = [count + new for count in progress.counts]
            return
        if isinstance(valid, Tensor) and (valid.dtype is not torch.long or valid.shape != (self.batch_size,)):
            raise ValueError(
                f"valid is {valid.dtype} of shape {tuple(valid.shape)}; it must be int64 of shape ({self.batch_size},)."
            )
        counts = valid.tolist() if isinstance(valid, Tensor) else list(valid)
        if len(counts) != self.batch_size:
            raise ValueError(f"valid holds {len(counts)} numbers; it must hold one per row, here {self.batch_size}.")
        if min(counts) < 0 or max(counts) > new:
            raise ValueError(
                f"valid holds counts from {min(counts)} to {max(counts)}; of {new} new tokens, 0 to {new} count."
            )
        progress.lengths = progress.lengths + torch.as_tensor(counts).to(progress.lengths.device, non_blocking=True)
        progress.counts = [count + more for count, more in zip(progress.counts, counts, strict=True)]

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
