"""Sparse query attention in Triton, forward and backward; see ``reference.py`` for the formula.

Three ways, each in a file of its own: ``triton_forward.py`` for many queries, ``triton_backward.py`` for its gradients, and
``triton_decode.py`` for few queries where no gradient is wanted.

Where positions are rotated. A forward program loads a block of queries of one head, and no other program loads it, so the
query is rotated as it is loaded, for nothing but the sines. A key is loaded again for every block of queries of every head
that reads it. Turned on load, a key costs head_dim sines and cosines each time, about 30 instructions apiece; in a 64 x 64
tile with head_dim 16 these are 64 * 16 * 30 = 31,000, as many as the softmax takes (64 * 64 scores, an exponential and some
seven more each), and they grow with head_dim. Over a causal prefill of 2048 tokens with 8 heads that is 4 microseconds of
all multiprocessors of an H100 (132 of them, 128 lanes, 1.8 GHz) for each layer; reading and writing the keys once, 4 heads
in bfloat16, is 0.5 MB or 0.2 microseconds, and a launch. At 512 tokens the two are about even. So keys of up to 512 tokens are
turned on load in the forward pass, which is what an encoder and a memory update ask for; more of them, those in float32, whose
tiles leave no registers for sines, and those that a gradient is wanted for, are turned once by the kernel of ``rotary``. So is
the query in the backward pass, where it is loaded again for every block of keys. A cache holds rotated keys anyway.

Where both sides are rotated, the layout of the pairs cannot be seen in a score; where only the query is, the split layout
is laid out in registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxt_kernels.rotary.triton import rotary_triton, unsupported_angles
from rxt_kernels.sparse_query_attention.triton_arguments import AttentionArguments
from rxt_kernels.sparse_query_attention.triton_backward import attention_backward
from rxt_kernels.sparse_query_attention.triton_decode import MOST_QUERIES, attention_decode
from rxt_kernels.sparse_query_attention.triton_forward import attention_forward
from rxt_kernels.triton_runtime import unsupported_tensors

LARGEST_HEAD = 256
MOST_KEYS_TURNED_ON_LOAD = 512


@torch.library.custom_op("rxt_kernels::sparse_query_attention_triton", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_angles: Tensor | None,
    split_layout: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return attention_forward(
        AttentionArguments(query, key, value, causal, key_mask, key_lengths, query_angles, split_layout, scale)
    )


@torch.library.custom_op("rxt_kernels::sparse_query_attention_backward_triton", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    out: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_angles: Tensor | None,
    split_layout: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = AttentionArguments(query, key, value, causal, key_mask, key_lengths, query_angles, split_layout, scale)
    return attention_backward(arguments, gradient, out, log_sum)


@torch.library.custom_op("rxt_kernels::sparse_query_attention_inference_triton", mutates_args=())
def _attention_inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_angles: Tensor | None,
    key_angles: Tensor | None,
    split_layout: bool,
    scale: float,
) -> Tensor:
    """Without gradients. The way is chosen in here, where sizes are numbers, so that no traced graph depends on it."""
    few_queries = query.shape[1] <= MOST_QUERIES
    many_keys = key.shape[1] > MOST_KEYS_TURNED_ON_LOAD or key.element_size() > 2
    if key_angles is not None and (few_queries or many_keys):
        key, key_angles = rotary_triton(key, key_angles, "split" if split_layout else "interleaved"), None
        split_layout = split_layout and query_angles is not None
    arguments = AttentionArguments(
        query, key, value, causal, key_mask, key_lengths, query_angles, split_layout, scale, key_angles
    )
    return attention_decode(arguments) if few_queries else attention_forward(arguments)[0]


@_attention.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, time, query_heads, head_dim = query.shape
    heads = max(query_heads, key.shape[2])
    return query.new_empty((batch, time, heads, head_dim)), query.new_empty((batch, heads, time), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    gradient: Tensor, out: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@_attention_inference.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    batch, time, query_heads, head_dim = query.shape
    return query.new_empty((batch, time, max(query_heads, key.shape[2]), head_dim))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.causal, key_mask, key_lengths, query_angles, ctx.split_layout, ctx.scale = inputs
    ctx.save_for_backward(*output, query, key, value, key_mask, key_lengths, query_angles)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    out, log_sum, query, key, value, key_mask, key_lengths, query_angles = ctx.saved_tensors
    found = _attention_backward(
        gradient, out, log_sum, query, key, value, ctx.causal, key_mask, key_lengths, query_angles, ctx.split_layout,
        ctx.scale,
    )  # fmt: skip
    return (*found, None, None, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)


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
    """None, or why this call is not for Triton."""
    if dropout:
        return f"dropout is {dropout}; the kernels drop no attention weights."
    if query.shape[3] > LARGEST_HEAD or query.shape[3] % 2:
        return f"heads have {query.shape[3]} values; the kernels take an even number of at most {LARGEST_HEAD}."
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; the kernels take one dtype."
    return unsupported_tensors(query) or unsupported_angles(query_angles) or unsupported_angles(key_angles)


def sparse_query_attention_triton(
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
    """query (B, Tq, Hq, dh), key and value (B, Tk, Hkv, dh) -> (B, Tq, max(Hq, Hkv), dh); as the reference.

    Key and value may also have batch 1, which then is read by every row of the query, and neither masked nor rotated.
    """
    if query_angles is not None and key_angles is not None:
        rotary_layout = "interleaved"  # gives the same scores, and needs no halves in registers
    scale = query.shape[3] ** -0.5 if scale is None else scale
    mixed: Tensor
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        if key_angles is not None:
            key = rotary_triton(key, key_angles, rotary_layout)
        key, value = (side.expand(query.shape[0], -1, -1, -1) for side in (key, value))
        is_split = query_angles is not None and rotary_layout == "split"
        mixed = _attention(query, key, value, causal, key_mask, key_lengths, query_angles, is_split, scale)[0]
    else:
        is_split = (query_angles is not None or key_angles is not None) and rotary_layout == "split"
        mixed = _attention_inference(
            query, key, value, causal, key_mask, key_lengths, query_angles, key_angles, is_split, scale
        )
    return mixed
