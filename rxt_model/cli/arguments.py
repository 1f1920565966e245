"""An argument parser that answers a wrong argument in one sentence, and the types of arguments that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rxt_model.cli.errors import UserError

__all__ = ["ArgumentParser", "existing_file", "file_to_write", "integer", "number"]


class ArgumentParser(argparse.ArgumentParser):
    """As ``argparse.ArgumentParser``, without its usage dump: :meth:`error` raises :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as one sentence that names the command and where its help is."""
        subject = self.prog.removeprefix("rxt").strip()
        where = f"rxt {subject} --help" if subject else "rxt --help"
        raise UserError(f"{subject + ': ' if subject else ''}{message.rstrip('.')}; see `{where}`.")


def number(lowest: float, highest: float = float("inf"), *, open_below: bool = False) -> Callable[[str], float]:
    """A type for numbers from ``lowest`` (excluded if ``open_below``) to ``highest``.

    Example:
        >>> number(0.0)("0.7")
        0.7
    """
    above = f"above {lowest:g}" if open_below else f"of at least {lowest:g}"
    wanted = f"a number {above}" + ("" if highest == float("inf") else f" and at most {highest:g}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        inside = lowest <= value <= highest and abs(value) != float("inf")
        if not inside or (open_below and value == lowest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def integer(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for integers from ``lowest`` to ``highest``.

    Example:
        >>> integer(1)("8")
        8
    """
    limit = f"of at least {lowest}" if highest == 2**31 - 1 else f"from {lowest} to {highest}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer {limit}")
        return value

    return parse


def existing_file(text: str) -> Path:
    """A type for a file to read."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory, and a file is needed")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def file_to_write(text: str) -> Path:
    """A type for a file to write: its directory exists and it is none itself."""
    path = Path(text).expanduser()
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory of {text!r} does not exist; create it first")
    return path
