"""The tokenizer: text to ids and back, on the `tokenizers` library (spec 2.15).

Decisions that a user meets:

* ``encode`` reads special-token strings in the text as control tokens (prompts are built as strings, spec 2.15);
  ``encode_ordinary`` never does, so that a user who types ``[A]`` cannot end their own query.
* Neither adds ``[BOS]``/``[EOS]``: the post-processor of the file is bypassed, as it is in every template.
* The file's pre-tokenizer puts a space before a text that does not start with one. Ids are exactly the file's, so
  ``"hello"`` and ``" hello"`` have the same ids and cannot both come back: decoding returns ``"hello"``. This is the
  only loss: a text that starts with spaces comes back with one space fewer, every other text comes back as it was.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers

from .byte_level import BYTE_TO_CHARACTER, TextAssembler, TokenBytes
from .files import TOKENIZER_FILE, locate_tokenizer_file, read_tokenizer_json, write_text_atomically
from .special_tokens import DEFAULT_SPECIAL_TOKENS, SpecialTokens

# Names that the transformers wrapper adds on its own when a file lacks them; no model has embeddings for them.
_WRAPPER_TOKENS = frozenset({"[CLS]", "[SEP]"})


class Tokenizer:
    """Byte-level BPE tokenizer with the special tokens of the Reactive Transformer families.

    Made by :meth:`from_file`, :meth:`from_pretrained`, :meth:`from_json`, ``train_tokenizer`` or ``as_tokenizer``.
    It is immutable, and safe to share between threads.

    Example:
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["hello there", "hello again"], vocab_size=300)
        >>> tokenizer.decode(tokenizer.encode("[BOS][Q]hello 👋[A]"))
        '[BOS][Q]hello 👋[A]'
        >>> tokenizer.special_tokens.answer in tokenizer.encode_ordinary("[A]")
        False

    Source: spec 2.15.
    """

    def __init__(self, content: Mapping[str, Any], *, special_tokens: Mapping[str, str] | None, source: str) -> None:
        """Build from the parsed content of a ``tokenizer.json``; users call :meth:`from_json` or :meth:`from_file`."""
        content, roles = _normalise(content, special_tokens, source)
        serialised = json.dumps(content, ensure_ascii=False)
        # Two copies, because the library's switch between parsing and not parsing special tokens is mutable state.
        self._parsing = _build(serialised, source)
        self._ordinary = _build(serialised, source)
        self._ordinary.encode_special_tokens = True

        vocabulary = self._parsing.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{source} is a tokenizer with an empty vocabulary.")
        added = self._parsing.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocabulary: dict[str, int] = vocabulary
        self._table = TokenBytes(
            {token_id: token for token, token_id in vocabulary.items()},
            literal=frozenset(added),
            special=special,
            prefix_space=_adds_prefix_space(content),
        )
        self._vocab_size = max(vocabulary.values()) + 1
        self._special_tokens = SpecialTokens(**{role: vocabulary[token] for role, token in roles.items()})
        # An unknown byte may become [UNK]; that controls nothing, unlike the other special tokens.
        unknown = self._special_tokens.unk
        shared = [role for role, token_id in self._special_tokens.present() if token_id == unknown]
        self._control_ids = special - {unknown} if shared == ["unk"] else special
        self._missing_bytes = frozenset(b for b, character in BYTE_TO_CHARACTER.items() if character not in vocabulary)
        self._has_unknown = content["model"].get("unk_token") is not None

    # ------------------------------------------------------------------------------------------------ loading, saving

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, special_tokens: Mapping[str, str] | None = None) -> Tokenizer:
        """Load a ``tokenizer.json``.

        Args:
            path: the file.
            special_tokens: role to token string, where the file does not use the default strings (``[BOS]``, ...).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, is something else, is not byte-level, or lacks a token of ``special_tokens``.
            TypeError: ``path`` is not a string or path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path is a {type(path).__name__}: give the path of a tokenizer.json as a string or path.")
        return cls(read_tokenizer_json(path), special_tokens=special_tokens, source=os.fspath(path))

    @classmethod
    def from_json(cls, text: str, *, special_tokens: Mapping[str, str] | None = None) -> Tokenizer:
        """Build from the text of a ``tokenizer.json``.

        Raises:
            ValueError: the text is not such a file.
            TypeError: it is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}: give the content of a tokenizer.json as a string.")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text is not valid JSON ({error}): give the content of a tokenizer.json.") from None
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError("text is JSON but not a tokenizer.json: it has no 'model' object.")
        return cls(content, special_tokens=special_tokens, source="text")

    @classmethod
    def from_pretrained(
        cls,
        directory_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        special_tokens: Mapping[str, str] | None = None,
    ) -> Tokenizer:
        """Load ``tokenizer.json`` from a local directory or from a repository on the hub.

        Args:
            directory_or_hub_id: a local directory, or ``"owner/name"``.
            revision: branch, tag or commit on the hub; a local directory has none and refuses it.
            token: hub access token; only asked for when something is downloaded, like the next two.
            cache_dir: where downloads are kept.
            local_files_only: never use the network.
            special_tokens: as in :meth:`from_file`.

        Raises:
            FileNotFoundError: no such directory, repository, revision or file.
            ValueError: the file is damaged or something else, or a revision was asked of a local directory.
            OSError: the hub could not be asked.
        """
        path = locate_tokenizer_file(
            directory_or_hub_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_file(path, special_tokens=special_tokens)

    def to_json(self) -> str:
        """The text of a ``tokenizer.json`` that rebuilds this tokenizer, here or in the `tokenizers` library."""
        return str(self._parsing.to_str(pretty=True))

    def save(self, directory_or_file: str | os.PathLike[str]) -> Path:
        """Write the tokenizer and return the path written.

        A name that ends in ``.json`` is the file; anything else is a directory (made if needed) that gets
        ``tokenizer.json``. Written to a temporary name and renamed.
        """
        if not isinstance(directory_or_file, (str, os.PathLike)):
            raise TypeError(
                f"directory_or_file is a {type(directory_or_file).__name__}: give a directory or a .json file name."
            )
        path = Path(directory_or_file)
        if path.is_dir() or path.suffix != ".json":
            path = path / TOKENIZER_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"directory_or_file is {os.fspath(directory_or_file)!r}, and {path.parent} or a parent of it is an "
                "existing file: give a directory, or a file name that ends in .json."
            ) from None
        write_text_atomically(path, self.to_json())
        return path

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, text: str) -> list[int]:
        """Encode text in which special-token strings are control tokens; nothing is added at either end.

        For text that this program wrote (templates). Text from a user belongs in :meth:`encode_ordinary`.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: it holds half a surrogate pair, which is not text, or a byte the vocabulary cannot write.
        """
        self._check_text(text, "text")
        return list(self._parsing.encode(text, add_special_tokens=False).ids)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text as text only: ``"[A]"`` becomes the bytes of three characters and never the answer token.

        Decoding gives the text back, except that one leading space is lost where the file adds one (see the module).
        The only special id that can appear is ``[UNK]``, and only with a vocabulary that lacks some bytes.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
        self._check_text(text, "text")
        return self._without_control(self._ordinary.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` for many texts at once, on several threads."""
        self._check_texts(texts)
        return [list(e.ids) for e in self._parsing.encode_batch(list(texts), add_special_tokens=False)]

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode_ordinary` for many texts at once, on several threads."""
        self._check_texts(texts)
        encodings = self._ordinary.encode_batch(list(texts), add_special_tokens=False)
        return [self._without_control(e.ids) for e in encodings]

    def _without_control(self, ids: Iterable[int]) -> list[int]:
        """Spell out special tokens that merges happened to make, as a file that does not split at brackets can."""
        ids = list(ids)
        if self._control_ids.isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for token_id in ids:
            if token_id not in self._control_ids:
                spelled.append(token_id)
                continue
            for byte in self._table[token_id]:
                byte_id = self._vocabulary.get(BYTE_TO_CHARACTER[byte])
                if byte_id is None or byte_id in self._control_ids:
                    raise ValueError(
                        f"text holds {self._table.tokens[token_id]!r}, which this vocabulary can only write as a "
                        "special token: remove it from the text, or use a tokenizer with the full byte alphabet."
                    )
                spelled.append(byte_id)
        return spelled

    def _check_text(self, text: str, name: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}: give a str.")
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which is "
                "not text: decode its source with errors='replace'."
            ) from None
        if self._missing_bytes and not self._has_unknown and not self._missing_bytes.isdisjoint(raw):
            byte = next(b for b in raw if b in self._missing_bytes)
            raise ValueError(
                f"{name} holds the byte 0x{byte:02X}, which this vocabulary has no token for, and it has no unknown "
                "token either: use a tokenizer with the full byte alphabet."
            )

    def _check_texts(self, texts: Sequence[str]) -> None:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"texts is a {type(texts).__name__}: give a list of str.")
        for index, text in enumerate(texts):
            self._check_text(text, f"texts[{index}]")

    # ------------------------------------------------------------------------------------------------------ decoding

    def decode(
        self, ids: Sequence[int] | Any, *, skip_special_tokens: bool = False, keep_prefix_space: bool = False
    ) -> str:
        """Decode ids to text, as UTF-8 bytes; bytes that are not UTF-8 become U+FFFD (defect 38).

        Args:
            ids: ids, as a sequence or as a one-dimensional integer tensor or array.
            skip_special_tokens: leave special tokens out. The texts around one stay separated by the space that
                encoding had put there.
            keep_prefix_space: the ids continue an earlier text, so a space at their start is part of the text.

        Raises:
            TypeError: something in ``ids`` is not an integer.
            ValueError: an id is not in the vocabulary. This includes ids that the transformers wrapper invents for
                names which the file lacks, and the signals -1 and -2 of ``interact``.
        """
        assembler = self.assembler(skip_special_tokens=skip_special_tokens, keep_prefix_space=keep_prefix_space)
        text = "".join([assembler.push(token_id) for token_id in self.check_ids(ids)])
        return text + assembler.finish()

    def assembler(self, *, skip_special_tokens: bool, keep_prefix_space: bool) -> TextAssembler:
        """A fresh incremental decoder; users want ``TokenStream``, which checks what it is given."""
        return TextAssembler(self._table, skip_special_tokens=skip_special_tokens, keep_prefix_space=keep_prefix_space)

    def check_id(self, token_id: Any, name: str = "token_id") -> int:
        """Return ``token_id`` as an int if it is one of this vocabulary.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is not in the vocabulary.
        """
        if type(token_id) is not int:
            token_id = _as_integer(token_id, name)
        if token_id in self._table:
            return int(token_id)
        if token_id in (-1, -2):
            raise ValueError(
                f"{name} is {token_id}, which is interact's signal that memory is being updated (-1) or is updated "
                "(-2) and not a token: pass only ids of 0 and above, or use the model's stringify_token."
            )
        raise ValueError(
            f"{name} is {token_id}, which is not in the vocabulary: this tokenizer has {self.vocab_size} tokens (ids "
            f"0 to {self.vocab_size - 1}); check that the model and the tokenizer belong together."
        )

    def check_ids(self, ids: Any, name: str = "ids") -> list[int]:
        """Return a sequence, or a one-dimensional integer tensor or array, as a list of ids of this vocabulary.

        Raises:
            TypeError, ValueError: as :meth:`check_id`; also for more than one dimension.
        """
        if isinstance(ids, (str, bytes, Mapping)):
            raise TypeError(f"{name} is a {type(ids).__name__}: give a sequence of int.")
        shape = getattr(ids, "shape", None)
        if shape is not None and hasattr(ids, "tolist"):
            if len(shape) != 1:
                raise ValueError(f"{name} has the shape {tuple(shape)}: give one dimension; decode a batch row by row.")
            ids = ids.tolist()
        try:
            items = list(ids)
        except TypeError:
            raise TypeError(f"{name} is a {type(ids).__name__}: give a sequence of int.") from None
        if all(type(item) is int and item in self._table for item in items):
            return items
        return [self.check_id(item, f"{name}[{index}]") for index, item in enumerate(items)]

    # ---------------------------------------------------------------------------------------------------- vocabulary

    @property
    def vocab_size(self) -> int:
        """The highest id plus one: the number of rows that an embedding needs."""
        return self._vocab_size

    @property
    def special_tokens(self) -> SpecialTokens:
        """The id of every role (pad, unk, bos, eos, mask, query, answer, ...), None where the file has none."""
        return self._special_tokens

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens of the file, those without a role included."""
        return self._table.special

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the file writes it (``"[A]"``, ``"Ġhello"``), or None."""
        if not isinstance(token, str):
            raise TypeError(f"token is a {type(token).__name__}: give a str.")
        return self._vocabulary.get(token)

    def id_to_token(self, token_id: SupportsIndex) -> str | None:
        """The token of an id as the file writes it, or None where there is none."""
        return self._table.tokens.get(_as_integer(token_id, "token_id"))

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """The bytes that an id stands for, with the prefix space where it has one.

        Raises:
            TypeError, ValueError: as :meth:`check_id`.
        """
        return self._table[self.check_id(token_id)]

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """A copy of the underlying `tokenizers` object, for uses that this class does not cover."""
        return _build(self._parsing.to_str(), "this tokenizer")

    def __len__(self) -> int:
        return self._vocab_size

    def __repr__(self) -> str:
        roles = ", ".join(f"{role}={token_id}" for role, token_id in self._special_tokens.present())
        return f"Tokenizer(vocab_size={self._vocab_size}, {roles or 'no special tokens'})"


def _as_integer(value: Any, name: str) -> int:
    """An int from an int, or from a zero-dimensional integer tensor or array; never from a bool or a float."""
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is a {type(value).__name__} ({value!r}): give a token id as an int.")


def _build(serialised: str, source: str) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_str(serialised)
        # A file may carry the padding and truncation of its last use; applied in silence they would change every text.
        built.no_truncation()
        built.no_padding()
    except BaseException as error:
        # A panic in the library's compiled code is no Exception, and for a damaged file it means the same.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{source} is not a tokenizer that the tokenizers library {tokenizers.__version__} reads ({error}): it is "
            "damaged, or was written by a newer version."
        ) from None
    return built


def _byte_level_stages(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ByteLevel stages among the pre-tokenizers and normalizers of a file."""
    stages: list[Mapping[str, Any]] = []
    for key, sequence in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")):
        stage = content.get(key)
        if isinstance(stage, Mapping):
            inner = stage.get(sequence) if stage.get("type") == "Sequence" else [stage]
            stages.extend(s for s in inner or [] if isinstance(s, Mapping) and s.get("type") == "ByteLevel")
    return stages


def _adds_prefix_space(content: Mapping[str, Any]) -> bool:
    return any(stage.get("add_prefix_space", False) for stage in _byte_level_stages(content))


def _is_added_token(entry: Any) -> bool:
    return isinstance(entry, Mapping) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)


def _normalise(
    content: Mapping[str, Any], special_tokens: Mapping[str, str] | None, source: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Check that the file is byte-level BPE, drop the wrapper's inventions, find the roles and mark them special."""
    model = content["model"]
    if not _byte_level_stages(content):
        kind = content.get("pre_tokenizer")
        found = kind.get("type", "unnamed") if isinstance(kind, Mapping) else "none"
        raise ValueError(
            f"{source} is a {model.get('type', 'tokenizer')} tokenizer with the pre-tokenizer {found}: Reactive "
            "Transformers use byte-level BPE (pre-tokenizer ByteLevel), so give such a one, or train one with "
            "train_tokenizer."
        )
    added = content.get("added_tokens") or []
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping) or not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise ValueError(f"{source} is damaged: its 'vocab' or 'added_tokens' is not what a tokenizer.json has.")

    # The transformers wrapper saves its own names behind the vocabulary (spec 2.15). They can only be taken off the
    # end: taken from the middle, the ids of later tokens would move.
    beyond = sorted((t for t in added if t["content"] not in vocabulary), key=lambda t: t["id"])
    while beyond and beyond[-1]["content"] in _WRAPPER_TOKENS:
        beyond.pop()
    kept_beyond = {t["content"] for t in beyond}
    added = [dict(t) for t in added if t["content"] in vocabulary or t["content"] in kept_beyond]

    by_content = {t["content"]: t for t in added}
    roles = {role: token for role, token in DEFAULT_SPECIAL_TOKENS.items() if token in by_content}
    for role, token in (special_tokens or {}).items():
        if role not in DEFAULT_SPECIAL_TOKENS:
            raise ValueError(
                f"special_tokens names the role {role!r}: the roles are {', '.join(DEFAULT_SPECIAL_TOKENS)}."
            )
        if token not in by_content:
            raise ValueError(
                f"special_tokens[{role!r}] is {token!r}, which is not among the added tokens of {source}: those are "
                f"{', '.join(list(by_content)[:20]) or 'none'}."
            )
        roles[role] = token
    for token in roles.values():
        by_content[token]["special"] = True
    return {**content, "added_tokens": added}, roles
