"""Memory cross-attention, the definition (specification 2.4, 2.5): the memory read.

    out[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s, h']) * v[b, s, h']      over all S memory slots

The heads h' and the scale are those of sparse query attention. Only the query is rotated, the memory slots have no
position; nothing is masked, and nothing is causal: every token may read all of memory, and memory never grows.
"""

from __future__ import annotations

from torch import Tensor

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
    batch = query.shape[0]
    memory_batch = memory_key.shape[0]
    return sparse_query_attention_reference(
        query,
        memory_key if memory_batch == batch else memory_key.expand(batch, -1, -1, -1),
        memory_value if memory_batch == batch else memory_value.expand(batch, -1, -1, -1),
        query_angles=query_angles,
        rotary_layout=rotary_layout,
        dropout=dropout,
        scale=scale,
    )
