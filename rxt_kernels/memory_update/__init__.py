"""The memory write: norms, attention of the memory slots over the encoded interaction, gated residuals."""

from rxt_kernels.memory_update.op import memory_norm, memory_update, residual_gate
from rxt_kernels.memory_update.parameters import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
)
from rxt_kernels.memory_update.reference import (
    memory_norm_reference,
    memory_update_reference,
    residual_gate_reference,
)

__all__ = [
    "AttentionWeights",
    "MemoryNormParameters",
    "MemoryUpdateLayer",
    "ResidualGateParameters",
    "memory_norm",
    "memory_norm_reference",
    "memory_update",
    "memory_update_reference",
    "residual_gate",
    "residual_gate_reference",
]
