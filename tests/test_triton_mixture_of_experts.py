"""Mixture of experts in Triton against its definition: every distribution of tokens, activation, bias and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from triton_cases import DEVICE, needs_triton

from rxt_kernels import SharedExperts, mixture_of_experts
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate
from rxt_kernels.triton_runtime import count_launches, record_launches

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
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (3, 4, 4), (20, 3, 1), (33, 9, 2), (35, 2, 1)])
def test_forward_and_backward(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    compare(make(tokens, experts, 24, 20), dtype, top_k=top_k)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 42, 4), (2, 384, 10)])
def test_many_experts(tokens: int, experts: int, top_k: int) -> None:
    tensors = make(tokens, experts, 16, 8)
    with torch.no_grad():
        fast = mixture_of_experts(**tensors, top_k=top_k, backend="triton")  # type: ignore[arg-type]
        slow = mixture_of_experts(**tensors, top_k=top_k, backend="reference")  # type: ignore[arg-type]
    torch.testing.assert_close(tuple(fast), tuple(slow), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "sigmoid", "linear"])
def test_activations(activation: str, gated: bool) -> None:
    compare(make(9, 3, 16, 8, gated=gated), top_k=2, activation=activation, gated=gated)


def test_no_bias_and_widths_over_a_block() -> None:
    compare(make(7, 2, 70, 66, bias=False), top_k=1)


@pytest.mark.parametrize("tokens", [1, 3, 70])
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


@pytest.mark.parametrize(("tokens", "experts", "expected"), [(1, 2, 4), (1, 42, 4), (33, 2, 6), (33, 9, 6)])
def test_launches_of_a_layer(tokens: int, experts: int, expected: int) -> None:
    """A decoded token costs four: router with sort, two matrix products, sum. More than a block of tokens costs a scan
    and a scatter more. The number of experts changes nothing."""
    with torch.no_grad(), count_launches() as launches:
        mixture_of_experts(**make(tokens, experts, 16, 8), top_k=2, backend="triton")  # type: ignore[arg-type]
    assert launches.total() == expected


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 42, 4), (5, 4, 2), (40, 4, 2), (200, 3, 2)])
def test_hardly_a_program_has_nothing_to_do(tokens: int, experts: int, top_k: int) -> None:
    """There are never more blocks than choices, nor than full blocks and one more per expert."""
    with record_launches() as launches:
        mixture_of_experts(**make(tokens, experts, 16, 8), top_k=top_k, backend="triton")  # type: ignore[arg-type]
    products = [one for one in launches if one.kernel.fn.__name__ in ("_moe_up_kernel", "_moe_down_kernel")]
    rows = tokens * top_k
    assert len(products) == 2
    for product in products:
        size = product.options["ROWS"]
        assert product.grid[0] <= min(rows, -(-rows // size) + experts)
        assert size == 16 or rows > 16 * experts


def test_experts_that_are_one_tensor_each() -> None:
    tensors = make(6, 4, 16, 8)
    names = ("w1", "w2", "b1", "b2")
    leaves = {name: [one.t().contiguous().requires_grad_() for one in tensors[name]] for name in names}
    stacked = {name: tensors[name].clone().requires_grad_() for name in names}
    rest: dict[str, Any] = {
        "x": tensors["x"],
        "router_weight": tensors["router_weight"],
        "top_k": 2,
        "backend": "triton",
    }
    own = mixture_of_experts(**leaves, **rest).output  # type: ignore[arg-type]
    expected = mixture_of_experts(**stacked, **rest).output  # type: ignore[arg-type]
    torch.testing.assert_close(own, expected)
    gradients = torch.autograd.grad(own.square().sum(), [one for name in names for one in leaves[name]])
    whole = torch.autograd.grad(expected.square().sum(), list(stacked.values()))
    for gradient, one in zip(gradients, (one for tensor in whole for one in tensor), strict=True):
        torch.testing.assert_close(gradient, one.t())


def test_the_same_again_is_the_same() -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in make(40, 5, 16, 8).items()}

    def run() -> tuple[Tensor, ...]:
        out, loss = mixture_of_experts(**leaves, top_k=2, backend="triton")  # type: ignore[arg-type]
        return (out, loss, *torch.autograd.grad((out.sum(), loss), list(leaves.values())))

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two)


def test_one_graph_for_every_number_of_tokens() -> None:
    """Traced with symbolic sizes and fake tensors: no shape follows from data, and nothing is read on the host."""
    tensors = make(1, 5, 16, 8)
    graphs = CompileCounterWithBackend("aot_eager")

    def layer(x: Tensor) -> Tensor:
        out, loss = mixture_of_experts(**{**tensors, "x": x}, top_k=2, backend="triton")  # type: ignore[arg-type]
        return out.sum() + loss

    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    frames = []
    for tokens in (3, 5):
        x = draw(tokens, 16)
        results = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            total = function(leaf)
            results.append((total, torch.autograd.grad(total, leaf)[0]))
        torch.testing.assert_close(results[0], results[1])
        frames.append(graphs.frame_count)
    assert frames[0] == frames[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [2, 40])
def test_the_operator_is_well_made(tokens: int) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in make(tokens, 3, 8, 4).items()}
    route = torch.ops.rxt_kernels.route_triton
    _, _, _, order, starts, _ = route(tensors["x"], tensors["router_weight"], 2, torch.float32, False, False)
    weights = torch.rand(tokens, 2, device=DEVICE, requires_grad=True)
    arguments = (
        tensors["x"], weights, order, starts, tensors["w1"], tensors["w2"], tensors["b1"], tensors["b2"], 1, True, True
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rxt_kernels.routed_experts_triton, arguments)


def test_what_the_kernels_do_not_do_is_refused_by_name() -> None:
    tensors: dict[str, Any] = make(2, 3, 16, 8)
    with pytest.raises(ValueError, match="dropout is 0"):
        mixture_of_experts(**tensors, top_k=1, dropout=0.5, backend="triton")
    many = make(2, 1025, 16, 2, bias=False)
    with pytest.raises(ValueError, match="there are 1025 experts"):
        mixture_of_experts(**many, top_k=1, backend="triton")  # type: ignore[arg-type]
