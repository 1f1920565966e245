"""Whole models on Triton's kernels against the reference: logits, memory, gradients of a training step, and answers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import EOS, messages, right_padded
from small_models import make
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from rxt_kernels import linear_cross_entropy, use_backend
from rxt_kernels.testing import GRADIENT_FACTOR, assert_accurate
from rxt_kernels.triton_runtime import count_launches
from rxt_model.models import ReactiveTransformer

pytestmark = needs_triton


FORWARD = {"_sqa_decode_kernel", "_rms_norm_fwd_kernel", "_swiglu_fwd_kernel", "_moe_up_kernel", "_moe_combine_kernel"}
BACKWARD = {"_sqa_bwd_dq_kernel", "_rms_norm_bwd_kernel", "_swiglu_bwd_kernel", "_moe_weight_gradient_kernel"}


@pytest.fixture(params=["beta", "beta-3b"])
def model(request: pytest.FixtureRequest) -> ReactiveTransformer:
    return make(request.param, DEVICE)


def padded(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    rows = right_padded(messages(lengths, seed))
    return rows["input_ids"].to(DEVICE), rows["attention_mask"].to(DEVICE)


def three_ways(
    model: ReactiveTransformer, compute: Callable[[ReactiveTransformer], dict[str, Tensor]]
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, on Triton, in eager torch, in float64) of everything computed."""
    with use_backend("reference"):
        exact, eager = compute(copy.deepcopy(model).double()), compute(model)
    with use_backend("triton"):
        fast = compute(model)
    assert fast.keys() == exact.keys()
    return [(name, fast[name], eager[name], exact[name]) for name in exact]


def test_logits_and_memory_after_two_updates(model: ReactiveTransformer) -> None:
    first, second = padded([7, 3], seed=1), padded([4, 9], seed=2)
    start = torch.randn(2, 2, model.stm.size, model.stm.dim, device=DEVICE)

    @torch.no_grad()
    def compute(model: ReactiveTransformer) -> dict[str, Tensor]:
        memory = start.to(model.stm.memory.dtype)
        found: dict[str, Tensor] = {}
        for name, (ids, mask) in (("first", first), ("second", second)):
            logits = model.decoder(ids, mask, memory)
            memory = model.memory_attention(model.encoder(ids, mask), mask, memory)
            found |= {f"logits of the {name} message": logits[mask], f"memory after the {name}": memory}
        return found

    with count_launches() as launches:
        found = three_ways(model, compute)
    assert launches.keys() >= FORWARD
    for _, own, plain, true in found:
        assert_accurate(own, plain, true)


def test_gradients_of_a_training_step(model: ReactiveTransformer) -> None:
    """Through the answer, the memory it read, and the encoder of the turn that was written."""
    heard, answered = padded([5, 8], seed=3), padded([6, 4], seed=4)
    start = torch.randn(2, 2, model.stm.size, model.stm.dim, device=DEVICE)

    def compute(model: ReactiveTransformer) -> dict[str, Tensor]:
        memory = model.memory_attention(model.encoder(*heard), heard[1], start.to(model.stm.memory.dtype))
        ids, mask = answered
        states = model.decoder.hidden_states(ids, mask, memory)
        head = model.decoder.model.head
        hidden = (
            states.hidden if model.decoder.model.head_norm is None else model.decoder.model.head_norm(states.hidden)
        )
        target = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        loss = linear_cross_entropy(hidden[:, :-1], head.weight, target, bias=head.bias)
        assert states.load_balance_loss is not None
        loss = loss + 0.01 * states.load_balance_loss
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
        return {name: gradient for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None}

    with count_launches() as launches:
        found = three_ways(model, compute)
    assert launches.keys() >= BACKWARD
    assert len(found) > 60
    for _, own, plain, true in found:
        assert_accurate(own, plain, true, factor=GRADIENT_FACTOR)


def test_greedy_answers_are_the_same(model: ReactiveTransformer) -> None:
    with torch.no_grad():
        model.decoder.model.head.bias[EOS] -= 9.0
    ids = torch.tensor(messages([5], seed=5))
    memory = model.export_stm_state()

    def talk(backend: str) -> list[list[int]]:
        model.load_stm_state(memory)
        with use_backend(backend):
            return [list(model.interact(ids, temperature=0.0, max_seq_len=11)) for _ in range(2)]

    with count_launches() as launches:
        answers = talk("triton")
    assert launches.keys() >= FORWARD
    assert answers == talk("reference")
    assert len(answers[1]) > 4
