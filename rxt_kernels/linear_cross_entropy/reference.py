"""Linear layer and cross-entropy in one, the definition.

    logits = hidden @ weight^T + bias            loss_n = logsumexp(logits_n) - logits_n[target_n]

Positions whose target is ``ignore_index`` count nowhere: 0 for "none" and "sum", left out of the mean. The mean over no
position at all is 0, with zero gradients. The softmax is taken in float32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """hidden (..., D), weight (V, D), target (...) -> scalar, or (...) for reduction "none"."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat_target = target.flatten()
    if reduction == "none":
        losses = F.cross_entropy(logits, flat_target, ignore_index=ignore_index, reduction="none")
        return losses.view(target.shape).to(hidden.dtype)
    total = F.cross_entropy(logits, flat_target, ignore_index=ignore_index, reduction="sum")
    if reduction == "mean":
        total = total / (flat_target != ignore_index).sum().clamp(min=1)
    return total.to(hidden.dtype)
