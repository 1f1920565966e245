"""Memory cross-attention by the native CPU kernels: those of sparse query attention, without mask, order, or rotated keys.

A memory that is shared by a batch of queries is never expanded: queries do not see each other, so those of all rows stand in
one row, and the memory is packed, or read, once.
"""

from __future__ import annotations

from torch import Tensor

from rxt_kernels.sparse_query_attention import native as attention


def supports(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> str | None:
    """None, or why this call is not for the native kernels."""
    return attention.supports(query, memory_key, memory_value, query_angles=query_angles, dropout=dropout)


def memory_cross_attention_native(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, T, Hq, dh), memory_key and memory_value (1 | B, S, Hkv, dh) -> (B, T, max(Hq, Hkv), dh)."""
    batch, time, _, head_dim = query.shape
    tables = attention.rotary_tables(query_angles)
    shared = memory_key.shape[0] != batch
    if shared:
        query = query.reshape(1, batch * time, *query.shape[2:])
        tables = tuple(  # type: ignore[assignment]
            table if table is None else table.expand(batch, time, -1).reshape(batch * time, -1).contiguous()
            for table in tables
        )
    options = attention.Options(
        False, None, None, *tables, None, None, rotary_layout == "split", head_dim**-0.5 if scale is None else scale
    )
    out = attention.attend(query, memory_key, memory_value, options)
    return out.unflatten(1, (batch, time)).squeeze(0) if shared else out
