"""Public rotary position embedding: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import floating, refuse_device, refuse_shape, refuse_value
from rxt_kernels.dispatch import Operation
from rxt_kernels.rotary.reference import rotary_reference

LAYOUTS = ("interleaved", "split")

_ROTARY = Operation("rotary", rotary_reference)

if triton_runtime.available():
    from rxt_kernels.rotary import triton

    _ROTARY.register("triton", triton.rotary_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.rotary import native

    _ROTARY.register("native", native.rotary_native, native.supports, devices=("cpu",))


def check_layout(name: str, layout: str) -> None:
    """Require a known output layout."""
    if layout not in LAYOUTS:
        refuse_value(name, layout, "'interleaved' or 'split'")


def check_angles(name: str, angles: Tensor, x_name: str, x: Tensor) -> None:
    """Require angles that fit x of shape (batch, time, heads, head_dim)."""
    floating(name, angles)
    batch, time, _, head_dim = x.shape
    if head_dim % 2:
        refuse_shape(x_name, x, "(batch, time, heads, head_dim) with an even head_dim, since pairs are rotated")
    dims = angles.dim()
    if (
        dims not in (2, 3)
        or angles.shape[-1] != head_dim // 2
        or angles.shape[-2] != time
        or (dims == 3 and angles.shape[0] != batch)
    ):
        refuse_shape(name, angles, f"({time}, {head_dim // 2}) or ({batch}, {time}, {head_dim // 2}), as {x_name} asks")
    if angles.device != x.device:
        refuse_device(name, angles, x_name, x)


def rotary(x: Tensor, angles: Tensor, *, layout: str = "interleaved", backend: str = "auto") -> Tensor:
    """Rotate query or key heads by the angles of their positions (specification 2.2).

    Args:
        x: (batch, time, heads, head_dim) with an even head_dim.
        angles: (time, head_dim/2) or (batch, time, head_dim/2) radians, any floating dtype. Sine and cosine are taken
            in that dtype; for the upstream "match" mode, give the angles in the dtype of x.
        layout: "interleaved" or "split", where the rotated pairs are written.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        Tensor like x, with its dtype.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, device, layout or backend is not accepted.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
        >>> angles = torch.tensor([[torch.pi / 2, torch.pi]])
        >>> rotary(x, angles).round().flatten().tolist()
        [-0.0, 1.0, 0.0, -1.0]
    """
    floating("x", x)
    if x.dim() != 4:
        refuse_shape("x", x, "(batch, time, heads, head_dim)")
    check_angles("angles", angles, "x", x)
    check_layout("layout", layout)
    return _ROTARY.select(backend, x, angles, layout)(x, angles, layout)
