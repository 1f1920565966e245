"""Text while it is being generated: ids in, completed characters out (spec 2.15, 2.16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

from .tokenizer import Tokenizer


class TokenStream:
    """Decodes one conversation's ids as they come. All pieces joined are ``tokenizer.decode`` of all ids.

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: give ``""`` for special tokens (an end token, a mode token).
        keep_prefix_space: the ids continue a text already shown, so a space at their start belongs to it.

    Example:
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a b"], vocab_size=267)
        >>> stream = TokenStream(tokenizer)
        >>> [stream.push(token_id) for token_id in tokenizer.encode_ordinary("é!")], stream.finish()
        (['', '', 'é', '!'], '')

    Source: spec 2.15, defect 38.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep_prefix_space: bool = False
    ) -> None:
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}: give a Tokenizer, or as_tokenizer(...) of it.")
        self._tokenizer = tokenizer
        self._assembler = tokenizer.assembler(
            skip_special_tokens=skip_special_tokens, keep_prefix_space=keep_prefix_space
        )
        self._finished = False

    def push(self, token_id: SupportsIndex) -> str:
        """Take the next id and return the characters it completes: none, one or several.

        The id is an int or an integer tensor of no dimensions.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is not in the vocabulary, or the stream is finished. The stream is left as it was.
        """
        if self._finished:
            raise ValueError("This stream is finished: make a new TokenStream for the next text.")
        return self._assembler.push(self._tokenizer.check_id(token_id))

    def finish(self) -> str:
        """End the text: U+FFFD if a character was left incomplete, else nothing. Further pushes are refused."""
        self._finished = True
        return self._assembler.finish()


class BatchTokenStream:
    """A :class:`TokenStream` for each row of a batch, fed by one (batch,) tensor per step.

    A row that has had its end token is done: what comes after it is not shown (``batch_interact`` repeats the last
    token of rows that finished early, spec 2.16).

    Args:
        tokenizer: the tokenizer; its ``eos`` token ends a row.
        batch_size: the number of rows.
        skip_special_tokens, keep_prefix_space: as for :class:`TokenStream`.

    Example:
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a b"], vocab_size=267)
        >>> stream = BatchTokenStream(tokenizer, 2)
        >>> a, b, end = (tokenizer.token_to_id(token) for token in ("a", "b", "[EOS]"))
        >>> stream.push([a, b]), stream.push([end, b]), stream.push([end, b]), stream.done
        (['a', 'b'], ['', 'b'], ['', 'b'], (True, False))

    Source: spec 2.16.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        skip_special_tokens: bool = True,
        keep_prefix_space: bool = False,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: give an int of 1 or more.")
        self._rows = [
            TokenStream(tokenizer, skip_special_tokens=skip_special_tokens, keep_prefix_space=keep_prefix_space)
            for _ in range(batch_size)
        ]
        self._tokenizer = tokenizer
        self._done = [False] * batch_size
        self._finished = False

    def push(self, token_ids: Sequence[int] | Any) -> list[str]:
        """Take one id per row, a sequence or a (batch,) integer tensor, and return the new characters of each row.

        Raises:
            TypeError: an id is not an integer.
            ValueError: not one id per row, an id outside the vocabulary, or the stream is finished. No row has moved.
        """
        if self._finished:
            raise ValueError("This stream is finished: make a new BatchTokenStream for the next texts.")
        ids = self._tokenizer.check_ids(token_ids, "token_ids")
        if len(ids) != len(self._rows):
            raise ValueError(f"token_ids has {len(ids)} ids: give one for each of the {len(self._rows)} rows.")
        texts = []
        for row, token_id in enumerate(ids):
            texts.append("" if self._done[row] else self._rows[row].push(token_id))
            self._done[row] |= token_id == self._tokenizer.special_tokens.eos
        return texts

    @property
    def done(self) -> tuple[bool, ...]:
        """For each row, whether its end token has come."""
        return tuple(self._done)

    def finish(self) -> list[str]:
        """End every row, as :meth:`TokenStream.finish`."""
        self._finished = True
        return [row.finish() for row in self._rows]
