"""Sparse feed-forward layers: softmax top-k router, experts, shared experts, load-balance loss."""

from rxt_kernels.mixture_of_experts.op import load_balance_loss, mixture_of_experts, route, routed_experts
from rxt_kernels.mixture_of_experts.reference import (
    MixtureOfExpertsOutput,
    Routing,
    SharedExperts,
    load_balance_loss_reference,
    mixture_of_experts_reference,
    route_reference,
)

__all__ = [
    "MixtureOfExpertsOutput",
    "Routing",
    "SharedExperts",
    "load_balance_loss",
    "load_balance_loss_reference",
    "mixture_of_experts",
    "mixture_of_experts_reference",
    "route",
    "route_reference",
    "routed_experts",
]
