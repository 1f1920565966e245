"""The full systems: decoder, encoder, memory attention and one short-term memory between them (spec 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.config import MemoryAttentionConfig, TokenIds, TransformerConfig, canonical_variant
from rxt_model.decoder import RxTDecoder
from rxt_model.encoder import RxTEncoder
from rxt_model.interaction.conversation import Conversation
from rxt_model.memory import ReadByUpdates, ShortTermMemory
from rxt_model.memory_attention import RxTMemoryAttention
from rxt_model.tokenizer import Tokenizer, as_tokenizer

ConfigLike = TransformerConfig | Mapping[str, Any]
Model = TypeVar("Model", bound="ReactiveTransformer")

_ROLES = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "query_token_id": "query",
    "answer_token_id": "answer",
    "pad_token_id": "pad",
    "think_token_id": "think",
    "tool_call_token_id": "tool_call",
    "tool_use_token_id": "tool_use",
    "internal_token_id": "internal",
}


def resolve_token_ids(config: TokenIds | Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> TokenIds:
    """Control-token ids from a checkpoint, completed from the tokenizer where the checkpoint names none (spec 3.1).

    Raises:
        ValueError: one of [BOS], [EOS], [Q], [A] is named by neither.
    """
    if isinstance(config, TokenIds):
        return config
    ids = {name: value for name, value in dict(config or {}).items() if value is not None}
    for name, role in _ROLES.items():
        if name not in ids and tokenizer is not None:
            found = getattr(tokenizer.special_tokens, role)
            if found is not None:
                ids[name] = found
    missing = [
        name for name in ("bos_token_id", "eos_token_id", "query_token_id", "answer_token_id") if name not in ids
    ]
    if missing:
        raise ValueError(
            f"tokenizer_config has no {', '.join(missing)} and no tokenizer was given that names them; add them to "
            "tokenizer_config or pass tokenizer=."
        )
    return TokenIds.from_dict(ids)


class ReactiveTransformer(ReadByUpdates, PretrainedModel, Conversation):
    """What RxT-Alpha and RxT-Beta share: components that use one embedding and one short-term memory.

    Args:
        decoder_config: :class:`TransformerConfig` or a mapping of its fields.
        encoder_config: likewise; a full model's encoder reads no memory, so ``skip_memory_cross_attention`` is True.
        memory_attention_config: :class:`MemoryAttentionConfig` or a mapping of its fields.
        tokenizer_config: control-token ids (:class:`TokenIds` or a mapping).
        memory_attention_variant: ``simple``, ``self``, ``interlayer``, ``gated-self-interlayer`` (upstream spelling
            ``self-interlayer``) or ``grouped-self-interlayer``.
        tokenizer: :class:`rxt_model.tokenizer.Tokenizer` or a ``transformers`` tokenizer; needed for text, not for ids.

    Raises:
        ValueError: components that do not fit each other, named with both values.
    """

    def __init__(
        self,
        decoder_config: ConfigLike,
        encoder_config: ConfigLike,
        memory_attention_config: MemoryAttentionConfig | Mapping[str, Any],
        tokenizer_config: TokenIds | Mapping[str, Any] | None = None,
        memory_attention_variant: str = "interlayer",
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        decoder = TransformerConfig.of(decoder_config)
        encoder = TransformerConfig.of(encoder_config)
        memory_attention = MemoryAttentionConfig.of(memory_attention_config)
        variant = canonical_variant(memory_attention_variant)
        if memory_attention.variant not in (variant, MemoryAttentionConfig.variant):
            raise ValueError(
                f"memory_attention_variant is {variant!r} and memory_attention_config.variant is "
                f"{memory_attention.variant!r}; give the same twice, or leave it out of memory_attention_config."
            )
        memory_attention = memory_attention.replace(variant=variant)
        _check_components_fit(decoder, encoder, memory_attention)
        self.decoder = RxTDecoder(decoder)
        self.encoder = RxTEncoder(encoder)
        self.memory_attention = RxTMemoryAttention(memory_attention)
        self.tokenizer: Tokenizer | None = None if tokenizer is None else as_tokenizer(tokenizer)
        self.token_ids = resolve_token_ids(tokenizer_config, self.tokenizer)
        self._check_tokenizer()
        self.share_components()
        self._start_conversation()

    def _finish_update(self) -> None:
        self.finish_memory_update()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.share_components()  # the encoder is copied without the memory

    def share_components(self) -> None:
        """Make encoder and decoder use one embedding and everything use one short-term memory.

        Done on construction and after loading; calling it again changes nothing and keeps what is remembered (spec 7,
        defects 15 and 18).
        """
        self.encoder.model.embedding = self.decoder.model.embedding
        self.memory_attention.model.stm = self.decoder.model.stm
        self.encoder.writes_to(self.decoder.model.stm)
        if self.encoder.model.stm is not None:
            self.encoder.model.stm = self.decoder.model.stm

    def _after_load(self) -> None:
        self.share_components()

    def _check_tokenizer(self) -> None:
        vocab_size = self.decoder.config.vocab_size
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer has {self.tokenizer.vocab_size} tokens and the model's vocabulary {vocab_size}; use the tokenizer "
                "the model was trained with."
            )
        for field in dataclasses.fields(self.token_ids):
            token_id = getattr(self.token_ids, field.name)
            if token_id is not None and token_id >= vocab_size:
                raise ValueError(
                    f"tokenizer_config.{field.name} is {token_id}; the vocabulary ends at {vocab_size - 1}."
                )

    @property
    def stm(self) -> ShortTermMemory:
        """The one short-term memory of the system."""
        return self.decoder.model.stm

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.model.embedding.weight.device

    @classmethod
    def _from_config(cls: type[Model], config: Mapping[str, Any], *, tokenizer: Any = None) -> Model:
        return cls(**config, tokenizer=tokenizer)

    def _config(self) -> dict[str, Any]:
        return {
            "decoder_config": self.decoder.config.to_dict(),
            "encoder_config": self.encoder.config.to_dict(),
            "memory_attention_config": self.memory_attention.config.to_dict(),
            "tokenizer_config": self.token_ids.to_dict(),
            "memory_attention_variant": self.memory_attention.config.variant,
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Decoder logits (B, T, V) for one message, reading the given memory or the model's own."""
        logits: Tensor = self.decoder(input_ids, attention_mask, memory)
        return logits


class RxTAlpha(ReactiveTransformer):
    """RxT-Alpha: ``[BOS][Q]query[A]answer[EOS]`` (spec 2.15); arguments as in :class:`ReactiveTransformer`."""

    component: ClassVar[Component] = "rxt_alpha"
    default_max_seq_len: ClassVar[int] = 256
    system_prompt_title = "SYSTEM INSTRUCTIONS"
    thinks: ClassVar[bool] = False


class RxTBeta(ReactiveTransformer):
    """RxT-Beta: thinking modes, tool calls and results, internal instructions (spec 2.15).

    Args:
        system_prompt_title: heading of a system prompt; the other arguments as in :class:`ReactiveTransformer`.
    """

    component: ClassVar[Component] = "rxt_beta"
    default_max_seq_len: ClassVar[int] = 8192
    thinks: ClassVar[bool] = True

    def __init__(
        self,
        decoder_config: ConfigLike,
        encoder_config: ConfigLike,
        memory_attention_config: MemoryAttentionConfig | Mapping[str, Any],
        tokenizer_config: TokenIds | Mapping[str, Any] | None = None,
        memory_attention_variant: str = "gated-self-interlayer",
        tokenizer: Any = None,
        system_prompt_title: str = "SYSTEM INSTRUCTIONS",
    ) -> None:
        super().__init__(
            decoder_config,
            encoder_config,
            memory_attention_config,
            tokenizer_config,
            memory_attention_variant,
            tokenizer,
        )
        self.system_prompt_title = system_prompt_title

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "system_prompt_title": self.system_prompt_title}


def _check_components_fit(
    decoder: TransformerConfig, encoder: TransformerConfig, memory_attention: MemoryAttentionConfig
) -> None:
    for name in ("num_layers", "embed_dim", "vocab_size"):
        if getattr(decoder, name) != getattr(encoder, name):
            raise ValueError(
                f"{name} is {getattr(decoder, name)} in decoder_config and {getattr(encoder, name)} in encoder_config; they "
                "must be equal, because layer i of the encoder is written where layer i of the decoder reads."
            )
    for name in ("num_layers", "embed_dim", "stm_size"):
        if getattr(decoder, name) != getattr(memory_attention, name):
            raise ValueError(
                f"{name} is {getattr(decoder, name)} in decoder_config and {getattr(memory_attention, name)} in "
                "memory_attention_config; they must be equal."
            )
