"""The memory read: queries against the fixed keys and values of the short-term memory."""

from rxt_kernels.memory_cross_attention.op import memory_cross_attention
from rxt_kernels.memory_cross_attention.reference import memory_cross_attention_reference

__all__ = ["memory_cross_attention", "memory_cross_attention_reference"]
