"""SwiGLU, the definition (specification 2.7): the first half is the linear part l, the second half the gate g.

y = l * silu(g),    silu(g) = g * sigmoid(g)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(x: Tensor) -> Tensor:
    """x (..., 2F) -> (..., F)."""
    linear, gate = x.chunk(2, dim=-1)
    return linear * F.silu(gate)
