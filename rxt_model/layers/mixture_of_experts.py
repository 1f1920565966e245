"""Mixture-of-experts layers: one class per weight layout, the same operation behind both (spec 2.8 and 3.3).

The per-expert layout holds a module per expert, as checkpoints up to rxlm 0.2 do; the stacked layout holds one tensor for
all experts, transposed. Which of them a model has follows its checkpoint; the results are those of the same formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from rxt_kernels import MixtureOfExpertsOutput, SharedExperts, mixture_of_experts
from rxt_model.config import TransformerConfig
from rxt_model.layers.feed_forward import FeedForward

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MixtureOfExpertsOptions:
    """What both layouts need to know of the configuration."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int
    gated: bool
    activation: str
    dropout: float
    num_shared: int
    shared_hidden: int
    weighted_shared: bool
    bias_mode: str
    shared_bias_mode: str
    router_dtype: torch.dtype | None

    @classmethod
    def of(cls, config: TransformerConfig) -> MixtureOfExpertsOptions:
        return cls(
            dim=config.embed_dim,
            hidden=config.ff_dim,
            num_experts=config.num_experts,
            top_k=config.moe_top_k,
            gated=config.use_gated,
            activation=config.ff_activation,
            dropout=config.ff_dropout,
            num_shared=config.num_shared_experts,
            shared_hidden=config.shared_expert_dim or config.ff_dim,
            weighted_shared=config.moe_use_weighted_shared_experts,
            bias_mode=config.moe_bias_mode,
            shared_bias_mode=config.moe_shared_experts_bias_mode,
            router_dtype=_DTYPES[config.router_dtype] if config.router_amp else None,
        )


class Router(nn.Module):
    """The linear map from a token to one logit per expert, without bias."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)


class ExpertWeights(NamedTuple):
    """The tensors of all experts, one per expert."""

    w1: list[Tensor]
    w2: list[Tensor]
    b1: list[Tensor]
    b2: list[Tensor]


class PerExpertMixtureOfExperts(nn.Module):
    """One feed-forward module per expert; every bias is the expert's own, shared experts have the routed width."""

    def __init__(self, options: MixtureOfExpertsOptions) -> None:
        super().__init__()
        self.options = options

        def expert() -> FeedForward:
            return FeedForward(options.dim, options.hidden, gated=options.gated, activation_name=options.activation)

        self.router = Router(options.dim, options.num_experts)
        self.experts = nn.ModuleList(expert() for _ in range(options.num_experts))
        if options.num_shared:
            self.shared_experts = nn.ModuleList(expert() for _ in range(options.num_shared))
        if options.num_shared > 1:
            self.shared_expert_gate = nn.Linear(options.dim, options.num_shared, bias=False)

    @staticmethod
    def _weights(experts: nn.ModuleList) -> ExpertWeights:
        layers = [cast(FeedForward, expert) for expert in experts]
        return ExpertWeights(
            w1=[layer.first_linear.weight for layer in layers],
            w2=[layer.fc2.weight for layer in layers],
            b1=[layer.first_linear.bias for layer in layers],
            b2=[layer.fc2.bias for layer in layers],
        )

    def _shared(self) -> SharedExperts | None:
        if not self.options.num_shared:
            return None
        gate = self.shared_expert_gate.weight if self.options.num_shared > 1 else None
        return SharedExperts(*self._weights(self.shared_experts), gate_weight=gate)

    def forward(self, x: Tensor) -> MixtureOfExpertsOutput:
        """(..., D) to the output (..., D) and the load-balance loss (a scalar)."""
        options = self.options
        weights = self._weights(self.experts)
        return mixture_of_experts(
            x,
            self.router.gate.weight,
            weights.w1,
            weights.w2,
            top_k=options.top_k,
            b1=weights.b1,
            b2=weights.b2,
            activation=options.activation,
            gated=options.gated,
            shared=self._shared(),
            router_dtype=options.router_dtype,
            dropout=options.dropout if self.training else 0.0,
        )


class StackedMixtureOfExperts(nn.Module):
    """One tensor for all experts, applied as ``x @ w``; biases per expert, one for all experts, or none."""

    def __init__(self, options: MixtureOfExpertsOptions) -> None:
        super().__init__()
        self.options = options
        dim, hidden, experts = options.dim, options.hidden, options.num_experts
        wide = 2 if options.gated else 1

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).normal_(std=0.02))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.router = Router(dim, experts)
        self.w1 = normal(experts, dim, wide * hidden)
        self.w2 = normal(experts, hidden, dim)
        self.b1 = zeros(experts, wide * hidden) if options.bias_mode == "local" else None
        self.b2 = zeros(experts, dim) if options.bias_mode == "local" else None
        self.global_bias = zeros(dim) if options.bias_mode == "global" else None
        shared, shared_hidden = options.num_shared, options.shared_hidden
        shared_bias = options.shared_bias_mode if shared else "off"
        if shared == 1:
            self.shared_expert = FeedForward(
                dim, shared_hidden, gated=options.gated, activation_name=options.activation
            )
            if shared_bias != "local":
                self.shared_expert.first_linear.register_parameter("bias", None)
                self.shared_expert.fc2.register_parameter("bias", None)
        elif shared > 1:
            self.shared_w1 = normal(shared, dim, wide * shared_hidden)
            self.shared_w2 = normal(shared, shared_hidden, dim)
            self.shared_b1 = zeros(shared, wide * shared_hidden) if shared_bias == "local" else None
            self.shared_b2 = zeros(shared, dim) if shared_bias == "local" else None
            self.shared_expert_gate = nn.Linear(dim, shared, bias=False)
        self.shared_experts_bias = zeros(dim) if shared_bias == "global" else None

    def _shared(self) -> SharedExperts | None:
        options = self.options
        if options.num_shared == 0:
            return None
        if options.num_shared == 1:
            first, second = self.shared_expert.first_linear, self.shared_expert.fc2
            local = first.bias is not None
            return SharedExperts(
                w1=[first.weight],
                w2=[second.weight],
                b1=[first.bias] if local else None,
                b2=[second.bias] if local else None,
                gate_weight=None,
                global_bias=self.shared_experts_bias,
                weighted=options.weighted_shared,
            )
        return SharedExperts(
            w1=self.shared_w1,
            w2=self.shared_w2,
            b1=self.shared_b1,
            b2=self.shared_b2,
            gate_weight=self.shared_expert_gate.weight,
            global_bias=self.shared_experts_bias,
            weighted=options.weighted_shared,
        )

    def forward(self, x: Tensor) -> MixtureOfExpertsOutput:
        """(..., D) to the output (..., D) and the load-balance loss (a scalar)."""
        options = self.options
        return mixture_of_experts(
            x,
            self.router.gate.weight,
            self.w1,
            self.w2,
            top_k=options.top_k,
            b1=self.b1,
            b2=self.b2,
            global_bias=self.global_bias,
            activation=options.activation,
            gated=options.gated,
            shared=self._shared(),
            router_dtype=options.router_dtype,
            dropout=options.dropout if self.training else 0.0,
        )


def make_mixture_of_experts(config: TransformerConfig) -> PerExpertMixtureOfExperts | StackedMixtureOfExperts:
    """The mixture of experts a configuration describes, in the layout its checkpoint has."""
    options = MixtureOfExpertsOptions.of(config)
    return StackedMixtureOfExperts(options) if config.use_vectorized_moe else PerExpertMixtureOfExperts(options)
