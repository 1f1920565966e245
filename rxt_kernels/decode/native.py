"""The decode engine of CPUs: one native call per token, from token numbers to logits, through all layers.

Weights are packed once, in fp32, bfloat16, or int8 with a scale per output; activations are fp32. Keys and values, of the
messages and of the memory, are kept in fp32 beside fp32 weights and in bfloat16 beside the others. Inside of a call the
threads go through the layers together and wait for each other at a barrier of their own. The bits of a row do not depend on
the number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rxt_kernels import native_runtime
from rxt_kernels.checks import refuse_device, refuse_shape, refuse_type, refuse_value
from rxt_kernels.decode.engine import check_sizes
from rxt_kernels.decode.weights import DecoderWeights, EncoderWeights, ExpertWeights
from rxt_kernels.dispatch import preferred_backend

__all__ = ["PRECISIONS", "NativeEngine"]

PRECISIONS = ("float32", "bfloat16", "int8")
"""What weights can be packed in."""


_ACTIVATIONS = frozenset({"silu", "swish", "relu", "gelu", "sigmoid", "linear", "tanh"})


def unsupported_network(weights: DecoderWeights | EncoderWeights) -> str | None:
    """None, or why native engines do not compute with such layers here, in one sentence."""
    if (preferred := preferred_backend()) not in ("auto", "native"):
        return f"{preferred!r} is preferred in this block, and this engine is native."
    if weights.gate_activation not in _ACTIVATIONS:
        return f"the activation of gated attention is {weights.gate_activation!r}, which it does not have."
    for layer in weights.layers:
        network = layer.feed_forward
        if network.activation not in _ACTIVATIONS:
            return f"the activation {network.activation!r} is not among its own."
        dtype = network.router_dtype if isinstance(network, ExpertWeights) else None
        if dtype not in (None, torch.float32, weights.embedding.dtype):
            return f"the router works in {dtype}; this engine routes in float32."
        heads = {layer.attention.head_dim} | ({layer.memory_read.attention.head_dim} if layer.memory_read else set())
        if weights.inverse_frequencies is not None and heads != {2 * len(weights.inverse_frequencies)}:
            return f"heads have {sorted(heads)} values and are not rotated over all of them."
    return None


class NativeEngine:
    """Decoding by the native kernels; the interface is :class:`rxt_kernels.decode.DecodeEngine`.

    Args:
        weights: the decoder, float32 or bfloat16, on the CPU.
        rows: messages that are answered at once, B.
        capacity: tokens per row to make room for; it doubles when it is full.
        limit: most tokens of a row, or None.
        precision: "float32", "bfloat16" or "int8"; None is the dtype of the weights.

    Raises:
        ValueError: a number below 1, an unknown precision, or weights that the engine cannot decode with.

    Logits come in the dtype of the weights. What stays in memory are the packed weights (4, 2 or 1 bytes each), the embedding,
    which is the caller's own, keys and values, and scratch. While packing, one matrix at a time is held twice.
    """

    name: ClassVar[str] = "native"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})

    def __init__(
        self,
        weights: DecoderWeights,
        rows: int,
        *,
        capacity: int = 256,
        limit: int | None = None,
        precision: str | None = None,
    ) -> None:
        if (reason := self.supports(weights)) is not None:
            raise ValueError(f"engine='native' cannot decode here: {reason}")
        self._dtype = weights.embedding.dtype
        precision = precision or str(self._dtype).removeprefix("torch.")
        if precision not in PRECISIONS:
            refuse_value("precision", precision, ", ".join(map(repr, PRECISIONS)))
        from rxt_kernels.decode.native_weights import native_decoder

        self.precision = precision
        self._reads = max((layer.memory_read.layer + 1 for layer in weights.layers if layer.memory_read), default=0)
        self._width, self._vocabulary = weights.embedding.shape[1], weights.embedding.shape[0]
        attentions = [layer.attention for layer in weights.layers]
        self._values_per_token = sum(2 * one.key_value_heads * one.head_dim for one in attentions)
        with torch.inference_mode(False), torch.no_grad():
            self._decoder = native_decoder(weights, precision)
        self._begin(rows, capacity, limit)

    def _begin(self, rows: int, capacity: int, limit: int | None) -> None:
        """Everything that is this engine's own."""
        check_sizes(rows, capacity, limit)
        self.limit = limit
        self._lengths = [0] * rows
        self._has_memory = False
        with torch.inference_mode(False), torch.no_grad():
            room = capacity if limit is None else min(capacity, limit)
            stored = "float32" if self.precision == "float32" else "bfloat16"
            decoder = {**self._decoder, "capacity": room}
            self._engine: Any = native_runtime.extension.DecodeEngine(decoder, rows, stored)
            self._logits = torch.zeros(rows, self._vocabulary)
            self._row = torch.arange(rows)

    def another(self, rows: int, *, capacity: int = 256, limit: int | None = None) -> NativeEngine:
        """An engine on the same packed weights, with messages and a memory of its own."""
        engine = copy.copy(self)
        engine._begin(rows, capacity, limit)
        return engine

    @staticmethod
    def supports(weights: DecoderWeights) -> str | None:
        """None, or why this engine cannot decode with these weights, in one sentence."""
        return native_runtime.unsupported_tensors(weights.embedding, weights.head) or unsupported_network(weights)

    @property
    def rows(self) -> int:
        """Messages that are answered at once."""
        return len(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens per row that there is room for without growing."""
        room: int = self._engine.capacity
        return room if self.limit is None else min(room, self.limit)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds."""
        return tuple(self._lengths)

    def state_bytes(self) -> int:
        """Bytes of the keys and values of what the rows hold."""
        return sum(self._lengths) * self._values_per_token * (4 if self.precision == "float32" else 2)

    @property
    def allocations(self) -> int:
        """Buffers that were made since the last change of room or memory: constant from one token to the next."""
        count: int = self._engine.allocations
        return count

    def set_memory(self, memory: Tensor) -> None:
        """Project this memory (L, 1 or B, S, D) into keys and values of every layer.

        Raises:
            TypeError, ValueError: a dtype, device or shape that the decoder does not read.
        """
        if not isinstance(memory, Tensor) or memory.dtype is not self._dtype:
            refuse_type("memory", memory, f"a tensor of {self._dtype}, the dtype of the weights")
        if memory.device.type != "cpu":
            refuse_device("memory", memory, "the weights", self._logits)
        if memory.dim() != 4 or memory.shape[0] < self._reads or memory.shape[1] not in (1, self.rows):
            refuse_shape("memory", memory, f"(at least {self._reads}, 1 or {self.rows}, S, D)")
        memory = memory.detach()
        self._engine.set_memory(memory if memory.stride(3) == 1 else memory.contiguous(), torch.get_num_threads())
        self._has_memory = True

    def reset(self) -> None:
        """Forget the message, keep the memory."""
        self._lengths = [0] * self.rows

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
        return self._read(tokens, lengths, [0] * self.rows)

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
        return self._read(tokens, lengths, self._lengths)

    def _read(self, tokens: Tensor, lengths: Sequence[int], held: Sequence[int]) -> Tensor:
        """Several tokens per row behind those that it holds."""
        if not self._has_memory and self._reads:
            raise ValueError("this engine was given no memory; call set_memory before prefill.")
        self._check_tokens(tokens, (self.rows, None))
        if len(lengths) != self.rows or min(lengths) < 1 or max(lengths) > tokens.shape[1]:
            refuse_value("lengths", list(lengths), f"{self.rows} numbers from 1 to {tokens.shape[1]}")
        grown = [before + new for before, new in zip(held, lengths, strict=True)]
        self._check_limit(max(grown))
        present = torch.arange(tokens.shape[1]) < torch.tensor(list(lengths))[:, None]
        rows, columns = present.nonzero(as_tuple=True)
        self._run(tokens[present].contiguous(), rows, columns + torch.tensor(list(held))[rows])
        self._lengths = grown
        return self._found()

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
        if min(self._lengths) < 1:
            raise ValueError("step was called without a message; call prefill first.")
        wanted = [True] * self.rows if active is None else list(active)
        if len(wanted) != self.rows:
            raise ValueError(f"active has {len(wanted)} entries; accepted is one per row, here {self.rows}.")
        grown = [length + on for length, on in zip(self._lengths, wanted, strict=True)]
        self._check_limit(max(grown))
        positions = torch.tensor(self._lengths)
        if all(wanted):
            self._run(tokens.contiguous(), self._row, positions)
        elif any(wanted):
            chosen = torch.tensor(wanted)
            self._run(tokens[chosen], self._row[chosen], positions[chosen])
        self._lengths = grown
        return self._found()

    def _run(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> None:
        self._engine.step(tokens, rows, positions, self._logits, torch.get_num_threads())

    def _found(self) -> Tensor:
        return self._logits.to(self._dtype)

    def _check_limit(self, needed: int) -> None:
        if self.limit is not None and needed > self.limit:
            raise ValueError(
                f"a row would hold {needed} tokens; the limit of this engine is {self.limit}. End the message earlier, or "
                "make an engine with a larger limit."
            )

    def _check_tokens(self, tokens: Tensor, shape: tuple[int | None, ...]) -> None:
        """Require int64 tokens of this shape in CPU memory; None stands for any size."""
        if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
            refuse_type("tokens", tokens, "an int64 tensor of token ids")
        fits = len(tokens.shape) == len(shape) and all(b in (None, a) for a, b in zip(tokens.shape, shape, strict=True))
        if not fits or not tokens.numel():
            refuse_shape("tokens", tokens, f"({self.rows},) in a step, ({self.rows}, T) in a prefill")
        if tokens.device.type != "cpu":
            refuse_device("tokens", tokens, "the weights", self._logits)
