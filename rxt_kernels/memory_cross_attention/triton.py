"""Memory cross-attention in Triton: the kernels of sparse query attention, without mask, order, or rotated keys.

One memory that is shared by a batch of queries is read in place: its batch stride is zero, nothing is expanded in memory.
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
    key, value = (side.expand(query.shape[0], -1, -1, -1) for side in (memory_key, memory_value))
    return attention.sparse_query_attention_triton(
        query, key, value, query_angles=query_angles, rotary_layout=rotary_layout, scale=scale
    )
