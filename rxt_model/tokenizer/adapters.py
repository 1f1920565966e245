"""Accepting the tokenizers of other libraries, and the function names of upstream's usage snippets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers

from .special_tokens import DEFAULT_SPECIAL_TOKENS
from .tokenizer import Tokenizer

# The roles that a transformers tokenizer knows by attribute; it has no name for the others.
_TRANSFORMERS_ROLES = ("pad", "unk", "bos", "eos", "mask")


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """This project's interface over a tokenizer of another kind; a :class:`Tokenizer` is returned as it is.

    Accepted: :class:`Tokenizer`, a fast `transformers` tokenizer (its pad, unk, bos, eos and mask tokens are taken
    from it, the other roles by their default strings), and a ``tokenizers.Tokenizer``. All must be byte-level BPE. The
    given object is copied, so changing it later changes nothing here.

    Raises:
        TypeError: it is something else, or a `transformers` tokenizer without a fast backend.
        ValueError: it is not byte-level.

    Example:
        >>> from rxt_model.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a b"], vocab_size=267)
        >>> as_tokenizer(tokenizer) is tokenizer
        True

    Source: spec 2.15.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _copy(tokenizer, {}, kind)
    # Recognised by what it has and not by its class: transformers is optional, and importing it takes seconds.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        return _copy(backend, _transformers_roles(tokenizer, backend), kind)
    if any(base.__module__.split(".")[0] == "transformers" for base in type(tokenizer).__mro__):
        raise TypeError(
            f"tokenizer is a transformers {kind} without a fast backend: load its tokenizer.json with "
            "PreTrainedTokenizerFast, or with Tokenizer.from_pretrained."
        )
    raise TypeError(
        f"tokenizer is a {kind}: give a Tokenizer, a fast transformers tokenizer, or a tokenizers.Tokenizer; load a "
        "file or directory with Tokenizer.from_pretrained."
    )


def load_tokenizer_from_hf_hub(
    model_id_or_directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """:meth:`Tokenizer.from_pretrained` under the name that upstream's usage snippets import.

    Example:
        >>> tokenizer = load_tokenizer_from_hf_hub("ReactiveAI/RxT-Alpha-Micro-Plus")  # doctest: +SKIP
    """
    return Tokenizer.from_pretrained(
        model_id_or_directory, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )


def _copy(backend: tokenizers.Tokenizer, roles: Mapping[str, str], kind: str) -> Tokenizer:
    try:
        content = json.loads(backend.to_str())
    except Exception as error:
        raise ValueError(
            f"tokenizer is a {kind} that cannot be written as a tokenizer.json ({error}): parts of it are Python code."
        ) from None
    return Tokenizer(content, special_tokens=roles, source=f"tokenizer (a {kind})")


def _transformers_roles(tokenizer: Any, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """The role tokens that the wrapper declares and its backend really has, where they differ from the defaults."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    roles = {}
    for role in _TRANSFORMERS_ROLES:
        token = getattr(tokenizer, f"{role}_token", None)
        if token is not None and str(token) in added and str(token) != DEFAULT_SPECIAL_TOKENS[role]:
            roles[role] = str(token)
    return roles
