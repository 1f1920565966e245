"""Mixture of experts against a loop over tokens; layouts, biases, shared experts, hostile routings, gradients, refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxt_kernels import (
    MixtureOfExpertsOutput,
    Routing,
    SharedExperts,
    load_balance_loss,
    mixture_of_experts,
    route,
    routed_experts,
)
from rxt_kernels.mixture_of_experts import mixture_of_experts_reference
from rxt_kernels.testing import GRADIENT_FACTOR, VIEWS, assert_accurate

ACTIVATION_FORMULAS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "swish": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "linear": lambda v: v,
}


def expert_oracle(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: str, gated: bool
) -> Tensor:
    """One token (D,) through one expert, w1 (D, 2F or F), w2 (F, D)."""
    hidden = x @ w1
    if b1 is not None:
        hidden = hidden + b1
    act = ACTIVATION_FORMULAS[activation]
    values = hidden.tolist()
    if gated:
        half = len(values) // 2
        values = [values[j] * act(values[half + j]) for j in range(half)]
    else:
        values = [act(value) for value in values]
    out = torch.tensor(values, dtype=torch.float64) @ w2
    return out if b2 is None else out + b2


def oracle(x: Tensor, p: dict[str, Any]) -> tuple[Tensor, float]:
    """One token at a time, in float64, written from specification 2.8; `p` holds stacked tensors."""
    p = {name: value.double() if isinstance(value, Tensor) else value for name, value in p.items()}
    activation, gated, top_k = p.get("activation", "silu"), p.get("gated", True), p["top_k"]
    tokens = x.double().reshape(-1, x.shape[-1])
    number = p["router_weight"].shape[0]
    counts, sums = [0] * number, [0.0] * number
    out = torch.zeros_like(tokens)

    def pick(tensors: Tensor | None, e: int) -> Tensor | None:
        return None if tensors is None else tensors[e]

    for n, token in enumerate(tokens):
        logits = (p["router_weight"] @ token).tolist()
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        probabilities = [value / sum(exponentials) for value in exponentials]
        best = sorted(range(number), key=lambda e: -probabilities[e])[:top_k]
        total = sum(probabilities[e] for e in best)
        routed = torch.zeros_like(token)
        for e in best:
            counts[e] += 1
            sums[e] += probabilities[e]
            b1, b2 = pick(p.get("b1"), e), pick(p.get("b2"), e)
            expert = expert_oracle(token, p["w1"][e], p["w2"][e], b1, b2, activation, gated)
            routed += probabilities[e] / (total + 1e-9) * expert
        shared = p.get("shared")
        if shared is not None:
            count = len(shared.w1)
            together = torch.zeros_like(token)
            shares = [1.0]
            if count > 1:
                gate = (shared.gate_weight.double() @ token).tolist()
                shares = [math.exp(g) / sum(math.exp(other) for other in gate) for g in gate]
            for j, share in enumerate(shares):
                b1, b2 = pick(shared.b1, j), pick(shared.b2, j)
                together += share * expert_oracle(
                    token,
                    shared.w1[j].double(),
                    shared.w2[j].double(),
                    None if b1 is None else b1.double(),
                    None if b2 is None else b2.double(),
                    activation,
                    gated,
                )
            if shared.global_bias is not None:
                together += shared.global_bias.double()
            if shared.weighted:
                routed, together = routed * top_k / (top_k + count), together * count / (top_k + count)
            routed = routed + together
        if p.get("global_bias") is not None:
            routed = routed + p["global_bias"]
        out[n] = routed
    loss = 0.0
    for e in range(number):
        if counts[e]:
            loss += counts[e] / (len(tokens) * top_k + 1e-6) * (sums[e] / counts[e])
    loss *= number
    shared = p.get("shared")
    if shared is not None and len(shared.w1) > 1:
        shares_of_all = torch.softmax(tokens @ shared.gate_weight.double().t(), -1)
        loss += (shares_of_all - 1 / len(shared.w1)).abs().mean().item()
    return out.reshape(x.shape), loss


def parameters(
    experts: int = 5, dim: int = 6, width: int = 4, *, biases: bool = True, gated: bool = True, **others: Any
) -> dict[str, Any]:
    inner = 2 * width if gated else width
    own = {
        "router_weight": torch.randn(experts, dim),
        "w1": torch.randn(experts, dim, inner) / 2,
        "w2": torch.randn(experts, width, dim) / 2,
        "gated": gated,
        "top_k": 2,
    }
    if biases:
        own |= {"b1": torch.randn(experts, inner), "b2": torch.randn(experts, dim)}
    return own | others


def per_expert(p: dict[str, Any]) -> dict[str, Any]:
    """The same parameters as one tensor per expert in the layout of torch.nn.Linear."""
    p = dict(p)
    for name in ("w1", "w2"):
        p[name] = [matrix.t().contiguous() for matrix in p[name]]
    for name in ("b1", "b2"):
        if p.get(name) is not None:
            p[name] = list(p[name])
    return p


def shared_experts(count: int, dim: int = 6, width: int = 3, **others: Any) -> SharedExperts:
    gate = torch.randn(count, dim) if count > 1 else None
    w1, w2 = torch.randn(count, dim, 2 * width), torch.randn(count, width, dim)
    return SharedExperts(w1, w2, torch.randn(count, 2 * width), torch.randn(count, dim), gate, **others)


def run(x: Tensor, p: dict[str, Any]) -> MixtureOfExpertsOutput:
    return mixture_of_experts(x, **p)


def check(x: Tensor, p: dict[str, Any]) -> None:
    expected, loss = oracle(x, p)
    for layout in (p, per_expert(p)):
        actual = run(x, layout)
        assert actual.output.shape == x.shape
        torch.testing.assert_close(actual.output, expected.float(), atol=2e-5, rtol=2e-5)
        assert actual.load_balance_loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 1, 6), (3, 7, 6), (33, 6)])
@pytest.mark.parametrize("accumulation", ["descending_probability", "expert_index"])
def test_formula(shape: tuple[int, ...], accumulation: str) -> None:
    check(torch.randn(shape), parameters() | {"accumulation": accumulation})


@pytest.mark.parametrize("activation", ACTIVATION_FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation: str, gated: bool) -> None:
    check(torch.randn(9, 6), parameters(gated=gated, activation=activation))


@pytest.mark.parametrize("tokens", [1, 9])
def test_bias_modes(tokens: int) -> None:
    x = torch.randn(tokens, 6)
    check(x, parameters(biases=False))
    check(x, parameters(biases=False, global_bias=torch.randn(6)))
    check(x, parameters(global_bias=torch.randn(6)))


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_every_number_of_experts_per_token(top_k: int) -> None:
    """Also K = E, where routing only weighs."""
    check(torch.randn(8, 6), parameters(top_k=top_k))


def test_one_expert() -> None:
    check(torch.randn(4, 6), parameters(experts=1, top_k=1))


@pytest.mark.parametrize("tokens", [1, 10])
def test_an_empty_expert_and_all_tokens_to_one(tokens: int) -> None:
    p = parameters(top_k=1)
    x = torch.randn(tokens, 6).abs() + 0.1
    p["router_weight"] = torch.zeros(5, 6)
    p["router_weight"][3] = 5.0
    assert (route(x, p["router_weight"], 1).experts == 3).all()
    check(x, p)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_shared_experts(count: int, weighted: bool, tokens: int) -> None:
    bias = torch.randn(6) if weighted else None
    shared = shared_experts(count, weighted=weighted, global_bias=bias)
    check(torch.randn(tokens, 6), parameters(shared=shared, global_bias=torch.randn(6)))


def test_shared_experts_per_expert_have_no_balance_term() -> None:
    """The term of the gate is in the stacked layout only (specification 2.8)."""
    stacked = shared_experts(2)
    p = parameters()
    listed = stacked._replace(
        w1=[m.t() for m in stacked.w1], w2=[m.t() for m in stacked.w2], b1=list(stacked.b1), b2=list(stacked.b2)
    )
    x = torch.randn(7, 6)
    one, two = run(x, p | {"shared": stacked}), run(x, p | {"shared": listed})
    torch.testing.assert_close(one.output, two.output)
    assert two.load_balance_loss.item() == pytest.approx(run(x, p).load_balance_loss.item())
    assert one.load_balance_loss.item() > two.load_balance_loss.item()


def test_accumulation_order_is_what_was_asked_for() -> None:
    """Three experts that answer 2^25, 1 and -2^25: in float32 the order of the sum shows in the result."""
    outputs = torch.tensor([1.0, -(2.0**25), 2.0**25])
    w1, w2 = torch.zeros(3, 2, 1), torch.zeros(3, 1, 2)
    b2 = outputs[:, None].expand(3, 2).contiguous()
    router = torch.zeros(3, 2)
    # Equal weights of 1/3 keep the values apart by powers of two only roughly, so expect what the float sums give.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    router[:, 0] = torch.tensor([-1e-3, 0.0, 1e-3])
    weights = route(x, router, 3)
    assert weights.experts[0].tolist() == [2, 1, 0]
    p = {"router_weight": router, "w1": w1, "w2": w2, "b2": b2, "gated": False, "top_k": 3, "activation": "linear"}
    for tokens in (x, x[:1]):
        by_probability = run(tokens, p).output[0, 0]
        by_index = run(tokens, p | {"accumulation": "expert_index"}).output[0, 0]
        parts = weights.weights[0] * outputs[[2, 1, 0]]
        torch.testing.assert_close(by_probability, (parts[0] + parts[1]) + parts[2], atol=2.0, rtol=0)
        assert by_probability != by_index


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shared_experts", [0, 1, 2])
def test_dropout(tokens: int, shared_experts: int) -> None:
    """Every hidden unit of every choice is dropped alone, and the mean over many draws is the layer without dropout."""
    torch.manual_seed(3)
    dim, width = 4, 6
    x, router = torch.randn(tokens, dim), torch.randn(3, dim)
    w1, w2 = torch.randn(3, dim, 2 * width), torch.randn(3, width, dim)
    shared = None
    if shared_experts:
        shared = SharedExperts(
            torch.randn(shared_experts, dim, 2 * width),
            torch.randn(shared_experts, width, dim),
            gate_weight=torch.randn(2, dim) if shared_experts == 2 else None,
        )
    whole = mixture_of_experts(x, router, w1, w2, top_k=2, shared=shared).output
    draws = torch.stack(
        [mixture_of_experts(x, router, w1, w2, top_k=2, shared=shared, dropout=0.3).output for _ in range(3000)]
    )
    assert len(torch.unique(draws[:, 0], dim=0)) > 500  # units, not whole experts, are dropped
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - whole).abs() < 5 * error).all()


def test_no_token() -> None:
    out = run(torch.randn(0, 6), parameters())
    assert out.output.shape == (0, 6)


@given(tokens=st.integers(1, 12), top_k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_batch_is_its_tokens(tokens: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    p, x = parameters(top_k=top_k), torch.randn(tokens, 6)
    together = run(x, p).output
    for row in range(tokens):
        torch.testing.assert_close(together[row : row + 1], run(x[row : row + 1], p).output)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_views(view: str, tokens: int) -> None:
    x, p = torch.randn(2, tokens, 6), parameters()
    expected = run(x, p)
    viewed = {name: VIEWS[view](value) if isinstance(value, Tensor) else value for name, value in p.items()}
    torch.testing.assert_close(run(VIEWS[view](x), viewed).output, expected.output)
    torch.testing.assert_close(run(x.transpose(0, 1), p).output, expected.output.transpose(0, 1))


def test_route() -> None:
    x, router = torch.randn(2, 3, 6), torch.randn(5, 6)
    routing = route(x, router, 3)
    every = torch.softmax(x.reshape(6, 6) @ router.t(), -1)
    assert (routing.probabilities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(every.gather(1, routing.experts), routing.probabilities)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(6))
    torch.testing.assert_close(routing.weights, routing.probabilities / routing.probabilities.sum(1, keepdim=True))


def test_router_dtype() -> None:
    x, router = torch.randn(64, 6), torch.randn(40, 6)
    coarse = route(x, router, 4, torch.bfloat16)
    logits = (x.bfloat16() @ router.bfloat16().t()).float()
    assert torch.equal(coarse.probabilities, logits.softmax(-1).topk(4).values)
    assert coarse.weights.dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(x, router, 4, torch.float32).weights, route(x, router, 4, torch.float32).weights)
        exact = route(x, router, 4, torch.float32)
    torch.testing.assert_close(exact.probabilities, route(x, router, 4).probabilities)
    half = run(x.bfloat16(), {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in parameters().items()})
    assert half.output.dtype is torch.bfloat16
    assert half.load_balance_loss.dtype is torch.float32


def test_load_balance_loss() -> None:
    """1 for a uniform router whatever it picks; the function is the loss of the operation."""
    assert load_balance_loss(route(torch.zeros(6, 4), torch.zeros(8, 4), 2), 8).item() == pytest.approx(1.0)
    x, p = torch.randn(9, 6), parameters()
    loss = load_balance_loss(route(x, p["router_weight"], 2), 5)
    assert loss.item() == pytest.approx(run(x, p).load_balance_loss.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_half_precision(dtype: torch.dtype, tokens: int) -> None:
    """K = E, so that a routing that rounding turns over is no matter."""
    p = parameters(experts=3, dim=16, width=8, top_k=3)
    p = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in p.items()}
    x = torch.randn(tokens, 16).to(dtype)

    def naive(x: Tensor, *tensors: Tensor) -> Tensor:
        router, w1, w2, b1, b2 = tensors
        weights = (x @ router.t()).softmax(-1)
        out = torch.zeros_like(x)
        for e in range(3):
            linear, gate = (x @ w1[e] + b1[e]).chunk(2, -1)
            out = out + weights[:, e : e + 1] * ((linear * torch.nn.functional.silu(gate)) @ w2[e] + b2[e])
        return out

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        router, w1, w2, b1, b2 = tensors
        return mixture_of_experts(x, router, w1, w2, top_k=3, b1=b1, b2=b2).output

    def results(function: Any, to: torch.dtype) -> list[Tensor]:
        names = ("router_weight", "w1", "w2", "b1", "b2")
        leaves = [t.detach().to(to).requires_grad_() for t in (x, *(p[name] for name in names))]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    actual, eager, exact = results(ours, dtype), results(naive, dtype), results(naive, torch.float64)
    assert_accurate(actual[0], eager[0], exact[0])
    for one, two, three in zip(actual[1:], eager[1:], exact[1:], strict=True):
        assert_accurate(one, two, three, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("layout", ["stacked", "listed"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_gradients(layout: str, tokens: int) -> None:
    """Of everything, through the loss too; an expert without tokens has zero gradients, not None."""
    p = parameters(experts=4, dim=3, width=2)
    names = ("router_weight", "w1", "w2", "b1", "b2")
    leaves = [torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)]
    leaves += [p[name].double().requires_grad_() for name in names]

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        own: dict[str, Any] = dict(zip(names, tensors, strict=True)) | {"top_k": 2}
        if layout == "listed":
            own |= {name: [m.t() for m in own[name]] for name in ("w1", "w2")}
            own |= {name: list(own[name]) for name in ("b1", "b2")}
        shared = SharedExperts(own["w1"], own["w2"], own["b1"], own["b2"], own["router_weight"], weighted=True)
        return tuple(mixture_of_experts_reference(x, **own, shared=shared))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(call, leaves)


def test_an_expert_without_tokens_has_zero_gradients() -> None:
    p = parameters(top_k=1)
    p["router_weight"] = torch.zeros(5, 6)
    p["router_weight"][3] = 5.0
    for name in ("w1", "w2", "b1", "b2"):
        p[name].requires_grad_()
    run(torch.rand(7, 6), p).output.sum().backward()
    for name in ("w1", "w2", "b1", "b2"):
        used = p[name].grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, False, False, True, False]


X, P = torch.ones(2, 6), parameters()
LISTED = per_expert(P)
SHARED = shared_experts(2)


def with_(x: Tensor = X, base: dict[str, Any] = P, **changes: Any) -> Any:
    return lambda: mixture_of_experts(x, **(base | changes))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (with_(X.long()), TypeError, "x is torch.int64"),
        (with_(torch.tensor(1.0)), ValueError, "x has shape"),
        (with_(router_weight=torch.ones(5, 4)), ValueError, "router_weight has shape"),
        (with_(router_weight=P["router_weight"].double()), TypeError, "router_weight is torch.float64"),
        (with_(router_weight=P["router_weight"].to("meta")), ValueError, "router_weight is on meta"),
        (with_(top_k=0), ValueError, "top_k is 0"),
        (with_(top_k=6), ValueError, "top_k is 6; accepted is from 1 to the number of experts, 5"),
        (with_(top_k=2.0), TypeError, "top_k is float"),
        (with_(w1=P["w1"][:4]), ValueError, "w1 has 4 experts"),
        (with_(w1=P["w1"][0]), ValueError, "w1 has shape"),
        (with_(w1=P["w1"][:, :5]), ValueError, "w1 has shape"),
        (with_(w1=P["w1"][..., :7]), ValueError, "w1 has width 7"),
        (with_(w1=3), TypeError, "w1 is int"),
        (with_(w1=[]), ValueError, "w1 is a sequence"),
        (with_(w2=P["w2"][:, :3]), ValueError, "w2 has shape"),
        (with_(w2=LISTED["w2"]), TypeError, "w2 is list"),
        (with_(w2=P["w2"].half()), TypeError, "w2 is torch.float16"),
        (with_(b1=P["b1"][:, :3]), ValueError, "b1 has shape"),
        (with_(b2=P["b2"].to("meta")), ValueError, "b2 is on meta"),
        (with_(base=LISTED, w2=P["w2"]), TypeError, "w2 is torch.float32"),
        (with_(base=LISTED, w2=LISTED["w2"][:4]), ValueError, "w2 has 4 tensors"),
        (with_(base=LISTED, w1=[*LISTED["w1"][:4], torch.ones(8, 5)]), ValueError, "a tensor of w1 has shape"),
        (with_(base=LISTED, b1=LISTED["b1"][:4]), ValueError, "b1 has 4 tensors"),
        (with_(base=LISTED, b2=[b.half() for b in LISTED["b2"]]), TypeError, "b2 is torch.float16"),
        (with_(global_bias=torch.ones(5)), ValueError, "global_bias has shape"),
        (with_(activation="tanh"), ValueError, "activation is 'tanh'"),
        (with_(accumulation="any"), ValueError, "accumulation is 'any'"),
        (with_(router_dtype=torch.int64), ValueError, "router_dtype is torch.int64"),
        (with_(dropout=1.0), ValueError, "dropout is 1.0"),
        (with_(shared=(1, 2)), TypeError, "shared is tuple"),
        (with_(shared=SHARED._replace(gate_weight=None)), ValueError, "shared.gate_weight is None"),
        (
            with_(shared=shared_experts(1)._replace(gate_weight=torch.ones(1, 6))),
            ValueError,
            "shared.gate_weight is given",
        ),
        (with_(shared=SHARED._replace(gate_weight=torch.ones(2, 5))), ValueError, "shared.gate_weight has shape"),
        (with_(shared=SHARED._replace(w2=SHARED.w2[:, :2])), ValueError, "shared.w2 has shape"),
        (with_(shared=SHARED._replace(global_bias=torch.ones(1))), ValueError, "shared.global_bias has shape"),
        (lambda: route(X, P["router_weight"], 9), ValueError, "top_k is 9"),
        (lambda: load_balance_loss(1.0, 4), TypeError, "routing is float"),  # type: ignore[arg-type]
        (lambda: load_balance_loss(Routing(X, X.long(), X), 4), ValueError, "number_of_experts is 4"),
    ],
)
def test_refusals(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# experts behind a router of one's own


def test_routed_experts_are_the_second_half_of_the_layer() -> None:
    torch.manual_seed(0)
    x, router, w1, w2 = torch.randn(6, 8), torch.randn(4, 8), torch.randn(4, 8, 12), torch.randn(4, 6, 8)
    routing = route(x, router, 2)
    found = routed_experts(x, routing.weights, routing.experts, w1, w2, backend="reference")
    torch.testing.assert_close(found, mixture_of_experts(x, router, w1, w2, top_k=2, backend="reference").output)


@pytest.mark.parametrize("lists", [False, True])
def test_routed_experts_trace_with_either_half_as_the_gate(lists: bool) -> None:
    x, chosen, weights = torch.randn(3, 8), torch.tensor([[0, 2], [1, 3], [2, 3]]), torch.rand(3, 2)
    w1, w2, b1 = torch.randn(4, 8, 12), torch.randn(4, 6, 8), torch.randn(4, 12)
    experts: tuple[Any, Any] = ([one.t() for one in w1], [one.t() for one in w2]) if lists else (w1, w2)
    biases: Any = list(b1) if lists else b1

    def layer(x: Tensor) -> Tensor:
        return routed_experts(x, weights, chosen, *experts, b1=biases, gate_first=True, backend="reference")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_routed_experts_refuse_in_a_sentence() -> None:
    x, chosen, weights = torch.randn(3, 8), torch.tensor([[0], [1], [2]]), torch.ones(3, 1)
    w1, w2 = torch.randn(4, 8, 12), torch.randn(4, 6, 8)
    for change, error, words in (
        ({"x": x[0]}, ValueError, "x has shape (8,); accepted is (N, D)"),
        ({"chosen": chosen.int()}, TypeError, "chosen is torch.int32"),
        ({"chosen": chosen[:2]}, ValueError, "chosen has shape (2, 1)"),
        ({"chosen": chosen + 2}, ValueError, "chosen is 4; accepted is from 0 to 3"),
        ({"chosen": chosen - 1}, ValueError, "chosen is -1"),
        ({"weights": weights.half()}, TypeError, "weights is torch.float16"),
        ({"weights": torch.ones(3, 2)}, ValueError, "weights has shape (3, 2)"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
        ({"w1": torch.randn(4, 8, 6), "gated": False, "gate_first": True}, ValueError, "without a gate"),
        ({"backend": "triton"}, ValueError, "triton"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            routed_experts(**{"x": x, "weights": weights, "chosen": chosen, "w1": w1, "w2": w2, **change})
