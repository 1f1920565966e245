"""The router and the counting sort in Triton against their definitions: every number of experts, ties, broken rows."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import load_balance_loss, route
from rxt_kernels.configs import override_config
from rxt_kernels.mixture_of_experts import Routing
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate
from rxt_kernels.triton_runtime import count_launches

pytestmark = needs_triton

SIZES = [(experts, top_k) for experts in (4, 5, 42, 384) for top_k in sorted({1, 4, 10, experts}) if top_k <= experts]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Routed(NamedTuple):
    weights: Tensor
    chosen: Tensor
    loss: Tensor
    order: Tensor
    starts: Tensor
    logits: Tensor


def routed(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    dtype: torch.dtype | None = None,
    *,
    by_index: bool = False,
    keep: bool = True,
) -> Routed:
    dtype = x.dtype if dtype is None else dtype
    return Routed(*torch.ops.rxt_kernels.route_triton(x, router_weight, top_k, dtype, by_index, keep))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def distinct(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """A token and router weights whose logits are exact in every dtype, and no two of a token are equal."""
    order = torch.stack([torch.randperm(experts) for _ in range(16)], dim=1)
    router_weight = (order - experts // 2) / 32
    return torch.eye(16, device=DEVICE)[torch.arange(tokens) % 16], router_weight.to(DEVICE)


def some_tokens(top_k: int) -> int:
    """More than a block of tokens, except where the interpreter would take long."""
    return 35 if top_k <= 42 else 3


def given_choice(x: Tensor, router_weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and loss by the definition, for experts that were chosen already; and the probabilities of all."""
    logits = torch.nn.functional.linear(x, router_weight)
    every = torch.softmax(logits, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    probabilities = every.gather(1, chosen.long())
    weights = probabilities / (probabilities.sum(dim=-1, keepdim=True) + 1e-9)
    return weights, load_balance_loss(Routing(weights, chosen, probabilities), router_weight.shape[0]), every


def assert_sorted(result: Routed, experts: int) -> None:
    """Order and starts are those of a stable sort."""
    flat = result.chosen.flatten().long()
    assert torch.equal(result.order.long(), flat.argsort(stable=True))
    ends = torch.searchsorted(flat.sort().values, torch.arange(experts + 1, device=DEVICE))
    assert torch.equal(result.starts.long(), ends)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_the_most_probable_experts_are_chosen(experts: int, top_k: int, dtype: torch.dtype) -> None:
    x, router_weight = (side.to(dtype) for side in distinct(some_tokens(top_k), experts))
    result = routed(x, router_weight, top_k)
    expected = route(x, router_weight, top_k)
    assert torch.equal(result.chosen.long(), expected.experts)
    torch.testing.assert_close(result.weights, expected.weights)
    torch.testing.assert_close(result.loss, load_balance_loss(expected, experts))
    assert_sorted(result, experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_weights_loss_and_gradients(experts: int, top_k: int, dtype: torch.dtype) -> None:
    """Of whichever of nearly equal experts were chosen: that these are among the largest is checked first."""
    tokens = some_tokens(top_k)
    x, router_weight = draw(tokens, 24).to(dtype), (draw(experts, 24) / 3).to(dtype)
    gradients = draw(tokens, top_k), draw()
    leaves = [x.clone().requires_grad_(), router_weight.clone().requires_grad_()]
    result = routed(leaves[0], leaves[1], top_k)
    own = (result.weights, result.loss, *torch.autograd.grad((result.weights, result.loss), leaves, gradients))

    every = given_choice(x, router_weight, result.chosen)[2]
    assert bool((result.chosen.sort(dim=-1).values.diff(dim=-1) > 0).all())
    step = max(torch.finfo(dtype).eps, 1e-6)
    taken, largest = every.gather(1, result.chosen.long()), every.topk(top_k, dim=-1).values
    # A logit of up to 8 that is rounded the other way changes its probability by the factor exp(8 * step).
    torch.testing.assert_close(taken, largest, rtol=8 * step, atol=0.0)

    def definition(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [side.to(dtype).requires_grad_() for side in (x, router_weight)]
        weights, loss, _ = given_choice(*leaves, result.chosen)
        incoming = [gradient.to(weights.dtype) for gradient in gradients]
        return (weights, loss, *torch.autograd.grad((weights, loss), leaves, incoming))

    for index, (fast, eager, exact) in enumerate(zip(own, definition(dtype), definition(torch.float64), strict=True)):
        assert_accurate(fast, eager, exact, factor=2.0 if index < 2 else GRADIENT_FACTOR)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_logits(dtype: torch.dtype, router_dtype: torch.dtype) -> None:
    x, router_weight = (side.to(dtype) for side in distinct(3, 10))
    leaves = [x.clone().requires_grad_(), router_weight.clone().requires_grad_()]
    own = routed(leaves[0], leaves[1], 3, router_dtype)
    expected = route(leaves[0], leaves[1], 3, router_dtype)
    assert own.logits.dtype is router_dtype
    assert own.loss.dtype is expected.probabilities.dtype
    torch.testing.assert_close(own.weights, expected.weights.float())
    torch.testing.assert_close(own.loss, load_balance_loss(expected, 10))
    gradient = draw(3, 3)
    fast = torch.autograd.grad(own.weights, leaves, gradient)
    slow = torch.autograd.grad(expected.weights, leaves, gradient.to(expected.weights.dtype))
    for one, two in zip(fast, slow, strict=True):
        # The logits' gradients are rounded to the narrower dtype, which forgives a step of it.
        step = max(torch.finfo(dtype).eps, torch.finfo(router_dtype).eps, 1e-6)
        torch.testing.assert_close(one, two, rtol=2 * step, atol=2 * step * float(two.abs().max()))


@pytest.mark.parametrize("tokens", [1, 3, 33, 100])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (42, 4), (384, 10), (1, 1)])
def test_the_sort_is_stable(tokens: int, experts: int, top_k: int) -> None:
    for by_index in (False, True):
        assert_sorted(routed(draw(tokens, 8), draw(experts, 8), top_k, by_index=by_index), experts)


def test_many_blocks_of_tokens() -> None:
    """More blocks and experts than a program of the scan takes at a time."""
    x, router_weight = draw(150, 4), draw(7, 4)
    with override_config("moe_scan", {"BLOCKS": 2, "EXPERTS": 4, "num_warps": 1, "num_stages": 1}):
        result = routed(x, router_weight, 2)
    assert_sorted(result, 7)
    torch.testing.assert_close(result.loss, load_balance_loss(route(x, router_weight, 2), 7))


def test_equal_probabilities_take_the_lowest_experts() -> None:
    result = routed(draw(40, 8), torch.zeros(6, 8, device=DEVICE), 4)
    assert torch.equal(result.chosen, torch.arange(4, dtype=torch.int32, device=DEVICE).expand(40, 4))
    assert_sorted(result, 6)


def test_all_tokens_to_one_expert() -> None:
    router_weight = torch.zeros(5, 8, device=DEVICE)
    router_weight[3, 0] = 50.0
    x = draw(70, 8)
    x[:, 0] = 1.0
    result = routed(x, router_weight, 1)
    assert result.starts.tolist() == [0, 0, 0, 0, 70, 70]
    assert torch.equal(result.order, torch.arange(70, dtype=torch.int32, device=DEVICE))


def test_columns_by_index_are_those_by_probability_exchanged() -> None:
    x, router_weight = draw(40, 8), draw(42, 8)
    falling, rising = routed(x, router_weight, 5), routed(x, router_weight, 5, by_index=True)
    chosen, columns = falling.chosen.sort(dim=-1)
    assert torch.equal(rising.chosen, chosen)
    assert torch.equal(rising.weights, falling.weights.gather(1, columns))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_token_spoils_its_own_weights_only(broken: float) -> None:
    x, router_weight = draw(4, 8), draw(5, 8)
    x[2] = broken
    result = routed(x, router_weight, 3)
    assert bool(((result.chosen >= 0) & (result.chosen < 5)).all())
    assert result.weights.isnan().any(dim=1).tolist() == [False, False, True, False]
    assert_sorted(result, 5)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    x, router_weight = draw(7, 12), draw(5, 12)
    own = routed(VIEWS[view](x), VIEWS[view](router_weight), 2)
    torch.testing.assert_close(tuple(own), tuple(routed(x, router_weight, 2)))


def test_no_token_has_no_loss() -> None:
    x, router_weight = draw(0, 8).requires_grad_(), draw(5, 8).requires_grad_()
    result = routed(x, router_weight, 2)
    assert float(result.loss.detach()) == 0.0
    assert result.starts.tolist() == [0] * 6
    gradients = torch.autograd.grad((result.weights.sum(), result.loss), (x, router_weight), (draw(), draw()))
    assert not gradients[1].any()


def test_the_same_again_is_the_same() -> None:
    x, router_weight = draw(70, 8), draw(42, 8)
    for one, two in zip(routed(x, router_weight, 4), routed(x, router_weight, 4), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (32, 1), (33, 3), (200, 3)])
def test_launches(tokens: int, expected: int) -> None:
    """A block of tokens is routed and sorted by one program; more blocks need a scan and a launch that scatters."""
    with count_launches() as launches:
        routed(draw(tokens, 8), draw(42, 8), 4)
    assert launches.total() == expected


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_is_well_made(tokens: int) -> None:
    x, router_weight = draw(tokens, 8).requires_grad_(), draw(5, 8).requires_grad_()
    torch.library.opcheck(torch.ops.rxt_kernels.route_triton, (x, router_weight, 2, torch.float32, False, True))
