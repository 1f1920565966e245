"""Our experts inside of models of `transformers`, against its own eager ones: logits and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rxt_kernels import native_runtime, use_backend

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no interface for experts (5.0)")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from rxt_kernels.integrations.transformers import NAME, experts_forward, register  # noqa: E402

_SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "gelu": ("Qwen3Moe", {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8, "hidden_act": "gelu"}),
}
BACKENDS = ["reference", *(["native"] if native_runtime.available() else [])]


def make(name: str) -> Any:
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES, **sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_experts_implementation("eager")
    return model


def ask(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_and_learns_what_it_did(name: str, backend: str) -> None:
    register()
    model = make(name)
    other = copy.deepcopy(model)
    other.set_experts_implementation(NAME)
    ids = torch.randint(50, (2, 9))
    (expected, their_gradients), (found, our_gradients) = ask(model, ids), (None, None)
    with use_backend(backend):
        found, our_gradients = ask(other, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any("experts" in name for name in our_gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_and_half_precision(backend: str) -> None:
    register()
    model = make("mixtral").eval()
    ids = torch.randint(50, (1, 4))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.set_experts_implementation(NAME)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        assert torch.equal(model.generate(ids, **options), expected)
        exact, rounded = model(ids).logits, half(ids).logits
    assert rounded.dtype is torch.bfloat16
    assert torch.linalg.vector_norm(rounded.float() - exact) < 0.1 * torch.linalg.vector_norm(exact)


def test_registering_is_repeatable_and_takes_nobody_s_name() -> None:
    register()
    register()
    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward
    with pytest.raises(ValueError, match="name is 'batched_mm', under which transformers has another"):
        register("batched_mm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act_fn": nn.Mish()}, "their activation is Mish"),
        ({"has_post_expert_norm": True}, "each has a norm behind it"),
        ({"is_concatenated": False}, "take turns"),
        ({"_is_expert_parallel": True}, "spread over several devices"),
    ],
)
def test_other_experts_are_refused_in_a_sentence(change: dict[str, Any], reason: str) -> None:
    register()
    model = make("qwen3-moe")
    model.set_experts_implementation(NAME)
    for name, value in change.items():
        setattr(model.model.layers[0].mlp.experts, name, value)
    with pytest.raises(ValueError, match=reason):
        model(torch.tensor([[1, 2, 3]]))
