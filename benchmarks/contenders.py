"""Who is measured on a whole decoder: the modules on a backend, the native engine, torch.compile of the reference.

Everything runs without gradients and greedily; only training has its own. The backends come through
:func:`rxt_kernels.dispatch.use_backend`, the engines through :data:`rxt_kernels.decode.ENGINES`; what this build does
not have is absent, with the reason, and appears by itself once it is there.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rxt_kernels.decode import DecodeEngine, DecoderWeights, EagerEngine, decode_engine, supports
from rxt_kernels.dispatch import available_backends, explain, operations, use_backend
from rxt_kernels.mixture_of_experts import route
from rxt_model.decoder import RxTDecoder
from rxt_model.interaction.decoding import CachedDecoding
from rxt_model.interaction.weights import decoder_weights
from rxt_model.layers.mixture_of_experts import PerExpertMixtureOfExperts, StackedMixtureOfExperts
from rxt_model.models import ReactiveTransformer
from rxt_model.presets import build, preset

from .costs import RxTCosts
from .measuring import Absent

__all__ = [
    "COMPILED",
    "ELEMENT_BYTES",
    "NATIVE",
    "NATIVE_ENGINE",
    "Decoder",
    "Models",
    "compiled",
    "compiled_decoder",
    "definition",
    "distinct_experts",
    "module_decoder",
    "native_decoder",
    "needs_backend",
    "token_counts",
    "torch_dtype",
]

NATIVE, NATIVE_ENGINE, COMPILED = "native", "native engine", "torch.compile"

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of one weight."""


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of activations and of keys and values; weights of 8 bits go with bfloat16.

    Example:
        >>> torch_dtype("int8")
        torch.bfloat16
    """
    return torch.float32 if dtype == "float32" else torch.bfloat16


class Models:
    """A preset with weights drawn from a seed, and copies of its parts in other dtypes, each made once."""

    def __init__(self, name: str, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.full = cast(ReactiveTransformer, build(name)).eval()
        configs = preset(name).configs
        self.name = name
        self.costs = RxTCosts(configs["decoder"], configs["encoder"], configs["memory_attention"])
        self.generator = torch.Generator().manual_seed(seed + 1)
        self._copies: dict[torch.dtype, ReactiveTransformer] = {torch.float32: self.full}

    def of(self, dtype: torch.dtype) -> ReactiveTransformer:
        """The model in this dtype."""
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self.full).to(dtype)
        return self._copies[dtype]

    @functools.cached_property
    def weights(self) -> DecoderWeights:
        """The decoder's weights as an engine takes them; experts that are separate modules are copied once."""
        return decoder_weights(self.full.decoder)

    def tokens(self, rows: int, time: int) -> Tensor:
        """Random token ids (rows, time), none of which is a control token."""
        return torch.randint(16, self.full.decoder.config.vocab_size, (rows, time), generator=self.generator)

    def memory(self, rows: int, slots: int) -> Tensor:
        """A random short-term memory (L, rows, slots, D)."""
        config = self.full.decoder.config
        return torch.randn(config.num_layers, rows, slots, config.embed_dim, generator=self.generator)


class Decoder(Protocol):
    """Decodes messages of equal length; the logits may be overwritten by the next call."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to logits (B, V) behind the last ones."""

    def step(self, tokens: Tensor) -> Tensor:
        """One more token (B,) per row to the next logits (B, V)."""


class _ModuleDecoder:
    """The modules, with a key/value cache, on one backend."""

    def __init__(self, decoder: RxTDecoder, memory: Tensor, backend: str, capacity: int) -> None:
        self._decoder, self._backend, self._capacity = decoder, backend, capacity
        with torch.no_grad(), use_backend(backend):
            self._memory = decoder.project_memory(memory)

    def prefill(self, tokens: Tensor) -> Tensor:
        rows = tokens.shape[0]
        self._decoding = CachedDecoding(
            lambda ids, cache: self._decoder.hidden_states(ids, None, self._memory, cache).hidden,
            self._decoder.logits,
            self._decoder.new_cache(rows, capacity=self._capacity),
            self._decoder.model.embedding.weight.device,
        )
        with use_backend(self._backend):
            return self._decoding.prefill(tokens.tolist())

    def step(self, tokens: Tensor) -> Tensor:
        with use_backend(self._backend):
            return self._decoding.step(tokens, None)


class _EngineDecoder:
    """A decode engine."""

    def __init__(self, engine: DecodeEngine, memory: Tensor, backend: str) -> None:
        self._engine, self._backend = engine, backend
        with use_backend(backend):
            engine.set_memory(memory)

    def prefill(self, tokens: Tensor) -> Tensor:
        with use_backend(self._backend):
            return self._engine.prefill(tokens, [tokens.shape[1]] * tokens.shape[0])

    def step(self, tokens: Tensor) -> Tensor:
        with use_backend(self._backend):
            return self._engine.step(tokens)


class _CompiledEngine(EagerEngine):
    """The plain engine with its step, from static buffers to logits, compiled as a whole."""

    name = COMPILED

    def __init__(self, weights: DecoderWeights, rows: int, *, capacity: int) -> None:
        super().__init__(weights, rows, capacity=capacity, limit=capacity)
        self._compiled = torch.compile(self._step_on_buffers, dynamic=False)

    def _run_step(self) -> Tensor:
        # All of the buffer, which the lengths mask: one graph serves every position.
        return self._compiled(self.capacity)


def token_counts(
    model: str, wanted: Sequence[int] | None, default: int, limit: int, skip: Callable[[str], None]
) -> Iterator[int]:
    """Numbers of tokens to measure a model with: those wanted that it takes, or as many of the default as it takes.

    Raises:
        ValueError: a number below 1.
    """
    if wanted is None:
        yield min(default, limit)
        return
    for count in dict.fromkeys(wanted):
        if count < 1:
            raise ValueError(f"tokens is {count}; it must be at least 1.")
        if count > limit:
            skip(f"{model}, {count} tokens: it takes at most {limit}.")
            continue
        yield count


def needs_native() -> None:
    """Raises:
    Absent: no operation of this build has a native backend.
    """
    if not any("native" in available_backends(name) for name in operations()):
        raise Absent(explain("mixture_of_experts", "native"))


def needs_backend(backend: str, dtype: str) -> None:
    """Require that this build has the backend, and that a whole model on the reference is worth waiting for.

    Raises:
        Absent: with the reason.
    """
    if backend == NATIVE:
        needs_native()
    elif dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Absent("this processor has no products of bfloat16, and torch takes ten times as long as in float32.")


def _needs_compiler() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise Absent("torch.compile needs a C++ compiler, and there is none here.")
    if importlib.util.find_spec("torch._inductor") is None:
        raise Absent("this build of torch has no compiler for the CPU.")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for shapes that do not change; what was compiled before, for other threads, is forgotten.

    Raises:
        Absent: there is no C++ compiler.
    """
    _needs_compiler()
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def module_decoder(models: Models, memory: Tensor, backend: str, dtype: str, capacity: int) -> Decoder:
    """The modules on the reference or on the native backend.

    Raises:
        Absent: this build or this machine is not made for it.
    """
    needs_backend(backend, dtype)
    kind = torch_dtype(dtype)
    return _ModuleDecoder(models.of(kind).decoder, memory.to(kind), backend, capacity)


def compiled_decoder(models: Models, memory: Tensor, capacity: int) -> Decoder:
    """The reference compiled by torch, in float32.

    Raises:
        Absent: there is no C++ compiler.
    """
    _needs_compiler()
    torch._dynamo.reset()
    return _EngineDecoder(_CompiledEngine(models.weights, memory.shape[1], capacity=capacity), memory, "reference")


def native_decoder(models: Models, memory: Tensor, dtype: str, capacity: int) -> Decoder:
    """The native engine with weights of 32, 16 or 8 bits.

    Raises:
        Absent: this build has no such engine, or it cannot decode this model.
    """
    return _EngineDecoder(_native_engine(models, memory.shape[1], dtype, capacity), memory, "auto")


def _native_engine(models: Models, rows: int, dtype: str, capacity: int) -> DecodeEngine:
    """The engine from weights in float32, packed in another type or as they are."""
    weights = models.weights
    if (reason := supports("native", weights)) is not None:
        raise Absent(f"the native engine cannot decode this model: {reason}")
    return decode_engine(weights, rows, engine="native", capacity=capacity, precision=dtype)


@contextmanager
def _inputs_of_experts(decoder: RxTDecoder) -> Iterator[list[tuple[PerExpertMixtureOfExperts, Tensor]]]:
    """What every layer of experts is given while the block runs."""
    seen: list[tuple[PerExpertMixtureOfExperts, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
        for module in decoder.modules()
        if isinstance(module, (PerExpertMixtureOfExperts, StackedMixtureOfExperts))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def definition(decoder: RxTDecoder, tokens: Tensor, memory: Tensor, first: int) -> tuple[Tensor, list[Tensor]]:
    """What has to come out, by the reference and without any cache, and which experts every token chose.

    Args:
        decoder: in float32.
        tokens: (B, T).
        memory: (L, 1 or B, S, D).
        first: position of the first logits that are wanted.

    Returns:
        Logits (T - first, B, V), and per layer of experts their numbers (B, T, K).
    """
    with use_backend("reference"), _inputs_of_experts(decoder) as seen:
        hidden = decoder.hidden_states(tokens, None, memory).hidden
        logits = decoder.logits(hidden[:, first:]).transpose(0, 1).contiguous()
    chosen = [
        route(x, module.router.gate.weight, module.options.top_k, module.options.router_dtype).experts.unflatten(
            0, tokens.shape
        )
        for module, x in seen
    ]
    return logits, chosen


def distinct_experts(chosen: Sequence[Tensor]) -> int:
    """How many different experts are chosen, over all layers; per layer numbers of any shape.

    Example:
        >>> distinct_experts([torch.tensor([[0, 1], [1, 2]]), torch.tensor([[4, 5], [5, 4]])])
        5
    """
    return sum(layer.unique().numel() for layer in chosen)
