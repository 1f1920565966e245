"""Self-attention with fewer query heads: MHA, GQA, MQA, SQA and reversed SQA, causal or not, with padding."""

from rxt_kernels.sparse_query_attention.op import sparse_query_attention
from rxt_kernels.sparse_query_attention.reference import sparse_query_attention_reference

__all__ = ["sparse_query_attention", "sparse_query_attention_reference"]
