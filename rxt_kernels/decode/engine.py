"""What an engine is, and the plain one: a decoder that answers one message per row, token by token, in static buffers.

    engine.set_memory(memory)                 keys and values of the short-term memory, projected once per memory update
    logits = engine.prefill(tokens, lengths)  a message; whatever was answered before is forgotten
    logits = engine.step(next_tokens)         one more token per row, until the answers have ended
    logits = engine.extend(tokens, lengths)   several more, behind all that is stored: the next message of a conversation

Tokens are chosen by the caller. The buffers are made once for a number of rows and a capacity and stay where they are,
so that an engine may record a step and repeat it. What a step needs to know of the past (lengths, keys, values, memory)
lies on the device and moves on there: a step never waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rxt_kernels.checks import refuse_device, refuse_shape, refuse_type, refuse_value
from rxt_kernels.decode.forward import MemoryKeyValue, hidden_states, logits, project_memory, rotary_angles
from rxt_kernels.decode.weights import DecoderWeights
from rxt_kernels.rotary import rotary
from rxt_kernels.sparse_query_attention import sparse_query_attention

__all__ = ["DecodeEngine", "EagerEngine", "check_sizes"]


class DecodeEngine(Protocol):
    """Something that decodes; see the module."""

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]]
    """Device types on which a model is given to this engine without being asked for it."""

    @staticmethod
    def supports(weights: DecoderWeights) -> str | None:
        """None, or why this engine cannot decode with these weights, in one sentence."""

    @property
    def rows(self) -> int:
        """Messages that are answered at once."""

    @property
    def capacity(self) -> int:
        """Tokens per row that there is room for without growing."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds."""

    def state_bytes(self) -> int:
        """Bytes of the keys and values of what the rows hold."""

    def another(self, rows: int, *, capacity: int = 256, limit: int | None = None) -> DecodeEngine:
        """An engine on the same weights, packed once for both, with messages and a memory of its own."""

    def set_memory(self, memory: Tensor) -> None:
        """Read this memory (L, 1 or B, S, D) from now on; call it again after every update."""

    def prefill(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Start a message: right-padded tokens (B, T) int64 and their lengths to logits (B, V) behind the last of each."""

    def extend(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """As prefill, behind what the rows hold already."""

    def step(self, tokens: Tensor, active: Sequence[bool] | None = None) -> Tensor:
        """One more token (B,) int64 per row to the next logits (B, V), valid until the next call.

        A row that is not active has ended: its token does not count, and its logits mean nothing.
        """

    def reset(self) -> None:
        """Forget the message, keep the memory."""


def check_sizes(rows: int, capacity: int, limit: int | None) -> None:
    """Require whole numbers from 1; the limit may be None."""
    for name, value in (("rows", rows), ("capacity", capacity), ("limit", limit)):
        if (type(value) is not int or value < 1) and not (name == "limit" and value is None):
            refuse_value(name, value, "an integer of at least 1")


@contextmanager
def _no_gradients() -> Iterator[None]:
    """Without gradients, also in a caller's inference mode, whose tensors could not be changed once it has ended."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class EagerEngine:
    """One operation after another, on every device: what the other engines must equal.

    Args:
        weights: the decoder.
        rows: messages that are answered at once, B.
        capacity: tokens per row to make room for; it doubles when it is full.
        limit: most tokens of a row, or None.

    Raises:
        ValueError: a number below 1.
    """

    name: ClassVar[str] = "eager"
    devices: ClassVar[frozenset[str]] = frozenset()  # the modules themselves do the same

    def __init__(self, weights: DecoderWeights, rows: int, *, capacity: int = 256, limit: int | None = None) -> None:
        self.weights = weights
        self._begin(rows, capacity, limit)

    def _begin(self, rows: int, capacity: int, limit: int | None) -> None:
        """Everything that is this engine's own."""
        check_sizes(rows, capacity, limit)
        self.limit = limit
        self._lengths_on_host = [0] * rows
        self._active_on_host = [True] * rows
        with _no_gradients():
            device = self.weights.embedding.device
            self._row = torch.arange(rows, device=device)
            self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
            self._active = torch.ones(rows, dtype=torch.int64, device=device)
            self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self._memory: list[MemoryKeyValue] = []
            self._keys: list[Tensor] = []
            self._values: list[Tensor] = []
            self._make_room(capacity if limit is None else min(capacity, limit))

    @staticmethod
    def supports(weights: DecoderWeights) -> str | None:
        """None, or why this engine cannot decode with these weights, in one sentence."""
        return None

    @property
    def rows(self) -> int:
        """Messages that are answered at once."""
        return len(self._lengths_on_host)

    @property
    def capacity(self) -> int:
        """Tokens per row that there is room for without growing."""
        return self._keys[0].shape[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds."""
        return tuple(self._lengths_on_host)

    def state_bytes(self) -> int:
        """Bytes of the keys and values of what the rows hold."""
        sides = (*self._keys, *self._values)
        return sum(self._lengths_on_host) * sum(side[0, 0].numel() * side.element_size() for side in sides)

    def another(self, rows: int, *, capacity: int = 256, limit: int | None = None) -> EagerEngine:
        """An engine on the same weights, with messages and a memory of its own."""
        engine = copy.copy(self)
        engine._begin(rows, capacity, limit)
        return engine

    # -- buffers ------------------------------------------------------------------------------------------------------

    def _make_room(self, capacity: int) -> None:
        """Key and value buffers for so many tokens per row, with what is stored copied; hidden tokens must be finite."""
        embedding = self.weights.embedding

        def grown(old: Tensor | None, heads: int, head_dim: int) -> Tensor:
            buffer = embedding.new_zeros(self.rows, capacity, heads, head_dim)
            if old is not None:
                buffer[:, : old.shape[1]] = old
            return buffer

        shapes = [(layer.attention.key_value_heads, layer.attention.head_dim) for layer in self.weights.layers]
        nothing: list[Tensor | None] = [None] * len(shapes)
        self._keys, self._values = (
            [grown(one, *shape) for one, shape in zip(old or nothing, shapes, strict=True)]
            for old in (self._keys, self._values)
        )
        self._buffers_moved()

    def _buffers_moved(self) -> None:
        """Called when buffers are no longer where they were."""

    def _reserve(self, needed: int) -> None:
        if self.limit is not None and needed > self.limit:
            raise ValueError(
                f"a row would hold {needed} tokens; the limit of this engine is {self.limit}. End the message earlier, or "
                "make an engine with a larger limit."
            )
        if needed > self.capacity:
            capacity = self.capacity
            while capacity < needed:
                capacity *= 2
            self._make_room(capacity if self.limit is None else min(capacity, self.limit))

    # -- the interface ------------------------------------------------------------------------------------------------

    @_no_gradients()
    def set_memory(self, memory: Tensor) -> None:
        """Project this memory (L, 1 or B, S, D) into the buffers of its keys and values.

        Raises:
            TypeError, ValueError: a dtype, device or shape that the decoder does not read.
        """
        embedding = self.weights.embedding
        if not isinstance(memory, Tensor) or memory.dtype is not embedding.dtype:
            refuse_type("memory", memory, f"a tensor of {embedding.dtype}, the dtype of the weights")
        if memory.device != embedding.device:
            refuse_device("memory", memory, "the weights", embedding)
        reads = [layer.memory_read for layer in self.weights.layers if layer.memory_read is not None]
        layers = max((read.layer + 1 for read in reads), default=0)
        if memory.dim() != 4 or memory.shape[0] < layers or memory.shape[1] not in (1, self.rows):
            refuse_shape("memory", memory, f"(at least {layers}, 1 or {self.rows}, S, D)")
        projected = project_memory(self.weights, memory)
        if [one.key.shape for one in projected] != [one.key.shape for one in self._memory]:
            self._memory = [MemoryKeyValue(one.key.contiguous(), one.value.contiguous()) for one in projected]
            self._buffers_moved()
            return
        for buffer, one in zip(self._memory, projected, strict=True):
            buffer.key.copy_(one.key)
            buffer.value.copy_(one.value)

    def reset(self) -> None:
        """Forget the message, keep the memory."""
        self._set_lengths([0] * self.rows)

    @_no_gradients()
    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._lengths_on_host = list(lengths)
        self._lengths.copy_(torch.tensor(self._lengths_on_host))

    def _set_active(self, active: Sequence[bool] | None) -> None:
        wanted = [True] * self.rows if active is None else list(active)
        if len(wanted) != self.rows:
            raise ValueError(f"active has {len(wanted)} entries; accepted is one per row, here {self.rows}.")
        if wanted != self._active_on_host:  # rows end rarely; a copy to the device for every token would be waste
            self._active_on_host = wanted
            self._active.copy_(torch.tensor(wanted))

    def _check_memory(self) -> None:
        if not self._memory and any(layer.memory_read is not None for layer in self.weights.layers):
            raise ValueError("this engine was given no memory; call set_memory before prefill.")

    @_no_gradients()
    def prefill(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Start a message in every row.

        Args:
            tokens: (B, T) int64, padded on the right with any token.
            lengths: tokens of each row, 1 to T.

        Returns:
            Logits (B, V) behind the last token of every row.

        Raises:
            TypeError, ValueError: tokens or lengths that do not fit, no memory, or more tokens than the limit.
        """
        self._check_message(tokens, lengths)
        return self._read(tokens, lengths, 0)

    @_no_gradients()
    def extend(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Go on in every row behind what it holds, with several tokens at once.

        Args:
            tokens: (B, T) int64, padded on the right with any token.
            lengths: new tokens of each row, 1 to T.

        Returns:
            Logits (B, V) behind the last token of every row.

        Raises:
            TypeError, ValueError: as :meth:`prefill`.
        """
        self._check_message(tokens, lengths)
        held = self._lengths_on_host
        if min(held) == max(held):
            return self._read(tokens, lengths, held[0])
        # The causal rule of the operation is one for all rows, so rows of different lengths go token by token.
        self._reserve(max(before + new for before, new in zip(held, lengths, strict=True)))
        result = self.weights.embedding.new_zeros(self.rows, self.weights.head.shape[0])
        for column in range(max(lengths)):
            found = self.step(tokens[:, column], [column < length for length in lengths])
            for row, length in enumerate(lengths):
                if column == length - 1:
                    result[row] = found[row]
        return result

    def _check_message(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        self._check_memory()
        self._check_tokens(tokens, (self.rows, None))
        if len(lengths) != self.rows or min(lengths) < 1 or max(lengths) > tokens.shape[1]:
            refuse_value("lengths", list(lengths), f"{self.rows} numbers from 1 to {tokens.shape[1]}")

    def _read(self, tokens: Tensor, lengths: Sequence[int], start: int) -> Tensor:
        """Several tokens at once behind the first ``start`` of every row."""
        end = start + tokens.shape[1]
        self._reserve(end)
        angles = rotary_angles(self.weights, torch.arange(start, end, device=tokens.device))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key = self._rotated(key, angles)
            self._keys[layer][:, start:end] = key
            self._values[layer][:, start:end] = value
            if start:
                key, value = self._keys[layer][:, :end], self._values[layer][:, :end]
            # No query of a real token sees the padding behind it.
            return sparse_query_attention(
                query, key, value, causal=True, query_angles=angles, rotary_layout=self.weights.rotary_layout
            )

        x, change = hidden_states(self.weights, tokens, angles, attend, self._memory)
        self._set_lengths([start + length for length in lengths])
        self._set_active(None)
        last = self._lengths - start - 1
        return logits(self.weights, x[self._row, last], change[self._row, last])

    @_no_gradients()
    def step(self, tokens: Tensor, active: Sequence[bool] | None = None) -> Tensor:
        """One more token per row.

        Args:
            tokens: (B,) int64.
            active: which rows go on; None for all.

        Returns:
            The next logits (B, V), valid until the next call.

        Raises:
            TypeError, ValueError: tokens or active that do not fit, nothing to go on from, or more tokens than the limit.
        """
        self._check_tokens(tokens, (self.rows,))
        if min(self._lengths_on_host) < 1:
            raise ValueError("step was called without a message; call prefill first.")
        self._set_active(active)
        grown = [length + on for length, on in zip(self._lengths_on_host, self._active_on_host, strict=True)]
        self._reserve(max(grown))
        self._tokens.copy_(tokens)
        found = self._run_step()
        self._lengths_on_host = grown
        return found

    def _check_tokens(self, tokens: Tensor, shape: tuple[int | None, ...]) -> None:
        """Require int64 tokens of this shape on the device of the weights; None stands for any size."""
        if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
            refuse_type("tokens", tokens, "an int64 tensor of token ids")
        fits = len(tokens.shape) == len(shape) and all(b in (None, a) for a, b in zip(tokens.shape, shape, strict=True))
        if not fits or not tokens.numel():
            refuse_shape("tokens", tokens, f"({self.rows},) in a step, ({self.rows}, T) in a prefill")
        if tokens.device != self._tokens.device:
            refuse_device("tokens", tokens, "the weights", self._tokens)

    def _rotated(self, key: Tensor, angles: Tensor | None) -> Tensor:
        return key if angles is None else rotary(key, angles, layout=self.weights.rotary_layout)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _run_step(self) -> Tensor:
        # The host knows how far the longest row is filled, so attention need not look at the rest.
        return self._step_on_buffers(max(self._lengths_on_host) + 1)

    def _step_on_buffers(self, visible: int) -> Tensor:
        """The step itself, from buffers to logits; of the key buffers, the first ``visible`` tokens are looked at."""
        # A row that has ended may be full; it writes over its last token, and nobody reads what comes of it.
        position = self._lengths.clamp(max=min(visible, self.capacity) - 1)
        seen = position + 1
        angles = rotary_angles(self.weights, position[:, None])

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[self._row, position] = self._rotated(key, angles)[:, 0]
            values[self._row, position] = value[:, 0]
            return sparse_query_attention(
                query,
                keys[:, :visible],
                values[:, :visible],
                key_lengths=seen,
                query_angles=angles,
                rotary_layout=self.weights.rotary_layout,
            )

        x, change = hidden_states(self.weights, self._tokens[:, None], angles, attend, self._memory)
        self._lengths.add_(self._active)
        return logits(self.weights, x[:, -1], change[:, -1])
