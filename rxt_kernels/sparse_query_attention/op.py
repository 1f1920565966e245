"""Public sparse query attention: checks, then dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import alike, floating, probability, refuse_device, refuse_shape, refuse_type, refuse_value
from rxt_kernels.dispatch import Operation
from rxt_kernels.rotary.op import check_angles, check_layout
from rxt_kernels.sparse_query_attention.reference import sparse_query_attention_reference

_SPARSE_QUERY_ATTENTION = Operation("sparse_query_attention", sparse_query_attention_reference)

if triton_runtime.available():
    from rxt_kernels.sparse_query_attention import triton

    _SPARSE_QUERY_ATTENTION.register("triton", triton.sparse_query_attention_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.sparse_query_attention import native

    _SPARSE_QUERY_ATTENTION.register("native", native.sparse_query_attention_native, native.supports, devices=("cpu",))


def check_heads(query: Tensor, key: Tensor, value: Tensor, key_name: str, value_name: str, shared: bool) -> None:
    """Require (batch, time, heads, head_dim) tensors whose head counts divide each other.

    `shared` says that key and value may have batch 1 whatever the batch of the query.
    """
    floating("query", query)
    alike(key_name, key, "query", query)
    alike(value_name, value, "query", query)
    if query.dim() != 4:
        refuse_shape("query", query, "(batch, time, heads, head_dim)")
    batch, _, query_heads, head_dim = query.shape
    if key.dim() != 4 or key.shape[3] != head_dim or (key.shape[0] != batch and not (shared and key.shape[0] == 1)):
        batches = f"{batch} (or 1)" if shared else f"{batch}"
        refuse_shape(key_name, key, f"(batch, time, heads, head_dim) with batch {batches} and head_dim {head_dim}")
    if value.shape != key.shape:
        refuse_shape(value_name, value, f"the shape of {key_name}, {tuple(key.shape)}")
    key_heads = key.shape[2]
    if not query_heads or not key_heads or (query_heads % key_heads and key_heads % query_heads):
        raise ValueError(
            f"query has {query_heads} heads and {key_name} has {key_heads}; accepted are head counts of which one "
            "divides the other."
        )


def check_keys_visible(batch: int, key: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None) -> None:
    """Require a mask or lengths, not both, that fit the keys."""
    key_time = key.shape[1]
    if key_mask is not None:
        if key_lengths is not None:
            raise ValueError("key_mask and key_lengths are both given; accepted is at most one of them.")
        if not isinstance(key_mask, Tensor) or key_mask.dtype is not torch.bool:
            refuse_type("key_mask", key_mask, "a bool tensor, True = keep; convert a 0/1 mask with .bool()")
        if key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] != key_time:
            refuse_shape("key_mask", key_mask, f"(batch, key time), here ({batch}, {key_time})")
        if key_mask.device != key.device:
            refuse_device("key_mask", key_mask, "key", key)
    if key_lengths is not None:
        if not isinstance(key_lengths, Tensor) or key_lengths.dtype is not torch.int64:
            refuse_type("key_lengths", key_lengths, "an int64 tensor")
        if key_lengths.dim() != 1 or key_lengths.shape[0] != batch:
            refuse_shape("key_lengths", key_lengths, f"(batch,), here ({batch},)")
        if key_lengths.device != key.device:
            refuse_device("key_lengths", key_lengths, "key", key)
        # The values are looked at only where the host has them: on an accelerator that would be a synchronisation.
        if key_lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            for length in key_lengths.tolist():
                if not 0 <= length <= key_time:
                    refuse_value("key_lengths", length, f"lengths from 0 to the {key_time} keys that there are")


def check_scale(scale: float | None) -> None:
    """Require a usable softmax scale."""
    if scale is not None and not scale > 0.0:
        refuse_value("scale", scale, "None, which is 1 / sqrt(head_dim), or a positive number")


def sparse_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_angles: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with any ratio of query heads to key/value heads (specification 2.4, 2.5).

    Args:
        query: (batch, query time, Hq, head_dim).
        key, value: (batch, key time, Hkv, head_dim); one of Hq and Hkv divides the other. With Hq > Hkv, query head h
            reads key/value head h // (Hq / Hkv); with Hq < Hkv, the query heads are tiled.
        causal: query i sees only the keys up to Tk - Tq + i, so the last query sees the last key. A single query sees
            every key.
        key_mask: (batch, key time) bool, True = visible. Hidden values weigh 0, so they must be finite all the same.
        key_lengths: (batch,) int64: the first so many keys are visible. At most one of key_mask and key_lengths. The
            causal alignment stays on key time.
        query_angles, key_angles: (time, head_dim/2) or (batch, time, head_dim/2): rotate that side first, see
            :func:`rxt_kernels.rotary`. None: not rotated (or rotated already).
        rotary_layout: "interleaved" or "split".
        dropout: probability of dropping an attention weight.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (batch, query time, max(Hq, Hkv), head_dim). A query that sees no key gives zeros, with zero gradients.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, head ratio, device, range, layout or backend is not accepted.

    Example:
        >>> import torch
        >>> query, key = torch.randn(2, 5, 8, 16), torch.randn(2, 5, 4, 16)
        >>> sparse_query_attention(query, key, key, causal=True).shape
        torch.Size([2, 5, 8, 16])
    """
    check_heads(query, key, value, "key", "value", shared=False)
    if key_mask is not None or key_lengths is not None:
        check_keys_visible(query.shape[0], key, key_mask, key_lengths)
    if query_angles is not None:
        check_angles("query_angles", query_angles, "query", query)
    if key_angles is not None:
        check_angles("key_angles", key_angles, "key", key)
    check_layout("rotary_layout", rotary_layout)
    probability("dropout", dropout)
    check_scale(scale)
    arguments = (
        query, key, value, causal, key_mask, key_lengths, query_angles, key_angles, rotary_layout, dropout, scale,
    )  # fmt: skip
    return _SPARSE_QUERY_ATTENTION.select(backend, *arguments)(*arguments)
