"""Public SwiGLU: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import floating, refuse_shape
from rxt_kernels.dispatch import Operation
from rxt_kernels.swiglu.reference import swiglu_reference

_SWIGLU = Operation("swiglu", swiglu_reference)

if triton_runtime.available():
    from rxt_kernels.swiglu import triton

    _SWIGLU.register("triton", triton.swiglu_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.swiglu import native

    _SWIGLU.register("native", native.swiglu_native, native.supports, devices=("cpu",))


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Gated activation of a feed-forward layer: linear half times SiLU of the gate half (specification 2.7).

    Args:
        x: (..., 2F): the first F values are the linear part, the last F the gate.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (..., F) with the dtype of x.

    Raises:
        TypeError: x is no tensor or not floating point.
        ValueError: the last dimension is odd, or the backend is not accepted.

    Example:
        >>> import torch
        >>> swiglu(torch.tensor([2.0, 1.0]))
        tensor([1.4621])
    """
    floating("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        refuse_shape("x", x, "(..., 2F), an even last dimension")
    return _SWIGLU.select(backend, x)(x)
