"""Mixture of experts, the definition (specification 2.7, 2.8).

Routing: ``p = softmax(x Wg^T)`` over all E experts; the K largest are kept and renormalised,
``w = p / (sum p + 1e-9)``. No capacity limit, no dropped token.

    expert_e(x) = dropout(l * act(g)) W2_e + b2_e    with [l, g] = x W1_e + b1_e   (not gated: act(x W1_e + b1_e))
    routed(x)   = sum over the K chosen experts of w_k * expert_k(x)
    shared(x)   = expert(x) for one shared expert, sum_j softmax(x Ws^T)_j * expert_j(x) for n > 1, + its global bias
    output      = routed + shared, or routed * K / (K + n) + shared * n / (K + n) if weighted; + global bias, unscaled

Load balance: ``E * sum_e f_e * pbar_e`` with ``f_e = count_e / (N K + 1e-6)`` and pbar_e the mean, over the tokens that
chose e, of p before renormalisation. (The Switch loss averages over all tokens instead.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertTensors: TypeAlias = Tensor | Sequence[Tensor]
"""One stacked tensor, applied as x @ w[e], or one tensor per expert in the layout of torch.nn.Linear."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}

ACCUMULATIONS = ("descending_probability", "expert_index")


class Routing(NamedTuple):
    """Which experts each of N tokens goes to: K columns in the order of falling probability."""

    weights: Tensor
    """(N, K) renormalised weights, float32 or wider."""
    experts: Tensor
    """(N, K) int64 expert numbers."""
    probabilities: Tensor
    """(N, K) probabilities before the renormalisation."""


class SharedExperts(NamedTuple):
    """Experts that every token goes through; either layout of :data:`ExpertTensors`, any width."""

    w1: ExpertTensors
    w2: ExpertTensors
    b1: ExpertTensors | None = None
    b2: ExpertTensors | None = None
    gate_weight: Tensor | None = None
    """(n, D), given exactly if n > 1."""
    global_bias: Tensor | None = None
    """(D,) added to the sum of the shared experts."""
    weighted: bool = False
    """Scale routed experts by K / (K + n) and shared ones by n / (K + n)."""


class MixtureOfExpertsOutput(NamedTuple):
    """What :func:`mixture_of_experts` returns."""

    output: Tensor
    """Like x."""
    load_balance_loss: Tensor
    """Scalar, float32 or wider."""


def route_reference(x: Tensor, router_weight: Tensor, top_k: int, router_dtype: torch.dtype | None = None) -> Routing:
    """x (N, D), router_weight (E, D) -> Routing; the logits are taken in `router_dtype`, the softmax in float32."""
    if router_dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(router_dtype), router_weight.to(router_dtype))
    else:
        logits = F.linear(x, router_weight)
    every = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    probabilities, experts = every.topk(top_k, dim=-1)
    weights = probabilities / (probabilities.sum(dim=-1, keepdim=True) + 1e-9)
    return Routing(weights, experts, probabilities)


def load_balance_loss_reference(probabilities: Tensor, number_of_experts: int) -> Tensor:
    """probabilities (N, K) of the chosen experts -> scalar.

    f_e * pbar_e = (count_e / (N K + 1e-6)) * (sum_e / count_e): the counts cancel, and nothing has to be counted.
    """
    return probabilities.sum() * (number_of_experts / (probabilities.numel() + 1e-6))


def expert_reference(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    gated: bool,
    hidden_scale: Tensor | None = None,
    gate_first: bool = False,
) -> Tensor:
    """One feed-forward network: x (N, D), w1 (2F or F, D), w2 (D, F), hidden_scale (N, F) -> (N, D)."""
    hidden = F.linear(x, w1, b1)
    if gated:
        halves = hidden.chunk(2, dim=-1)
        linear, gate = halves[::-1] if gate_first else halves
        hidden = linear * ACTIVATIONS[activation](gate)
    else:
        hidden = ACTIVATIONS[activation](hidden)
    if hidden_scale is not None:
        hidden = hidden * hidden_scale
    return F.linear(hidden, w2, b2)


def dropout_scale(x: Tensor, columns: int, width: int, dropout: float) -> Tensor | None:
    """Dropout of hidden units as the factor they are multiplied with: x (N, D) -> (N, columns, width) of 0 or 1 / (1 - p).

    Drawn apart from the experts, so that an opaque operation gives the same result forward and backward.
    """
    return F.dropout(x.new_ones(x.shape[0], columns, width), dropout) if dropout else None


class Experts(NamedTuple):
    """E feed-forward networks: `experts(x, e)` is expert e of x. Build it with :func:`make_experts`."""

    w1: ExpertTensors
    w2: ExpertTensors
    b1: ExpertTensors | None
    b2: ExpertTensors | None
    transposed: bool
    """The matrices are stored input first, as a stacked tensor holds them."""
    activation: str
    gated: bool
    gate_first: bool = False
    """The gate is the first half of the hidden width, not the second."""

    @property
    def hidden_width(self) -> int:
        """F, the width between the two matrices."""
        second = self.w2[0]
        return second.shape[0 if self.transposed else 1]

    def __call__(self, x: Tensor, expert: int, hidden_scale: Tensor | None = None) -> Tensor:
        w1, w2 = self.w1[expert], self.w2[expert]
        return expert_reference(
            x,
            w1.t() if self.transposed else w1,
            w2.t() if self.transposed else w2,
            None if self.b1 is None else self.b1[expert],
            None if self.b2 is None else self.b2[expert],
            self.activation,
            self.gated,
            hidden_scale,
            self.gate_first,
        )


def make_experts(
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    activation: str,
    gated: bool,
    gate_first: bool = False,
) -> Experts:
    """The experts of either layout, ready to be called one by one."""
    stacked = isinstance(w1, Tensor)
    if stacked and torch.is_grad_enabled():
        # The gradient of one unbind is one stack; that of E single selections would be E tensors of full size.
        w1, w2, b1, b2 = _unbind(w1), _unbind(w2), b1 if b1 is None else _unbind(b1), b2 if b2 is None else _unbind(b2)
    return Experts(w1, w2, b1, b2, stacked, activation, gated, gate_first)


def _unbind(tensors: ExpertTensors) -> ExpertTensors:
    return tensors.unbind() if isinstance(tensors, Tensor) else tensors


def group_by_expert(chosen: Tensor, number_of_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """chosen (N, K) -> (order, back, sizes) of the N * K choices.

    order (N * K,) lists the choices expert by expert, back undoes it, and sizes, on the host, counts each expert's.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return order, back, torch.bincount(flat, minlength=number_of_experts).tolist()


def routed_experts_reference(
    x: Tensor, routing_weights: Tensor, chosen: Tensor, experts: Experts, hidden_scale: Tensor | None = None
) -> Tensor:
    """x (N, D), routing_weights and chosen (N, K) -> sum_k routing_weights[:, k] * expert_{chosen[:, k]}(x), (N, D).

    hidden_scale (N, K, F) multiplies the hidden units of each choice; it is how dropout comes in.

    Tokens are grouped by expert, so that each expert that has tokens runs once; the host reads the group sizes. The sum
    runs over the columns from first to last. The result has the dtype of the weights, float32 or wider.
    """
    tokens, top_k = chosen.shape
    if tokens == 0:
        return x.to(routing_weights.dtype)
    if tokens == 1 and hidden_scale is None:
        columns = [experts(x, expert) for expert in chosen[0].tolist()]
    else:
        order, back, sizes = group_by_expert(chosen, len(experts.w1))
        groups = x.index_select(0, order // top_k).split(sizes)
        scales: Sequence[Tensor | None] = [None] * len(groups)
        if hidden_scale is not None:
            scales = hidden_scale.flatten(0, 1).index_select(0, order).split(sizes)
        results = [experts(group, expert, scales[expert]) for expert, group in enumerate(groups) if sizes[expert]]
        columns = list(torch.cat(results).index_select(0, back).unflatten(0, (tokens, top_k)).unbind(1))
    column_weights = routing_weights.split(1, dim=1)
    total = columns[0].to(routing_weights.dtype) * column_weights[0]
    for column, weight in zip(columns[1:], column_weights[1:], strict=True):
        total = torch.addcmul(total, column.to(routing_weights.dtype), weight)
    return total


def chosen_experts_reference(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None = None,
    b2: ExpertTensors | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_first: bool = False,
) -> Tensor:
    """As :func:`routed_experts_reference`, from tensors, and in the dtype of x."""
    if torch.compiler.is_compiling():
        from rxt_kernels.mixture_of_experts.library import routed_experts_in_graph

        if gate_first:
            w1, b1 = _gate_last(w1), None if b1 is None else _gate_last(b1)
        return routed_experts_in_graph(x, weights, chosen, w1, w2, b1, b2, None, activation, gated).to(x.dtype)
    experts = make_experts(w1, w2, b1, b2, activation, gated, gate_first)
    return routed_experts_reference(x, weights, chosen, experts).to(x.dtype)


def _gate_last(tensors: ExpertTensors) -> ExpertTensors:
    """First matrices or biases with both halves of their hidden width exchanged."""
    if isinstance(tensors, Tensor):
        return tensors.roll(tensors.shape[-1] // 2, -1)
    return [tensor.roll(tensor.shape[0] // 2, 0) for tensor in tensors]


def shared_experts_reference(
    x: Tensor, shared: SharedExperts, activation: str, gated: bool, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x (N, D) -> (output (N, D), gate imbalance mean|softmax - 1/n|, which is 0 for one shared expert)."""
    experts = make_experts(shared.w1, shared.w2, shared.b1, shared.b2, activation, gated)
    drawn = dropout_scale(x, len(experts.w1), experts.hidden_width, dropout)
    scales = [None] * len(experts.w1) if drawn is None else list(drawn.unbind(1))
    wide = torch.promote_types(x.dtype, torch.float32)
    imbalance = torch.zeros((), dtype=wide, device=x.device)
    if shared.gate_weight is None:
        output = experts(x, 0, scales[0]).to(wide)
    else:
        shares = torch.softmax(F.linear(x, shared.gate_weight), dim=-1, dtype=wide)
        imbalance = (shares - 1.0 / len(shared.w1)).abs().mean()
        output = torch.zeros(x.shape, dtype=wide, device=x.device)
        for number, share in enumerate(shares.split(1, dim=1)):
            output = torch.addcmul(output, experts(x, number, scales[number]).to(wide), share)
    if shared.global_bias is not None:
        output = output + shared.global_bias
    return output, imbalance


def add_shared_experts(
    output: Tensor,
    loss: Tensor,
    x: Tensor,
    shared: SharedExperts,
    top_k: int,
    activation: str,
    gated: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Routed output and load-balance loss -> those of routed and shared experts together."""
    shared_output, imbalance = shared_experts_reference(x, shared, activation, gated, dropout)
    number = len(shared.w1)
    if shared.weighted:
        output = output * (top_k / (top_k + number))
        shared_output = shared_output * (number / (top_k + number))
    if number > 1 and isinstance(shared.w1, Tensor):
        loss = loss + imbalance
    return output + shared_output, loss


def mixture_of_experts_reference(
    x: Tensor,
    router_weight: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
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
) -> MixtureOfExpertsOutput:
    """x (..., D) -> MixtureOfExpertsOutput(output (..., D), load_balance_loss)."""
    flat = x.reshape(-1, x.shape[-1])
    number_of_experts = router_weight.shape[0]
    weights, chosen, probabilities = route_reference(flat, router_weight, top_k, router_dtype)
    loss = load_balance_loss_reference(probabilities, number_of_experts)
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    if accumulation == "expert_index":
        chosen, by_index = chosen.sort(dim=-1)
        weights = weights.gather(-1, by_index)
    experts = make_experts(w1, w2, b1, b2, activation, gated)
    hidden_scale = dropout_scale(flat, top_k, experts.hidden_width, dropout)
    if torch.compiler.is_compiling():
        # The sizes of the groups depend on data, so a graph holds this step as one opaque operation.
        from rxt_kernels.mixture_of_experts.library import routed_experts_in_graph

        output = routed_experts_in_graph(flat, weights, chosen, w1, w2, b1, b2, hidden_scale, activation, gated)
    else:
        output = routed_experts_reference(flat, weights, chosen, experts, hidden_scale)
    if shared is not None:
        output, loss = add_shared_experts(output, loss, flat, shared, top_k, activation, gated, dropout)
    if global_bias is not None:
        output = output + global_bias
    return MixtureOfExpertsOutput(output.to(x.dtype).view(x.shape), loss)
