"""Memory cross-attention in Triton: the kernels of sparse query attention, without mask, order, or rotated keys.

A prefill is one launch. Where no gradient is wanted, few queries split the memory between programs
(``sparse_query_attention/triton_decode.py``). One memory that is shared by a batch of queries is read in place and never
expanded: a prefill gives it a batch stride of zero, and a decode step reads it once for the queries of all rows.
"""

from __future__ import annotations

from torch import Tensor

from rxt_kernels.sparse_query_attention import triton as attention


def supports(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> str | None:
    """None, or why this call is not for Triton."""
    return attention.supports(query, memory_key, memory_value, query_angles=query_angles, dropout=dropout)


def memory_cross_attention_triton(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, T, Hq, dh), memory_key and memory_value (1 | B, S, Hkv, dh) -> (B, T, max(Hq, Hkv), dh)."""
    return attention.sparse_query_attention_triton(
        query, memory_key, memory_value, query_angles=query_angles, rotary_layout=rotary_layout, scale=scale
    )
