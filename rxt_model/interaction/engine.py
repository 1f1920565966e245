"""The decode engine of a decoder or language model, and why it is or is not decoded with one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rxt_kernels.decode import ENGINES, PRECISIONS, DecodeEngine, NativeEngine, decode_engine, supports
from rxt_model.decoder import CausalModel
from rxt_model.gradients import no_gradients
from rxt_model.interaction.decoding import padded
from rxt_model.interaction.plain_weights import State, look_at
from rxt_model.interaction.weights import decoder_weights

__all__ = [
    "MODULES",
    "DecodingChoice",
    "EngineDecoding",
    "choose_engine",
    "engine_decoding",
    "explain_choice",
    "own_engine",
    "prepare_memory",
]

MODULES = "modules"
"""The name of decoding without an engine."""


class DecodingChoice(NamedTuple):
    """How a model is decoded: the name of an engine, or :data:`MODULES`; and why, in one sentence."""

    engine: str
    reason: str


# -- engines ----------------------------------------------------------------------------------------------------------


class _Kept:
    """The engine of a decoder, kept for its next message, with the weights it was made from."""

    def __init__(self, decoder: CausalModel, state: State) -> None:
        self.state = state
        self.weights = decoder_weights(decoder)
        self.engine: DecodeEngine | None = None
        self.made_for: tuple[str, str | None] | None = None
        self.message = 0
        """Counts messages: the engine answers the last one only."""
        self._read: tuple[DecodeEngine, Tensor, int] | None = None

    def made(self, engine: str, rows: int, precision: str | None) -> DecodeEngine:
        """The engine of this name for so many rows: the one of the message before, if it fits, or another on its weights."""
        if self.engine is None or self.made_for != (engine, precision):
            self.engine = decode_engine(self.weights, rows, engine=engine, precision=precision)
            self.made_for = (engine, precision)
        elif self.engine.rows != rows:
            self.engine = self.engine.another(rows)
        return self.engine

    def read(self, memory: Tensor) -> None:
        """Make keys and values of this memory, unless the engine has those of the same one."""
        assert self.engine is not None
        version = -1 if memory.is_inference() else memory._version
        if self._read is not None and version >= 0:
            engine, known, known_version = self._read
            if engine is self.engine and known is memory and known_version == version:
                return
        self._read = None
        self.engine.set_memory(memory)
        self._read = self.engine, memory, version


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _keep(decoder: CausalModel, state: State | None = None) -> _Kept:
    """What is kept of a decoder, whose weights are in this state; None looks."""
    module = cast(nn.Module, decoder)
    if state is None:
        state = look_at(module).state
    kept = _kept.get(module)
    if kept is None or kept.state != state:
        kept = _kept[module] = _Kept(decoder, state)
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
    module, config = cast(nn.Module, decoder), decoder.model.config
    reason, state = look_at(module)
    if reason is None and module.training and (config.att_dropout or config.ff_dropout):
        reason = "the model is in training mode and drops activations; call eval()."
    if wanted != "auto":
        reason = reason or supports(wanted, _keep(decoder, state).weights)
        if reason is not None:
            raise ValueError(f"decode_engine={wanted!r} cannot decode this model: {reason}")
        return DecodingChoice(wanted, "it was asked for.")
    device = decoder.model.embedding.weight.device
    candidates = [name for name, engine in ENGINES.items() if device.type in engine.devices]
    if not candidates:
        return DecodingChoice(MODULES, f"no engine of this build is made for {device.type}.")
    for name in candidates:
        reason = reason or supports(name, _keep(decoder, state).weights)
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
    kept.read(memory)
    return _MessageDecoding(kept, made)


@no_gradients()
def prepare_memory(decoder: CausalModel, memory: Tensor) -> None:
    """Let the engine that answered the last message read a memory now, so that the next message need not wait for it.

    An answer that this engine still gives ends with a sentence. What fails here fails again, and is told, when the next
    message reads the memory.
    """
    module = cast(nn.Module, decoder)
    kept = _kept.get(module)
    if kept is None or kept.engine is None or memory.shape[1] not in (1, kept.engine.rows):
        return
    if kept.state == look_at(module).state:
        kept.message += 1
        with suppress(Exception):
            kept.read(memory)


@no_gradients()
def own_engine(decoder: CausalModel, engine: str, precision: str | None = None) -> DecodeEngine:
    """An engine for one conversation of its own, on weights that are packed once for all of this model's.

    It decodes with the weights as they are now; ``look_at(decoder).state`` tells when they have changed.
    """
    return _keep(decoder).made(engine, 1, precision).another(1)
