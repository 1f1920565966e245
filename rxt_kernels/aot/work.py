"""What a launch must spend at least: operations, and bytes of every tensor that it touches, each counted once.

Bytes follow from the code: the arguments that it reads and writes. Operations are given here for every kernel, by the
formula in its docstring, with a score, an activation or a norm counted to first order. A kernel that is missing here is an
error, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxt_kernels.aot.targets import Target

__all__ = ["KERNELS", "Bound", "Work", "bound_of", "tensor_bytes", "work_of"]

Values = Mapping[str, Any]
"""The arguments and constants of a launch, by name."""


class Work(NamedTuple):
    """Operations of one launch: a multiplication and an addition are two.

    Attributes:
        products: in matrix products of tiles.
        in_half: whether these are of half precision, for matrix units.
        others: element by element.
        specials: exponentials, sines and the like.
    """

    products: int = 0
    in_half: bool = False
    others: int = 0
    specials: int = 0


class Bound(NamedTuple):
    """Seconds that a launch cannot beat on a target, and what it would wait for.

    Attributes:
        seconds: by bytes and operations.
        limit: ``bytes``, ``products`` or ``others``.
        special_seconds: of exponentials and sines on the units made for them. No strict bound: they can be computed on
            others, but Triton's code does not.
    """

    seconds: float
    limit: str
    special_seconds: float


def _size(values: Values, name: str) -> int:
    tensor: Tensor = values[name]
    return tensor.numel()


def _is_half(values: Values, name: str) -> bool:
    return bool(values[name].dtype in (torch.float16, torch.bfloat16))


def _attention(products: int, values: Values, others_per_value: int = 0) -> Work:
    """So many matrix products between a query, a key and a head's width, for every pair that sees each other."""
    batch, query_time, query_heads, head_dim = values["query"].shape
    key_time = int(values["key_time"])
    pairs = query_time * key_time
    if values["CAUSAL"]:
        pairs = sum(min(max(place + 1 + key_time - query_time, 0), key_time) for place in range(query_time))
    scores = batch * int(values["HEADS"]) * pairs
    return Work(
        2 * products * scores * head_dim, _is_half(values, "query"),
        others_per_value * batch * query_time * query_heads * head_dim, scores,
    )  # fmt: skip


def _elementwise(name: str, others: int, specials: int = 0) -> Callable[[Values], Work]:
    """So many operations for every value of a tensor."""
    return lambda values: Work(others=others * _size(values, name), specials=specials * _size(values, name))


def _rotary(values: Values) -> Work:
    # A token's sines are taken again for each of its heads.
    return Work(others=3 * _size(values, "x"), specials=_size(values, "x"))


def _experts_up(values: Values) -> Work:
    rows, wide = _size(values, "order"), 2 if values["GATED"] else 1
    return Work(
        2 * rows * values["inner"] * values["width"] * wide, _is_half(values, "x"), 2 * rows * values["width"],
        rows * values["width"],
    )  # fmt: skip


def _experts_down(values: Values) -> Work:
    return Work(2 * _size(values, "order") * values["inner"] * values["width"], _is_half(values, "b"))


def _experts_weight_gradient(values: Values) -> Work:
    return Work(2 * _size(values, "order") * values["a_width"] * values["b_width"], _is_half(values, "a"))


def _route(values: Values) -> Work:
    scores = values["tokens"] * values["experts"]
    # Each of the top k is found by a comparison with every expert.
    return Work(2 * scores * values["inner"], _is_half(values, "logits"), 2 * values["TOP_K"] * scores, scores)


def _route_backward(values: Values) -> Work:
    scores = values["tokens"] * values["experts"]
    return Work(others=(8 + 2 * values["TOP_K"]) * scores, specials=scores)


def _scatter(values: Values) -> Work:
    return Work(others=(2 + values["TOP_K"]) * values["tokens"] * values["experts"])


KERNELS: Mapping[str, Callable[[Values], Work]] = {
    "_cross_entropy_bwd_kernel": _elementwise("logits", 3, 1),
    "_cross_entropy_fwd_kernel": _elementwise("logits", 3, 2),
    "_memory_update_gate_bwd_kernel": _elementwise("gradient", 6),
    "_memory_update_gate_bwd_opening_kernel": _elementwise("gradient", 3),
    "_memory_update_gate_fwd_kernel": _elementwise("out", 5),
    "_memory_update_gate_status_kernel": _elementwise("old", 2),
    "_memory_update_norm_bwd_kernel": _elementwise("gradient", 9),
    "_memory_update_norm_fwd_kernel": _elementwise("out", 4),
    "_moe_activation_gradient_kernel": _elementwise("hidden_gradient", 8, 1),
    "_moe_combine_kernel": _elementwise("results", 2),
    "_moe_down_kernel": _experts_down,
    "_moe_route_backward_kernel": _route_backward,
    "_moe_route_kernel": _route,
    "_moe_routing_gradient_kernel": _elementwise("results", 2),
    "_moe_scan_kernel": _elementwise("counts", 2),
    "_moe_scatter_kernel": _scatter,
    "_moe_up_kernel": _experts_up,
    "_moe_weight_gradient_kernel": _experts_weight_gradient,
    "_rms_norm_bwd_kernel": _elementwise("x", 9),
    "_rms_norm_fwd_kernel": _elementwise("x", 4),
    "_rotary_kernel": _rotary,
    "_sqa_bwd_dkdv_kernel": lambda values: _attention(4, values),
    "_sqa_bwd_dq_kernel": lambda values: _attention(3, values, others_per_value=2),
    "_sqa_decode_combine_kernel": _elementwise("mixed", 2),
    "_sqa_decode_kernel": lambda values: _attention(2, values),
    "_sqa_fwd_kernel": lambda values: _attention(2, values),
    "_swiglu_bwd_kernel": _elementwise("gradient", 8, 1),
    "_swiglu_fwd_kernel": _elementwise("out", 3, 1),
}
"""Operations of every kernel of the package."""

_OF_EXPERTS = {"_moe_up_kernel": ("w1", "b1"), "_moe_down_kernel": ("b", "bias")}
"""Arguments with a part per expert, of which only the experts that are chosen are read."""


def work_of(kernel: str, values: Values) -> Work:
    """Operations of a launch.

    Raises:
        ValueError: the kernel is not known here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"nothing is known of the work of {kernel}; add it to rxt_kernels/aot/work.py.")
    return KERNELS[kernel](values)


def tensor_bytes(kernel: str, values: Values) -> dict[str, int]:
    """Bytes of every tensor of a launch; what is repeated by a stride of zero counts once, and idle experts do not."""
    found = {}
    for name, tensor in values.items():
        if not isinstance(tensor, Tensor):
            continue
        count = tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else min(size, 1)
        if name in _OF_EXPERTS.get(kernel, ()):
            experts = int(values["experts"])
            count = count * min(experts, _size(values, "order")) // experts
        found[name] = count
    return found


def bound_of(work: Work, moved: int, target: Target) -> Bound:
    """The time that a launch cannot beat, from what it must move and compute.

    Example:
        >>> from rxt_kernels.aot.targets import TARGETS
        >>> bound_of(Work(products=2 * 10**12, in_half=True), 10**6, TARGETS["sm_80"]).limit
        'products'
    """
    times = {
        "bytes": moved / target.bandwidth,
        "products": work.products / (target.matrix_rate if work.in_half else target.vector_rate),
        "others": work.others / target.vector_rate,
    }
    limit = max(times, key=times.__getitem__)
    return Bound(times[limit], limit, work.specials / target.special_rate)
