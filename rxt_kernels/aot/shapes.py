"""The shapes of every published model: what of a configuration decides which code a kernel becomes.

This package knows nothing of models, so the numbers stand here once more; ``tests/test_aot.py`` holds them to the presets.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "Experts", "MemoryWrite", "ModelShape"]

Heads = tuple[int, int]
"""Query heads, key and value heads."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        hidden: width of an expert.
        count: how many there are.
        top_k: how many a token goes to.
        has_biases: whether every expert has its own biases.
        half_precision_router: whether logits are bfloat16 whatever the model's dtype is.
    """

    hidden: int
    count: int
    top_k: int
    has_biases: bool = True
    half_precision_router: bool = False


@dataclass(frozen=True)
class MemoryWrite:
    """A memory update of all layers; fields as in ``rxt_kernels.memory_update``."""

    layers: int
    slots: int
    heads: Heads
    variant: str
    gate: str
    groups: int = 1


@dataclass(frozen=True)
class ModelShape:
    """The layers of one model; None or empty where it has no such layer.

    Attributes:
        model: name of its preset.
        width: of the residual stream.
        head_dim: of every head.
        vocabulary: classes of the head.
        longest: tokens that the model is made for.
        rotary: layout of rotated pairs.
        causal: heads of self-attention in the decoder.
        bidirectional: heads of self-attention in the encoder.
        reads: heads of memory cross-attention, decoder's and encoder's, as far as they differ.
        read_slots: slots that they read.
        experts: of the decoder.
        dense: hidden widths of dense feed-forward layers in SwiGLU form.
        write: the memory update.
    """

    model: str
    width: int
    head_dim: int
    vocabulary: int
    longest: int
    rotary: str = "split"
    causal: Heads | None = None
    bidirectional: Heads | None = None
    reads: tuple[Heads, ...] = ()
    read_slots: int = 0
    experts: Experts | None = None
    dense: tuple[int, ...] = ()
    write: MemoryWrite | None = None


_GATED, _GROUPED = "gated-self-interlayer", "grouped-self-interlayer"

_FULL = (
    ModelShape(
        "rxt-alpha-micro", 128, 16, 7500, 256, causal=(4, 4), bidirectional=(4, 4), reads=((4, 4),), read_slots=256,
        experts=Experts(256, 12, 2), dense=(384,), write=MemoryWrite(6, 256, (4, 4), "interlayer", "linear"),
    ),
    ModelShape(
        "rxt-alpha-micro-plus", 128, 16, 7500, 256, causal=(4, 4), bidirectional=(4, 4), reads=((4, 4),), read_slots=256,
        experts=Experts(256, 20, 4), dense=(384,), write=MemoryWrite(10, 256, (4, 4), _GATED, "linear"),
    ),
    ModelShape(
        "rxt-alpha-mini", 256, 16, 10000, 1024, causal=(8, 8), bidirectional=(8, 8), reads=((8, 8), (8, 4)),
        read_slots=1024, experts=Experts(512, 16, 2), dense=(768,),
        write=MemoryWrite(8, 1024, (8, 8), _GATED, "elementwise"),
    ),
    ModelShape(
        "rxt-alpha-mini-s", 256, 16, 10000, 256, causal=(8, 8), bidirectional=(8, 8), reads=((8, 8),), read_slots=256,
        experts=Experts(512, 20, 4), dense=(768,), write=MemoryWrite(10, 256, (8, 8), _GATED, "linear"),
    ),
    ModelShape(
        "rxt-beta-micro", 256, 16, 32000, 1024, causal=(8, 4), bidirectional=(8, 8), reads=((8, 4),), read_slots=1024,
        experts=Experts(512, 42, 4), dense=(768,), write=MemoryWrite(14, 1024, (8, 8), _GATED, "elementwise"),
    ),
    ModelShape(
        "rxt-beta-3b", 512, 32, 65536, 8192, rotary="interleaved", causal=(8, 4), bidirectional=(8, 8), reads=((8, 4),),
        read_slots=4096, experts=Experts(192, 384, 10, has_biases=False, half_precision_router=True), dense=(1536, 384),
        write=MemoryWrite(21, 4096, (8, 8), _GROUPED, "elementwise", groups=3),
    ),
)  # fmt: skip

_ENCODERS = (
    ModelShape("rxt-beta-micro-0.6b-encoder", 256, 16, 65536, 8192, "interleaved", bidirectional=(8, 8), dense=(1024,)),
    ModelShape("rxt-beta-mini-1.2b-encoder", 384, 24, 65536, 8192, "interleaved", bidirectional=(8, 8), dense=(1536,)),
)

_STATELESS = tuple(
    ModelShape(f"sqat-m-{kind}", 256, 16, 10000, 1024, causal=heads, dense=(768,))
    for kind, heads in {
        "mha": (16, 16), "gqa": (16, 4), "mqa": (16, 1), "sqa": (8, 4), "ssqa": (8, 8), "xsqa": (4, 4), "xsmqa": (4, 1),
    }.items()
) + tuple(
    ModelShape(f"sqat-mm-{kind}", 128, 16, 5000, 256, causal=heads, experts=Experts(256, 12, 2))
    for kind, heads in {"gqa": (8, 2), "mqa": (8, 1), "sqa": (4, 2), "ssqa": (4, 4), "xsqa": (2, 2)}.items()
)  # fmt: skip

MODELS: tuple[ModelShape, ...] = (*_FULL, *_ENCODERS, *_STATELESS)
"""Every published model; heads for masked language modelling have the width and vocabulary of one of these."""
