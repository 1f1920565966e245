"""How a problem ends: one sentence on stderr, and an exit status that says whose it is."""

from __future__ import annotations

import os
import re
import sys
import traceback

__all__ = ["FAILURE", "INTERRUPTED", "USER_ERROR", "UserError", "debugging", "report", "sentence", "status_of", "tell"]

USER_ERROR = 2
"""The arguments, a file, or a message cannot be used; nothing is wrong with the program."""

FAILURE = 1
"""Something failed: the disk is full, the network is gone, or the program is wrong."""

INTERRUPTED = 130
"""Ended by Ctrl-C, as shells count it."""

_USERS_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
                 PermissionError)  # fmt: skip


class UserError(ValueError):
    """What a user asked for cannot be done; the message is the sentence to show."""


def debugging() -> bool:
    """Whether ``RXT_DEBUG=1`` asks for the traceback behind every sentence."""
    return os.environ.get("RXT_DEBUG", "") not in ("", "0")


def sentence(error: BaseException) -> str:
    """One line that tells a person what an exception means.

    Example:
        >>> sentence(ValueError("top_k is 0;\\n  it must be at least 1."))
        'top_k is 0; it must be at least 1.'
        >>> sentence(FileNotFoundError(2, "No such file or directory", "talk.safetensors"))
        'talk.safetensors: no such file or directory.'
    """
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        text = f"{error.filename}: {reason}" if error.filename else reason
    else:
        text = re.sub(r"\s+", " ", str(error)).strip()
    if not text:
        return f"{type(error).__name__} without a message."
    if not isinstance(error, (*_USERS_ERRORS, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text if text[-1] in ".!?)" else f"{text}."


def status_of(error: BaseException) -> int:
    """The exit status for an exception."""
    return USER_ERROR if isinstance(error, _USERS_ERRORS) else FAILURE


def tell(text: str) -> None:
    """A line on stderr, where it is in nobody's way; text on stdout that came first is shown first."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def report(error: BaseException, *, prefix: str = "rxt") -> int:
    """Print the sentence of an exception, with ``RXT_DEBUG=1`` after its traceback; return the exit status."""
    if debugging():
        traceback.print_exception(error)
    tell(f"{prefix}: {sentence(error)}")
    return status_of(error)
