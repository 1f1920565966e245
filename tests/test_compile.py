"""torch.compile(fullgraph=True), torch.export and opcheck of every public function, also with changing lengths.

The compiled graphs run eagerly (backend "aot_eager": traced, functionalised, differentiated, but no code generated), so
no compiler is needed; one test generates code where there is a C++ compiler.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rxt_kernels as rk
from rxt_kernels.mixture_of_experts import library
from rxt_kernels.testing import make_gate, make_memory_update_layers, make_norm

DIM, SLOTS, LAYERS_COUNT, EXPERTS = 8, 5, 2, 4
LAYERS, MEAN_NORM = make_memory_update_layers("gated-self-interlayer", LAYERS_COUNT, SLOTS, DIM, gate="linear")
GATE, NORM = make_gate("linear", SLOTS, DIM), make_norm("positional", SLOTS, DIM)
WEIGHT, ROUTER = torch.randn(DIM), torch.randn(EXPERTS, DIM)
W1, W2 = torch.randn(EXPERTS, DIM, 2 * DIM) / 3, torch.randn(EXPERTS, DIM, DIM) / 3
B1, B2 = torch.randn(EXPERTS, 2 * DIM), torch.randn(EXPERTS, DIM)
LISTED = [w.t().contiguous() for w in W1], [w.t().contiguous() for w in W2], list(B1), list(B2)
HEAD = torch.randn(11, DIM)
SHARED = rk.SharedExperts(W1[:2], W2[:2], B1[:2], B2[:2], ROUTER[:2], weighted=True)
MEMORY = torch.randn(LAYERS_COUNT, 1, SLOTS, DIM)
MEMORY_HEADS = torch.randn(1, SLOTS, 2, 4)

Maker = Callable[[int], tuple[Tensor, ...]]


def rows(time: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, time, DIM),)


def heads(time: int) -> tuple[Tensor, ...]:
    return torch.randn(2, time, 4, 4), torch.randn(2, time, 2, 4), torch.randn(2, time, 2, 4), torch.randn(time, 2)


def masked_heads(time: int) -> tuple[Tensor, ...]:
    return *heads(time)[:3], torch.arange(time) < torch.tensor([[time], [1]])


def cached_heads(time: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 1, 4, 4), *heads(time)[1:3], torch.tensor([time, 1])


def encoded(time: int) -> tuple[Tensor, ...]:
    mask = torch.arange(time) < torch.tensor([[time], [0]])
    return torch.randn(LAYERS_COUNT, 2, time, DIM), mask, torch.randn(time, 2)


CASES: dict[str, tuple[Callable[..., Any], Maker, tuple[int | None, ...]]] = {
    # name: (function, inputs for a length, the dimension of each input that is the length)
    "rms_norm": (lambda x: rk.rms_norm(x, WEIGHT), rows, (1,)),
    "add_rms_norm": (lambda x: rk.add_rms_norm(x, x * 2, WEIGHT), rows, (1,)),
    "rotary": (lambda q, k, v, a: (rk.rotary(q, a), rk.rotary(k, a, layout="split"), v), heads, (1, 1, 1, 0)),
    "swiglu": (rk.swiglu, rows, (1,)),
    "linear_cross_entropy": (
        lambda x, t: rk.linear_cross_entropy(x, HEAD, t),
        lambda time: (torch.randn(2, time, DIM), torch.randint(0, 11, (2, time))),
        (1, 1),
    ),
    "sparse_query_attention": (
        lambda q, k, v, a: rk.sparse_query_attention(q, k, v, causal=True, query_angles=a, key_angles=a),
        heads,
        (1, 1, 1, 0),
    ),
    "sparse_query_attention with key_mask": (
        lambda q, k, v, m: rk.sparse_query_attention(q, k, v, causal=True, key_mask=m),
        masked_heads,
        (1, 1, 1, 1),
    ),
    "sparse_query_attention with key_lengths": (
        lambda q, k, v, n: rk.sparse_query_attention(q, k, v, key_lengths=n),
        cached_heads,
        (None, 1, 1, None),
    ),
    "memory_cross_attention": (
        lambda q, k, v, a: (rk.memory_cross_attention(q, MEMORY_HEADS, MEMORY_HEADS, query_angles=a), k, v),
        heads,
        (1, 1, 1, 0),
    ),
    "route": (lambda x: tuple(rk.route(x, ROUTER, 2)), rows, (1,)),
    "load_balance_loss": (lambda x: rk.load_balance_loss(rk.route(x, ROUTER, 2), EXPERTS), rows, (1,)),
    "mixture_of_experts stacked": (
        lambda x: tuple(rk.mixture_of_experts(x, ROUTER, W1, W2, top_k=2, b1=B1, b2=B2, shared=SHARED)),
        rows,
        (1,),
    ),
    "mixture_of_experts listed": (
        lambda x: tuple(
            rk.mixture_of_experts(
                x, ROUTER, *LISTED[:2], top_k=2, b1=LISTED[2], b2=LISTED[3], accumulation="expert_index"
            )
        ),
        rows,
        (1,),
    ),
    "memory_update": (
        lambda e, m, a: rk.memory_update(
            MEMORY,
            e,
            LAYERS,
            variant="gated-self-interlayer",
            mean_norm=MEAN_NORM,
            key_mask=m,
            key_angles=a,
        ),
        encoded,
        (2, 1, 0),
    ),
    "residual_gate": (
        lambda x: rk.residual_gate(x, x * 2, GATE),
        lambda batch: (torch.randn(batch, SLOTS, DIM),),
        (0,),
    ),
    "memory_norm": (lambda x: rk.memory_norm(x, NORM), lambda batch: (torch.randn(batch, SLOTS, DIM),), (0,)),
}
NAMES = list(CASES)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum(out.square().sum() for out in outputs if out.requires_grad)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    return [out.detach() for out in outputs] + [g for g in gradients if g is not None]


@pytest.mark.parametrize("name", NAMES)
def test_compile(name: str) -> None:
    """One graph, the same outputs and gradients, for several lengths; the second length makes the shapes dynamic."""
    function, make, _ = CASES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (7, 4, 12):
        inputs = make(length)
        expected = outputs_and_gradients(function, inputs)
        actual = outputs_and_gradients(compiled, inputs)
        assert len(actual) == len(expected)
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_shapes_compile_once(name: str) -> None:
    function, make, _ = CASES[name]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (7, 4, 12, 33):
            inputs = make(length)
            torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert len(graphs) == 1


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_export(name: str, strict: bool) -> None:
    """With the length left open; the exported program runs at other lengths than it was traced with."""
    function, make, lengths = CASES[name]
    open_length = torch.export.Dim("length", min=2, max=256)
    shapes = tuple({} if dim is None else {dim: open_length} for dim in lengths)
    program = torch.export.export(Wrapped(function), make(7), dynamic_shapes=(shapes,), strict=strict)
    for length in (7, 4, 33):
        inputs = make(length)
        torch.testing.assert_close(program.module()(*inputs), function(*inputs))


def test_running_means_are_updated_by_a_compiled_function() -> None:
    one, two = make_norm("adaptive", SLOTS, DIM), make_norm("adaptive", SLOTS, DIM)
    two = two._replace(**{name: t.clone() for name, t in one._asdict().items() if isinstance(t, Tensor)})
    x = torch.randn(2, SLOTS, DIM)
    compiled = torch.compile(rk.memory_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, one, training=True), rk.memory_norm(x, two, training=True))
    torch.testing.assert_close(one.ema_rms, two.ema_rms)


def test_refusals_reach_the_caller_of_a_compiled_function() -> None:
    compiled = torch.compile(rk.rms_norm, backend="aot_eager")
    with pytest.raises(ValueError, match="weight has shape"):
        compiled(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "sigmoid", "linear"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_routed_experts_operation(stacked: bool, activation: str, gated: bool, dropped: bool) -> None:
    """opcheck of the opaque operation, and its gradient against that of the plain reference."""
    width = 6
    w1 = torch.randn(EXPERTS, 3, 2 * width if gated else width, dtype=torch.float64)
    w2 = torch.randn(EXPERTS, width, 3, dtype=torch.float64)
    b1, b2 = torch.randn(EXPERTS, w1.shape[2], dtype=torch.float64), torch.randn(EXPERTS, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    weights, chosen = torch.rand(5, 2, dtype=torch.float64), torch.tensor([[0, 1], [1, 0], [3, 1], [1, 3], [0, 3]])

    def lists(*tensors: Tensor) -> list[list[Tensor]]:
        if stacked:
            return [[t.clone().requires_grad_()] for t in tensors]
        transposed = (t.transpose(1, 2) if t.dim() == 3 else t for t in tensors)
        return [[one.clone().requires_grad_() for one in t] for t in transposed]

    parameters = lists(w1, w2, b1, b2)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *(t for own in parameters for t in own)]
    scale = 2.0 * torch.randint(0, 2, (5, 2, width)).double() if dropped else None
    arguments = (x, weights, chosen, *parameters, scale, stacked, activation, gated)
    torch.library.opcheck(library.routed_experts, arguments)
    actual = library.routed_experts(*arguments)
    experts = library._experts(*parameters, stacked, activation, gated)  # type: ignore[arg-type]
    expected = library.routed_experts_reference(x, weights, chosen, experts, scale)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual.square().sum(), leaves)
    for one, two in zip(
        gradients, torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two)


@pytest.mark.parametrize("tokens", [0, 1])
def test_routed_experts_operation_with_few_tokens(tokens: int) -> None:
    x = torch.randn(tokens, DIM, requires_grad=True)
    weights, chosen = torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int64)
    chosen[:, 1:] = 1
    out = library.routed_experts(x, weights, chosen, [W1], [W2], [], [], None, True, "silu", True)
    assert out.shape == (tokens, DIM)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="code generation needs a C++ compiler")
def test_generated_code() -> None:
    """Inductor, once for the operation with the most parts."""
    function, make, _ = CASES["memory_update"]
    moe, make_rows, _ = CASES["mixture_of_experts stacked"]
    with torch.no_grad():
        for one, maker in ((function, make), (moe, make_rows)):
            inputs = maker(7)
            torch.testing.assert_close(torch.compile(one, fullgraph=True)(*inputs), one(*inputs))
