"""The operations of a Reactive Transformer: one eager definition each, and the backends that must equal it."""

from rxt_kernels.dispatch import use_backend
from rxt_kernels.linear_cross_entropy import linear_cross_entropy
from rxt_kernels.memory_cross_attention import memory_cross_attention
from rxt_kernels.memory_update import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
    memory_norm,
    memory_update,
    residual_gate,
)
from rxt_kernels.mixture_of_experts import (
    MixtureOfExpertsOutput,
    Routing,
    SharedExperts,
    load_balance_loss,
    mixture_of_experts,
    route,
    routed_experts,
)
from rxt_kernels.rms_norm import add_rms_norm, rms_norm
from rxt_kernels.rotary import rotary
from rxt_kernels.sparse_query_attention import sparse_query_attention
from rxt_kernels.swiglu import swiglu
from rxt_kernels.version import __version__

__all__ = [
    "AttentionWeights",
    "MemoryNormParameters",
    "MemoryUpdateLayer",
    "MixtureOfExpertsOutput",
    "ResidualGateParameters",
    "Routing",
    "SharedExperts",
    "__version__",
    "add_rms_norm",
    "linear_cross_entropy",
    "load_balance_loss",
    "memory_cross_attention",
    "memory_norm",
    "memory_update",
    "mixture_of_experts",
    "residual_gate",
    "rms_norm",
    "rotary",
    "route",
    "routed_experts",
    "sparse_query_attention",
    "swiglu",
    "use_backend",
]
