"""Memory cross-attention, the definition (specification 2.4, 2.5): the memory read.

    out[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s, h']) * v[b, s, h']      over all S memory slots

The heads h' and the scale are those of sparse query attention. Only the query is rotated, the memory slots have no
position; nothing is masked, and nothing is causal: every token may read all of memory, and memory never grows.
"""

from __future__ import annotations

from torch import Tensor

from rxt_kernels.rotary.reference import rotary_reference
from rxt_kernels.sparse_query_attention.reference import sparse_query_attention_reference


def memory_cross_attention_reference(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query (B, T, Hq, dh), memory_key and memory_value (1 | B, S, Hkv, dh) -> (B, T, max(Hq, Hkv), dh)."""
    batch, time = query.shape[0], query.shape[1]
    if query_angles is not None:
        query = rotary_reference(query, query_angles, rotary_layout)
    shared = memory_key.shape[0] != batch
    if shared:
        # Queries do not see each other, so those of all rows can stand in one row, and the shared memory is read once.
        query = query.reshape(1, batch * time, *query.shape[2:])
    out = sparse_query_attention_reference(query, memory_key, memory_value, dropout=dropout, scale=scale)
    return out.unflatten(1, (batch, time)).squeeze(0) if shared else out
