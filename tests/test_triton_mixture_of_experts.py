"""Mixture of experts in Triton against its definition: every distribution of tokens, activation, bias and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import SharedExperts, mixture_of_experts
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate
from rxt_kernels.triton_runtime import count_launches

pytestmark = needs_triton


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def make(
    tokens: int, experts: int, dim: int, width: int, *, gated: bool = True, bias: bool = True
) -> dict[str, Tensor]:
    inner = 2 * width if gated else width
    tensors = {
        "x": draw(tokens, dim), "router_weight": draw(experts, dim), "w1": draw(experts, dim, inner) * dim**-0.5,
        "w2": draw(experts, width, dim) * width**-0.5,
    }  # fmt: skip
    if bias:
        tensors |= {"b1": draw(experts, inner), "b2": draw(experts, dim)}
    return tensors


def compare(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Output, loss and all gradients. The same experts must be chosen, so the router works in float64 everywhere."""
    gradient = draw(*tensors["x"].shape).to(dtype)

    def run(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, loss = mixture_of_experts(**leaves, router_dtype=torch.float64, backend=backend, **options)  # type: ignore[arg-type]
        wanted = (out, loss), list(leaves.values()), (gradient.to(out.dtype), torch.ones_like(loss))
        return (out.detach(), *torch.autograd.grad(*wanted))

    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = run({name: tensor.double() for name, tensor in rounded.items()}, "reference")
    eager, fast = run(rounded, "reference"), run(rounded, "triton")
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (5, 4, 4), (40, 3, 1), (33, 42, 4)])
def test_forward_and_backward(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    compare(make(tokens, experts, 24, 20), dtype, top_k=top_k)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "sigmoid", "linear"])
def test_activations(activation: str, gated: bool) -> None:
    compare(make(9, 3, 16, 8, gated=gated), top_k=2, activation=activation, gated=gated)


def test_no_bias_and_widths_over_a_block() -> None:
    compare(make(7, 2, 70, 66, bias=False), top_k=1)


@pytest.mark.parametrize("tokens", [3, 70])
def test_all_tokens_to_one_expert_and_the_others_empty(tokens: int) -> None:
    tensors = make(tokens, 5, 16, 8)
    tensors["router_weight"].zero_()
    tensors["router_weight"][3, 0] = 50.0
    tensors["x"][:, 0] = 1.0
    compare(tensors, top_k=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out, _ = mixture_of_experts(**leaves, top_k=1, backend="triton")  # type: ignore[arg-type]
    first, second = torch.autograd.grad(out.sum(), (leaves["w1"], leaves["b2"]))
    assert bool((first[[0, 1, 2, 4]] == 0).all())
    assert bool((second[[0, 1, 2, 4]] == 0).all())


@pytest.mark.parametrize("weighted", [True, False])
def test_shared_experts_a_global_bias_and_the_order_of_experts(weighted: bool) -> None:
    tensors = make(6, 4, 16, 8)
    shared = SharedExperts(draw(2, 16, 12), draw(2, 6, 16), gate_weight=draw(2, 16), weighted=weighted)
    options: dict[str, Any] = {"shared": shared, "global_bias": draw(16), "accumulation": "expert_index", "top_k": 3}
    fast = mixture_of_experts(**tensors, backend="triton", **options)  # type: ignore[arg-type]
    slow = mixture_of_experts(**tensors, backend="reference", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(tuple(fast), tuple(slow), rtol=1e-5, atol=1e-5)


def test_views_and_leading_dimensions() -> None:
    tensors = make(12, 3, 16, 8)
    tensors["x"] = draw(3, 4, 32)[..., ::2]
    tensors["w1"] = draw(3, 16, 16).transpose(1, 2)
    compare(tensors, top_k=2)


def test_no_token_at_all() -> None:
    tensors = make(2, 3, 16, 8)
    tensors["x"] = tensors["x"][:0]
    out, _ = mixture_of_experts(**tensors, top_k=2, backend="triton")  # type: ignore[arg-type]
    assert out.shape == (0, 16)


def test_launches_do_not_depend_on_the_number_of_experts() -> None:
    counts = []
    for experts in (2, 42):
        with count_launches() as launches:
            mixture_of_experts(**make(5, experts, 16, 8), top_k=2, backend="triton")  # type: ignore[arg-type]
        counts.append(launches.total())
    assert counts == [3, 3]


def test_the_operator_is_well_made() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in make(4, 3, 8, 4).items()}
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], device=DEVICE)
    weights = torch.rand(4, 2, device=DEVICE, requires_grad=True)
    arguments = (
        tensors["x"], weights, chosen, tensors["w1"], tensors["w2"], tensors["b1"], tensors["b2"], 1, True, True
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rxt_kernels.routed_experts_triton, arguments)


def test_separate_tensors_and_dropout_are_refused_by_name() -> None:
    tensors = make(2, 3, 16, 8)
    with pytest.raises(ValueError, match="dropout is 0"):
        mixture_of_experts(**tensors, top_k=1, dropout=0.5, backend="triton")  # type: ignore[arg-type]
    lists = {name: [m.t().contiguous() for m in tensors[name]] for name in ("w1", "w2")}
    with pytest.raises(ValueError, match="one tensor per expert"):
        mixture_of_experts(tensors["x"], tensors["router_weight"], **lists, top_k=1, backend="triton")  # type: ignore[arg-type]
