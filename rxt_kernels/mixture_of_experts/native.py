"""Mixture of experts by the native CPU kernels of ``csrc/mixture_of_experts``; see ``reference.py`` for the formula.

    route     logits, softmax, top-k, weights and loss
    experts   choices grouped by expert, two products with the weights where they are, weighted sum
    backward  of both

No weight is copied or packed: experts are read in the layout that they have, stacked or one tensor each. Of equally probable
experts the one with the lower number is chosen, and NaN counts as the largest probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.mixture_of_experts.reference import ExpertTensors, MixtureOfExpertsOutput, SharedExperts
from rxt_kernels.native_runtime import DTYPES, extension, is_plain_call, neighbouring_rows, unsupported_tensors


def _route_forward(
    x: Tensor, router_weight: Tensor, top_k: int, rounds: bool, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and experts of every token, the loss, and the logits; `rounds` makes it work in bfloat16."""
    tokens, experts = x.shape[0], router_weight.shape[0]
    weights = x.new_empty((tokens, top_k), dtype=torch.float32)
    chosen = x.new_empty((tokens, top_k), dtype=torch.int64)
    loss = x.new_empty((), dtype=torch.float32)
    logits = x.new_empty((tokens, experts), dtype=torch.float32)
    extension.route_forward(
        neighbouring_rows(x), router_weight.contiguous(), rounds, by_index, logits, weights, chosen, loss
    )
    return weights, chosen, loss, logits


@torch.library.custom_op("rxt_kernels::route_native", mutates_args=())
def _route(
    x: Tensor, router_weight: Tensor, top_k: int, rounds: bool, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _route_forward(x, router_weight, top_k, rounds, by_index)


@torch.library.custom_op("rxt_kernels::route_backward_native", mutates_args=())
def _route_backward(
    weights_gradient: Tensor,
    loss_gradient: Tensor,
    logits: Tensor,
    chosen: Tensor,
    x: Tensor,
    router_weight: Tensor,
    rounds: bool,
) -> tuple[Tensor, Tensor]:
    x_gradient, router_gradient = x.new_empty(x.shape), router_weight.new_empty(router_weight.shape)
    extension.route_backward(
        neighbouring_rows(x), router_weight.contiguous(), rounds, logits, chosen, weights_gradient.contiguous(), loss_gradient,
        x_gradient, router_gradient,
    )  # fmt: skip
    return x_gradient, router_gradient


@_route.register_fake
def _(
    x: Tensor, router_weight: Tensor, top_k: int, rounds: bool, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = x.shape[0], router_weight.shape[0]
    return (
        x.new_empty((tokens, top_k), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.int64),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((tokens, experts), dtype=torch.float32),
    )


@_route_backward.register_fake
def _(
    weights_gradient: Tensor, loss_gradient: Tensor, logits: Tensor, chosen: Tensor, x: Tensor, router_weight: Tensor,
    rounds: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), router_weight.new_empty(router_weight.shape)


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, chosen, _, logits = output
    x, router_weight, _, ctx.rounds, _ = inputs
    ctx.save_for_backward(logits, chosen, x, router_weight)
    ctx.mark_non_differentiable(chosen, logits)


def _route_gradients(ctx: Any, weights: Tensor, chosen: Any, loss: Tensor, _: Any) -> tuple[Any, ...]:
    return (*_route_backward(weights, loss, *ctx.saved_tensors, ctx.rounds), None, None, None)


_route.register_autograd(_route_gradients, setup_context=_keep_logits)


def _experts_forward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: Tensor | Sequence[Tensor | None],
    w2: Tensor | Sequence[Tensor | None],
    b1: Tensor | Sequence[Tensor | None] | None,
    b2: Tensor | Sequence[Tensor | None] | None,
    experts: int,
    hidden: int,
    activation: str,
    gated: bool,
    gate_first: bool,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum (N, D), float32 if `wide`, else like x; and what goes into the activation, if it is to be kept."""
    output = x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)
    width = 2 * hidden if gated else hidden
    before = x.new_empty((chosen.numel(), width), dtype=torch.float32) if keep else None
    extension.experts_forward(
        neighbouring_rows(x),
        weights,
        chosen,
        w1,
        w2,
        b1,
        b2,
        experts,
        hidden,
        activation,
        gated,
        gate_first,
        output,
        before,
    )
    return output, before


def _readable(matrices: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Matrices of which one stride is 1, as the kernels read them; a copy only where none is."""
    if isinstance(matrices, Tensor):
        return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()
    return [matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in matrices]


def _biases(biases: Sequence[Tensor], stacked: bool) -> Tensor | list[Tensor] | None:
    if not biases:
        return None
    readable = [bias if bias.stride(-1) == 1 else bias.contiguous() for bias in biases]
    return readable[0] if stacked else readable


def _count(w2: Sequence[Tensor], stacked: bool) -> tuple[int, int]:
    """How many experts there are, and their hidden width."""
    return (w2[0].shape[0], w2[0].shape[1]) if stacked else (len(w2), w2[0].shape[1])


_ARGUMENTS = (
    "Tensor x, Tensor weights, Tensor chosen, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, bool stacked, "
    "str activation, bool gated, bool gate_first"
)


@torch.library.custom_op(
    "rxt_kernels::routed_experts_native", mutates_args=(), schema=f"({_ARGUMENTS}, bool wide) -> (Tensor, Tensor)"
)
def _routed_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    stacked: bool,
    activation: str,
    gated: bool,
    gate_first: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    output, before = _experts_forward(
        x, weights.contiguous(), chosen.contiguous(), _readable(w1[0] if stacked else w1),
        _readable(w2[0] if stacked else w2), _biases(b1, stacked), _biases(b2, stacked), *_count(w2, stacked), activation,
        gated, gate_first, wide, True,
    )  # fmt: skip
    assert before is not None
    return output, before


@torch.library.custom_op(
    "rxt_kernels::routed_experts_backward_native",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor before, {_ARGUMENTS}) -> Tensor[]",
)
def _routed_experts_backward(
    gradient: Tensor,
    before: Tensor,
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    stacked: bool,
    activation: str,
    gated: bool,
    gate_first: bool,
) -> list[Tensor]:
    gradients = [[tensor.new_empty(tensor.shape) for tensor in tensors] for tensors in (w1, w2, b1, b2)]
    x_gradient, weights_gradient = x.new_empty(x.shape), weights.new_empty(weights.shape)
    extension.experts_backward(
        gradient.contiguous(), before, neighbouring_rows(x), weights.contiguous(), chosen.contiguous(),
        _readable(w1[0] if stacked else w1), _readable(w2[0] if stacked else w2), _biases(b1, stacked),
        _biases(b2, stacked), *_count(w2, stacked), activation, gated, gate_first, x_gradient, weights_gradient,
        *((own[0] if stacked else own) if own else None for own in gradients),
    )  # fmt: skip
    return [x_gradient, weights_gradient, *(tensor for own in gradients for tensor in own)]


@_routed_experts.register_fake
def _(
    x: Tensor, weights: Tensor, chosen: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], stacked: bool, activation: str, gated: bool, gate_first: bool, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden = _count(w2, stacked)[1]
    before = x.new_empty((chosen.shape[0] * chosen.shape[1], 2 * hidden if gated else hidden), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype), before


@_routed_experts_backward.register_fake
def _(
    gradient: Tensor, before: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, w1: Sequence[Tensor],
    w2: Sequence[Tensor], b1: Sequence[Tensor], b2: Sequence[Tensor], *_: Any,
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor in (x, weights, *w1, *w2, *b1, *b2)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, chosen, w1, w2, b1, b2, *ctx.options, _ = inputs
    ctx.lengths = (len(w1), len(w2), len(b1), len(b2))
    ctx.save_for_backward(output[1], x, weights, chosen, *w1, *w2, *b1, *b2)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for what the activations were given: as much memory again


def _gradients(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 12
    before, x, weights, chosen, *rest = ctx.saved_tensors
    x_gradient, weights_gradient, *others = _routed_experts_backward(
        gradient, before, x, weights, chosen, *_lists(rest, ctx.lengths), *ctx.options
    )
    return (x_gradient, weights_gradient, None, *_lists(others, ctx.lengths), None, None, None, None, None)


def _lists(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Tensors one after the other -> lists of the given lengths."""
    rest = iter(tensors)
    return [[next(rest) for _ in range(length)] for length in lengths]


_routed_experts.register_autograd(_gradients, setup_context=_keep)


def _tensors_of(experts: ExpertTensors | None) -> list[Tensor]:
    if experts is None:
        return []
    return [experts] if isinstance(experts, Tensor) else list(experts)


def _unsupported(x: Tensor, *experts: ExpertTensors | None, dropout: float = 0.0) -> str | None:
    if dropout:
        return f"dropout is {dropout}; the kernels drop no hidden units."
    if torch.is_autocast_enabled("cpu"):
        return "autocast is at work, which native kernels do not know."
    # The tensors of a list have been compared in shape; the first one stands for the dtype of all.
    return unsupported_tensors(x, *(one[0] for one in map(_tensors_of, experts) if one))


def supports_routed(
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
) -> str | None:
    """None, or why this call is not for the native kernels."""
    return _unsupported(x, w1, w2, b1, b2)


def supports(
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
) -> str | None:
    """None, or why this call is not for the native kernels."""
    if router_dtype is not None and router_dtype not in DTYPES:
        return f"router_dtype is {router_dtype}; the kernels take logits in float32 and bfloat16."
    return _unsupported(x, [router_weight], w1, w2, b1, b2, dropout=dropout)


def _routed(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    w1: ExpertTensors,
    w2: ExpertTensors,
    b1: ExpertTensors | None,
    b2: ExpertTensors | None,
    activation: str,
    gated: bool,
    wide: bool,
    gate_first: bool = False,
) -> Tensor:
    """The weighted sum of each token's experts, (N, D)."""
    stacked = isinstance(w1, Tensor)
    lists = [_tensors_of(tensors) for tensors in (w1, w2, b1, b2)]
    if not is_plain_call(x, weights, *(tensor for tensors in lists for tensor in tensors)):
        output: Tensor = _routed_experts(x, weights, chosen, *lists, stacked, activation, gated, gate_first, wide)[0]
        return output
    count, hidden = _count(lists[1], stacked)
    used: list[Any]
    if stacked:
        used = [_readable(lists[0][0]), _readable(lists[1][0])]
        used += [_biases(tensors, True) for tensors in lists[2:]]
    else:
        # Only the experts that somebody goes to are handed over: that is what a single token's time would go to.
        needed = set(chosen.flatten().tolist()) if chosen.numel() < count else range(count)
        used = [
            [_only(tensor) if expert in needed else None for expert, tensor in enumerate(tensors)] if tensors else None
            for tensors in lists
        ]
    w1, w2, b1, b2 = used
    return _experts_forward(
        x, weights, chosen, w1, w2, b1, b2, count, hidden, activation, gated, gate_first, wide, False
    )[0]


def routed_experts_native(
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
    """x (N, D), weights and chosen (N, K) -> (N, D) like x; as the reference."""
    weights, chosen = weights.contiguous(), chosen.contiguous()
    return _routed(x, weights, chosen, w1, w2, b1, b2, activation, gated, False, gate_first)


def _only(tensor: Tensor) -> Tensor:
    return tensor if 1 in tensor.stride() and (tensor.dim() > 1 or tensor.stride(0) == 1) else tensor.contiguous()


def _shared(x: Tensor, shared: SharedExperts, activation: str, gated: bool) -> tuple[Tensor, Tensor | None]:
    """The shared experts' output (N, D) in float32, and for several of them how unevenly their gate shares out."""
    number = len(shared.w1)
    imbalance = None
    if shared.gate_weight is None:
        shares = torch.ones(x.shape[0], 1)
    else:
        logits = torch.nn.functional.linear(x, shared.gate_weight)
        shares = torch.softmax(logits, dim=-1, dtype=torch.float32)
        imbalance = (shares - 1.0 / number).abs().mean()
    chosen = torch.arange(number).expand(x.shape[0], number).contiguous()
    output = _routed(x, shares, chosen, shared.w1, shared.w2, shared.b1, shared.b2, activation, gated, True)
    return output if shared.global_bias is None else output + shared.global_bias, imbalance


def mixture_of_experts_native(
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
    """x (..., D) -> MixtureOfExpertsOutput(output (..., D), load_balance_loss); as the reference."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    by_index = accumulation == "expert_index"
    rounds = (x.dtype if router_dtype is None else router_dtype) is torch.bfloat16
    route = _route_forward if is_plain_call(flat, router_weight) else _route
    weights, chosen, loss, _ = route(flat, router_weight, top_k, rounds, by_index)
    alone = shared is None and global_bias is None
    output = _routed(flat, weights, chosen, w1, w2, b1, b2, activation, gated, not alone)
    if alone:
        return MixtureOfExpertsOutput(output.view(x.shape), loss)
    if shared is not None:
        shared_output, imbalance = _shared(flat, shared, activation, gated)
        number = len(shared.w1)
        if shared.weighted:
            output = output * (top_k / (top_k + number))
            shared_output = shared_output * (number / (top_k + number))
        output = output + shared_output
        if imbalance is not None and isinstance(shared.w1, Tensor):
            loss = loss + imbalance
    if global_bias is not None:
        output = output + global_bias
    return MixtureOfExpertsOutput(output.to(x.dtype).view(x.shape), loss)
