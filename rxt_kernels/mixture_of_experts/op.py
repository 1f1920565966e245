"""Public mixture of experts: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import (
    FLOATING,
    alike,
    floating,
    probability,
    refuse_device,
    refuse_shape,
    refuse_type,
    refuse_value,
)
from rxt_kernels.dispatch import Operation
from rxt_kernels.mixture_of_experts.reference import (
    ACCUMULATIONS,
    ACTIVATIONS,
    ExpertTensors,
    MixtureOfExpertsOutput,
    Routing,
    SharedExperts,
    chosen_experts_reference,
    load_balance_loss_reference,
    mixture_of_experts_reference,
    route_reference,
)

_MIXTURE_OF_EXPERTS = Operation("mixture_of_experts", mixture_of_experts_reference)
_ROUTED_EXPERTS = Operation("routed_experts", chosen_experts_reference)

if triton_runtime.available():
    from rxt_kernels.mixture_of_experts import triton

    _MIXTURE_OF_EXPERTS.register("triton", triton.mixture_of_experts_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.mixture_of_experts import native

    _MIXTURE_OF_EXPERTS.register("native", native.mixture_of_experts_native, native.supports, devices=("cpu",))
    _ROUTED_EXPERTS.register("native", native.routed_experts_native, native.supports_routed, devices=("cpu",))


def _check_router(x: Tensor, router_weight: Tensor, top_k: int, router_dtype: torch.dtype | None) -> None:
    floating("x", x)
    if x.dim() == 0:
        refuse_shape("x", x, "(..., D)")
    alike("router_weight", router_weight, "x", x)
    if router_weight.dim() != 2 or router_weight.shape[1] != x.shape[-1]:
        refuse_shape("router_weight", router_weight, f"(E, D) with D = {x.shape[-1]}, the last dimension of x")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        refuse_type("top_k", top_k, "an int")
    if not 1 <= top_k <= router_weight.shape[0]:
        refuse_value("top_k", top_k, f"from 1 to the number of experts, {router_weight.shape[0]}")
    if router_dtype is not None and router_dtype not in FLOATING:
        refuse_value("router_dtype", router_dtype, "None or a floating point torch.dtype")


def _check_tensors(name: str, tensors: ExpertTensors, stacked: bool, shape: tuple[int, ...], x: Tensor) -> None:
    """Require E tensors of `shape`, stacked or not; matrices are transposed in the stacked layout."""
    if isinstance(tensors, Tensor) is not stacked:
        refuse_type(name, tensors, "one stacked tensor if w1 is one, else a sequence of one tensor per expert")
    if isinstance(tensors, Tensor):
        alike(name, tensors, "x", x)
        if tensors.shape != shape:
            refuse_shape(name, tensors, f"{shape}, stacked over the experts")
        return
    if len(tensors) != shape[0]:
        raise ValueError(f"{name} has {len(tensors)} tensors; accepted is one per expert, here {shape[0]}.")
    each = shape[:0:-1]
    # dtype and device are looked at once: comparing every expert would cost more than running one at a single token.
    alike(name, tensors[0], "x", x)
    # At a single token (decode) the first and last stand for all: 42 comparisons would cost a tenth of the layer, and a
    # longer input has come before.
    for tensor in tensors if x.numel() > x.shape[-1] else (tensors[0], tensors[-1]):
        if tensor.shape != each:
            refuse_shape(f"a tensor of {name}", tensor, f"{each}, the layout of torch.nn.Linear")


def _check_experts(
    prefix: str,
    x: Tensor,
    count: int | None,
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    gated: bool,
) -> int:
    dim = x.shape[-1]
    stacked = isinstance(w1, Tensor)
    if not stacked and not isinstance(w1, Sequence):
        refuse_type(f"{prefix}w1", w1, "one stacked tensor, or a sequence of one tensor per expert")
    if isinstance(w1, Tensor):
        if w1.dim() != 3:
            refuse_shape(f"{prefix}w1", w1, "(experts, D, hidden width)")
        number, width = w1.shape[0], w1.shape[2]
    else:
        number = len(w1)
        if not number or not isinstance(w1[0], Tensor) or w1[0].dim() != 2:
            raise ValueError(
                f"{prefix}w1 is a sequence that starts with no matrix; accepted is one (width, D) per expert."
            )
        width = w1[0].shape[0]
    if number < 1 or (count is not None and number != count):
        raise ValueError(
            f"{prefix}w1 has {number} experts; accepted is {count or 'at least one'}, as router_weight has."
        )
    if gated and width % 2:
        raise ValueError(f"{prefix}w1 has width {width}; accepted is an even one, since gated experts halve it.")
    hidden = width // 2 if gated else width
    _check_tensors(f"{prefix}w1", w1, stacked, (number, dim, width), x)
    _check_tensors(f"{prefix}w2", w2, stacked, (number, hidden, dim), x)
    if b1 is not None:
        _check_tensors(f"{prefix}b1", b1, stacked, (number, width), x)
    if b2 is not None:
        _check_tensors(f"{prefix}b2", b2, stacked, (number, dim), x)
    return number


def _check_bias(name: str, bias: Tensor, x: Tensor) -> None:
    alike(name, bias, "x", x)
    if bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        refuse_shape(name, bias, f"(D,) with D = {x.shape[-1]}")


def _check_shared(x: Tensor, shared: SharedExperts, gated: bool) -> None:
    if not isinstance(shared, SharedExperts):
        refuse_type("shared", shared, "rxt_kernels.SharedExperts or None")
    number = _check_experts("shared.", x, None, shared.w1, shared.w2, shared.b1, shared.b2, gated)
    gates = 0 if shared.gate_weight is None else 1
    if (number > 1 and not gates) or (number == 1 and gates):
        raise ValueError(
            f"shared.gate_weight is {'given' if gates else 'None'} for {number} shared expert(s); accepted is a gate "
            "exactly if there is more than one."
        )
    if shared.gate_weight is not None:
        alike("shared.gate_weight", shared.gate_weight, "x", x)
        if shared.gate_weight.shape != (number, x.shape[-1]):
            refuse_shape("shared.gate_weight", shared.gate_weight, f"({number}, {x.shape[-1]})")
    if shared.global_bias is not None:
        _check_bias("shared.global_bias", shared.global_bias, x)


def route(x: Tensor, router_weight: Tensor, top_k: int, router_dtype: torch.dtype | None = None) -> Routing:
    """Softmax router: which experts each token goes to, and with which weights (specification 2.8).

    Args:
        x: (..., D); N is the product of the leading dimensions.
        router_weight: (E, D).
        top_k: how many experts a token goes to, 1 to E.
        router_dtype: dtype of the logits; None is that of x.

    Returns:
        Routing(weights (N, K), experts (N, K), probabilities (N, K)); columns go from the most probable expert down.

    Raises:
        TypeError, ValueError: a shape, dtype, device or range is not accepted.

    Example:
        >>> import torch
        >>> route(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]), 2).experts
        tensor([[1, 2]])
    """
    _check_router(x, router_weight, top_k, router_dtype)
    return route_reference(x.reshape(-1, x.shape[-1]), router_weight, top_k, router_dtype)


def load_balance_loss(routing: Routing, number_of_experts: int) -> Tensor:
    """Load-balance loss of a routing (specification 2.8), without the shared-gate term.

    Args:
        routing: what :func:`route` returned.
        number_of_experts: E.

    Returns:
        Scalar E * sum_e f_e * pbar_e.

    Raises:
        TypeError, ValueError: routing is none, or number_of_experts is smaller than its number of columns.

    Example:
        >>> import torch
        >>> load_balance_loss(route(torch.zeros(4, 2), torch.zeros(8, 2), 2), 8)
        tensor(1.0000)
    """
    if not isinstance(routing, Routing):
        refuse_type("routing", routing, "rxt_kernels.Routing, the result of route")
    if number_of_experts < routing.probabilities.shape[-1]:
        refuse_value("number_of_experts", number_of_experts, f"at least {routing.probabilities.shape[-1]}, the top_k")
    return load_balance_loss_reference(routing.probabilities, number_of_experts)


def mixture_of_experts(
    x: Tensor,
    router_weight: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    *,
    top_k: int,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    global_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    shared: SharedExperts | None = None,
    router_dtype: torch.dtype | None = None,
    accumulation: str = "descending_probability",
    dropout: float = 0.0,
    backend: str = "auto",
) -> MixtureOfExpertsOutput:
    """Sparse feed-forward layer: each token goes through its top_k experts (specification 2.8).

    Args:
        x: (..., D).
        router_weight: (E, D).
        w1: (E, D, 2F) applied as x @ w1[e], or a sequence of E tensors (2F, D) in the layout of torch.nn.Linear.
            Without gating F instead of 2F.
        w2: (E, F, D), or E tensors (D, F).
        top_k: experts per token, 1 to E.
        b1, b2: (E, 2F) and (E, D), or E tensors (2F,) and (D,); None for no bias per expert.
        global_bias: (D,) added last, unscaled.
        activation: "silu" (or "swish"), "relu", "gelu", "sigmoid" or "linear".
        gated: the first half of the hidden width times the activation of the second.
        shared: experts that every token goes through.
        router_dtype: dtype of the router logits; None is that of x.
        accumulation: "descending_probability" or "expert_index", the order in which a token's experts are summed.
        dropout: probability of dropping a hidden unit of a routed or shared expert; pass 0 outside of training.
        backend: "auto", "reference", "triton" or "native". The reference reads the group sizes on the host.

    Returns:
        MixtureOfExpertsOutput(output like x, load_balance_loss scalar).

    Raises:
        TypeError, ValueError: a type, shape, dtype, device, range or name is not accepted.

    Example:
        >>> import torch
        >>> x, router = torch.randn(2, 3, 8), torch.randn(4, 8)
        >>> mixture_of_experts(x, router, torch.randn(4, 8, 32), torch.randn(4, 16, 8), top_k=2).output.shape
        torch.Size([2, 3, 8])
    """
    _check_router(x, router_weight, top_k, router_dtype)
    _check_experts("", x, router_weight.shape[0], w1, w2, b1, b2, gated)
    if global_bias is not None:
        _check_bias("global_bias", global_bias, x)
    if activation not in ACTIVATIONS:
        refuse_value("activation", activation, ", ".join(repr(name) for name in ACTIVATIONS))
    if shared is not None:
        _check_shared(x, shared, gated)
    if accumulation not in ACCUMULATIONS:
        refuse_value("accumulation", accumulation, "'descending_probability' or 'expert_index'")
    probability("dropout", dropout)
    arguments = (
        x, router_weight, w1, w2, top_k, b1, b2, global_bias, activation, gated, shared, router_dtype, accumulation, dropout,
    )  # fmt: skip
    return _MIXTURE_OF_EXPERTS.select(backend, *arguments)(*arguments)


def routed_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    *,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The experts of :func:`mixture_of_experts` behind a router of your own.

    Args:
        x: (N, D).
        weights: (N, K), float32 or wider: what each choice counts.
        chosen: (N, K) int64, the experts that each token goes to, 0 to E - 1.
        w1, w2, b1, b2: as in :func:`mixture_of_experts`.
        activation: as there.
        gated: one half of the hidden width times the activation of the other.
        gate_first: the gate is the first half instead of the second.
        backend: "auto", "reference" or "native".

    Returns:
        (N, D) like x: for every token, the sum of its K experts times their weights.

    Raises:
        TypeError, ValueError: a type, shape, dtype, device, range or name is not accepted. On a GPU experts that do not exist
            are not noticed, since looking would wait for it.

    Example:
        >>> import torch
        >>> x, chosen, weights = torch.randn(3, 8), torch.tensor([[0, 2], [1, 3], [2, 3]]), torch.full((3, 2), 0.5)
        >>> routed_experts(x, weights, chosen, torch.randn(4, 8, 32), torch.randn(4, 16, 8)).shape
        torch.Size([3, 8])
    """
    floating("x", x)
    if x.dim() != 2:
        refuse_shape("x", x, "(N, D)")
    count = _check_experts("", x, None, w1, w2, b1, b2, gated)
    if not isinstance(chosen, Tensor) or chosen.dtype is not torch.int64:
        refuse_type("chosen", chosen, "an int64 tensor")
    if chosen.dim() != 2 or chosen.shape[0] != x.shape[0] or chosen.shape[1] < 1:
        refuse_shape("chosen", chosen, f"(N, K) with N = {x.shape[0]}, the rows of x")
    wide = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(weights, Tensor) or weights.dtype is not wide:
        refuse_type("weights", weights, f"a tensor of {wide}")
    if weights.shape != chosen.shape:
        refuse_shape("weights", weights, f"the shape of chosen, {tuple(chosen.shape)}")
    for name, tensor in (("weights", weights), ("chosen", chosen)):
        if tensor.device != x.device:
            refuse_device(name, tensor, "x", x)
    if chosen.device.type == "cpu" and chosen.numel() and not torch.compiler.is_compiling():
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= count:
            refuse_value("chosen", low if low < 0 else high, f"from 0 to {count - 1}, the experts that there are")
    if activation not in ACTIVATIONS:
        refuse_value("activation", activation, ", ".join(repr(name) for name in ACTIVATIONS))
    if gate_first and not gated:
        raise ValueError("gate_first is True for experts without a gate; leave it out.")
    arguments = (x, weights, chosen, w1, w2, b1, b2, activation, gated, gate_first)
    return _ROUTED_EXPERTS.select(backend, *arguments)(*arguments)
