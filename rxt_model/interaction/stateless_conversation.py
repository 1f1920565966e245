"""A conversation with a model that has no memory: its history is read again, or its key/value cache is kept.

What people use instead of a Reactive Transformer. Messages have the same template, so the context of turn N is the
concatenation of all interactions so far, ``[BOS][Q]query[A]answer[EOS][BOS][Q]query[A]...``, and answers come out of the
same decoding loop, engines and sampler (spec 2.15, 2.16; section 6, cost).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rxt_kernels.decode import DecodeEngine
from rxt_model.cache import SelfAttentionCache
from rxt_model.checks import check_token_ids
from rxt_model.config import TokenIds
from rxt_model.interaction.decoding import CachedDecoding, Decoding, UncachedDecoding, stream_tokens
from rxt_model.interaction.engine import (
    MODULES,
    EngineDecoding,
    choose_engine,
    explain_choice,
    own_engine,
)
from rxt_model.interaction.plain_weights import weights_state
from rxt_model.interaction.sampling import Sampler, SamplingOptions
from rxt_model.interaction.templates import fits
from rxt_model.interaction.text import TextInterface
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import as_tokenizer

__all__ = ["StatelessConversation"]

_TOKEN_ID_BYTES = 8  # int64, as input_ids are


class StatelessConversation(TextInterface):
    """One conversation with a :class:`SparseQueryTransformer`.

    Args:
        model: the language model.
        token_ids: control tokens of the template.
        tokenizer: :class:`rxt_model.tokenizer.Tokenizer` or a ``transformers`` tokenizer; needed for text, not for ids.
        keep_cache: keep keys and values between turns, so that a turn reads its own message alone. False reads the whole
            history again at the start of every turn; within an answer a cache is used either way.
        max_history: most tokens of the whole conversation, or None. Rotary angles exist for every position, so nothing
            but time and memory limits a conversation; a trained model is reliable up to its ``seq_len`` only.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: control tokens or a tokenizer outside of the model's vocabulary, or a limit below 1.

    Example:
        >>> from rxt_model.config import StatelessConfig
        >>> model = SparseQueryTransformer(StatelessConfig(num_layers=1, vocab_size=50, embed_dim=32, ff_dim=64,
        ...     att_heads=4, att_groups=2, att_num_query_groups=2))
        >>> ids = TokenIds(bos_token_id=2, eos_token_id=3, query_token_id=5, answer_token_id=6)
        >>> conversation = StatelessConversation(model, ids, keep_cache=True)
        >>> answer = list(conversation.interact(torch.tensor([[2, 5, 20, 21]]), temperature=0.0, max_seq_len=8))
        >>> conversation.history == [2, 5, 20, 21, 6, *answer]
        True
    """

    thinks: ClassVar[bool] = False
    default_max_seq_len: ClassVar[int] = 256
    system_prompt_title: str = "SYSTEM INSTRUCTIONS"

    decode_engine: str = "auto"
    """How answers are decoded: "auto", "modules", or the name of an engine of :mod:`rxt_kernels.decode`.

    An answer without a cache (``use_self_attn_cache=False``) is always computed by the modules: that is what it is for.
    """

    decode_weights: str | None = None
    """What the native engine packs weights in: "float32", "bfloat16", "int8", or None for the dtype of the model."""

    def __init__(
        self,
        model: SparseQueryTransformer,
        token_ids: TokenIds,
        tokenizer: Any = None,
        *,
        keep_cache: bool = False,
        max_history: int | None = None,
    ) -> None:
        if not isinstance(model, SparseQueryTransformer):
            raise TypeError(f"model is a {type(model).__name__}; it must be a SparseQueryTransformer.")
        if max_history is not None and max_history < 1:
            raise ValueError(f"max_history is {max_history}; it must be at least 1, or None for no limit.")
        vocab_size = model.config.vocab_size
        largest = max(token_id for token_id in token_ids.to_dict().values() if token_id is not None)
        if largest >= vocab_size:
            raise ValueError(f"token_ids names the id {largest}; the vocabulary of the model ends at {vocab_size - 1}.")
        self.model = model
        self.token_ids = token_ids
        self.tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer has {self.tokenizer.vocab_size} tokens and the model's vocabulary {vocab_size}; use the "
                "tokenizer the model was trained with."
            )
        self.keep_cache = keep_cache
        self.max_history = max_history
        self._reading = 0  # counts answers begun, so that an abandoned stream is recognised
        self._engine: DecodeEngine | None = None
        self._engine_made_for: tuple[object, ...] = ()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # An engine cannot be copied; a copy of this conversation reads its history again.
        return {**self.__dict__, "_engine": None}

    def reset(self) -> None:
        """Forget the conversation; a stream that is still open can no longer be read."""
        self.history: list[int] = []
        """Token ids of every interaction so far."""
        self.turns = 0
        """Interactions so far."""
        self._forget_keys()
        self._reading += 1
        self._text_stream = None
        self._text_rows = None

    def _forget_keys(self) -> None:
        """Whatever was read has to be read again."""
        self._cache: SelfAttentionCache | None = None
        if self._engine is not None:
            self._engine.reset()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.model.embedding.weight.device

    def state_bytes(self) -> int:
        """Bytes that have to be kept until the next message: token ids, and keys and values if they are kept."""
        holder = (self._cache or self._engine) if self.keep_cache else None
        return (0 if holder is None else holder.state_bytes()) + _TOKEN_ID_BYTES * len(self.history)

    def explain(self) -> str:
        """Which path decoding takes, and why, in one sentence."""
        return explain_choice(choose_engine(self.model, self.decode_engine, self.decode_weights), self.decode_weights)

    def interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_seq_len: int | None = None,
        use_self_attn_cache: bool = True,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Answer one message token by token; the interaction becomes part of the history.

        It does so token by token, so what a caller read before it stopped is remembered. An exception while decoding
        leaves the history as it was.

        Args:
            input_ids: (1, T) int64 from :meth:`tokenize_query`; padding is left out by the mask.
            attention_mask: (1, T) bool, True at real tokens.
            temperature, top_k, top_p, seed: see :class:`SamplingOptions`; temperature 0 is greedy.
            max_seq_len: most tokens of message and answer together; 256 unless given.
            use_self_attn_cache: False runs the whole history again for every token, for checks.

        Returns:
            An iterator over token ids, the end token included. There is no memory update to announce.

        Raises:
            TypeError, ValueError: arguments that do not fit, before anything is computed.
        """
        check_token_ids(input_ids, attention_mask, self.model.config.vocab_size)
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[0]} rows; interact takes one message, of shape (1, time)."
            )
        if self.keep_cache and not use_self_attn_cache:
            raise ValueError(
                "use_self_attn_cache is False and this conversation keeps its cache; build it with keep_cache=False."
            )
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt = [token for token, real in zip(input_ids[0].tolist(), keep[0].tolist(), strict=True) if real]
        if not prompt:
            raise ValueError("attention_mask is all False; a conversation needs a message.")
        limit = max_seq_len or self.default_max_seq_len
        fits(prompt, limit, room=2, what="the message")
        prompt = [*prompt, self.token_ids.answer_token_id]
        sampler = Sampler(SamplingOptions(temperature, top_k, top_p, seed))
        return self.stream(prompt, sampler, limit - len(prompt), use_self_attn_cache)

    def stream(
        self, prompt: Sequence[int], sampler: Sampler, budget: int, use_self_attn_cache: bool = True
    ) -> Generator[int, None, None]:
        """What :meth:`interact` does after its checks: continue the history with ``prompt``, then answer.

        Args:
            prompt: token ids of the message, the token that opens the answer included.
            sampler: chooses the tokens.
            budget: most tokens of the answer, at least 1.
            use_self_attn_cache: as in :meth:`interact`.

        Raises:
            ValueError: the history would grow beyond ``max_history``, or a budget below 1.
        """
        if budget < 1:
            raise ValueError(f"budget is {budget}; an answer needs at least 1 token.")
        needed = len(self.history) + len(prompt) + 1
        if self.max_history is not None and needed > self.max_history:
            raise ValueError(
                f"the history holds {len(self.history)} tokens and the message adds {len(prompt)}; with one token of answer "
                f"that is more than max_history = {self.max_history}. Call reset(), or build the conversation with a larger "
                "max_history or None."
            )
        if self.max_history is not None:
            budget = min(budget, self.max_history - len(self.history) - len(prompt))
        return self._stream(list(prompt), sampler, budget, use_self_attn_cache)

    def _stream(
        self, prompt: list[int], sampler: Sampler, budget: int, use_self_attn_cache: bool
    ) -> Generator[int, None, None]:
        self._reading += 1
        reading, before = self._reading, len(self.history)
        self._text_stream = None
        decoding, unread = self._decoding(prompt, use_self_attn_cache)
        try:
            steps = stream_tokens(
                decoding, [unread], sampler=sampler, budgets=[budget], eos_id=self.token_ids.eos_token_id
            )
            for number, step in enumerate(steps):
                token = int(step.tokens[0])
                if number == 0:
                    self.history += prompt
                    self.turns += 1
                self.history.append(token)
                yield token
                if reading != self._reading:  # looked at before anything is computed: the cache is another answer's now
                    raise RuntimeError(
                        "this answer was ended because another message was sent or the conversation was reset; read an "
                        "answer to its end before asking again."
                    )
        except GeneratorExit:
            raise
        except BaseException:
            if reading == self._reading:
                if len(self.history) > before:
                    self.turns -= 1
                del self.history[before:]
                self._forget_keys()  # they are of tokens that are not part of the history
            raise

    def _decoding(self, prompt: list[int], use_self_attn_cache: bool) -> tuple[Decoding, list[int]]:
        """How to decode, and the tokens that are to be read first."""
        context = [*self.history, *prompt]
        if not use_self_attn_cache:
            model = self.model
            return UncachedDecoding(lambda ids, _: model.hidden_states(ids).hidden, model.logits, self.device), context
        engine = self._engine_in_use()
        if engine is not None:
            if not self.keep_cache:
                engine.reset()
            return EngineDecoding(engine, self.device), context[engine.lengths[0] :]
        cache = self._cache
        if cache is None:
            cache = self.model.new_cache(1, capacity=len(context) + 64)
        if self.keep_cache:
            self._cache = cache
        # The last token of an answer was chosen but never read, so it is not in the cache either.
        unread = context[cache.longest :]
        return (
            CachedDecoding(
                lambda ids, cache: self.model.hidden_states(ids, None, cache).hidden,
                self.model.logits,
                cache,
                self.device,
            ),
            unread,
        )

    def _engine_in_use(self) -> DecodeEngine | None:
        """The engine of this conversation, which holds what was read; a new one where something else is to decode now."""
        name = choose_engine(self.model, self.decode_engine, self.decode_weights).engine
        made_for = (name, self.decode_weights, weights_state(self.model))
        lost = self._engine is None and name != MODULES
        if lost or self._engine_made_for != made_for:
            self._forget_keys()
            self._engine = None if name == MODULES else own_engine(self.model, name, self.decode_weights)
            self._engine_made_for = made_for
        return self._engine
