"""Whole components on Triton's kernels under torch.compile: one graph, and none anew for another length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import VOCABULARY
from small_models import make
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from triton_cases import DEVICE, needs_triton

from rxt_kernels import use_backend
from rxt_kernels.triton_runtime import count_launches
from rxt_model.models import ReactiveTransformer

pytestmark = needs_triton

Inputs = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoder_inputs(model: ReactiveTransformer, time: int) -> Inputs:
    ids = torch.randint(11, VOCABULARY, (2, time), device=DEVICE)
    return ids, None, model.stm.memory.detach()


def memory_inputs(model: ReactiveTransformer, time: int) -> Inputs:
    layers, _, _, width = model.stm.memory.shape
    return torch.randn(layers, 2, time, width, device=DEVICE), None, model.stm.memory.detach()


PARTS: dict[str, tuple[str, Callable[[ReactiveTransformer, int], Inputs]]] = {
    "decoder": ("decoder", decoder_inputs),
    "memory attention": ("memory_attention", memory_inputs),
}


@pytest.mark.parametrize("part", PARTS)
def test_one_graph_for_every_length(part: str) -> None:
    name, inputs = PARTS[part]
    model = make("beta", DEVICE)
    module: nn.Module = getattr(model, name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames: set[int] = set()
    with torch.no_grad():
        for time in (5, 3, 9):
            given = inputs(model, time)
            with use_backend("reference"):
                expected = module(*given)
            with use_backend("triton"), count_launches() as launches:
                actual: Tensor = compiled(*given)
            assert launches.total() > 0
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            frames.add(counter.frame_count)
    assert len(frames) == 1, "a later length was compiled anew"


def test_gradients_through_a_compiled_decoder() -> None:
    model = make("beta", DEVICE)
    given = decoder_inputs(model, 4)
    parameters = [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]

    def gradients(module: Callable[..., Tensor]) -> list[Tensor | None]:
        loss = module(*given).square().mean()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    with use_backend("reference"):
        expected = gradients(model.decoder)
    with use_backend("triton"), count_launches() as launches:
        actual = gradients(torch.compile(model.decoder, fullgraph=True, backend="aot_eager"))
    assert "_rms_norm_bwd_kernel" in launches
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) is (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
