"""Tolerances and hostile inputs, shared by tests and benchmarks.

The tolerance is measured, not chosen: the error of a result against the exact (float64) one is at most twice the error
that plain eager torch makes at the same dtype, plus a small floor; three times for gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rxt_kernels.memory_update.parameters import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
)

__all__ = [
    "VIEWS",
    "assert_accurate",
    "error",
    "make_attention",
    "make_gate",
    "make_memory_update_layers",
    "make_norm",
    "offset_view",
    "strided_view",
    "transposed_view",
]

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, relative to the largest exact value; NaN and infinity are an infinite error.

    Example:
        >>> error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.25
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"actual has shape {tuple(actual.shape)}, exact has {tuple(exact.shape)}.")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - exact.double()).abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / max(exact.double().abs().max().item(), 1e-30)


def floor(dtype: torch.dtype) -> float:
    """Error that is always granted: one rounding step of a half precision result, four of a wider one."""
    steps = 1.0 if dtype in (torch.float16, torch.bfloat16) else 4.0
    return steps * torch.finfo(dtype).eps


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, *, factor: float = OUTPUT_FACTOR) -> None:
    """Require that `actual` is at most `factor` times as wrong as `eager`, plus the floor of its dtype.

    Args:
        actual: the result under test.
        eager: the same in plain eager torch, at the same dtype.
        exact: the same in float64.
        factor: 2 for outputs, 3 for gradients.

    Raises:
        AssertionError: with both errors.

    Example:
        >>> assert_accurate(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"actual is {actual.dtype}, eager is {eager.dtype}: compare results of one dtype.")
    own, granted = error(actual, exact), factor * error(eager, exact) + floor(actual.dtype)
    if not own <= granted:
        raise AssertionError(f"The relative error is {own:.3g}, granted is {granted:.3g} at {actual.dtype}.")


def strided_view(x: Tensor) -> Tensor:
    """The values of x in every second element of a buffer of NaN."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[..., ::2]
    view.copy_(x)
    return view


def transposed_view(x: Tensor) -> Tensor:
    """The values of x, stored with the last two dimensions exchanged."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else strided_view(x)


def offset_view(x: Tensor) -> Tensor:
    """The values of x, contiguous, but starting at an odd offset of a buffer of NaN."""
    buffer = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided_view,
    "transposed": transposed_view,
    "offset": offset_view,
}
"""Makers of views with the values of a tensor and a layout that a kernel may trip over."""


def make_norm(
    kind: str,
    slots: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    per_dim_scale: bool = False,
    generator: torch.Generator | None = None,
) -> MemoryNormParameters:
    """A memory norm of any kind with random parameters."""

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.3 * torch.randn(shape, dtype=dtype, generator=generator)

    if kind == "classic-rms":
        return MemoryNormParameters(kind, weight=draw(dim, mean=1.0))
    if kind == "layer":
        return MemoryNormParameters(
            kind, weight=draw(dim, mean=1.0), bias=draw(dim), scale=draw(dim, mean=1.0), gate=draw(1)
        )
    if kind == "positional":
        scale = draw(dim, mean=1.0) if per_dim_scale else draw(slots, 1, mean=1.0)
        return MemoryNormParameters(kind, scale=scale, gate=draw(slots, 1), ema_rms=1.0 + draw(slots, 1).abs())
    ema_rms = 1.0 + draw(1).abs() if kind == "adaptive" else None
    return MemoryNormParameters(kind, scale=draw(dim, mean=1.0), gate=draw(1), ema_rms=ema_rms)


def make_gate(
    kind: str,
    slots: int,
    dim: int,
    *,
    per_slot: bool = True,
    status: str = "mean",
    activation: str = "sigmoid",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> ResidualGateParameters:
    """A residual gate of any kind with random parameters.

    Linear maps are scaled by the square root of their inputs, so that a gate is neither open nor shut: one that is either
    multiplies the rounding of what comes in by its steep weights, and what is then compared is chance.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return draw(outputs, inputs) * inputs**-0.5, draw(outputs)

    if kind in ("add", "replace"):
        return ResidualGateParameters(kind)
    status_weight, status_bias = linear(1, dim) if status == "linear" else (None, None)
    if kind == "linear":
        weight, bias = linear(slots if per_slot else 1, slots)
    else:
        weight, bias = (draw(slots, 1) if per_slot else draw(1)), None
    return ResidualGateParameters(kind, weight, bias, status_weight, status_bias, per_slot, activation)


def make_attention(
    dim: int,
    query_heads: int,
    key_value_heads: int,
    head_dim: int,
    *,
    bias: bool = True,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> AttentionWeights:
    """Attention projections with random weights."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator) * dim**-0.5

    width = max(query_heads, key_value_heads) * head_dim
    return AttentionWeights(
        draw(query_heads * head_dim, dim),
        draw(key_value_heads * head_dim, dim),
        draw(key_value_heads * head_dim, dim),
        draw(dim, width),
        draw(dim) if bias else None,
        draw(width, dim) if gated else None,
        query_heads,
        key_value_heads,
        head_dim,
    )


def make_memory_update_layers(
    variant: str,
    number_of_layers: int,
    slots: int,
    dim: int,
    *,
    query_heads: int = 2,
    key_value_heads: int = 2,
    head_dim: int = 4,
    norm: str = "classic-rms",
    gate: str = "elementwise",
    per_slot: bool = True,
    status: str = "mean",
    activation: str = "sigmoid",
    gated_attention: bool = False,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[list[MemoryUpdateLayer], MemoryNormParameters | None]:
    """Random parameters of a memory update: (layers, mean_norm), with exactly what the variant reads."""

    def make_one_norm() -> MemoryNormParameters:
        return make_norm(norm, slots, dim, dtype=dtype, generator=generator)

    def make_one_gate() -> ResidualGateParameters:
        return make_gate(
            gate,
            slots,
            dim,
            per_slot=per_slot,
            status=status,
            activation=activation,
            dtype=dtype,
            generator=generator,
        )

    def make_one_attention() -> AttentionWeights:
        return make_attention(
            dim, query_heads, key_value_heads, head_dim, gated=gated_attention, dtype=dtype, generator=generator
        )

    layers = []
    for _ in range(number_of_layers):
        layer = MemoryUpdateLayer(
            make_one_norm(),
            1.0 + 0.3 * torch.randn(dim, dtype=dtype, generator=generator),
            make_one_attention(),
            make_one_gate(),
        )
        if variant != "simple":
            layer = layer._replace(
                context_norm=make_one_norm(), context_attention=make_one_attention(), context_gate=make_one_gate()
            )
        if variant in ("gated-self-interlayer", "grouped-self-interlayer"):
            layer = layer._replace(interlayer_gate=make_one_gate())
        layers.append(layer)
    return layers, None if variant in ("simple", "self") else make_one_norm()
