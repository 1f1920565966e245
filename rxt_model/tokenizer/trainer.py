"""Training a byte-level BPE tokenizer (spec 2.15)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from .special_tokens import DEFAULT_SPECIAL_TOKENS
from .tokenizer import Tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Mapping[str, str] = DEFAULT_SPECIAL_TOKENS,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> Tokenizer:
    """Train byte-level BPE on texts. The same texts give the same tokenizer, on any machine and in any run.

    Ids: the special tokens in their order ([PAD] 0, [UNK] 1, [BOS] 2, [EOS] 3, [MASK] 4, [Q] 5, [A] 6, then [I] 7,
    [T] 8, [U] 9, [C] 10), the 256 bytes, then the merges. Every text can be written, so [UNK] is never produced.

    Args:
        texts: the texts, read once. Special-token strings in them are ordinary text.
        vocab_size: the size wanted, at least 256 bytes + the special tokens. With few texts there may not be enough
            pairs to merge: read ``vocab_size`` of the result.
        special_tokens: role to token string, in the order of ids.
        min_frequency: a pair is merged if it occurs at least this often.
        show_progress: draw a progress bar on the terminal.

    Returns:
        The tokenizer, with the post-processor ``[BOS] $A [EOS]`` in its file (``encode`` does not use it).

    Raises:
        TypeError: a text is not a str, or ``texts`` is a single str.
        ValueError: no text, too small a ``vocab_size``, an unknown role, or two roles with the same token.

    Example:
        >>> tokenizer = train_tokenizer(["the cat", "the hat"], vocab_size=280)
        >>> tokenizer.special_tokens.query, tokenizer.special_tokens.answer
        (5, 6)

    Source: spec 2.15.
    """
    _check(texts, vocab_size, special_tokens, min_frequency)
    backend = tokenizers.Tokenizer(models.BPE(unk_token=special_tokens.get("unk")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens.values()),
        # Sorted: the library's order is that of a hash table.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    bos, eos = special_tokens.get("bos"), special_tokens.get("eos")
    if bos is not None and eos is not None:
        ends = [(token, backend.token_to_id(token)) for token in (bos, eos)]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", pair=f"{bos} $A $B {eos}", special_tokens=ends
        )
    return Tokenizer.from_json(backend.to_str(), special_tokens=special_tokens)


def _check(texts: Iterable[str], vocab_size: int, special_tokens: Mapping[str, str], min_frequency: int) -> None:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is a {type(texts).__name__}: give an iterable of str, such as a list or a generator.")
    for name, value in (("vocab_size", vocab_size), ("min_frequency", min_frequency)):
        if type(value) is not int:
            raise TypeError(f"{name} is a {type(value).__name__}: give an int.")
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}: give 1 or more.")
    for role, token in special_tokens.items():
        if role not in DEFAULT_SPECIAL_TOKENS:
            raise ValueError(
                f"special_tokens names the role {role!r}: the roles are {', '.join(DEFAULT_SPECIAL_TOKENS)}."
            )
        if not isinstance(token, str) or len(token) < 2 or token.split() != [token]:
            raise ValueError(
                f"special_tokens[{role!r}] is {token!r}: give a string of at least two characters without spaces."
            )
    if len(set(special_tokens.values())) != len(special_tokens):
        raise ValueError("special_tokens gives two roles the same token: give each role its own.")
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}: give at least {smallest}, which is 256 bytes and {len(special_tokens)} "
            "special tokens."
        )


def _checked(texts: Iterable[str]) -> Iterator[str]:
    count = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts yields a {type(text).__name__} at position {index}: every text is a str.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"texts yields a lone surrogate at position {index}, which is not text: decode its source with "
                "errors='replace'."
            ) from None
        count += bool(text)
        yield text
    if count == 0:
        raise ValueError("texts yields no text: a tokenizer is learned from at least one non-empty str.")
