"""Text in and text out: the tokenizing and printing half of the conversation interface (spec 2.15, 2.16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rxt_model.config import TokenIds
from rxt_model.interaction.templates import InteractionTemplate, as_batch, fits
from rxt_model.tokenizer import BatchTokenStream, Tokenizer, TokenStream

#: What streams yield around the memory update.
MEMORY_UPDATE_START, MEMORY_UPDATE_END = -1, -2

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextInterface:
    """Methods of a full model that need its tokenizer."""

    tokenizer: Tokenizer | None
    token_ids: TokenIds
    thinks: ClassVar[bool]
    default_max_seq_len: ClassVar[int]
    system_prompt_title: str
    _text_stream: TokenStream | BatchTokenStream | None
    #: Which rows of a yielded tensor are news; a row whose budget is spent repeats a word and not an end token.
    _text_rows: WeakTensorKeyDictionary | None

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"this {type(self).__name__} has no tokenizer; pass tokenizer= to the constructor or to from_pretrained, or "
                "work with token ids."
            )
        return self.tokenizer

    def _limit(self, max_seq_len: int | None) -> int:
        if max_seq_len is None:
            return self.default_max_seq_len
        if type(max_seq_len) is not int or max_seq_len < 1:
            raise ValueError(f"max_seq_len is {max_seq_len!r}; it must be an integer of at least 1, or None.")
        return max_seq_len

    @property
    def template(self) -> InteractionTemplate:
        """How this model's interactions are laid out."""
        return InteractionTemplate(self.token_ids, self._require_tokenizer())

    def tokenize_query(
        self,
        text: str | None,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
        *,
        internal: str | None = None,
        tool_result: str | None = None,
    ) -> dict[str, Tensor]:
        """Token ids of one message, to be passed to ``interact``.

        Args:
            text: the message.
            max_seq_len: most tokens of the whole interaction; the message must leave room for an answer.
            device: where the tensors go.
            internal: instructions for this message alone (``[I]``, Beta family).
            tool_result: what a tool returned, instead of ``text`` (``[U]``, Beta family).

        Returns:
            ``input_ids`` (1, T) int64 and ``attention_mask`` (1, T) bool, without padding.

        Raises:
            ValueError: no tokenizer, an empty message, or one that does not fit.
        """
        ids = self.template.prompt(text, internal=internal, tool_result=tool_result)
        fits(ids, self._limit(max_seq_len), room=2, what="the message")
        return as_batch([ids], self.token_ids.pad_token_id, len(ids), device)

    def tokenize_full_interaction(
        self,
        query: str | None,
        answer: str | None,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
        *,
        think: str | None = None,
        tool_call: str | None = None,
        internal: str | None = None,
        tool_result: str | None = None,
    ) -> dict[str, Tensor]:
        """Token ids of a finished interaction, to be written into memory with ``init_stm_state``.

        Returns and raises as :meth:`tokenize_query`.
        """
        ids = self.template.interaction(
            query, answer, think=think, tool_call=tool_call, internal=internal, tool_result=tool_result
        )
        fits(ids, self._limit(max_seq_len), room=0, what="the interaction")
        return as_batch([ids], self.token_ids.pad_token_id, len(ids), device)

    def tokenize_batch(
        self, queries: Sequence[str], max_seq_len: int | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Token ids of one message per conversation, right-padded to ``max_seq_len``.

        Returns:
            ``input_ids`` (B, max_seq_len) int64 and ``attention_mask`` (B, max_seq_len) bool.

        Raises:
            TypeError: a single string instead of a sequence of them.
            ValueError: no query, no tokenizer, or a message that does not fit.
        """
        if isinstance(queries, str):
            raise TypeError("queries is a string; it must be a sequence with one string per conversation.")
        if not queries:
            raise ValueError("queries is empty; it must hold one string per conversation.")
        width = self._limit(max_seq_len)
        rows = [self.template.prompt(query) for query in queries]
        for index, row in enumerate(rows):
            fits(row, width, room=2, what=f"message {index}")
        return as_batch(rows, self.token_ids.pad_token_id, width, device)

    def stringify_token(self, token_id: int, show_memory_update: bool = False) -> str:
        """The text that one more token of the running answer completes.

        Characters that span several tokens come out with the last of them, so the pieces joined are correct UTF-8.
        Control tokens give an empty string. -1 and -2 give an empty string, or a notice if asked for.
        """
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TypeError(
                f"token_id is of type {type(token_id).__name__}; it must be an integer, as interact yields it."
            )
        stream = self._text_stream if isinstance(self._text_stream, TokenStream) else None
        if token_id in (MEMORY_UPDATE_START, MEMORY_UPDATE_END):
            self._text_stream = None
            rest = stream.finish() if stream is not None else ""
            return rest + (_notice(token_id) if show_memory_update else "")
        if stream is None:
            stream = self._text_stream = TokenStream(self._require_tokenizer())
        if token_id >= self._require_tokenizer().vocab_size:
            return _UNKNOWN  # a vocabulary padded beyond its tokenizer: show that there was something
        return stream.push(token_id)

    def stringify_tokens(self, token_ids: Tensor, show_memory_update: bool = False) -> list[str]:
        """As :meth:`stringify_token` for one token per conversation; rows that have ended give empty strings.

        Args:
            token_ids: (B,) as ``batch_interact`` yields them.
            show_memory_update: whether -1 and -2 give a notice.

        Raises:
            TypeError, ValueError: not a (B,) tensor of integers, or of another B than the tokens before.
        """
        if not isinstance(token_ids, Tensor) or token_ids.is_floating_point():
            kind = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise TypeError(f"token_ids is of type {kind}; it must be an integer tensor, as batch_interact yields it.")
        if token_ids.dim() != 1 or token_ids.shape[0] < 1:
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}; it must be (batch,) with at least one row."
            )
        ids = token_ids.tolist()
        stream = self._text_stream if isinstance(self._text_stream, BatchTokenStream) else None
        if ids[0] in (MEMORY_UPDATE_START, MEMORY_UPDATE_END):
            self._text_stream = None
            rest = stream.finish() if stream is not None else [""] * len(ids)
            return [text + (_notice(ids[0]) if show_memory_update else "") for text in rest]
        if stream is None:
            stream = self._text_stream = BatchTokenStream(self._require_tokenizer(), len(ids))
        active = None if self._text_rows is None else self._text_rows.get(token_ids)
        if active is not None:
            # A row whose budget is spent repeats a word, not an end token: end its text as well.
            end = self.token_ids.eos_token_id
            ids = [token if is_active else end for token, is_active in zip(ids, active.tolist(), strict=True)]
        tokenizer = self._require_tokenizer()
        known = tokenizer.vocab_size
        # An id beyond the tokenizer stands for a control token to the decoder, which shows none, but ends nothing.
        silent = min(tokenizer.special_ids - {tokenizer.special_tokens.eos}, default=self.token_ids.bos_token_id)
        done = stream.done
        pieces = stream.push([token if token < known else silent for token in ids])
        return [
            _UNKNOWN if token >= known and not was_done else piece
            for piece, token, was_done in zip(pieces, ids, done, strict=True)
        ]

    def stringify_batch(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """Whole texts of (B, T) ids where the (B, T) mask is True, control tokens left out.

        Raises:
            TypeError, ValueError: no tokenizer, or ids and mask that are no integer tensors of one shape.
        """
        tokenizer = self._require_tokenizer()
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if not isinstance(value, Tensor) or value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} is of type {kind}; it must be a tensor of integers or bool.")
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)}; both must "
                "be (batch, time)."
            )
        return [
            tokenizer.decode(row[mask.bool()].tolist(), skip_special_tokens=True)
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]


def _notice(token_id: int) -> str:
    return "\n[Start memory update...]\n" if token_id == MEMORY_UPDATE_START else "[Memory updated]\n"
