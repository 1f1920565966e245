"""Root-mean-square norm as a module, and the choice between it and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxt_kernels import rms_norm


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, without bias (spec 2.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])


def make_norm(dim: int, *, use_rms_norm: bool) -> nn.Module:
    """The norm of a transformer layer: RMSNorm, or LayerNorm with bias where the configuration asks for it."""
    return RMSNorm(dim) if use_rms_norm else nn.LayerNorm(dim)
