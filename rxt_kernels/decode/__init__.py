"""One token through a whole decoder: engines with static buffers behind one interface, and the choice between them."""

from __future__ import annotations

from typing import Any

from rxt_kernels.decode.cuda_graph import CudaGraphEngine
from rxt_kernels.decode.engine import DecodeEngine, EagerEngine
from rxt_kernels.decode.native import PRECISIONS, NativeEngine
from rxt_kernels.decode.native_encoder import NativeEncoder
from rxt_kernels.decode.weights import (
    DecoderLayerWeights,
    DecoderWeights,
    EncoderWeights,
    ExpertWeights,
    FeedForwardWeights,
    MemoryReadWeights,
    NormWeights,
)

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "CudaGraphEngine",
    "DecodeEngine",
    "DecoderLayerWeights",
    "DecoderWeights",
    "EagerEngine",
    "EncoderWeights",
    "ExpertWeights",
    "FeedForwardWeights",
    "MemoryReadWeights",
    "NativeEncoder",
    "NativeEngine",
    "NormWeights",
    "decode_engine",
    "supports",
]

ENGINES: dict[str, type[CudaGraphEngine] | type[NativeEngine] | type[EagerEngine]] = {
    "cuda_graph": CudaGraphEngine,
    "native": NativeEngine,
    "eager": EagerEngine,
}
"""Every engine by name, fastest first."""


def supports(engine: str, weights: DecoderWeights) -> str | None:
    """None, or why an engine cannot decode with these weights, in one sentence.

    Raises:
        ValueError: there is no engine of this name.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, which is not known; it is one of {', '.join(map(repr, ENGINES))}.")
    return ENGINES[engine].supports(weights)


def decode_engine(
    weights: DecoderWeights,
    rows: int,
    *,
    engine: str = "auto",
    capacity: int = 256,
    limit: int | None = None,
    precision: str | None = None,
) -> DecodeEngine:
    """An engine for these weights.

    Args:
        weights: the decoder.
        rows: messages that are answered at once.
        engine: a name of :data:`ENGINES`, or "auto" for the fastest that can be used.
        capacity: tokens per row to make room for; it grows.
        limit: most tokens of a row, or None.
        precision: one of :data:`PRECISIONS`, what the native engine packs weights in; None is their dtype.

    Raises:
        ValueError: the name is unknown, a precision is given for another engine, or the engine cannot decode with these
            weights; the message is its reason.
    """
    if engine == "auto":
        engine = next(name for name in ENGINES if supports(name, weights) is None)
    elif (reason := supports(engine, weights)) is not None:
        raise ValueError(f"engine={engine!r} cannot decode here: {reason}")
    options: dict[str, Any] = {"capacity": capacity, "limit": limit}
    if precision is not None:
        if engine != NativeEngine.name:
            raise ValueError(
                f"precision is {precision!r} for the engine {engine!r}, which computes with the weights as they are; "
                "leave it out, or use engine='native'."
            )
        options["precision"] = precision
    return ENGINES[engine](weights, rows, **options)
