"""Public memory cross-attention: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import probability
from rxt_kernels.dispatch import Operation
from rxt_kernels.memory_cross_attention.reference import memory_cross_attention_reference
from rxt_kernels.rotary.op import check_angles, check_layout
from rxt_kernels.sparse_query_attention.op import check_heads, check_scale

_MEMORY_CROSS_ATTENTION = Operation("memory_cross_attention", memory_cross_attention_reference)

if triton_runtime.available():
    from rxt_kernels.memory_cross_attention import triton

    _MEMORY_CROSS_ATTENTION.register("triton", triton.memory_cross_attention_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.memory_cross_attention import native

    _MEMORY_CROSS_ATTENTION.register("native", native.memory_cross_attention_native, native.supports, devices=("cpu",))


def memory_cross_attention(
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    query_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Read the short-term memory: every query attends to every slot (specification 2.4, 2.5).

    Args:
        query: (batch, time, Hq, head_dim).
        memory_key, memory_value: (batch or 1, slots, Hkv, head_dim); with batch 1 every row reads the same memory.
            Never rotated: slots have no position.
        query_angles: (time, head_dim/2) or (batch, time, head_dim/2), or None for an unrotated query.
        rotary_layout: "interleaved" or "split"; it matters here, because only one side is rotated.
        dropout: probability of dropping an attention weight.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (batch, time, max(Hq, Hkv), head_dim).

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, head ratio, device, range, layout or backend is not accepted.

    Example:
        >>> import torch
        >>> memory = torch.randn(1, 32, 4, 16)
        >>> memory_cross_attention(torch.randn(3, 1, 8, 16), memory, memory).shape
        torch.Size([3, 1, 8, 16])
    """
    check_heads(query, memory_key, memory_value, "memory_key", "memory_value", shared=True)
    if query_angles is not None:
        check_angles("query_angles", query_angles, "query", query)
    check_layout("rotary_layout", rotary_layout)
    probability("dropout", dropout)
    check_scale(scale)
    arguments = (query, memory_key, memory_value, query_angles, rotary_layout, dropout, scale)
    return _MEMORY_CROSS_ATTENTION.select(backend, *arguments)(*arguments)
