"""What is compiled: every operation, forward and backward, at the shapes of published models, in bfloat16.

A case calls the same functions as a user of the Triton backend; what they would launch is recorded instead, with its
arguments, so that the compiled code is that of a real call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["CASES", "Case"]

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """What the operations of a model look like: a layer of it, and how many tokens it reads at once."""

    model: str
    width: int
    query_heads: int
    key_heads: int
    memory_key_heads: int
    head_dim: int
    slots: int
    hidden: int
    experts: int
    top_k: int
    vocabulary: int
    tokens: int


SHAPES = (
    Shape("rxt-alpha-micro-plus", 128, 4, 2, 2, 16, 256, 160, 20, 4, 7500, 256),
    Shape("rxt-beta-micro", 256, 8, 4, 4, 16, 1024, 192, 42, 4, 32000, 512),
    Shape("rxt-beta-3b", 512, 16, 8, 8, 32, 4096, 256, 384, 10, 65536, 512),
)
"""Layers of the three models whose speed is reported; numbers as in their configurations."""


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        name: ``model/operation``.
        call: makes the call, forward and backward.
        is_small: whether it belongs to the short check.
    """

    name: str
    call: Callable[[], None]
    is_small: bool


def _draw(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DTYPE, requires_grad=True)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def _rms_norm(shape: Shape) -> None:
    from rxt_kernels.rms_norm.triton import add_rms_norm_triton, rms_norm_triton

    x, weight = _draw(1, shape.tokens, shape.width), _draw(shape.width)
    _backward(rms_norm_triton(x, weight))
    _backward(*add_rms_norm_triton(x, _draw(1, shape.tokens, shape.width), weight))


def _rotary(shape: Shape) -> None:
    from rxt_kernels.rotary.triton import rotary_triton

    angles = torch.zeros(shape.tokens, shape.head_dim // 2)
    _backward(rotary_triton(_draw(1, shape.tokens, shape.query_heads, shape.head_dim), angles))


def _swiglu(shape: Shape) -> None:
    from rxt_kernels.swiglu.triton import swiglu_triton

    _backward(swiglu_triton(_draw(1, shape.tokens, 2 * shape.hidden)))


def _self_attention(shape: Shape) -> None:
    from rxt_kernels.sparse_query_attention.triton import sparse_query_attention_triton

    angles = torch.zeros(shape.tokens, shape.head_dim // 2)
    query = _draw(1, shape.tokens, shape.query_heads, shape.head_dim)
    key, value = (_draw(1, shape.tokens, shape.key_heads, shape.head_dim) for _ in range(2))
    _backward(sparse_query_attention_triton(query, key, value, True, None, None, angles, angles))


def _memory_cross_attention(shape: Shape) -> None:
    from rxt_kernels.memory_cross_attention.triton import memory_cross_attention_triton

    angles = torch.zeros(shape.tokens, shape.head_dim // 2)
    query = _draw(1, shape.tokens, shape.query_heads, shape.head_dim)
    key, value = (_draw(1, shape.slots, shape.memory_key_heads, shape.head_dim) for _ in range(2))
    _backward(memory_cross_attention_triton(query, key, value, angles))


def _mixture_of_experts(shape: Shape) -> None:
    from rxt_kernels.mixture_of_experts.triton import mixture_of_experts_triton

    output, _ = mixture_of_experts_triton(
        _draw(1, shape.tokens, shape.width), _draw(shape.experts, shape.width),
        _draw(shape.experts, shape.width, 2 * shape.hidden), _draw(shape.experts, shape.hidden, shape.width),
        shape.top_k, _draw(shape.experts, 2 * shape.hidden), _draw(shape.experts, shape.width),
    )  # fmt: skip
    _backward(output)


def _linear_cross_entropy(shape: Shape) -> None:
    from rxt_kernels.linear_cross_entropy.triton import linear_cross_entropy_triton

    hidden, weight = _draw(8, shape.width), _draw(shape.vocabulary, shape.width)
    _backward(linear_cross_entropy_triton(hidden, weight, torch.zeros(8, dtype=torch.int64)))


_OPERATIONS: dict[str, Callable[[Shape], None]] = {
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "sparse_query_attention": _self_attention,
    "memory_cross_attention": _memory_cross_attention,
    "mixture_of_experts": _mixture_of_experts,
    "linear_cross_entropy": _linear_cross_entropy,
}

CASES: tuple[Case, ...] = tuple(
    Case(f"{shape.model}/{name}", partial(call, shape), shape.model == "rxt-beta-micro")
    for shape in SHAPES
    for name, call in _OPERATIONS.items()
)
"""Every case, models from small to large."""
