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
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    wide = x.to(compute)
    if torch.compiler.is_compiling() or not wide.numel():
        # The formula as it stands above: compilers generate no code for complex numbers, and those of an empty tensor have
        # no gradient.
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    else:
        # The same formula as one product of complex numbers, (a + ib)(cos + i sin): two operations instead of nine.
        if wide.is_contiguous() and wide.storage_offset() % 2 == 0:
            pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        else:
            pairs = torch.complex(wide[..., 0::2], wide[..., 1::2])
        rotated = torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(-2))
    if layout == "split":
        rotated = rotated.transpose(-1, -2)
    return rotated.flatten(-2).to(x.dtype)
