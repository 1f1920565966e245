"""Upstream's `generate` of stateless language models, by this package's decode engines (or key/value cache) and sampler.

Upstream's own (0.3.92) continues in another way with its cache than without; here both give the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

from torch import nn

from rxt_model.cache import SelfAttentionCache
from rxt_model.checks import check_token_ids
from rxt_model.drop_in.accelerated import AcceleratedLanguageModel, accelerated_by
from rxt_model.drop_in.language_model import LanguageModel
from rxt_model.drop_in.shadow import Shadow
from rxt_model.interaction.decoding import CachedDecoding, Decoding, Step, UncachedDecoding, stream_tokens
from rxt_model.interaction.engine import MODULES, DecodingChoice, EngineDecoding, choose_engine, own_engine
from rxt_model.interaction.sampling import Sampler, SamplingOptions

__all__ = ["AcceleratedGeneration"]


class AcceleratedGeneration(Shadow):
    """`generate` of a model whose network is accelerated already."""

    names = ("generate",)

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__(model)
        self._network = network

    def _model(self) -> LanguageModel:
        accelerated = accelerated_by(self._network)
        assert isinstance(accelerated, AcceleratedLanguageModel)
        return accelerated.ours()

    def decoding(self) -> DecodingChoice:
        """How answers are decoded, and why."""
        return choose_engine(self._model())

    def generate(self, *arguments: Any, **named: Any) -> Iterator[int]:
        """As upstream's `generate`, with its arguments; temperature 0 is greedy.

        Raises:
            TypeError, ValueError: arguments that do not fit, before anything is computed.
        """
        bound = inspect.signature(cast(Any, type(self.target)).generate).bind(self.target, *arguments, **named)
        bound.apply_defaults()
        given = bound.arguments
        model = self._model()
        ids, mask = given["input_ids"], given["attention_mask"]
        mask = None if mask is None else mask.bool()
        check_token_ids(ids, mask, model.config.vocab_size)
        if ids.shape[0] != 1:
            raise ValueError(f"input_ids has {ids.shape[0]} rows; generate takes one.")
        prompt = (ids[0] if mask is None else ids[0][mask[0]]).tolist()
        if given["answer_token_id"] is not None:
            prompt.append(given["answer_token_id"])
        budget = given["max_seq_len"] - len(prompt)
        if budget < 1:
            raise ValueError(
                f"max_seq_len is {given['max_seq_len']} and the prompt has {len(prompt)} tokens with the one that opens the "
                "answer; there must be room for more."
            )
        options = SamplingOptions(given["temperature"], given["top_k"], given["top_p"])
        options.check_vocabulary(model.config.vocab_size)
        decoding: Decoding
        engine = choose_engine(model).engine
        if not given["use_self_attn_cache"]:
            decoding = UncachedDecoding(lambda tokens, _: model.hidden_states(tokens).hidden, model.logits, ids.device)
        elif engine != MODULES:
            decoding = EngineDecoding(own_engine(model, engine), ids.device)
        else:
            cache = SelfAttentionCache(model.model.depth, 1, capacity=len(prompt) + 64, device=ids.device)
            decoding = CachedDecoding(
                lambda tokens, cache: model.hidden_states(tokens, None, cache).hidden, model.logits, cache, ids.device
            )
        # Without an end token nothing ends an answer early; no token has this id.
        end = -1 if given["eos_token_id"] is None else given["eos_token_id"]
        steps = stream_tokens(decoding, [prompt], sampler=Sampler(options, rows=1), budgets=[budget], eos_id=end)
        return _tokens(steps)


def _tokens(steps: Any) -> Generator[int, None, None]:
    with closing(steps):
        for step in steps:
            assert isinstance(step, Step)
            yield int(step.tokens[0])
