"""The modules for any torch model: what they compute, that they train, and that they are the layers of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import refusal
from torch import Tensor, nn

from rxt_model.layers import attention
from rxt_model.modules import MixtureOfExperts, SparseQueryAttention

DIM = 24


def sqa(**options: Any) -> SparseQueryAttention:
    return SparseQueryAttention(DIM, **{"head_dim": 8, "query_heads": 2, "key_value_heads": 4, **options})


def by_torch(layer: SparseQueryAttention, x: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """The same without positions, by torch's own attention."""
    query, key, value = (
        projection(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if query.shape[1] > key.shape[1]:
        key, value = (side.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for side in (key, value))
    else:
        query = query.repeat(1, key.shape[1] // query.shape[1], 1, 1)
    shown = None if mask is None else mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=shown, is_causal=causal)
    found: Tensor = layer.out_proj(heads.transpose(1, 2).flatten(-2))
    return found


@pytest.mark.parametrize("heads", [(1, 4), (2, 4), (4, 4), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torch_s_where_that_can_do_it(heads: tuple[int, int], causal: bool) -> None:
    layer, x = sqa(query_heads=heads[0], key_value_heads=heads[1], rope_base=None), torch.randn(2, 7, DIM)
    torch.testing.assert_close(layer(x, causal=causal), by_torch(layer, x, causal), rtol=1e-5, atol=1e-5)
    if not causal:
        mask = torch.arange(7) < torch.tensor([[7], [3]])
        torch.testing.assert_close(layer(x, key_mask=mask), by_torch(layer, x, False, mask), rtol=1e-5, atol=1e-5)


def test_attention_is_the_layer_of_our_models() -> None:
    """Same names, same weights, same numbers; and positions are relative."""
    layer, x = sqa(gated=True, bias=False), torch.randn(2, 7, DIM)
    ours = attention.SparseQueryAttention(DIM, 8, (2, 4), output_bias=False, gated=True)
    ours.load_state_dict(layer.state_dict())
    assert layer.rotary is not None
    angles = layer.rotary.angles(torch.arange(7), x.dtype)
    assert torch.equal(layer(x, causal=True), ours(x, angles, causal=True))
    assert not torch.allclose(layer(x), layer(x.flip(1)).flip(1), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_continues_and_does_not_change_anything(dtype: torch.dtype) -> None:
    layer, x = sqa().to(dtype).eval(), torch.randn(2, 9, DIM, dtype=dtype)
    cache = layer.new_cache(2, capacity=2)
    found = torch.cat([layer(part, cache=cache) for part in x.split([3, 4, 1, 1], dim=1)], dim=1)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, layer(x, causal=True), rtol=tolerance, atol=tolerance)
    assert found.dtype is dtype


def experts_one_by_one(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, as the formula is written."""
    act = F.silu if layer.options.activation == "silu" else F.relu
    rows = []
    for token in x.flatten(0, -2):
        share, chosen = torch.softmax(layer.router.gate(token), -1).topk(layer.options.top_k)
        total = torch.zeros(DIM)
        for weight, expert in zip(share / share.sum(), chosen.tolist(), strict=True):
            hidden = token @ layer.w1[expert] + (0 if layer.b1 is None else layer.b1[expert])
            if layer.options.gated:
                linear, gate = hidden.chunk(2)
                hidden = linear * act(gate)
            else:
                hidden = act(hidden)
            total = total + weight * (hidden @ layer.w2[expert] + (0 if layer.b2 is None else layer.b2[expert]))
        rows.append(total)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "relu", "bias": True}, {"top_k": 5}])
def test_experts_are_those_of_the_formula(options: dict[str, Any]) -> None:
    layer, x = MixtureOfExperts(DIM, **{"hidden": 16, "experts": 5, "top_k": 2, **options}), torch.randn(2, 3, DIM)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    torch.testing.assert_close(layer(x).output, experts_one_by_one(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_add_what_every_token_gets(shared: int) -> None:
    layer, x = MixtureOfExperts(DIM, hidden=16, experts=3, top_k=1, shared_experts=shared), torch.randn(4, DIM)
    with torch.no_grad():
        layer.w2.zero_()
    assert layer(x).output.abs().max() > 0
    assert not any(name.endswith("bias") for name in layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_them_learns_and_is_saved(dtype: torch.dtype) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = sqa(dropout=0.1)
            self.experts = MixtureOfExperts(DIM, hidden=16, experts=4, top_k=2, dropout=0.1, router_dtype=torch.float32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.attention(x, causal=True)
            output, loss = self.experts(x)
            return x + output, loss

    model = Block().to(dtype)
    x, target = torch.randn(4, 6, DIM, dtype=dtype), torch.randn(4, 6, DIM, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(12):
        found, balance = model(x)
        loss = (found - target).square().mean() + 0.01 * balance
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    other = Block().to(dtype).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], other(x)[0])


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    layer = sqa(dropout=0.5)
    x = torch.randn(2, 3, DIM)
    with refusal(ValueError, "query_heads is 3", "key_value_heads is 4"):
        sqa(query_heads=3)
    with refusal(ValueError, "head_dim is 7", "even"):
        sqa(head_dim=7)
    with refusal(ValueError, "dropout is 1.0"):
        sqa(dropout=1.0)
    with refusal(ValueError, "x", "(2, 24)", "(batch, time, 24)"):
        layer(x[:, 0])
    with refusal(TypeError, "x is list"):
        layer([1.0])
    with refusal(ValueError, "dropout is 0.5", "eval()"):
        layer(x, cache=layer.new_cache(2))
    layer.eval()
    with refusal(ValueError, "key_mask", "cache"):
        layer(x, key_mask=torch.ones(2, 3, dtype=torch.bool), cache=layer.new_cache(2))
    with refusal(ValueError, "1 rows"):
        layer(x, cache=layer.new_cache(1))
    sizes: dict[str, Any] = {"hidden": 4, "experts": 3, "top_k": 2}
    with refusal(ValueError, "top_k is 4", "3 experts"):
        MixtureOfExperts(DIM, **{**sizes, "top_k": 4})
    with refusal(ValueError, "hidden is 0"):
        MixtureOfExperts(DIM, **{**sizes, "hidden": 0})
    with refusal(ValueError, "activation is 'mish'"):
        MixtureOfExperts(DIM, **sizes, activation="mish")
    with refusal(ValueError, "router_dtype"):
        MixtureOfExperts(DIM, **sizes, router_dtype=torch.int32)
    with refusal(ValueError, "shared_experts is -1"):
        MixtureOfExperts(DIM, **sizes, shared_experts=-1)
