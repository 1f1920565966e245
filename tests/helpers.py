"""Tiny models and messages that the tests of models and conversations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_model import MemoryAttentionConfig, RxTAlpha, RxTBeta, Tokenizer, TransformerConfig, train_tokenizer
from rxt_model.config import TokenIds

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "embed_dim": 32,
    "ff_dim": 48,
    "att_heads": 4,
    "att_groups": 2,
    "att_query_groups": 2,
    "stm_size": 8,
    "seq_len": 64,
}
MEMORY_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 32,
    "att_heads": 4,
    "att_groups": 2,
    "att_query_groups": 2,
    "stm_size": 8,
    "seq_len": 64,
}
PAD, BOS, EOS, QUERY, ANSWER, INTERNAL, THINK, TOOL_USE, TOOL_CALL = 0, 2, 3, 5, 6, 7, 8, 9, 10
ALPHA_TOKENS = TokenIds(bos_token_id=BOS, eos_token_id=EOS, query_token_id=QUERY, answer_token_id=ANSWER)
BETA_TOKENS = ALPHA_TOKENS.replace(
    think_token_id=THINK, tool_call_token_id=TOOL_CALL, tool_use_token_id=TOOL_USE, internal_token_id=INTERNAL
)


def decoder_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**SIZES, **changes})


def encoder_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**SIZES, "skip_memory_cross_attention": True, **changes})


def memory_config(**changes: Any) -> MemoryAttentionConfig:
    return MemoryAttentionConfig(**{**MEMORY_SIZES, **changes})


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """Every byte is a token, so any character of more than one byte spans tokens."""
    return train_tokenizer(["the cat sat on the mat", "the hat of the cat"], vocab_size=VOCABULARY - 20)


def alpha(
    seed: int = 0,
    *,
    decoder: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    variant: str = "interlayer",
    with_tokenizer: bool = True,
) -> RxTAlpha:
    """An RxT-Alpha in evaluation mode whose weights and memory follow from the seed."""
    torch.manual_seed(seed)
    model = RxTAlpha(
        decoder_config(**(decoder or {})),
        encoder_config(**(encoder or {})),
        memory_config(**(memory or {})),
        ALPHA_TOKENS,
        variant,
        tokenizer() if with_tokenizer else None,
    )
    return model.eval()


def beta(seed: int = 0, *, with_tokenizer: bool = True, **changes: Any) -> RxTBeta:
    """An RxT-Beta with experts, in evaluation mode."""
    torch.manual_seed(seed)
    experts = {"use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 0, "moe_bias_mode": "local"}
    model = RxTBeta(
        decoder_config(**{**experts, **changes}),
        encoder_config(),
        memory_config(use_gated_residual=True, residual_gate_type="elementwise"),
        BETA_TOKENS,
        tokenizer=tokenizer() if with_tokenizer else None,
    )
    return model.eval()


def favour_end(model: RxTAlpha | RxTBeta, by: float) -> None:
    """Make the end token likelier, so that answers end by it."""
    with torch.no_grad():
        model.decoder.model.head.bias[EOS] += by


def messages(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Ids of one message per length, ``[BOS][Q]`` included."""
    generator = torch.Generator().manual_seed(seed)
    return [[BOS, QUERY, *torch.randint(11, VOCABULARY, (length,), generator=generator).tolist()] for length in lengths]


def right_padded(rows: Sequence[Sequence[int]], filler: int = PAD) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row))
        mask[index, : len(row)] = True
    return {"input_ids": ids, "attention_mask": mask}


def left_padded(rows: Sequence[Sequence[int]], filler: int = PAD) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in right_padded([row[::-1] for row in rows], filler).items()}


@contextmanager
def refusal(kind: type[Exception], *named: str):  # type: ignore[no-untyped-def]
    """Expect an error of this kind whose message is a short sentence naming every one of ``named``."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    for name in named:
        assert name in message, f"{name!r} is not named in: {message}"
    assert message.endswith("."), message
    assert "\n" not in message, message
    assert 20 < len(message) < 1200, message


def count_updates(model: RxTAlpha | RxTBeta) -> list[Tensor]:
    """The list that every memory update appends its encoded token ids to."""
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].clone()))
    return seen


def fails_when_called(error: BaseException) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return fail
