"""The special tokens of the Reactive Transformer families and the role each plays in a conversation (spec 2.15)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

DEFAULT_SPECIAL_TOKENS: dict[str, str] = {
    "pad": "[PAD]",
    "unk": "[UNK]",
    "bos": "[BOS]",
    "eos": "[EOS]",
    "mask": "[MASK]",
    "query": "[Q]",
    "answer": "[A]",
    "internal": "[I]",
    "think": "[T]",
    "tool_use": "[U]",
    "tool_call": "[C]",
}
"""Role to token string. The order is the order of ids in a newly trained tokenizer: [PAD] is 0, ..., [A] is 6, then
the four tokens that only the Beta family uses (spec 2.15)."""


@dataclass(frozen=True)
class SpecialTokens:
    """The id of each special role, or None where the tokenizer has no such token (spec 2.15, 3.1).

    Example:
        >>> roles = SpecialTokens(bos=2, eos=3, query=5, answer=6)
        >>> roles.answer, roles.think
        (6, None)
        >>> dict(roles.present())
        {'bos': 2, 'eos': 3, 'query': 5, 'answer': 6}
    """

    pad: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    mask: int | None = None
    query: int | None = None
    answer: int | None = None
    internal: int | None = None
    think: int | None = None
    tool_use: int | None = None
    tool_call: int | None = None

    def present(self) -> Iterator[tuple[str, int]]:
        """Yield (role, id) for every role that this tokenizer has."""
        for field in fields(self):
            token_id = getattr(self, field.name)
            if token_id is not None:
                yield field.name, token_id
