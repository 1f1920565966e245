"""Encoding on CPUs: one native call from token numbers to the states of every layer, which the memory write reads.

The engine is that of decoding (``native.py``), in which every token sees all of its message and nothing is kept from one message
to the next. Weights are packed once, in their own dtype, beside those that the model holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels import native_runtime
from rxt_kernels.checks import refuse_shape, refuse_type
from rxt_kernels.decode.native import unsupported_network
from rxt_kernels.decode.weights import EncoderWeights

__all__ = ["NativeEncoder"]


class NativeEncoder:
    """An encoder by the native kernels.

    Args:
        weights: the encoder, float32 or bfloat16, on the CPU.

    Raises:
        ValueError: weights that it cannot encode with.
    """

    def __init__(self, weights: EncoderWeights) -> None:
        if (reason := self.supports(weights)) is not None:
            raise ValueError(f"the native encoder cannot encode here: {reason}")
        from rxt_kernels.decode.native_weights import native_encoder

        self._dtype = weights.embedding.dtype
        self._layers, self._width = len(weights.layers), weights.embedding.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            self._network = native_encoder(weights, str(self._dtype).removeprefix("torch."))
        self._kept: tuple[int, Any] = (0, None)

    @staticmethod
    def supports(weights: EncoderWeights) -> str | None:
        """None, or why these weights are not encoded with natively, in one sentence."""
        if any(layer.memory_read is not None for layer in weights.layers):
            return "its layers read memory, which this engine does for decoders only."
        return native_runtime.unsupported_tensors(weights.embedding) or unsupported_network(weights)

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The residual stream behind every layer, without a final norm.

        Args:
            tokens: (B, T) int64.
            mask: (B, T) bool, True at the tokens of a row, which stand at its beginning; None for all.

        Returns:
            (L, B, T, D) in the dtype of the weights; zeros at padded positions.

        Raises:
            TypeError, ValueError: tokens or a mask that do not fit.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
            refuse_type("tokens", tokens, "an int64 tensor of token ids")
        if tokens.dim() != 2 or not tokens.numel():
            refuse_shape("tokens", tokens, "(B, T) with at least one token")
        rows, time = tokens.shape
        if mask is not None and (mask.shape != tokens.shape or mask.dtype is not torch.bool):
            refuse_shape("mask", mask, f"{tuple(tokens.shape)}, bool")
        states = torch.empty(self._layers, rows, time, self._width, dtype=torch.float32, device="cpu")
        if mask is None or bool(mask.all()):
            row, position = (torch.arange(count, device="cpu") for count in (rows, time))
            places = row.repeat_interleave(time), position.repeat(rows)
            chosen = tokens.reshape(-1)
        else:
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError(
                    "mask has a token behind padding; accepted are rows whose tokens stand at the beginning."
                )
            states.zero_()
            row_of, position = mask.nonzero(as_tuple=True)
            places, chosen = (row_of, position), tokens[mask]
        if chosen.numel():
            self._engine(rows).encode(chosen.contiguous(), *places, states, torch.get_num_threads())
        return states.to(self._dtype)

    def _engine(self, rows: int) -> Any:
        """The extension's engine for so many rows; that of the last call is kept. Threads may make one each."""
        kept_rows, engine = self._kept
        if kept_rows != rows:
            stored = "float32" if self._dtype is torch.float32 else "bfloat16"
            engine = native_runtime.extension.DecodeEngine({**self._network, "capacity": 64}, rows, stored)
            self._kept = rows, engine
        return engine
