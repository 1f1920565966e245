"""SwiGLU, the gated activation of every dense and expert feed-forward layer."""

from rxt_kernels.swiglu.op import swiglu
from rxt_kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
