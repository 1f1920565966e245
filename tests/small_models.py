"""Models of the published families in small, with the options that kernels and engines have to get right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import ALPHA_TOKENS, BETA_TOKENS, VOCABULARY

from rxt_model import MemoryAttentionConfig, RxTAlpha, RxTBeta, TransformerConfig
from rxt_model.models import ReactiveTransformer


def alpha() -> RxTAlpha:
    """An RxT-Alpha: experts that are separate modules, linear gates."""
    common: dict[str, Any] = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "att_query_groups": 1, "stm_size": 4}
    transformer = {**common, "vocab_size": VOCABULARY, "ff_dim": 12, "num_shared_experts": 0}
    return RxTAlpha(
        TransformerConfig(
            **transformer, use_moe=True, num_experts=3, moe_top_k=2, use_vectorized_moe=False, moe_bias_mode="local",
            rope_layout="split", rope_angle_dtype="match",
        ),
        TransformerConfig(**transformer, skip_memory_cross_attention=True),
        MemoryAttentionConfig(**common, use_gated_residual=True, residual_gate_type="linear"),
        ALPHA_TOKENS,
    )  # fmt: skip


def beta() -> RxTBeta:
    """An RxT-Beta: fewer query heads, stacked experts, gates between a layer's memory and the mean of all."""
    common: dict[str, Any] = {"num_layers": 2, "embed_dim": 32, "att_heads": 2, "att_query_groups": 2, "stm_size": 6}
    transformer = {**common, "vocab_size": VOCABULARY, "ff_dim": 24}
    return RxTBeta(
        TransformerConfig(
            **transformer, use_moe=True, num_experts=3, moe_top_k=2, num_shared_experts=0, moe_bias_mode="local"
        ),
        TransformerConfig(**transformer, skip_memory_cross_attention=True),
        MemoryAttentionConfig(
            **common, use_gated_residual=True, residual_gate_type="elementwise", use_tanh_residual_gate=False
        ),
        BETA_TOKENS,
        "gated-self-interlayer",
    )


def beta_3b() -> RxTBeta:
    """What RxT-Beta 3B has besides: stateless layers, shared experts, gated attention, a head norm, groups of layers."""
    common: dict[str, Any] = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "att_query_groups": 2, "stm_size": 5}
    transformer = {
        **common, "vocab_size": VOCABULARY, "ff_dim": 12, "use_gated_attention": True, "use_attention_output_bias": False,
    }  # fmt: skip
    return RxTBeta(
        TransformerConfig(
            **transformer, use_moe=True, num_experts=4, moe_top_k=2, num_shared_experts=2, shared_expert_dim=10,
            moe_bias_mode="global", moe_shared_experts_bias_mode="global", use_gated_cross_attention=False,
            use_head_norm=True, head_norm_type="rms_norm", dense_layer_dim=20, stateless_layers_config=("dense", "moe"),
            final_stateless_layers_config=("moe",), router_amp=True, router_dtype="float32",
        ),
        TransformerConfig(**transformer, skip_memory_cross_attention=True),
        MemoryAttentionConfig(
            **common, use_gated_residual=True, residual_gate_type="elementwise", use_tanh_residual_gate=False, num_groups=2
        ),
        BETA_TOKENS,
        "grouped-self-interlayer",
    )  # fmt: skip


def dense() -> RxTAlpha:
    """Without experts and with everything else that differs: LayerNorm, GELU without a gate, no positions."""
    common: dict[str, Any] = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "att_query_groups": 2, "stm_size": 3}
    transformer = {
        **common, "vocab_size": VOCABULARY, "ff_dim": 12, "use_rms_norm": False, "use_gated": False, "ff_activation": "gelu",
        "use_nope": True,
    }  # fmt: skip
    return RxTAlpha(
        TransformerConfig(
            **transformer, use_gated_attention=True, gated_attention_activation="tanh", use_head_norm=True
        ),
        TransformerConfig(**transformer, skip_memory_cross_attention=True),
        MemoryAttentionConfig(**common),
        ALPHA_TOKENS,
    )


MODELS: dict[str, Callable[[], ReactiveTransformer]] = {
    "alpha": alpha, "beta": beta, "beta-3b": beta_3b, "dense": dense,
}  # fmt: skip


def make(name: str, device: str = "cpu") -> ReactiveTransformer:
    """One of :data:`MODELS` in evaluation mode; its weights follow from the seed, and none is a constant."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        # Biases and gates start at constants; a formula that forgot one would pass.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device)
