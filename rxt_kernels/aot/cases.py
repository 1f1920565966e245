"""What is compiled: every operation at the shapes of every published model, training, prefill and decode.

A case calls the function of the Triton backend as a user's call would. Ahead of time, what it would launch is recorded
instead, so that the compiled code is that of a real call; on a GPU the same call runs, and is what is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rxt_kernels.aot.shapes import MODELS, Experts, Heads, MemoryWrite, ModelShape

__all__ = ["Case", "Inputs", "all_cases"]

SMALL_MODEL = "rxt-beta-micro"
"""The model of the short check, and the one whose float32 kernels are compiled too."""

BATCH, TRAINED = 8, 256
"""Rows and tokens of a training step."""
CACHED = 512
"""Tokens of a prompt, and of the cache that a decoded token sees."""
SCORED = 64
"""Rows of logits of a training step that are compiled for; more rows are more programs of the same code."""
WRITTEN = 1024
"""Tokens of an interaction that is written to the memory, if a model takes so many."""


@dataclass(frozen=True)
class Inputs:
    """Where a case gets its tensors from.

    Attributes:
        dtype: of activations and weights.
        device: of all tensors.
        seed: of normally distributed values; None for zeros, which cost nothing until somebody reads them.
    """

    dtype: torch.dtype
    device: str = "cpu"
    seed: int | None = None

    def generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(self.device).manual_seed(self.seed)


class _Draw:
    """Tensors for one call, the same in every call with the same inputs; those with a gradient are remembered."""

    def __init__(self, inputs: Inputs, *, trains: bool) -> None:
        self._inputs = inputs
        self._generator = inputs.generator()
        self.trains = trains
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int, scale: float = 1.0, leaf: bool = True) -> Tensor:
        tensor = torch.zeros(shape, dtype=self._inputs.dtype, device=self._inputs.device)
        if self._generator is not None:
            tensor.normal_(0.0, scale, generator=self._generator)
        if leaf and self.trains:
            self.leaves.append(tensor.requires_grad_())
        return tensor

    def angles(self, tokens: int, head_dim: int, first: int = 0) -> Tensor:
        """(tokens, head_dim / 2) float32, as models make them."""
        position = torch.arange(first, first + tokens, device=self._inputs.device, dtype=torch.float32)
        pair = torch.arange(head_dim // 2, device=self._inputs.device, dtype=torch.float32)
        return position[:, None] * 10000.0 ** (-2.0 * pair / head_dim)

    def classes(self, count: int, classes: int) -> Tensor:
        return torch.arange(count, device=self._inputs.device) % classes


Operation = Callable[[_Draw], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        name: ``operation/shape/phase/dtype``.
        models: the models that have a layer of this shape.
        dtype: of its tensors.
        phase: ``training`` (forward and backward), ``prefill`` (many tokens without gradients, an encoder's too), ``decode``
            or, for memory, ``update``.
        operation: makes the call with the tensors that it draws.
    """

    name: str
    models: tuple[str, ...]
    dtype: torch.dtype
    phase: str
    operation: Operation

    @property
    def is_small(self) -> bool:
        """Whether it belongs to the short check."""
        return SMALL_MODEL in self.models and self.dtype is torch.bfloat16

    def call(self, device: str = "cpu", seed: int | None = None) -> list[Tensor]:
        """Make the call; its outputs and, in training, the gradients of all that it was given."""
        trains = self.phase == "training"
        draw = _Draw(Inputs(self.dtype, device, seed), trains=trains)
        if not trains:
            with torch.inference_mode():
                return list(self.operation(draw))
        outputs = [output for output in self.operation(draw) if output.requires_grad]
        gradients = [draw(*output.shape, leaf=False).to(output.dtype) for output in outputs]
        found = torch.autograd.grad(outputs, draw.leaves, gradients, allow_unused=True)
        return [*(output.detach() for output in outputs), *(gradient for gradient in found if gradient is not None)]


def _sizes(phase: str, longest: int) -> tuple[int, int, int]:
    """Batch, tokens of the call, and tokens that they see."""
    if phase == "training":
        return BATCH, TRAINED, TRAINED
    seen = min(CACHED, longest)
    return 1, 1 if phase == "decode" else seen, seen


def _norm(draw: _Draw, *, phase: str, longest: int, width: int) -> Sequence[Tensor]:
    from rxt_kernels.rms_norm.triton import add_rms_norm_triton, rms_norm_triton

    batch, tokens, _ = _sizes(phase, longest)
    x, residual, weight = draw(batch, tokens, width), draw(batch, tokens, width), draw(width)
    return [rms_norm_triton(x, weight), *add_rms_norm_triton(x, residual, weight)]


def _rotary(draw: _Draw, *, phase: str, longest: int, heads: Heads, head_dim: int, layout: str) -> Sequence[Tensor]:
    from rxt_kernels.rotary.triton import rotary_triton

    batch, tokens, _ = _sizes(phase, longest)
    return [rotary_triton(draw(batch, tokens, heads[1], head_dim), draw.angles(tokens, head_dim), layout)]


def _swiglu(draw: _Draw, *, phase: str, longest: int, hidden: int) -> Sequence[Tensor]:
    from rxt_kernels.swiglu.triton import swiglu_triton

    batch, tokens, _ = _sizes(phase, longest)
    return [swiglu_triton(draw(batch, tokens, 2 * hidden))]


def _causal(draw: _Draw, *, phase: str, longest: int, heads: Heads, head_dim: int, layout: str) -> Sequence[Tensor]:
    from rxt_kernels.sparse_query_attention.triton import sparse_query_attention_triton

    batch, tokens, seen = _sizes(phase, longest)
    query = draw(batch, tokens, heads[0], head_dim)
    if phase == "decode":
        # The cache has room for more than it holds, and its keys are rotated.
        key, value = (draw(batch, 2 * seen, heads[1], head_dim)[:, :seen] for _ in range(2))
        angles = draw.angles(tokens, head_dim, seen - tokens)
        return [sparse_query_attention_triton(query, key, value, False, None, None, angles, None, layout)]
    key, value = (draw(batch, seen, heads[1], head_dim) for _ in range(2))
    angles = draw.angles(tokens, head_dim)
    return [sparse_query_attention_triton(query, key, value, True, None, None, angles, angles, layout)]


def _bidirectional(
    draw: _Draw, *, phase: str, longest: int, heads: Heads, head_dim: int, layout: str
) -> Sequence[Tensor]:
    from rxt_kernels.sparse_query_attention.triton import sparse_query_attention_triton

    batch, tokens, _ = _sizes(phase, longest)
    query, key, value = (draw(batch, tokens, count, head_dim) for count in (heads[0], heads[1], heads[1]))
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    angles = draw.angles(tokens, head_dim)
    return [sparse_query_attention_triton(query, key, value, False, mask, None, angles, angles, layout)]


def _memory_read(
    draw: _Draw, *, phase: str, longest: int, heads: Heads, head_dim: int, slots: int, layout: str
) -> Sequence[Tensor]:
    from rxt_kernels.memory_cross_attention.triton import memory_cross_attention_triton

    batch, tokens, seen = _sizes(phase, longest)
    query = draw(batch, tokens, heads[0], head_dim)
    key, value = (draw(batch, slots, heads[1], head_dim) for _ in range(2))
    return [memory_cross_attention_triton(query, key, value, draw.angles(tokens, head_dim, seen - tokens), layout)]


def _experts(draw: _Draw, *, phase: str, longest: int, width: int, experts: Experts) -> Sequence[Tensor]:
    from rxt_kernels.mixture_of_experts.triton import mixture_of_experts_triton

    batch, tokens, _ = _sizes(phase, longest)
    count, hidden = experts.count, experts.hidden
    output, loss = mixture_of_experts_triton(
        draw(batch, tokens, width), draw(count, width),
        draw(count, width, 2 * hidden, scale=width**-0.5), draw(count, hidden, width, scale=hidden**-0.5), experts.top_k,
        draw(count, 2 * hidden) if experts.has_biases else None, draw(count, width) if experts.has_biases else None,
        router_dtype=torch.bfloat16 if experts.half_precision_router else None,
    )  # fmt: skip
    return [output, loss]


def _memory_write(
    draw: _Draw, *, phase: str, longest: int, width: int, head_dim: int, write: MemoryWrite, layout: str
) -> Sequence[Tensor]:
    from rxt_kernels.memory_update import (
        AttentionWeights,
        MemoryNormParameters,
        MemoryUpdateLayer,
        ResidualGateParameters,
    )
    from rxt_kernels.memory_update.triton import memory_update_triton

    batch, tokens = (2, TRAINED) if phase == "training" else (1, min(WRITTEN, longest))
    query_heads, key_heads = write.heads

    def norm() -> MemoryNormParameters:
        return MemoryNormParameters("classic-rms", weight=draw(width))

    def gate() -> ResidualGateParameters:
        if write.gate == "linear":
            weight = draw(write.slots, write.slots, scale=write.slots**-0.5)
            return ResidualGateParameters("linear", weight=weight, bias=draw(write.slots))
        return ResidualGateParameters(write.gate, weight=draw(write.slots, 1))

    def attention() -> AttentionWeights:
        def linear(rows: int, columns: int) -> Tensor:
            return draw(rows, columns, scale=columns**-0.5)

        return AttentionWeights(
            linear(query_heads * head_dim, width), linear(key_heads * head_dim, width), linear(key_heads * head_dim, width),
            linear(width, max(write.heads) * head_dim), draw(width), None, query_heads, key_heads, head_dim,
        )  # fmt: skip

    layers = [
        MemoryUpdateLayer(
            norm(), draw(width), attention(), gate(), norm(), attention(), gate(),
            None if write.variant == "interlayer" else gate(),
        )
        for _ in range(write.layers)
    ]  # fmt: skip
    memory, encoded = draw(write.layers, 1, write.slots, width), draw(write.layers, batch, tokens, width)
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=memory.device)
    updated = memory_update_triton(
        memory, encoded, layers, write.variant, norm(), write.groups, mask, draw.angles(tokens, head_dim), layout,
        training=phase == "training",
    )  # fmt: skip
    return [updated]


def _cross_entropy(draw: _Draw, *, phase: str, longest: int, width: int, vocabulary: int) -> Sequence[Tensor]:
    from rxt_kernels.linear_cross_entropy.triton import linear_cross_entropy_triton

    hidden, weight = draw(SCORED, width), draw(vocabulary, width, scale=width**-0.5)
    return [linear_cross_entropy_triton(hidden, weight, draw.classes(SCORED, vocabulary))]


_ALL, _TRAINING = ("training", "prefill", "decode"), ("training",)
_WITHOUT_PREFILL, _WITHOUT_DECODE = ("training", "decode"), ("training", "prefill")
_UPDATES = ("training", "update")


def _layers(
    model: ModelShape,
) -> Iterator[tuple[str, Callable[..., Sequence[Tensor]], tuple[str, ...], dict[str, Any]]]:
    """Operation and shape as text, the operation, its phases, and the arguments of the shape."""
    size = {"head_dim": model.head_dim, "layout": model.rotary}
    for heads in [model.causal] if model.causal else []:
        name = f"{heads[0]}-{heads[1]}x{model.head_dim}-{model.rotary}"
        yield f"causal_attention/{name}", _causal, _ALL, {"heads": heads, **size}
        yield f"rotary/{heads[1]}x{model.head_dim}-{model.rotary}", _rotary, _WITHOUT_PREFILL, {"heads": heads, **size}
    for heads in [model.bidirectional] if model.bidirectional else []:
        name = f"{heads[0]}-{heads[1]}x{model.head_dim}-{model.rotary}"
        yield f"bidirectional_attention/{name}", _bidirectional, _WITHOUT_DECODE, {"heads": heads, **size}
    for heads in model.reads:
        name = f"{heads[0]}-{heads[1]}x{model.head_dim}-{model.read_slots}-{model.rotary}"
        yield f"memory_read/{name}", _memory_read, _ALL, {"heads": heads, "slots": model.read_slots, **size}
    if model.experts is not None:
        e = model.experts
        name = f"{model.width}-{e.hidden}x{e.count}-{e.top_k}"
        yield f"experts/{name}", _experts, _ALL, {"width": model.width, "experts": e}
    if model.write is not None:
        w = model.write
        name = f"{w.variant}-{w.gate}-{w.layers}x{w.slots}x{model.width}-{w.heads[0]}-{w.heads[1]}-{model.rotary}"
        yield f"memory_write/{name}", _memory_write, _UPDATES, {"width": model.width, "write": w, **size}
    for hidden in model.dense:
        yield f"swiglu/{hidden}", _swiglu, _WITHOUT_PREFILL, {"hidden": hidden}
    yield f"norm/{model.width}", _norm, _WITHOUT_PREFILL, {"width": model.width}
    yield (
        f"cross_entropy/{model.width}-{model.vocabulary}", _cross_entropy, _TRAINING,
        {"width": model.width, "vocabulary": model.vocabulary},
    )  # fmt: skip


def all_cases() -> tuple[Case, ...]:
    """Every case once, also when several models have it."""
    found: dict[str, Case] = {}
    for model in MODELS:
        dtypes = (torch.bfloat16, torch.float32) if model.model == SMALL_MODEL else (torch.bfloat16,)
        for shape, function, phases, arguments in _layers(model):
            for phase in phases:
                for dtype in dtypes:
                    name = f"{shape}/{phase}/{str(dtype).removeprefix('torch.')}"
                    call = partial(function, phase=phase, longest=model.longest, **arguments)
                    # Models that differ in their longest sequence alone share a case: it is the first one's.
                    models = (*(found[name].models if name in found else ()), model.model)
                    operation = found[name].operation if name in found else call
                    found[name] = Case(name, models, dtype, phase, operation)
    return tuple(found.values())
