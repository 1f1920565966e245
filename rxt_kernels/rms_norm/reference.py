"""RMSNorm, the definition (specification 2.3).

    y = x * rsqrt(mean(x^2 over the last dimension) + eps) * weight

No bias, no mean subtraction. ``eps=None`` follows torch: the machine epsilon of the dtype the mean is taken in, which
is float64 for float64 inputs and float32 for every other one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON_FLOAT64 = torch.finfo(torch.float64).eps
EPSILON = torch.finfo(torch.float32).eps


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) with the dtype of x."""
    if eps is None:
        eps = EPSILON_FLOAT64 if x.dtype is torch.float64 else EPSILON
    if weight.dtype is not x.dtype:  # Under autocast only, see checks.alike.
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual (..., D), weight (D,) -> (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total
