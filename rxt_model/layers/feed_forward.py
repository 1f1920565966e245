"""Dense feed-forward networks: SwiGLU and its relatives, and the two-layer kind (spec 2.7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rxt_kernels import swiglu
from rxt_model.layers.activations import activation


class GatedLinearUnit(nn.Module):
    """One projection to twice the width: the first half is linear, the second half is its activated gate."""

    def __init__(self, dim: int, hidden: int, activation_name: str) -> None:
        super().__init__()
        self.activation = activation_name
        self.linear = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.linear(x)
        if self.activation in ("silu", "swish"):
            return swiglu(projected)
        linear, gate = projected.chunk(2, dim=-1)
        return linear * activation(self.activation)(gate)


class FeedForward(nn.Module):
    """``fc2(dropout(fc1(x)))`` with a gated or a plain first layer.

    Args:
        dim: model width D.
        hidden: width F between the layers.
        gated: whether ``fc1`` is a :class:`GatedLinearUnit`.
        activation_name: activation of the gate, or of the plain first layer.
        dropout: dropout between the layers while training.
    """

    def __init__(self, dim: int, hidden: int, *, gated: bool, activation_name: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.gated = gated
        self.activation = activation_name
        self.dropout = dropout
        self.fc1: nn.Module = GatedLinearUnit(dim, hidden, activation_name) if gated else nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    @property
    def first_linear(self) -> nn.Linear:
        """The linear layer inside ``fc1``, whichever kind it is."""
        first = self.fc1.linear if isinstance(self.fc1, GatedLinearUnit) else self.fc1
        assert isinstance(first, nn.Linear)
        return first

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x) if self.gated else activation(self.activation)(self.fc1(x))
        output: Tensor = self.fc2(F.dropout(hidden, self.dropout, self.training))
        return output
