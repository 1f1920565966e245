"""The routed experts of this package as an experts implementation of `transformers`.

    from rxt_kernels.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="rxt")    # or, of a model that is there:
    model.set_experts_implementation("rxt")

Mixture-of-experts models of `transformers` 5 keep the experts of a layer in stacked tensors and let a registered function
compute them, after the model's own router has chosen. Weights are used where they are, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rxt_kernels.mixture_of_experts import routed_experts

__all__ = ["NAME", "experts_forward", "register"]

NAME = "rxt"

_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "ReLU": "relu", "Sigmoid": "sigmoid",
    "LinearActivation": "linear",
}  # fmt: skip
"""Ours by the names of the classes that `transformers` has for them; its other kinds of GELU are approximations."""


def register(name: str = NAME) -> None:
    """Make ``experts_implementation=name`` known to `transformers`; doing so again changes nothing.

    Raises:
        ImportError: `transformers` is absent, or older than its interface for experts (5.0).
        ValueError: somebody else has registered another function under this name.
    """
    interface = _interface()
    known = interface.get(name)
    if known is not None and known is not experts_forward:
        raise ValueError(f"name is {name!r}, under which transformers has another implementation; take another name.")
    interface.register(name, experts_forward)


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        try:
            from transformers import __version__ as version
        except ImportError:
            raise ImportError("transformers is not installed; install transformers>=5.") from error
        raise ImportError(
            f"transformers {version} has no interface for experts (ALL_EXPERTS_FUNCTIONS); install transformers>=5."
        ) from error
    return ALL_EXPERTS_FUNCTIONS


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts of a layer add up to; called by `transformers` in place of their own forward pass.

    Args:
        self: the module that holds the experts' weights.
        hidden_states: (N, D).
        top_k_index: (N, K) int64.
        top_k_weights: (N, K).

    Raises:
        ValueError: experts that compute something else than this package's, such as another activation; the message says what.
    """
    experts: Any = self
    if (reason := _unknown(experts)) is not None:
        raise ValueError(
            f"rxt_kernels cannot compute the experts of {type(self).__name__}: {reason} Choose another "
            'implementation with model.set_experts_implementation("eager").'
        )
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, first), experts.down_proj
    if not experts.is_transposed:  # (E, outputs, inputs); ours are applied as x @ w
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    with_bias = experts.has_bias
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return routed_experts(
        hidden_states,
        top_k_weights.to(wide),
        top_k_index,
        w1,
        w2,
        b1=getattr(experts, f"{first}_bias") if with_bias else None,
        b2=experts.down_proj_bias if with_bias else None,
        activation=_ACTIVATIONS[type(experts.act_fn).__name__],
        gated=experts.has_gate,
        gate_first=experts.has_gate,
    )


def _unknown(experts: Any) -> str | None:
    """Why experts are none of ours, in one sentence; None if they are."""
    if getattr(experts, "_is_expert_parallel", False):
        return "they are spread over several devices."
    if getattr(experts, "has_post_expert_norm", False):
        return "each has a norm behind it."
    if experts.has_gate and not experts.is_concatenated:
        return "gate and linear half take turns inside of their first matrix."
    if experts.has_gate and type(experts)._apply_gate.__name__ != "_default_apply_gate":
        return "their gate is none of activation(gate) * linear."
    if type(experts.act_fn).__name__ not in _ACTIVATIONS:
        return f"their activation is {type(experts.act_fn).__name__}; accepted are {', '.join(sorted(_ACTIVATIONS))}."
    return None
