"""From token ids back to text, byte by byte (spec 2.15, defect 38).

A byte-level vocabulary writes each of the 256 bytes as one printable character (a space is ``Ġ``, a newline ``Ċ``).
The files of published models carry no decoder, so a plain decode shows those characters; here they are mapped back to
the bytes they stand for, and the bytes are read as UTF-8.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping


def _printable_characters() -> dict[int, str]:
    """The byte-to-character table of GPT-2: printable Latin-1 bytes are themselves, the rest follow from U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in kept}
    shifted = 0x100
    for byte in range(0x100):
        if byte not in table:
            table[byte] = chr(shifted)
            shifted += 1
    return table


BYTE_TO_CHARACTER: dict[int, str] = _printable_characters()
CHARACTER_TO_BYTE: dict[str, int] = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


class TokenBytes:
    """The bytes that each token id stands for.

    Args:
        tokens: id to token string, for every id of the vocabulary.
        literal: the ids whose string is the text itself and not written in byte characters (the file's added tokens).
        special: the ids of special tokens; a subset of ``literal``.
        prefix_space: whether encoding puts a space before a text that does not start with one.

    Example:
        >>> table = TokenBytes({0: "[A]", 1: "Ġhi"}, literal=frozenset({0}), special=frozenset({0}), prefix_space=True)
        >>> table[1], table[0]
        (b' hi', b'[A]')
    """

    def __init__(
        self, tokens: Mapping[int, str], *, literal: frozenset[int], special: frozenset[int], prefix_space: bool
    ) -> None:
        self.tokens = tokens
        self.literal = literal
        self.special = special
        self.prefix_space = prefix_space
        self._bytes: dict[int, bytes] = {}

    def __contains__(self, token_id: int) -> bool:
        return token_id in self.tokens

    def __getitem__(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self.tokens[token_id]
            if token_id not in self.literal and all(character in CHARACTER_TO_BYTE for character in token):
                known = bytes(CHARACTER_TO_BYTE[character] for character in token)
            else:
                known = token.encode("utf-8")
            self._bytes[token_id] = known
        return known


class TextAssembler:
    """Turns token ids into text, one at a time. Decoding and streaming are both this class, so they cannot disagree.

    Bytes that do not yet make a character are held back; bytes that never will become U+FFFD. A special token ends the
    character in progress. The one space that encoding adds is left out at the start of the output and after a special
    token that is shown; where a special token is skipped the space stays and keeps the two texts apart.
    """

    def __init__(self, table: TokenBytes, *, skip_special_tokens: bool, keep_prefix_space: bool) -> None:
        self._table = table
        self._skip_special_tokens = skip_special_tokens
        self._drop_space = table.prefix_space and not keep_prefix_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id (known to the table) and return the characters it completes."""
        if token_id in self._table.literal:
            text = self.finish()
            if token_id in self._table.special and self._skip_special_tokens:
                return text
            self._drop_space = self._table.prefix_space
            return text + self._table.tokens[token_id]
        piece = self._table[token_id]
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece[1:] if piece[:1] == b" " else piece
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """End the character in progress: nothing, or U+FFFD for bytes that were still held."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
