"""How a message, an answer and their parts become token ids (spec 2.15).

Text never becomes a control token: what a user types is encoded as plain bytes even where it spells ``[A]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_model.config import TokenIds
from rxt_model.tokenizer import Tokenizer


def required(token_id: int | None, role: str) -> int:
    """The id of a control token, or a sentence that says the model has none.

    Raises:
        ValueError: the id is None.
    """
    if token_id is None:
        raise ValueError(
            f"this model has no {role} token: neither its tokenizer_config nor its tokenizer names one. Leave out the part "
            "that needs it, or use a model that was trained with it."
        )
    return token_id


class InteractionTemplate:
    """Builds the token ids of whole interactions and of queries.

    ``[BOS] ([I] internal) ([Q] query | [U] tool result) ([T] thoughts) ([A] answer) ([C] tool call) [EOS]``; parts that
    are None or empty are left out. The older family uses only query and answer.
    """

    def __init__(self, ids: TokenIds, tokenizer: Tokenizer) -> None:
        self.ids = ids
        self._tokenizer = tokenizer

    def _part(self, token_id: int | None, role: str, text: str | None) -> list[int]:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"the {role} part is of type {type(text).__name__}; it must be a string, or None.")
        if not text:
            return []
        return [required(token_id, role), *self._tokenizer.encode_ordinary(text)]

    def prompt(self, query: str | None, *, internal: str | None = None, tool_result: str | None = None) -> list[int]:
        """Ids of a message up to where the answer starts, without ``[A]``.

        Raises:
            TypeError: a part that is no string.
            ValueError: both a query and a tool result (spec 7, defect 30), neither, or a part the model has no token for.
        """
        for name, part in (("query", query), ("internal", internal), ("tool_result", tool_result)):
            if part is not None and not isinstance(part, str):
                raise TypeError(f"{name} is of type {type(part).__name__}; it must be a string.")
        if query and tool_result:
            raise ValueError("query and tool_result are both given; an interaction starts with one of them.")
        if not query and not tool_result:
            raise ValueError("query is empty and there is no tool_result; give the text of the message.")
        return [
            self.ids.bos_token_id,
            *self._part(self.ids.internal_token_id, "internal [I]", internal),
            *self._part(self.ids.query_token_id, "query [Q]", query),
            *self._part(self.ids.tool_use_token_id, "tool result [U]", tool_result),
        ]

    def interaction(
        self,
        query: str | None,
        answer: str | None,
        *,
        think: str | None = None,
        tool_call: str | None = None,
        internal: str | None = None,
        tool_result: str | None = None,
    ) -> list[int]:
        """Ids of a whole interaction, ``[BOS]`` to ``[EOS]``.

        Raises:
            ValueError: as :meth:`prompt`.
        """
        return [
            *self.prompt(query, internal=internal, tool_result=tool_result),
            *self._part(self.ids.think_token_id, "think [T]", think),
            *self._part(self.ids.answer_token_id, "answer [A]", answer),
            *self._part(self.ids.tool_call_token_id, "tool call [C]", tool_call),
            self.ids.eos_token_id,
        ]

    def system_prompt(self, text: str, title: str) -> list[int]:
        """Ids of a system prompt: ``[BOS][I]title\\n\\ntext[EOS]``, or ``[BOS][Q]title[A]text[EOS]`` without ``[I]``."""
        if not isinstance(text, str):
            raise TypeError(f"the system prompt is of type {type(text).__name__}; it must be a string.")
        if not text:
            raise ValueError("the system prompt is empty; give its text, or None for no system prompt.")
        if self.ids.internal_token_id is None:
            return self.interaction(title, text)
        return [
            self.ids.bos_token_id,
            *self._part(self.ids.internal_token_id, "internal [I]", f"{title}\n\n{text}"),
            self.ids.eos_token_id,
        ]


def fits(ids: Sequence[int], max_seq_len: int, *, room: int, what: str) -> None:
    """Refuse a message that is too long instead of cutting it.

    Raises:
        ValueError: ``ids`` and ``room`` more tokens do not fit into ``max_seq_len``.
    """
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len is {max_seq_len}; it must be at least 1.")
    if len(ids) + room > max_seq_len:
        needed = f"{len(ids)} tokens" + (f" and needs room for {room} more" if room else "")
        raise ValueError(f"{what} has {needed}; max_seq_len is {max_seq_len}. Shorten it or raise max_seq_len.")


def as_batch(rows: Sequence[Sequence[int]], pad_id: int, width: int, device: torch.device | str) -> dict[str, Tensor]:
    """Right-padded ``input_ids`` (B, width) int64 and ``attention_mask`` (B, width) bool."""
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, : len(row)] = True
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
