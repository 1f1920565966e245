"""Offsets beyond 2^31 elements: every tensor that a kernel reads, one at a time, with neighbours that far apart.

Executed in the interpreter, on memory that is promised and never filled. What kernels write is contiguous and cannot be that
large here; for that, ``rxt_kernels.aot`` reads the address arithmetic of the compiled code (``aot/addresses.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from far_memory import far_view
from torch import Tensor
from triton_cases import needs_triton

import rxt_kernels
from rxt_kernels import triton_runtime

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="address space is promised on the CPU only"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory without reserve is Linux's"),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def check(call: Callable[..., Any], tensors: dict[str, Tensor], name: str, dim: int) -> None:
    """The result with one far tensor is that with all of them near; a wrapped offset would read zeros."""
    near = call(**tensors)
    far = call(**{**tensors, name: far_view(tensors[name], dim)})
    for one, other in zip(near, far, strict=True) if isinstance(near, tuple) else [(near, far)]:
        torch.testing.assert_close(one, other)


ATTENTION = {"query": (2, 2, 2, 16), "key": (2, 2, 2, 16), "value": (2, 2, 2, 16)}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention(name: str, dim: int) -> None:
    tensors = {key: draw(*shape) for key, shape in ATTENTION.items()}

    def call(**tensors: Tensor) -> Tensor:
        return rxt_kernels.sparse_query_attention(**tensors, causal=True, backend="triton")

    check(call, tensors, name, dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", list(ATTENTION))
def test_gradients_of_attention(name: str, dim: int) -> None:
    tensors = {key: draw(*shape) for key, shape in ATTENTION.items()}

    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = {key: value.requires_grad_() for key, value in tensors.items()}
        out = rxt_kernels.sparse_query_attention(**leaves, causal=True, backend="triton")
        return torch.autograd.grad(out.square().sum(), list(leaves.values()))

    check(call, tensors, name, dim)


@pytest.mark.parametrize("name", list(ATTENTION))
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_decoding(name: str, dim: int) -> None:
    shapes = {**ATTENTION, "query": (2, 1, 2, 16)}
    tensors = {key: draw(*shape) for key, shape in shapes.items()}

    def call(**tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return rxt_kernels.sparse_query_attention(**tensors, key_lengths=torch.tensor([2, 1]), backend="triton")

    check(call, tensors, name, dim)


@pytest.mark.parametrize("name", ["query", "memory_key", "memory_value"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_memory_reads(name: str, dim: int) -> None:
    tensors = {key: draw(2, 2, 2, 16) for key in ("query", "memory_key", "memory_value")}

    def call(**tensors: Tensor) -> Tensor:
        return rxt_kernels.memory_cross_attention(**tensors, backend="triton")

    check(call, tensors, name, dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows(dim: int) -> None:
    weight = draw(24)
    tensors = {"x": draw(2, 2, 24)}
    check(lambda x: rxt_kernels.rms_norm(x, weight, backend="triton"), tensors, "x", dim)
    check(lambda x: rxt_kernels.add_rms_norm(x, tensors["x"], weight, backend="triton"), tensors, "x", dim)
    check(lambda x: rxt_kernels.add_rms_norm(tensors["x"], x, weight, backend="triton"), tensors, "x", dim)
    check(lambda x: rxt_kernels.swiglu(x, backend="triton"), tensors, "x", dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rotation(dim: int) -> None:
    angles = torch.rand(2, 8)
    check(lambda x: rxt_kernels.rotary(x, angles, backend="triton"), {"x": draw(2, 2, 2, 16)}, "x", dim)


EXPERTS = {"x": (2, 16), "w1": (2, 16, 24), "w2": (2, 12, 16), "b1": (2, 24), "b2": (2, 16)}


@pytest.mark.parametrize("name", list(EXPERTS))
def test_experts(name: str) -> None:
    router = draw(2, 16)
    tensors = {key: draw(*shape) for key, shape in EXPERTS.items()}

    def call(**tensors: Tensor) -> Tensor:
        out: Tensor = rxt_kernels.mixture_of_experts(router_weight=router, top_k=2, **tensors, backend="triton").output
        return out

    check(call, tensors, name, 0)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_linear_cross_entropy(name: str) -> None:
    tensors = {"hidden": draw(2, 16), "weight": draw(2, 16)}

    def call(**tensors: Tensor) -> Tensor:
        return rxt_kernels.linear_cross_entropy(**tensors, target=torch.tensor([0, 1]), backend="triton")

    check(call, tensors, name, 0)
