"""Rotary position embedding, the definition (specification 2.2).

Pairs are always read interleaved, (x[2j], x[2j+1]) = (a, b), and turned by the angle of their position:

    first = a * cos - b * sin        second = a * sin + b * cos

The output layout decides where they are written:

    "interleaved"   first to 2j, second to 2j + 1
    "split"         every first to the first half, every second to the second half

Two rotated sides give the same scores under both layouts; a rotated and an unrotated side (memory attention) do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x: Tensor, angles: Tensor, layout: str = "interleaved") -> Tensor:
    """x (B, T, H, head_dim), angles (T, head_dim/2) or (B, T, head_dim/2) in radians -> like x.

    Sine and cosine are taken in the dtype of the angles, the rotation in float32 or wider.
    """
    compute = torch.promote_types(torch.promote_types(x.dtype, angles.dtype), torch.float32)
    cos = angles.cos().unsqueeze(-2).to(compute)
    sin = angles.sin().unsqueeze(-2).to(compute)
    first, second = x[..., 0::2].to(compute), x[..., 1::2].to(compute)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    if layout == "interleaved":
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
    return torch.cat(rotated, dim=-1).to(x.dtype)
