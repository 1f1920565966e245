"""Real dialogue as token ids: the same turns for every system.

The text is that of the PyPI package ``chitchat-dataset`` (MIT, 7,168 human conversations) where it is installed, else
sixteen short conversations of this project's own. Weights do not matter for cost, and words hardly do (they choose the
experts); lengths do. So turns are cut in one of two ways:

``equal``
    every turn has the same number of query and of answer tokens, taken in order from what the two speakers really said.
    The turn's number is then the only thing that changes along a conversation, which is what an exponent is fitted to.
``real``
    every message as long as it was, those beyond a limit cut there.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rxt_model.config import TokenIds
from rxt_model.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Dialogues",
    "Lengths",
    "Turn",
    "conversation_turns",
    "dialogue_tokenizer",
    "load_dialogues",
    "long_conversation",
]

Lengths = Literal["equal", "real"]

_OWN_DATA = Path(__file__).parent / "data" / "dialogues.json"
_PACKAGE = "chitchat_dataset"


@dataclass(frozen=True)
class Dialogues:
    """Conversations of at least the length that was asked for; messages alternate between two speakers.

    Attributes:
        source: where they are from, for the record.
        conversations: messages as text.
    """

    source: str
    conversations: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Turn:
    """One interaction as token ids: ``[BOS][Q]query[A]`` and ``answer[EOS]`` (spec 2.15)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole interaction."""
        return len(self.prompt) + len(self.answer)


def _joined(conversations: Sequence[Sequence[str]], messages: int) -> tuple[tuple[str, ...], ...]:
    """Conversations of at least ``messages`` messages: as they are, or several in a row where all are shorter."""
    long = tuple(tuple(conversation) for conversation in conversations if len(conversation) >= messages)
    if long:
        return long
    return tuple(_in_a_row(conversations, start, messages) for start in range(len(conversations)))


def _in_a_row(conversations: Sequence[Sequence[str]], start: int, messages: int) -> tuple[str, ...]:
    """At least ``messages`` messages: one conversation and those after it, from the first on again behind the last."""
    row: list[str] = []
    while len(row) < messages:
        conversation = conversations[start % len(conversations)]
        row += conversation[: len(conversation) // 2 * 2]  # whole exchanges, so that speakers keep alternating
        start += 1
    return tuple(row)


def _own() -> list[list[str]]:
    conversations: list[list[str]] = json.loads(_OWN_DATA.read_text(encoding="utf-8"))["conversations"]
    return conversations


def _from_package() -> list[list[str]]:
    import chitchat_dataset

    result = []
    for conversation in chitchat_dataset.Dataset().values():
        messages = [
            " ".join(" ".join(part["text"] for part in message).split()) for message in conversation["messages"]
        ]
        result.append([message for message in messages if message])
    return result


def load_dialogues(turns: int, *, use_package: bool | None = None) -> Dialogues:
    """Conversations with at least ``turns`` exchanges.

    Args:
        turns: exchanges, each a message and its reply.
        use_package: True for ``chitchat-dataset``, False for the project's own, None for whichever is there.

    Raises:
        ValueError: fewer than one turn.
        ModuleNotFoundError: the package was asked for and is not installed.

    Example:
        >>> dialogues = load_dialogues(40, use_package=False)
        >>> len(dialogues.conversations), min(map(len, dialogues.conversations)) >= 80
        (16, True)
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; it must be at least 1.")
    installed = importlib.util.find_spec(_PACKAGE) is not None
    if use_package and not installed:
        raise ModuleNotFoundError(
            "the package chitchat-dataset is not installed; install it with pip install 'rxt-kernels[train]', or leave out "
            "use_package to take the project's own conversations."
        )
    if installed if use_package is None else use_package:
        return Dialogues("chitchat-dataset", _joined(_from_package(), 2 * turns))
    return Dialogues("own conversations of rxt-kernels", _joined(_own(), 2 * turns))


def long_conversation(turns: int, start: int) -> tuple[tuple[str, ...], str]:
    """One conversation of any number of turns, made of those from number ``start`` on; and where they are from.

    Example:
        >>> messages, source = long_conversation(1000, 0)
        >>> len(messages) >= 2000
        True
    """
    dialogues = load_dialogues(1)
    return _in_a_row(dialogues.conversations, start, 2 * turns), dialogues.source


def dialogue_tokenizer(dialogues: Dialogues, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the dialogues themselves, for models without a published one.

    Args:
        dialogues: the text.
        vocab_size: of the model; at most 7500 are used, the vocabulary of the RxT-Alpha family.
    """
    texts = (message for conversation in dialogues.conversations for message in conversation)
    return train_tokenizer(texts, min(vocab_size, 7500))


def _cut(ids: list[int], pieces: int, size: int) -> list[list[int]]:
    """``pieces`` runs of ``size`` tokens, starting over where the speaker said too little."""
    repeated = ids * -(-pieces * size // len(ids))
    return [repeated[index * size : (index + 1) * size] for index in range(pieces)]


def conversation_turns(
    messages: Sequence[str],
    tokenizer: Any,
    token_ids: TokenIds,
    turns: int,
    *,
    lengths: Lengths,
    query_tokens: int,
    answer_tokens: int,
) -> list[Turn]:
    """Turn messages into ``turns`` interactions.

    Args:
        messages: of two speakers in turn, at least ``2 * turns``.
        tokenizer: text to ids.
        token_ids: control tokens of the template.
        turns: how many.
        lengths: ``equal`` or ``real``; see the module.
        query_tokens, answer_tokens: tokens of a query and of an answer without control tokens; with ``real`` the most
            they may have.

    Raises:
        ValueError: too few messages, a length below 1, or an unknown way to cut.
    """
    if lengths not in ("equal", "real"):
        raise ValueError(f"lengths is {lengths!r}; accepted are 'equal' and 'real'.")
    if len(messages) < 2 * turns or turns < 1:
        raise ValueError(f"messages holds {len(messages)}; {turns} turns need {2 * turns}, and at least one turn.")
    if query_tokens < 1 or answer_tokens < 1:
        raise ValueError(
            f"query_tokens and answer_tokens are {query_tokens} and {answer_tokens}; each must be at least 1."
        )
    encoded = tokenizer.encode_ordinary_batch(list(messages[: 2 * turns]))
    sides = encoded[0::2], encoded[1::2]
    if lengths == "equal":
        joined = [[token for message in side for token in message] for side in sides]
        sides = _cut(joined[0], turns, query_tokens), _cut(joined[1], turns, answer_tokens)
    return [
        Turn(
            (token_ids.bos_token_id, token_ids.query_token_id, *query[:query_tokens], token_ids.answer_token_id),
            (*answer[:answer_tokens], token_ids.eos_token_id),
        )
        for query, answer in zip(*sides, strict=True)
    ]
