"""Upstream's `interact`, `batch_interact` and `batch_interactions`, answered by this package's conversation and engines.

They work also where upstream's crash or never end (specification 7, defects 2 to 8 and 30): every model generates, with and
without stateless layers; automatic thinking chooses the first token only; no gradient mode leaks to the caller; masks may be
left out; inputs stay as they were; the memory is written also when the caller stops reading.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rxt_model.config import TokenIds
from rxt_model.drop_in.accelerated import (
    AcceleratedDecoder,
    AcceleratedEncoder,
    AcceleratedMemoryAttention,
    accelerated_by,
)
from rxt_model.drop_in.shadow import Shadow
from rxt_model.gradients import no_gradients
from rxt_model.interaction.conversation import Conversation
from rxt_model.interaction.engine import DecodingChoice, choose_engine
from rxt_model.memory import ShortTermMemory
from rxt_model.tokenizer import as_tokenizer

__all__ = ["AcceleratedConversation"]

_ROLES = ("bos", "eos", "query", "answer", "pad", "think", "tool_call", "tool_use", "internal")


class _Speaker(Conversation):
    """Our conversation over upstream's components and its memory."""

    thinks: ClassVar[bool] = False
    default_max_seq_len: ClassVar[int] = 256
    system_prompt_title = "SYSTEM INSTRUCTIONS"
    tokenizer = None

    def __init__(self, model: Any, token_ids: TokenIds) -> None:
        self.model = model
        self.token_ids = token_ids
        self._components = tuple(
            accelerated_by(component.model) for component in (model.decoder, model.encoder, model.memory_attention)
        )
        self._start_conversation()

    def follow(self) -> None:
        """Take upstream's components as they are now.

        Raises:
            RuntimeError: they do not share a memory.
        """
        decoder, encoder, memory_attention = self._components
        assert isinstance(decoder, AcceleratedDecoder)
        assert isinstance(encoder, AcceleratedEncoder)
        assert isinstance(memory_attention, AcceleratedMemoryAttention)
        if self.model.memory_attention.model.stm is not self._store:
            raise RuntimeError(
                "decoder and memory attention of this model have a memory each, so nothing would be remembered; call "
                "share_components() or init_model() first."
            )
        self.decoder, self.encoder, self.memory_attention = decoder.ours(), encoder.ours(), memory_attention.ours()

    @property
    def _store(self) -> Any:
        return self.model.decoder.model.stm

    @property
    def stm(self) -> ShortTermMemory:
        """Our memory, holding what upstream's holds now."""
        memory = self.decoder.model.stm
        memory._buffers["state"] = self._store.memory.detach()
        return memory

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.model.embedding.weight.device

    def _write_interaction(self, rows: Sequence[Sequence[int]]) -> None:
        self.follow()  # weights may have been exchanged while the answer was read
        super()._write_interaction(rows)
        self._store.update_all(self.decoder.model.stm.state)


class _ThinkingSpeaker(_Speaker):
    thinks: ClassVar[bool] = True
    default_max_seq_len: ClassVar[int] = 8192


class AcceleratedConversation(Shadow):
    """The methods of a complete model that talk and remember.

    Args:
        model: upstream's model, its components accelerated already.

    Raises:
        ValueError: the model does not name the control tokens that a conversation needs.
    """

    names = (
        "interact", "batch_interact", "batch_interactions", "stringify_batch", "init_stm_state", "update_stm",
        "reset_self_attn_cache",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = cast(Any, model)
        ids = {f"{role}_token_id": getattr(model, f"{role}_token_id", None) for role in _ROLES}
        self.token_ids = TokenIds(**{name: token for name, token in ids.items() if token is not None})
        self._speaker: _Speaker | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_speaker": None}

    def _speak(self) -> _Speaker:
        if self._speaker is None:
            thinks = "thinking_mode" in self._signature("interact").parameters
            self._speaker = (_ThinkingSpeaker if thinks else _Speaker)(self.model, self.token_ids)
        self._speaker.follow()
        return self._speaker

    def decoding(self) -> DecodingChoice:
        """How answers are decoded, and why."""
        decoder = accelerated_by(self.model.decoder.model)
        assert isinstance(decoder, AcceleratedDecoder)
        return choose_engine(decoder.ours())

    def _signature(self, method: str) -> inspect.Signature:
        return inspect.signature(getattr(type(self.model), method))

    def _arguments(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in upstream's order and with upstream's defaults."""
        bound = self._signature(method).bind(self.model, *given, **named)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        mask = arguments["attention_mask"]
        if mask is not None:
            arguments["attention_mask"] = mask.bool()
        return arguments

    def interact(self, *arguments: Any, **named: Any) -> Iterator[int]:
        """As upstream's `interact`, with its arguments; temperature 0 is greedy."""
        given = self._arguments("interact", arguments, named)
        return self._speak().interact(**given)

    def batch_interact(self, *arguments: Any, **named: Any) -> Iterator[Tensor]:
        """As upstream's `batch_interact`, with its arguments; temperature 0 is greedy."""
        given = self._arguments("batch_interact", arguments, named)
        speaker = self._speak()
        if not speaker.thinks:
            return speaker.batch_interact(**given)
        # Upstream opens every answer of a batch with [A] and does not yield it.
        return _without_opening(speaker.batch_interact(**given, thinking_mode="fast"))

    def batch_interactions(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As upstream's `batch_interactions`, with its arguments; temperature 0 is greedy."""
        given = self._arguments("batch_interactions", arguments, named)
        speaker = self._speak()
        return speaker.batch_interactions(**given, thinking_mode="fast" if speaker.thinks else None)

    def stringify_batch(self, generated_ids: Tensor) -> list[str]:
        """The text of every row (B, T) up to its end token, without control tokens (defect 9)."""
        if self.model.tokenizer is None:
            raise ValueError("this model has no tokenizer; call set_tokenizer first.")
        tokenizer = as_tokenizer(self.model.tokenizer)
        end = self.token_ids.eos_token_id
        rows = ([*row, end] for row in generated_ids.tolist())
        return [tokenizer.decode(row[: row.index(end)], skip_special_tokens=True) for row in rows]

    def init_stm_state(self, *arguments: Any, **named: Any) -> Any:
        """As upstream's, without leaving a graph of gradients in the memory (defect 17)."""
        with no_gradients():
            return self.original("init_stm_state")(*arguments, **named)

    def update_stm(self, *arguments: Any, **named: Any) -> Any:
        """As upstream's, without leaving a graph of gradients in the memory (defect 17)."""
        with no_gradients():
            return self.original("update_stm")(*arguments, **named)

    def reset_self_attn_cache(self) -> None:
        """Empty the caches of every self-attention that upstream has, those of all stateless layers included."""
        for module in self.model.decoder.modules():
            for name in ("key_cache", "value_cache", "mask_cache"):
                if name in vars(module):
                    setattr(module, name, None)


def _without_opening(steps: Generator[Tensor, None, None]) -> Iterator[Tensor]:
    with closing(steps):
        next(steps)
        yield from steps
