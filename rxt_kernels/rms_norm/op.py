"""Public RMSNorm operations: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import alike, floating, refuse_shape, refuse_value
from rxt_kernels.dispatch import Operation
from rxt_kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference

_RMS_NORM = Operation("rms_norm", rms_norm_reference)
_ADD_RMS_NORM = Operation("add_rms_norm", add_rms_norm_reference)

if triton_runtime.available():
    from rxt_kernels.rms_norm import triton

    _RMS_NORM.register("triton", triton.rms_norm_triton, triton.supports, devices=("cuda",))
    _ADD_RMS_NORM.register("triton", triton.add_rms_norm_triton, triton.supports_sum, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.rms_norm import native

    _RMS_NORM.register("native", native.rms_norm_native, native.supports, devices=("cpu",))
    _ADD_RMS_NORM.register("native", native.add_rms_norm_native, native.supports_sum, devices=("cpu",))


def _check(x: Tensor, weight: Tensor, eps: float | None) -> None:
    floating("x", x)
    alike("weight", weight, "x", x)
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        refuse_shape("weight", weight, f"(D,) with D the last dimension of x, which has shape {tuple(x.shape)}")
    if eps is not None and not eps >= 0.0:
        refuse_value("eps", eps, "None or a number that is not negative")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float | None = None, backend: str = "auto") -> Tensor:
    """Root-mean-square normalisation over the last dimension (specification 2.3).

    Args:
        x: (..., D), floating point.
        weight: (D,), same dtype and device as x.
        eps: added to the mean square. None is torch's rule: 2.22e-16 for float64, 1.1920929e-07 for every other dtype.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (..., D) with the dtype of x.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, device, eps or backend is not accepted.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
        tensor([[0.8485, 1.1314]])
    """
    _check(x, weight, eps)
    return _RMS_NORM.select(backend, x, weight, eps)(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm of the sum, the step between two sublayers (specification 2.3, 2.6).

    Args:
        x, residual: (..., D), same shape.
        weight: (D,).
        eps, backend: as in :func:`rms_norm`.

    Returns:
        (rms_norm(x + residual, weight), x + residual).

    Raises:
        TypeError, ValueError: as :func:`rms_norm`; residual must be like x.

    Example:
        >>> import torch
        >>> normed, total = add_rms_norm(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]), torch.ones(2))
        >>> total
        tensor([[3., 4.]])
    """
    _check(x, weight, eps)
    alike("residual", residual, "x", x)
    if residual.shape != x.shape:
        refuse_shape("residual", residual, f"the shape of x, {tuple(x.shape)}")
    return _ADD_RMS_NORM.select(backend, x, residual, weight, eps)(x, residual, weight, eps)
