"""Mixture of experts by the native kernels against its definition, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels import SharedExperts, mixture_of_experts, native_runtime, routed_experts
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

pytestmark = pytest.mark.usefixtures("every_instruction_set")

DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("w1", "w2", "b1", "b2")


def make(
    tokens: int, experts: int, dim: int, width: int, *, gated: bool = True, bias: bool = True
) -> dict[str, Tensor]:
    inner = 2 * width if gated else width
    tensors = {
        "x": torch.randn(tokens, dim), "router_weight": torch.randn(experts, dim),
        "w1": torch.randn(experts, dim, inner) * dim**-0.5, "w2": torch.randn(experts, width, dim) * width**-0.5,
    }  # fmt: skip
    if bias:
        tensors |= {"b1": torch.randn(experts, inner), "b2": torch.randn(experts, dim)}
    return tensors


def as_lists(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The same experts as one tensor each, in the layout of torch.nn.Linear."""
    return {
        name: [one.t().contiguous() if one.dim() == 2 else one.clone() for one in tensor] if name in NAMES else tensor
        for name, tensor in tensors.items()
    }


def compare(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, lists: bool = False, **options: Any
) -> None:
    """Output, loss and all gradients. The same experts must be chosen, so the router works in float32 everywhere."""
    gradient = torch.randn(*tensors["x"].shape).to(dtype)

    def run(tensors: dict[str, Tensor], backend: str, lists: bool, router: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        arguments: dict[str, Any] = as_lists(leaves) if lists else leaves
        out, loss = mixture_of_experts(**arguments, router_dtype=router, backend=backend, **options)
        wanted = (out, loss), list(leaves.values()), (gradient.to(out.dtype), torch.ones_like(loss))
        return (out.detach(), *torch.autograd.grad(*wanted))

    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = run({name: tensor.double() for name, tensor in rounded.items()}, "reference", False, torch.float64)
    eager = run(rounded, "reference", lists, torch.float32)
    fast = run(rounded, "native", lists, torch.float32)
    for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
        assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "dim", "width"),
    [(1, 4, 2, 24, 20), (3, 4, 4, 8, 5), (20, 3, 1, 17, 33), (33, 9, 2, 24, 20), (70, 2, 1, 40, 64), (2, 1, 1, 1, 1)],
)
def test_forward_and_backward(
    tokens: int, experts: int, top_k: int, dim: int, width: int, lists: bool, dtype: torch.dtype
) -> None:
    compare(make(tokens, experts, dim, width), dtype, lists, top_k=top_k)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "width"), [(9, 300, 280), (130, 128, 72), (310, 270, 34)])
def test_more_than_one_block_of_everything(tokens: int, dim: int, width: int, lists: bool) -> None:
    compare(make(tokens, 2, dim, width), torch.float32, lists, top_k=1)


@pytest.mark.parametrize("accumulation", ["descending_probability", "expert_index"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 42, 4), (2, 384, 10), (40, 384, 10)])
def test_many_experts(tokens: int, experts: int, top_k: int, accumulation: str) -> None:
    tensors = make(tokens, experts, 16, 8)
    for arguments in (tensors, as_lists(tensors)):
        with torch.no_grad():
            options: dict[str, Any] = {**arguments, "top_k": top_k, "accumulation": accumulation}
            fast, slow = (mixture_of_experts(**options, backend=backend) for backend in ("native", "reference"))
        torch.testing.assert_close(tuple(fast), tuple(slow), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lists", [False, True])
def test_several_rounds_of_experts_with_many_tokens_and_with_few(lists: bool) -> None:
    tensors = make(2600, 5, 24, 100)
    tensors["x"][:, 0] = 1.0
    tensors["router_weight"][:2, 0] -= 16.0  # hardly ever, and never, chosen
    tensors["router_weight"][1, 0] -= 1000.0
    chosen = (tensors["x"] @ tensors["router_weight"].t()).topk(2).indices
    counts = chosen.flatten().bincount(minlength=5).tolist()
    # A round has room for 2^21 floats, five hundred of which a place of these experts takes; a block for 960 tokens, and those of
    # fewer than 24 are multiplied otherwise.
    assert 0 < counts[0] < 24
    assert counts[1] == 0
    assert max(counts) > 960
    assert sum(counts) > 2**21 // 500
    compare(tensors, torch.float32, lists, top_k=2)


@pytest.mark.parametrize("tokens", [9, 120])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "swish", "relu", "gelu", "sigmoid", "linear"])
def test_activations(activation: str, gated: bool, tokens: int) -> None:
    compare(make(tokens, 3, 16, 9, gated=gated), top_k=2, activation=activation, gated=gated)


@pytest.mark.parametrize("lists", [False, True])
def test_without_bias(lists: bool) -> None:
    compare(make(7, 2, 70, 66, bias=False), lists=lists, top_k=1)


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_all_tokens_to_one_expert_and_the_others_empty(tokens: int) -> None:
    tensors = make(tokens, 5, 16, 8)
    tensors["router_weight"].zero_()
    tensors["router_weight"][3, 0] = 50.0
    tensors["x"][:, 0] = 1.0
    compare(tensors, top_k=1)
    leaves: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out, _ = mixture_of_experts(**leaves, top_k=1, backend="native")
    first, second = torch.autograd.grad(out.sum(), (leaves["w1"], leaves["b2"]))
    assert bool((first[[0, 1, 2, 4]] == 0).all())
    assert bool((second[[0, 1, 2, 4]] == 0).all())


@pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_and_its_gradients(dtype: torch.dtype, router_dtype: torch.dtype | None) -> None:
    """Logits that are exact in every dtype, no two of a token equal: whole numbers, each expert looking at one of them."""
    tokens, experts, dim, top_k = 13, 10, 12, 3
    tensors: dict[str, Any] = make(tokens, experts, dim, 4)
    tensors["x"] = torch.stack([torch.randperm(dim) for _ in range(tokens)]) / 4.0
    tensors["router_weight"] = torch.eye(experts, dim)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def run(backend: str, wide: bool) -> tuple[Tensor, ...]:
        leaves: dict[str, Any] = {
            name: (tensor.double() if wide else tensor.clone()).requires_grad_() for name, tensor in tensors.items()
        }
        kind = torch.float64 if wide else router_dtype
        out, loss = mixture_of_experts(**leaves, top_k=top_k, router_dtype=kind, backend=backend)
        found = torch.autograd.grad((out.sum(), loss), (leaves["x"], leaves["router_weight"]))
        return (out.detach(), loss.detach(), *found)

    for index, (own, plain, true) in enumerate(
        zip(run("native", False), run("reference", False), run("reference", True), strict=True)
    ):
        assert_accurate(own, plain, true, factor=2.0 if index < 2 else GRADIENT_FACTOR)


def test_of_equal_experts_the_first_is_chosen_and_nan_is_kept_inside() -> None:
    from rxt_kernels.mixture_of_experts import native

    x, router = torch.ones(2, 4), torch.zeros(9, 4)
    weights, chosen, loss, _ = native._route(x, router, 3, False, False)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(loss, torch.tensor(1.0))
    x[1, 2] = float("nan")
    out = mixture_of_experts(**{**make(2, 9, 4, 4), "x": x}, top_k=3, backend="native").output  # type: ignore[arg-type]
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("weighted", [True, False])
def test_shared_experts_a_global_bias_and_the_order_of_experts(weighted: bool, number: int, dtype: torch.dtype) -> None:
    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        made = make(6, 4, 16, 8)
        more = {
            "w1": torch.randn(number, 16, 12) / 4, "w2": torch.randn(number, 6, 16) / 3, "b1": torch.randn(number, 12),
            "b2": torch.randn(number, 16), "global_bias": torch.randn(16),
        }  # fmt: skip
        if number > 1:
            more["gate_weight"] = torch.randn(number, 16)
        bias = torch.randn(16)
        before = torch.bfloat16 if DTYPES[1] is inputs else torch.float32
        leaves: dict[str, Any] = {n: t.to(before).to(dtype).requires_grad_() for n, t in made.items()}
        shared_leaves: dict[str, Any] = {n: t.to(before).to(dtype).requires_grad_() for n, t in more.items()}
        out, loss = mixture_of_experts(
            **leaves, top_k=3, global_bias=bias.to(before).to(dtype), accumulation="expert_index", backend=backend,
            shared=SharedExperts(**shared_leaves, weighted=weighted),
            router_dtype=torch.float64 if dtype is torch.float64 else torch.float32,
        )  # fmt: skip
        every = [*leaves.values(), *shared_leaves.values()]
        return (out.detach(), loss.detach(), *torch.autograd.grad((out.sum(), loss), every))

    inputs = dtype
    found = zip(run("native", dtype), run("reference", dtype), run("reference", torch.float64), strict=True)
    for index, (own, plain, true) in enumerate(found):
        assert_accurate(own, plain, true, factor=2.0 if index < 2 else GRADIENT_FACTOR)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(view: str, dtype: torch.dtype) -> None:
    tensors: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in make(5, 3, 16, 9).items()}
    expected = mixture_of_experts(**tensors, top_k=2, backend="native").output
    for name in tensors:
        seen = {**tensors, name: VIEWS[view](tensors[name])}
        actual = mixture_of_experts(**seen, top_k=2, backend="native").output
        torch.testing.assert_close(actual, expected)
        listed: dict[str, Any] = as_lists(tensors)
        if name in NAMES:
            listed[name] = [VIEWS[view](one) for one in listed[name]]
            torch.testing.assert_close(mixture_of_experts(**listed, top_k=2, backend="native").output, expected)


def test_leading_dimensions_and_no_token_at_all() -> None:
    tensors = make(12, 3, 16, 8)
    flat = mixture_of_experts(**tensors, top_k=2, backend="native").output  # type: ignore[arg-type]
    tensors["x"] = tensors["x"].view(3, 4, 16)
    assert torch.equal(mixture_of_experts(**tensors, top_k=2, backend="native").output.flatten(0, 1), flat)  # type: ignore[arg-type]
    tensors["x"] = tensors["x"][:0]
    leaves: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out, loss = mixture_of_experts(**leaves, top_k=2, backend="native")
    assert out.shape == (0, 4, 16)
    assert loss == 0
    assert all(bool((one == 0).all()) for one in torch.autograd.grad((out.sum(), loss), list(leaves.values())))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("lists", [False, True])
def test_the_same_for_every_number_of_threads(lists: bool, tokens: int) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in make(tokens, 5, 64, 48).items()}
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        arguments: dict[str, Any] = as_lists(tensors) if lists else tensors
        out, loss = mixture_of_experts(**arguments, top_k=2, backend="native")
        found.append((out, loss, *torch.autograd.grad((out.sum(), loss), list(tensors.values()))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_plain_call_gives_what_the_operation_gives() -> None:
    tensors = make(7, 4, 24, 16)
    for arguments in (tensors, as_lists(tensors)):
        options: dict[str, Any] = {**arguments, "top_k": 2, "backend": "native"}
        plain = mixture_of_experts(**options)
        recorded = mixture_of_experts(**{**options, "x": tensors["x"].clone().requires_grad_()})
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_traces_and_checks_as_an_operation() -> None:
    from rxt_kernels.mixture_of_experts import native

    tensors: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in make(3, 3, 8, 4).items()}
    torch.library.opcheck(native._route, (tensors["x"], tensors["router_weight"], 2, False, False))
    _, chosen, _, _ = native._route(tensors["x"], tensors["router_weight"], 2, False, False)
    weights = torch.rand(3, 2, requires_grad=True)
    lists = [[tensors[name]] for name in NAMES]
    torch.library.opcheck(
        native._routed_experts, (tensors["x"], weights, chosen, *lists, True, "silu", True, False, True)
    )

    def layer(x: Tensor) -> Tensor:
        return mixture_of_experts(**{**tensors, "x": x}, top_k=2, backend="native").output

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    assert torch.equal(compiled(x), layer(x))


def test_what_the_kernels_do_not_do_is_refused_by_name() -> None:
    tensors: dict[str, Any] = make(2, 3, 16, 8)
    with pytest.raises(ValueError, match="dropout is 0"):
        mixture_of_experts(**tensors, top_k=1, dropout=0.5, backend="native")
    with pytest.raises(ValueError, match=r"router_dtype is torch\.float64"):
        mixture_of_experts(**tensors, top_k=1, router_dtype=torch.float64, backend="native")
    doubles: dict[str, Any] = {name: tensor.double() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"a tensor is torch\.float64"):
        mixture_of_experts(**doubles, top_k=1, backend="native")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        mixture_of_experts(**tensors, top_k=1, backend="native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_behind_another_router(tokens: int, lists: bool, dtype: torch.dtype) -> None:
    """Either half may be the gate."""
    made = {name: tensor.to(dtype) for name, tensor in make(tokens, 5, 24, 20).items()}
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    shares, gradient = torch.rand(tokens, 2), torch.randn(tokens, 24).to(dtype)

    def run(backend: str, gate_first: bool, kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: made[name].to(kind).requires_grad_() for name in ("x", *NAMES)}
        weights = shares.to(torch.promote_types(kind, torch.float32)).requires_grad_()
        turned = {name: leaves[name].roll(20, -1) for name in ("w1", "b1")} if gate_first else {}
        experts: dict[str, Any] = {name: turned.get(name, leaves[name]) for name in NAMES}
        if lists:
            experts = as_lists(experts)
        out = routed_experts(leaves["x"], weights, chosen, **experts, gate_first=gate_first, backend=backend)
        assert out.dtype is kind
        return (out.detach(), *torch.autograd.grad(out, [weights, *leaves.values()], gradient.to(kind)))

    exact = run("reference", False, torch.float64)
    for gate_first in (False, True):
        eager, fast = (run(backend, gate_first, dtype) for backend in ("reference", "native"))
        for index, (own, plain, true) in enumerate(zip(fast, eager, exact, strict=True)):
            assert_accurate(own, plain, true, factor=2.0 if index == 0 else GRADIENT_FACTOR)


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = native_runtime.extension
    x, w1, w2 = torch.ones(2, 4), torch.ones(3, 4, 6), torch.ones(3, 3, 4)
    good: dict[str, Any] = {
        "x": x, "weights": torch.ones(2, 1), "chosen": torch.tensor([[0], [2]]), "w1": w1, "w2": w2, "b1": None, "b2": None,
        "experts": 3, "hidden": 3, "activation": "silu", "gated": True, "gate_first": False, "output": torch.empty(2, 4),
        "before": None,
    }  # fmt: skip
    extension.experts_forward(**good)
    lists = {"w1": [one.t() for one in w1], "w2": [one.t() for one in w2]}
    for change, error, message in [
        ({"chosen": torch.tensor([[0], [3]])}, ValueError, "chosen holds 3; accepted is from 0 to 2"),
        ({"chosen": torch.tensor([[-1], [0]])}, ValueError, "chosen holds -1"),
        ({"chosen": torch.tensor([[0], [1]]).int()}, TypeError, "chosen"),
        ({"w1": w1.bfloat16()}, TypeError, "w1 is bfloat16; accepted is float32"),
        ({"w1": torch.ones(3, 4, 12)[..., ::2]}, ValueError, "w1 has no dimension of stride 1"),
        ({"w2": torch.ones(3, 4, 4)}, ValueError, "w2 has shape"),
        ({"w1": lists["w1"], "w2": [None, *lists["w2"][1:]]}, ValueError, "expert 0 has tokens"),
        ({"w1": lists["w1"][:2], "w2": lists["w2"]}, ValueError, "w1 has 2 tensors; accepted is one per expert, 3"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
        ({"output": torch.empty(2, 8)[:, ::2]}, ValueError, "output of shape .* is not contiguous"),
    ]:
        with pytest.raises(error, match=message):
            extension.experts_forward(**{**good, **change})
    extension.experts_forward(**{**good, "w1": [lists["w1"][0], None, lists["w1"][2]], "w2": lists["w2"]})
