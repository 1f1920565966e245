"""Public linear cross-entropy: checks, then dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import alike, floating, refuse_device, refuse_shape, refuse_type, refuse_value
from rxt_kernels.dispatch import Operation
from rxt_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

_LINEAR_CROSS_ENTROPY = Operation("linear_cross_entropy", linear_cross_entropy_reference)

if triton_runtime.available():
    from rxt_kernels.linear_cross_entropy import triton

    _LINEAR_CROSS_ENTROPY.register("triton", triton.linear_cross_entropy_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.linear_cross_entropy import native

    _LINEAR_CROSS_ENTROPY.register("native", native.linear_cross_entropy_native, native.supports, devices=("cpu",))


def _check_target_range(target: Tensor, classes: int, ignore_index: int) -> None:
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        refuse_value(
            "target",
            target[outside][0].item(),
            f"class numbers from 0 to {classes - 1}, or ignore_index {ignore_index}",
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear head, without asking the caller for the logits (specification 2.1, 5.1).

    Args:
        hidden: (..., D), at least two dimensions.
        weight: (V, D), the head.
        target: (...) int64 class numbers; its shape is that of hidden without D.
        bias: (V,) or None.
        ignore_index: targets with this value are left out.
        reduction: "mean" (over the targets that count), "sum" or "none".
        backend: "auto", "reference", "triton" or "native".

    Returns:
        Scalar, or (...) for "none", with the dtype of hidden. A mean over no target is 0, not NaN.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, device, reduction, backend or (where the host can see it) class number is not accepted.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(2, 4)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([[0, 1, -100]]))
        tensor(0.6931)
    """
    floating("hidden", hidden)
    if hidden.dim() < 2:
        refuse_shape("hidden", hidden, "(..., D) with at least two dimensions")
    alike("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        refuse_shape("weight", weight, f"(V, D) with D = {hidden.shape[-1]}, the last dimension of hidden")
    if bias is not None:
        alike("bias", bias, "hidden", hidden)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            refuse_shape("bias", bias, f"(V,) with V = {weight.shape[0]}")
    if not isinstance(target, Tensor) or target.dtype is not torch.int64:
        refuse_type("target", target, "an int64 tensor of class numbers")
    if target.shape != hidden.shape[:-1]:
        refuse_shape("target", target, f"the shape of hidden without its last dimension, {tuple(hidden.shape[:-1])}")
    if target.device != hidden.device:
        refuse_device("target", target, "hidden", hidden)
    if reduction not in ("mean", "sum", "none"):
        refuse_value("reduction", reduction, "'mean', 'sum' or 'none'")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_target_range(target, weight.shape[0], ignore_index)
    arguments = (hidden, weight, target, bias, ignore_index, reduction)
    return _LINEAR_CROSS_ENTROPY.select(backend, *arguments)(*arguments)
