"""From the modules of a decoder or language model to a decode engine, and why it is or is not decoded with one.

An engine (:mod:`rxt_kernels.decode`) knows weights, not modules. It is used only where it computes what the modules
would: a module of another class, a hook, or a replaced ``forward`` is a reason to let the modules do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rxt_kernels.decode import (
    ENGINES,
    PRECISIONS,
    DecodeEngine,
    DecoderLayerWeights,
    DecoderWeights,
    ExpertWeights,
    FeedForwardWeights,
    MemoryReadWeights,
    NativeEngine,
    NormWeights,
    decode_engine,
    supports,
)
from rxt_kernels.mixture_of_experts.reference import ExpertTensors
from rxt_model.decoder import CausalModel, DecoderNetwork, RxTDecoder
from rxt_model.gradients import no_gradients
from rxt_model.interaction.decoding import padded
from rxt_model.layers.attention import MemoryCrossAttention, SparseQueryAttention
from rxt_model.layers.feed_forward import FeedForward, GatedLinearUnit
from rxt_model.layers.mixture_of_experts import PerExpertMixtureOfExperts, Router, StackedMixtureOfExperts
from rxt_model.layers.norms import RMSNorm
from rxt_model.layers.transformer_layer import TransformerLayer
from rxt_model.memory import ShortTermMemory
from rxt_model.stateless import SparseQueryTransformer, StatelessNetwork

__all__ = [
    "MODULES",
    "DecodingChoice",
    "EngineDecoding",
    "choose_engine",
    "decoder_weights",
    "engine_decoding",
    "explain_choice",
    "known_to_engines",
    "own_engine",
    "weights_state",
]

MODULES = "modules"
"""The name of decoding without an engine."""

_KNOWN: set[type[nn.Module]] = {
    RxTDecoder, DecoderNetwork, SparseQueryTransformer, StatelessNetwork, TransformerLayer, SparseQueryAttention,
    MemoryCrossAttention, FeedForward, GatedLinearUnit, Router, PerExpertMixtureOfExperts, StackedMixtureOfExperts, RMSNorm,
    ShortTermMemory, nn.Embedding, nn.Linear, nn.LayerNorm, nn.ModuleList,
}  # fmt: skip

Known = TypeVar("Known", bound=type[nn.Module])


def known_to_engines(cls: Known) -> Known:
    """Decorates a class of which the weights, and the configuration of its network, say all that it computes."""
    _KNOWN.add(cls)
    return cls


class DecodingChoice(NamedTuple):
    """How a model is decoded: the name of an engine, or :data:`MODULES`; and why, in one sentence."""

    engine: str
    reason: str


# -- weights ----------------------------------------------------------------------------------------------------------


def _foreign(model: CausalModel) -> str | None:
    """Why weights do not say all that the modules of a model compute, in one sentence; None if they do."""
    decoder = cast(nn.Module, model)
    for name, module in decoder.named_modules():
        where = name or "the decoder"
        if type(module) not in _KNOWN:
            return f"{where} is of the class {type(module).__name__}, which an engine does not know."
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has forward hooks, which an engine would not call."
        if "forward" in vars(module) or module._compiled_call_impl is not None:
            return f"the forward method of {where} was replaced, and an engine would not call it."
    config = model.model.config
    if decoder.training and (config.att_dropout or config.ff_dropout):
        return "the model is in training mode and drops activations; call eval()."
    kinds = {(parameter.dtype, parameter.device) for parameter in decoder.parameters()}
    if len(kinds) > 1:
        found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"the parameters are {found}; an engine takes one dtype on one device."
    return None


def _norm(module: nn.Module) -> NormWeights:
    return NormWeights(cast(Tensor, module.weight), module.bias if isinstance(module, nn.LayerNorm) else None)


def _feed_forward(module: nn.Module) -> FeedForwardWeights | ExpertWeights:
    if isinstance(module, FeedForward):
        first, second = module.first_linear, module.fc2
        return FeedForwardWeights(first.weight, first.bias, second.weight, second.bias, module.gated, module.activation)
    assert isinstance(module, (PerExpertMixtureOfExperts, StackedMixtureOfExperts))
    options = module.options
    experts: tuple[ExpertTensors, ExpertTensors, ExpertTensors | None, ExpertTensors | None, Tensor | None]
    if isinstance(module, StackedMixtureOfExperts):
        experts = (module.w1, module.w2, module.b1, module.b2, module.global_bias)
    else:
        own = module._weights(module.experts)
        experts = (own.w1, own.w2, own.b1, own.b2, None)
    w1, w2, b1, b2, global_bias = experts
    return ExpertWeights(
        module.router.gate.weight, w1, w2, b1, b2, global_bias, module._shared(),
        top_k=options.top_k, gated=options.gated, activation=options.activation, router_dtype=options.router_dtype,
    )  # fmt: skip


def _layer(layer: TransformerLayer, memory_index: int | None) -> DecoderLayerWeights:
    read = None
    if memory_index is not None:
        read = MemoryReadWeights(
            _norm(layer.stm_norm), _norm(layer.norm2), layer.memory_cross_attention.weights(), memory_index
        )
    return DecoderLayerWeights(
        _norm(layer.norm1),
        layer.attention.weights(),
        read,
        _norm(getattr(layer, layer._feed_forward_norm)),
        _feed_forward(layer.ff),
    )


@no_gradients()
def decoder_weights(decoder: CausalModel) -> DecoderWeights:
    """The weights of a decoder as an engine takes them: its parameters themselves."""
    network, config = decoder.model, decoder.model.config
    rotary, head = network.rotary, network.head
    device = network.embedding.weight.device
    return DecoderWeights(
        embedding=network.embedding.weight,
        layers=tuple(_layer(layer, index) for layer, index in network.layers_in_order()),
        head_norm=None if network.head_norm is None else _norm(network.head_norm),
        head=network.embedding.weight if head is None else head.weight,
        head_bias=None if head is None else head.bias,
        inverse_frequencies=None if rotary is None else rotary._frequencies(device),
        rotary_layout=config.rope_layout,
        rounds_angles=config.rope_angle_dtype == "match",
        gate_activation=config.gated_attention_activation,
    )


# -- engines ----------------------------------------------------------------------------------------------------------


class _Kept:
    """The engine of a decoder, kept for its next message, with the weights it was made from."""

    def __init__(self, decoder: CausalModel) -> None:
        self.state = weights_state(decoder)
        self.weights = decoder_weights(decoder)
        self.engine: DecodeEngine | None = None
        self.made_for: tuple[str, str | None] | None = None
        self.message = 0
        """Counts messages: the engine answers the last one only."""

    def made(self, engine: str, rows: int, precision: str | None) -> DecodeEngine:
        """The engine of this name for so many rows: the one of the message before, if it fits, or another on its weights."""
        if self.engine is None or self.made_for != (engine, precision):
            self.engine = decode_engine(self.weights, rows, engine=engine, precision=precision)
            self.made_for = (engine, precision)
        elif self.engine.rows != rows:
            self.engine = self.engine.another(rows)
        return self.engine


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def weights_state(decoder: CausalModel) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced, moved, or changed in place."""
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in cast(nn.Module, decoder).parameters()
    )


def _keep(decoder: CausalModel) -> _Kept:
    module = cast(nn.Module, decoder)
    kept = _kept.get(module)
    if kept is None or kept.state != weights_state(decoder):
        kept = _kept[module] = _Kept(decoder)
    return kept


@no_gradients()  # as answers are: an engine that records no gradients is no worse for a model that could be trained
def choose_engine(decoder: CausalModel, wanted: str = "auto", precision: str | None = None) -> DecodingChoice:
    """How this decoder is decoded.

    Args:
        decoder: the decoder or language model.
        wanted: the name of an engine, :data:`MODULES`, or "auto": the first engine that is made for the device and can
            decode this model, else its modules.
        precision: what weights are to be packed in, which the native engine can do; None leaves them as they are.

    Raises:
        ValueError: the name is unknown, or the engine cannot decode this model (in this precision); the message is its reason.
    """
    choice = _choose(decoder, wanted)
    if precision is None:
        return choice
    if precision not in PRECISIONS:
        raise ValueError(f"decode_weights is {precision!r}; it is one of {', '.join(map(repr, PRECISIONS))}, or None.")
    if choice.engine != NativeEngine.name:
        raise ValueError(
            f"decode_weights is {precision!r}, which takes the native engine; this model is decoded by {choice.engine}: "
            f"{choice.reason}"
        )
    return choice


def explain_choice(choice: DecodingChoice, precision: str | None) -> str:
    """The same as a sentence."""
    path = (
        "operation by operation through the modules" if choice.engine == MODULES else f"by the {choice.engine} engine"
    )
    weights = f" with weights in {precision}" if precision is not None else ""
    return f"Answers are decoded {path}{weights}: {choice.reason}"


def _choose(decoder: CausalModel, wanted: str) -> DecodingChoice:
    if wanted == MODULES:
        return DecodingChoice(MODULES, "it was asked for.")
    if wanted != "auto" and wanted not in ENGINES:
        known = ", ".join(map(repr, ("auto", MODULES, *ENGINES)))
        raise ValueError(f"decode_engine is {wanted!r}, which is not known; it is one of {known}.")
    reason = _foreign(decoder)
    if wanted != "auto":
        reason = reason or supports(wanted, _keep(decoder).weights)
        if reason is not None:
            raise ValueError(f"decode_engine={wanted!r} cannot decode this model: {reason}")
        return DecodingChoice(wanted, "it was asked for.")
    device = decoder.model.embedding.weight.device
    candidates = [name for name, engine in ENGINES.items() if device.type in engine.devices]
    if not candidates:
        return DecodingChoice(MODULES, f"no engine of this build is made for {device.type}.")
    for name in candidates:
        reason = reason or supports(name, _keep(decoder).weights)
        if reason is None:
            return DecodingChoice(name, f"it can decode this model on {device}.")
    assert reason is not None
    return DecodingChoice(MODULES, reason)


class EngineDecoding:
    """Decoding by an engine, behind what it holds (see :class:`rxt_model.interaction.decoding.Decoding`)."""

    def __init__(self, engine: DecodeEngine, device: torch.device) -> None:
        self._engine = engine
        self._device = device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens, _ = padded(prompts, self._device)
        return self._engine.extend(tokens, [len(prompt) for prompt in prompts])

    def step(self, tokens: Tensor, active: Sequence[bool] | None) -> Tensor:
        return self._engine.step(tokens, active)


class _MessageDecoding(EngineDecoding):
    """Decoding of one message by the engine that all messages of a model share."""

    def __init__(self, kept: _Kept, engine: DecodeEngine) -> None:
        super().__init__(engine, kept.weights.embedding.device)
        engine.reset()
        kept.message += 1
        self._kept = kept
        self._message = kept.message

    def _check(self) -> None:
        if self._message != self._kept.message:
            raise RuntimeError(
                "this answer was ended because another interaction began; read an answer to its end before asking again."
            )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._check()
        return super().prefill(prompts)

    def step(self, tokens: Tensor, active: Sequence[bool] | None) -> Tensor:
        self._check()
        return super().step(tokens, active)


@no_gradients()
def engine_decoding(
    decoder: CausalModel, engine: str, rows: int, memory: Tensor, precision: str | None = None
) -> EngineDecoding:
    """Decoding of the next message by an engine; the engine of the message before is used again if it fits.

    Args:
        decoder: the decoder.
        engine: what :func:`choose_engine` chose.
        rows: messages answered at once.
        memory: (L, 1 or rows, S, D).
        precision: what the native engine packs weights in; None is their dtype.
    """
    kept = _keep(decoder)
    made = kept.made(engine, rows, precision)
    made.set_memory(memory)
    return _MessageDecoding(kept, made)


@no_gradients()
def own_engine(decoder: CausalModel, engine: str, precision: str | None = None) -> DecodeEngine:
    """An engine for one conversation of its own, on weights that are packed once for all of this model's.

    It decodes with the weights as they are now; :func:`weights_state` tells when they have changed.
    """
    return _keep(decoder).made(engine, 1, precision).another(1)
