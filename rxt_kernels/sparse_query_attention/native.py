"""Sparse query attention by the native CPU kernels, forward and backward; see ``reference.py`` for the formula.

Keys and values of every head are packed once per call, keys rotated and transposed, so that scores are computed with keys
along the lanes of a vector; blocks of queries then run over them with a running maximum. A decode step packs nothing and
reads the filled part of a cache where it lies. The backward pass computes the weights again from the largest score and
the sum that are saved of each query. Both sides are rotated as they are read, by sines and cosines that torch takes in the
dtype of the angles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxt_kernels.native_runtime import extension, is_plain_call, unsupported_tensors

LARGEST_HEAD = 256


class Options(NamedTuple):
    """What a call of the kernels takes besides query, key and value, in the order of the operation's schema."""

    causal: bool
    key_mask: Tensor | None
    key_lengths: Tensor | None
    query_cosine: Tensor | None
    query_sine: Tensor | None
    key_cosine: Tensor | None
    key_sine: Tensor | None
    split: bool
    scale: float


def _with_neighbours(heads: Tensor) -> Tensor:
    """Heads whose values are neighbours in memory: themselves where they are."""
    return heads if heads.stride(-1) == 1 or heads.shape[-1] == 1 else heads.contiguous()


def _out_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    batch, time, query_heads, head_dim = query.shape
    return batch, time, max(query_heads, key.shape[2]), head_dim


def _forward(query: Tensor, key: Tensor, value: Tensor, options: Options, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(out, largest scores and sums of the softmax); the latter where they are wanted."""
    shape = _out_shape(query, key)
    out = query.new_empty(shape)
    softmax_sums = query.new_empty((2, shape[0], shape[2], shape[1]), dtype=torch.float32) if keep else None
    extension.attention_forward(*map(_with_neighbours, (query, key, value)), *options, out, softmax_sums)
    return out, softmax_sums


@torch.library.custom_op("rxt_kernels::sparse_query_attention_native", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_cosine: Tensor | None,
    query_sine: Tensor | None,
    key_cosine: Tensor | None,
    key_sine: Tensor | None,
    split: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    options = Options(
        causal, key_mask, key_lengths, query_cosine, query_sine, key_cosine, key_sine, split, scale
    )  # fmt: skip
    out, softmax_sums = _forward(query, key, value, options, True)
    assert softmax_sums is not None
    return out, softmax_sums


@torch.library.custom_op("rxt_kernels::sparse_query_attention_backward_native", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    out: Tensor,
    softmax_sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_cosine: Tensor | None,
    query_sine: Tensor | None,
    key_cosine: Tensor | None,
    key_sine: Tensor | None,
    split: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    extension.attention_backward(
        *map(_with_neighbours, (query, key, value)), causal, key_mask, key_lengths, query_cosine, query_sine, key_cosine,
        key_sine, split, scale, out, softmax_sums, _with_neighbours(gradient), *gradients,
    )  # fmt: skip
    return gradients


@_attention.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = _out_shape(query, key)
    return query.new_empty(shape), query.new_empty((2, shape[0], shape[2], shape[1]), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    gradient: Tensor, out: Tensor, softmax_sums: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.causal, *tables, ctx.split, ctx.scale = inputs
    ctx.save_for_backward(*output, query, key, value, *tables)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    out, softmax_sums, query, key, value, *tables = ctx.saved_tensors
    found = _attention_backward(
        gradient, out, softmax_sums, query, key, value, ctx.causal, *tables, ctx.split, ctx.scale
    )  # fmt: skip
    return (*found, *[None] * 9)


_attention.register_autograd(_gradients, setup_context=_keep)


def _unsupported_angles(angles: Tensor | None, name: str) -> str | None:
    if angles is not None and angles.requires_grad:
        return f"{name} require a gradient; the kernels have none for angles."
    return None


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> str | None:
    """None, or why this call is not for the native kernels."""
    if dropout:
        return f"dropout is {dropout}; the kernels drop no attention weights."
    if query.shape[3] > LARGEST_HEAD or not query.shape[3]:
        return f"heads have {query.shape[3]} values; the kernels take 1 to {LARGEST_HEAD}."
    return (
        unsupported_tensors(query, key, value)
        or _unsupported_angles(query_angles, "query_angles")
        or _unsupported_angles(key_angles, "key_angles")
    )


def rotary_tables(angles: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines (..., time, head_dim / 2) float32, taken in the dtype of the angles."""
    if angles is None:
        return None, None
    return angles.cos().float().contiguous(), angles.sin().float().contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """query (B, Tq, Hq, dh), key and value (B, Tk, Hkv, dh) -> (B, Tq, max(Hq, Hkv), dh)."""
    if is_plain_call(query, key, value):
        return _forward(query, key, value, options, False)[0]
    out: Tensor = _attention(query, key, value, *options)[0]
    return out


def sparse_query_attention_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, Tq, Hq, dh), key and value (B, Tk, Hkv, dh) -> (B, Tq, max(Hq, Hkv), dh); as the reference."""
    # Where both sides are rotated, the layout of the pairs cannot be seen in a score.
    split = rotary_layout == "split" and (query_angles is None or key_angles is None)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    key_mask, key_lengths = (side if side is None else side.contiguous() for side in (key_mask, key_lengths))
    options = Options(
        causal, key_mask, key_lengths, *rotary_tables(query_angles), *rotary_tables(key_angles), split, scale
    )
    return attend(query, key, value, options)
