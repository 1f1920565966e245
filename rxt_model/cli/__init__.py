"""The command line ``rxt``: talk to a model, look into it, measure it, train it, and see what this machine can do.

Nothing here imports torch before a command needs it, so that ``rxt --help`` and every refusal of an argument is
immediate. Every command is a module with ``add_arguments(parser)`` and ``run(options) -> int``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from rxt_model.cli import bench, chat, demo, doctor, info, train
from rxt_model.cli.arguments import ArgumentParser
from rxt_model.cli.errors import FAILURE, INTERRUPTED, USER_ERROR, report, tell
from rxt_model.cli.waiting import wait_briefly

__all__ = ["main"]

_COMMANDS = {"chat": chat, "info": info, "bench": bench, "train": train, "demo": demo, "doctor": doctor}

_EPILOG = """\
exit status: 0 done, 1 something failed, 2 the arguments or a file cannot be used, 130 ended by Ctrl-C.
RXT_DEBUG=1 shows the traceback behind an error.
"""


class _Version(argparse.Action):
    """``--version``; the version is written in ``rxt_kernels``, which is not imported for anything else."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rxt_kernels.version import __version__

        print(f"rxt-kernels {__version__}")
        parser.exit()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="rxt",
        description="Reactive Transformers: conversations with a memory of fixed size.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].split(": ", 1)[1]
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary[:1].upper() + summary[1:],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


@contextlib.contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Warnings become one line on stderr each, without the place in the code that gave them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        tell("rxt: warning: " + " ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; never raises for anything a user can cause.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        rxt-kernels ...
        0
    """
    try:
        with _warnings_as_sentences():
            options = _parser().parse_args(None if argv is None else list(argv))
            wait_briefly()
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else USER_ERROR
    except KeyboardInterrupt:
        tell("rxt: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has left; python would complain once more when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        return report(error)
