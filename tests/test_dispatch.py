"""Choosing, explaining and refusing backends; `python -m rxt_kernels.info`."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import rxt_kernels
from rxt_kernels import dispatch, info
from rxt_kernels.dispatch import Operation, available_backends, explain, operations, use_backend
from rxt_kernels.testing import make_gate, make_memory_update_layers, make_norm

LAYERS, MEAN_NORM = make_memory_update_layers("interlayer", 2, 3, 8)
CALLS: dict[str, Callable[[str], Any]] = {
    "rms_norm": lambda b: rxt_kernels.rms_norm(torch.ones(2, 4), torch.ones(4), backend=b),
    "add_rms_norm": lambda b: rxt_kernels.add_rms_norm(torch.ones(4), torch.ones(4), torch.ones(4), backend=b)[0],
    "rotary": lambda b: rxt_kernels.rotary(torch.ones(1, 2, 1, 4), torch.ones(2, 2), backend=b),
    "swiglu": lambda b: rxt_kernels.swiglu(torch.ones(4), backend=b),
    "linear_cross_entropy": lambda b: rxt_kernels.linear_cross_entropy(
        torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 2]), backend=b
    ),
    "sparse_query_attention": lambda b: rxt_kernels.sparse_query_attention(
        torch.ones(1, 2, 2, 4), torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), backend=b
    ),
    "memory_cross_attention": lambda b: rxt_kernels.memory_cross_attention(
        torch.ones(1, 2, 2, 4), torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), backend=b
    ),
    "mixture_of_experts": lambda b: (
        rxt_kernels.mixture_of_experts(
            torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 4, 4), torch.ones(3, 2, 4), top_k=2, backend=b
        ).output
    ),
    "routed_experts": lambda b: rxt_kernels.routed_experts(
        torch.ones(2, 4),
        torch.ones(2, 1),
        torch.tensor([[0], [2]]),
        torch.ones(3, 4, 4),
        torch.ones(3, 2, 4),
        backend=b,
    ),
    "residual_gate": lambda b: rxt_kernels.residual_gate(
        torch.ones(1, 3, 8), torch.ones(1, 3, 8), make_gate("static", 3, 8), backend=b
    ),
    "memory_norm": lambda b: rxt_kernels.memory_norm(torch.ones(1, 3, 8), make_norm("rms", 3, 8), backend=b),
    "memory_update": lambda b: rxt_kernels.memory_update(
        torch.ones(2, 1, 3, 8), torch.ones(2, 1, 4, 8), LAYERS, variant="interlayer", mean_norm=MEAN_NORM, backend=b
    ),
}


def test_every_operation_is_here() -> None:
    assert set(operations()) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_auto_and_reference(name: str) -> None:
    outputs = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        outputs.append(CALLS[name](backend))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_backend_that_is_not_in_this_build(name: str, backend: str) -> None:
    if backend in available_backends(name):
        assert explain(name, backend).startswith("Registered")
        return
    with pytest.raises(ValueError, match=f"no {backend} backend for {name}.*python -m rxt_kernels.info"):
        CALLS[name](backend)
    assert "no " + backend in explain(name, backend)


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=r"backend is 'cuda'.*'auto', 'reference', 'triton', 'native'"):
        CALLS[name]("cuda")


ONE = torch.tensor(1.0)


def double_reference(x: Tensor) -> Tensor:
    return 2 * x


@pytest.fixture
def operation() -> Iterator[Operation]:
    yield Operation("double", double_reference)
    del dispatch._operations["double"]


def refuse_negative(x: Tensor) -> str | None:
    return "x is negative." if x < 0 else None


def test_a_registered_backend_is_preferred(operation: Operation) -> None:
    operation.register("native", lambda x: x + x, refuse_negative)
    assert operation.select("auto", ONE) is not double_reference
    assert operation.select("native", ONE) is operation.select("auto", ONE)
    assert operation.select("reference", ONE) is double_reference
    assert available_backends("double") == ("native", "reference")
    assert explain("double", "native").startswith("Registered")


def test_an_explicit_request_raises_the_reason(operation: Operation) -> None:
    operation.register("native", lambda x: x + x, refuse_negative)
    with pytest.raises(ValueError, match="backend='native' cannot run this call of double: x is negative"):
        operation.select("native", -ONE)


def test_auto_falls_back_and_says_so_once(operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
    operation.register("triton", lambda x: x, lambda x: "there is no GPU.")
    operation.register("native", lambda x: x + x, refuse_negative)
    with caplog.at_level(logging.WARNING, logger="rxt_kernels"):
        for _ in range(3):
            assert operation.select("auto", -ONE) is double_reference
            assert operation.select("auto", ONE) is not double_reference
    assert sorted(record.getMessage() for record in caplog.records) == [
        "double runs on another backend than native: x is negative. (said once)",
        "double runs on another backend than triton: there is no GPU. (said once)",
    ]


def test_auto_passes_over_a_backend_of_other_devices_without_a_word(
    operation: Operation, caplog: pytest.LogCaptureFixture
) -> None:
    operation.register("triton", lambda x: x, lambda x: "it runs on a GPU.", devices=("cuda",))
    with caplog.at_level(logging.WARNING, logger="rxt_kernels"):
        assert operation.select("auto", ONE) is double_reference
    assert not caplog.records
    with pytest.raises(ValueError, match="it runs on a GPU"):
        operation.select("triton", ONE)


def test_a_block_prefers_a_backend_on_every_device(operation: Operation) -> None:
    operation.register("native", lambda x: x + x, refuse_negative)
    operation.register("triton", lambda x: x, lambda x: None, devices=("cuda",))
    by_default, native, triton = (operation.select(name, ONE) for name in ("auto", "native", "triton"))
    assert by_default is native
    with use_backend("triton"):
        assert operation.select("auto", ONE) is triton
        assert operation.select("native", ONE) is native
        with use_backend("reference"):
            assert operation.select("auto", ONE) is double_reference
        with use_backend("auto"):
            assert operation.select("auto", ONE) is native
        with pytest.raises(RuntimeError, match="left"), use_backend("native"):
            raise RuntimeError("left")
        assert operation.select("auto", ONE) is triton
    assert operation.select("auto", ONE) is native


def test_a_preference_that_cannot_be_met_is_said_once(operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
    operation.register("triton", lambda x: x, refuse_negative, devices=("cuda",))
    with caplog.at_level(logging.WARNING, logger="rxt_kernels"):
        for _ in range(2):
            with use_backend("triton"):
                assert operation.select("auto", -ONE) is double_reference
            with use_backend("native"):
                assert operation.select("auto", ONE) is double_reference
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "double runs on another backend than triton: x is negative. (said once)"
    assert second.startswith("double runs on another backend than native: This build has no native backend")


def test_a_preference_holds_in_its_own_thread(operation: Operation) -> None:
    operation.register("native", lambda x: x + x, refuse_negative)
    chosen: list[Callable[..., Any]] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: chosen.append(operation.select("auto", ONE)))
        thread.start()
        thread.join()
        assert operation.select("auto", ONE) is double_reference
    assert chosen == [operation.select("native", ONE)]


def test_a_preference_is_seen_by_a_compiled_function(operation: Operation) -> None:
    operation.register("native", lambda x: x + 1, lambda x: None, devices=("cuda",))

    def call(x: Tensor) -> Tensor:
        return operation.select("auto", x)(x)

    def call_inside(x: Tensor) -> Tensor:
        with use_backend("native"):
            return operation.select("auto", x)(x)

    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    five = torch.tensor(5.0)
    for _ in range(2):
        assert compiled(five) == 10
        with use_backend("native"):
            assert compiled(five) == 6
    assert counter.frame_count == 2
    assert torch.compile(call_inside, fullgraph=True, backend="eager")(five) == 6
    assert operation.select("auto", five) is double_reference


def test_a_preference_is_checked() -> None:
    with (
        pytest.raises(ValueError, match=r"backend is 'cuda'.*'auto', 'reference', 'triton', 'native'"),
        use_backend("cuda"),
    ):
        pass


def test_registration_is_checked(operation: Operation) -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        operation.register("cuda", double_reference, refuse_negative)
    with pytest.raises(ValueError, match="backend is 'reference'"):
        operation.register("reference", double_reference, refuse_negative)
    operation.register("native", double_reference, refuse_negative)
    with pytest.raises(ValueError, match="already has a native backend"):
        operation.register("native", double_reference, refuse_negative)
    with pytest.raises(ValueError, match="'double' is already registered"):
        Operation("double", double_reference)


def test_questions_are_checked() -> None:
    with pytest.raises(ValueError, match="operation is 'softmax'"):
        available_backends("softmax")
    with pytest.raises(ValueError, match="operation is 'softmax'"):
        explain("softmax", "native")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        explain("rms_norm", "cuda")


def test_public_functions_swallow_nothing() -> None:
    """An argument is honoured or it raises."""
    import inspect

    for name in rxt_kernels.__all__:
        function = getattr(rxt_kernels, name)
        if inspect.isfunction(function):
            kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
            assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert rxt_kernels.__version__ in text
    assert "sparse_query_attention" in text
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["operations"]) == set(operations())
    for backends in report["operations"].values():
        assert set(backends) == set(dispatch.BACKENDS)
        assert backends["reference"]["available"]
        assert all(state["reason"].endswith(".") for state in backends.values())
