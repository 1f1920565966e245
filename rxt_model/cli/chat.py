"""``rxt chat``: talk to a model that remembers."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rxt_model.cli.arguments import existing_file, file_to_write, integer, number
from rxt_model.cli.errors import FAILURE, INTERRUPTED, UserError, report, tell

if TYPE_CHECKING:
    from rxt_model.cli.interrupts import Interrupts
    from rxt_model.cli.session import Answer, ChatSession, Settings

__all__ = ["add_arguments", "run"]

_EPILOG = """\
Type a message and press Enter; an empty line is nothing, and the end of the input (Ctrl-D) ends the conversation.
Answers go to stdout, everything else to stderr. Lines that begin with / are commands (/help lists them); a message that
begins with / is written with two. Memory is updated and saved in the background, which is said when it is done; the next
message, and the end, wait for it. With --json a turn is printed when all of it is done.

Ctrl-C while an answer comes stops it, and what was said is remembered; a second Ctrl-C drops the answer. Ctrl-C
at the prompt ends the conversation. A saved conversation is never lost: its file is replaced whole, after each
memory update.
"""

_PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt chat``."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model",
        default="demo",
        metavar="PATH|HUB_ID|demo",
        help="a directory, a hub id, or the shipped model (default)",
    )
    parser.add_argument("--load", type=existing_file, metavar="FILE", help="continue a saved conversation")
    parser.add_argument(
        "--save", type=file_to_write, metavar="FILE", help="save the conversation after every memory update"
    )
    parser.add_argument("--overwrite", action="store_true", help="let --save replace a file with another conversation")
    parser.add_argument("--system-prompt", metavar="TEXT", help="write this into memory before the first message")
    parser.add_argument(
        "--temperature", type=number(0.0), default=0.0, metavar="T", help="0 is greedy (default); above 0 draws tokens"
    )
    parser.add_argument("--top-k", type=integer(1), metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=number(0.0, 1.0, open_below=True), metavar="P", help="draw from the most likely share P"
    )
    parser.add_argument("--seed", type=integer(0), metavar="N", help="makes first memory and draws repeatable")
    parser.add_argument(
        "--max-seq-len", type=integer(4), metavar="N", help="most tokens of message and answer (default: the model's)"
    )
    parser.add_argument(
        "--thinking-mode", choices=("auto", "fast", "extended"), help="RxT-Beta: whether to think first"
    )
    parser.add_argument("--device", metavar="DEVICE", help="torch device, such as cuda (default: cpu)")
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="what decoding on a CPU packs the model's weights in (default: as they are)",
    )
    parser.add_argument(
        "--rope-layout",
        choices=("auto", "split", "interleaved"),
        default="auto",
        help="rotary layout of an old checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a turn instead of streamed text")


def run(options: argparse.Namespace) -> int:
    """Hold a conversation until the input ends."""
    settings = _settings(options)
    _check_files(options)
    from rxt_model.cli.interrupts import Interrupts

    screen = _Screen()
    with Interrupts() as interrupts:
        session = _open(options, settings, interrupts, screen)
        return _Chat(session, interrupts, screen, as_json=options.json).run()


def _settings(options: argparse.Namespace) -> Settings:
    """The arguments that belong together, checked before a model is loaded."""
    from rxt_model.cli.session import Settings

    for name, value in (("--top-k", options.top_k), ("--top-p", options.top_p)):
        if value is not None and options.temperature == 0:
            raise UserError(
                f"{name} is given and --temperature is 0, which is greedy; set --temperature above 0 to draw."
            )
    if options.system_prompt is not None and options.load is not None:
        raise UserError("--system-prompt begins a conversation and --load continues one; leave one of them out.")
    if options.overwrite and options.save is None:
        raise UserError("--overwrite is given without --save; name the file to save to.")
    return Settings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_seq_len=options.max_seq_len,
        seed=options.seed,
        thinking_mode=options.thinking_mode,
        system_prompt=options.system_prompt,
    )


def _check_files(options: argparse.Namespace) -> None:
    save: Path | None = options.save
    if save is None or not save.exists() or options.overwrite:
        return
    if options.load is None or not options.load.samefile(save):
        raise UserError(
            f"--save {save} exists and would be overwritten; continue it with --load {save} --save {save}, name another "
            "file, or add --overwrite."
        )


def _open(options: argparse.Namespace, settings: Settings, interrupts: Interrupts, screen: _Screen) -> ChatSession:
    from rxt_model.cli.loading import load_full_model
    from rxt_model.cli.session import ChatSession

    model = load_full_model(options.model, device=options.device, rope_layout=options.rope_layout)
    if options.weights is not None:
        model.decode_weights = options.weights
        try:
            model.explain()
        except ValueError as error:
            raise UserError(f"--weights {options.weights}: {error}") from error
    vocabulary = model.decoder.config.vocab_size
    if settings.thinking_mode is not None and not model.thinks:
        raise UserError(f"--thinking-mode is for RxT-Beta; {options.model} is an {type(model).__name__}.")
    if settings.top_k is not None and settings.top_k > vocabulary:
        raise UserError(f"--top-k is {settings.top_k}; the vocabulary of {options.model} has {vocabulary} tokens.")
    if options.json:
        session = ChatSession(model, settings, interrupts=interrupts)
    else:
        session = ChatSession(
            model,
            settings,
            output=sys.stdout,
            interrupts=interrupts,
            on_update=lambda answer: _tell_turn(answer, screen),
        )
    if options.load is not None:
        session.load(options.load)
    if options.save is not None:
        session.autosave_to(options.save, known=True)  # checked in _check_files
    return session


class _Quit(Exception):  # noqa: N818  # not an error
    """The user has had enough."""


class _Screen:
    """Where a person types while notices come from the background: a notice goes above the prompt, not behind it."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._lock = threading.Lock()
        self._is_prompting = False

    def read_line(self) -> str:
        """One line with its end, or an empty string at the end of the input.

        Raises:
            UnicodeDecodeError: the input is no text.
        """
        if not self.interactive:
            return sys.stdin.readline()
        try:
            with self._lock:
                self._is_prompting = True
                if not sys.stdout.isatty():
                    self._prompt()
            return input(_PROMPT if sys.stdout.isatty() else "") + "\n"
        except EOFError:
            return ""
        finally:
            with self._lock:
                self._is_prompting = False

    @contextlib.contextmanager
    def above_prompt(self) -> Iterator[None]:
        """While lines are written to stderr; the prompt, if one was shown, is shown again below them."""
        with self._lock:
            redraws = self._is_prompting and sys.stderr.isatty()
            if redraws:
                print("\r", end="", file=sys.stderr)
            yield
            if redraws:
                self._prompt()

    def _prompt(self) -> None:
        print(_PROMPT, end="", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


class _Chat:
    """The lines of a conversation: messages and commands."""

    def __init__(self, session: ChatSession, interrupts: Interrupts, screen: _Screen, *, as_json: bool) -> None:
        self.session = session
        self.interrupts = interrupts
        self.screen = screen
        self.as_json = as_json
        self.interactive = screen.interactive
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/save": ("[FILE]  save now, and after every memory update from now on", self.save),
            "/load": ("FILE  continue a saved conversation", self.load),
            "/reset": ("forget this conversation and begin another", self.reset),
            "/info": ("model, turns, memory, settings", self.info),
            "/quit": ("end the conversation (as does Ctrl-D)", self.quit),
            "/help": ("this list", self.help),
        }

    def run(self) -> int:
        """Read until the input ends; the exit status."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() a line that can be edited
            self.greet()
        try:
            for line in self.lines():
                is_command = line.startswith("/") and not line.startswith("//")
                try:
                    (self.command if is_command else self.message)(line)
                except _Quit:
                    break
                except Exception as error:
                    # Where a person types, a message that cannot be answered is no end; in a script it is.
                    if not self.interactive:
                        raise
                    report(error)
                if self.interrupts.requested and not self.interactive:
                    tell("rxt: interrupted.")
                    return self.close() or INTERRUPTED
        except KeyboardInterrupt:
            tell("" if self.interactive else "rxt: interrupted.")
            return self.close() or (0 if self.interactive else INTERRUPTED)
        except BaseException:
            self.close()
            raise
        return self.close()

    def lines(self) -> Iterator[str]:
        """Messages and commands, without empty lines, until the end of the input."""
        while True:
            try:
                line = self.screen.read_line()
            except UnicodeDecodeError as error:
                raise UserError(f"the input is not {error.encoding} text; convert it first.") from None
            if not line:
                if self.interactive:
                    tell("")
                return
            self.interrupts.requested = False
            if line.strip():
                yield line.strip()

    def close(self) -> int:
        """Wait for the last memory update, save what its save could not, and say what stays unsaved."""
        session = self.session
        try:
            with self.interrupts.shielded():
                session.settle()
        except Exception as error:
            report(error)
            return self._save_rest() or FAILURE
        return self._save_rest()

    def _save_rest(self) -> int:
        session = self.session
        if not session.unsaved:
            return 0
        if session.save_path is None:
            if self.interactive:
                tell("[this conversation was not saved]")
            return 0
        try:
            tell(f"[saved to {session.save()}]")
        except OSError as error:
            report(error)
            return FAILURE
        return 0

    # -- messages -----------------------------------------------------------------------------------------------------

    def message(self, line: str) -> None:
        """Answer one message."""
        try:
            self.session.settle()
        except Exception as error:
            # A person hears that the last message is not remembered, and gets an answer to this one.
            if not self.interactive:
                raise
            report(error)
        answer = self.session.answer(line[1:] if line.startswith("//") else line)
        if self.as_json:
            self.write_json(answer)
        if self.as_json or answer.exchange is None:
            _tell_turn(answer, self.screen)

    def write_json(self, answer: Answer) -> None:
        exchange = None if answer.exchange is None else asdict(answer.exchange)
        values = {
            **({"dropped": True} if exchange is None else exchange),
            "tokens": answer.tokens,
            "seconds": round(answer.seconds, 6),
            "memory_update_seconds": round(answer.update_seconds, 6),
            "state_bytes": self.session.state_bytes,
            "saved_to": None if answer.saved_to is None else str(answer.saved_to),
        }
        print(json.dumps(values, ensure_ascii=False), flush=True)

    # -- commands -----------------------------------------------------------------------------------------------------

    def command(self, line: str) -> None:
        """Run one line that begins with a slash."""
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"{name} is no command; commands are {', '.join(self.commands)}.")
        argument = argument.strip()
        if argument and name not in ("/save", "/load"):
            raise UserError(f"{name} takes no argument, and {argument!r} was given.")
        self.commands[name][1](argument)

    def save(self, argument: str) -> None:
        if argument:
            with _refusals():
                self.session.autosave_to(file_to_write(argument))
        elif self.session.save_path is None and self.session.loaded_path is not None:
            self.session.autosave_to(self.session.loaded_path)
        tell(f"[saved to {self.session.save()}; every memory update is saved there]")

    def load(self, argument: str) -> None:
        if not argument:
            raise UserError("/load needs the file of a saved conversation.")
        with _refusals():
            path = existing_file(argument)
        self.session.load(path)
        tell(f"[{self.session.model.turns} turns loaded from {path}; /save goes on saving there]")

    def reset(self, argument: str) -> None:
        kept = self.session.save_path
        self.session.reset()
        note = "" if kept is None else f"; {kept} keeps the one before, /save FILE saves this one"
        tell(f"[a new conversation{note}]")

    def info(self, argument: str) -> None:
        for name, value in self.session.describe().items():
            tell(f"  {name:<8} {value}")

    def quit(self, argument: str) -> None:
        raise _Quit

    def help(self, argument: str) -> None:
        for name, (text, _) in self.commands.items():
            tell(f"  {name:<8} {text}")

    def greet(self) -> None:
        """Say who is there and, of a conversation that goes on, what was said last."""
        session = self.session
        tell(f"{session.describe()['model']}; memory of {session.state_bytes:,} bytes. /help lists commands.")
        if session.model.turns:
            tell(f"[a conversation of {session.model.turns} turns goes on]")
        for exchange in session.transcript.exchanges[-3:]:
            tell(f"  > {exchange.message}\n  {exchange.answer}")


def _tell_turn(answer: Answer, screen: _Screen) -> None:
    """Say that memory was updated, or that it was not; called in the background as well."""
    with screen.above_prompt():
        if answer.exchange is None:
            tell("\n[answer dropped; memory is as it was before this message]")
            return
        what = "stopped; memory updated with what was said" if answer.exchange.stopped else "memory updated"
        where = "" if answer.saved_to is None else f"; saved to {answer.saved_to}"
        tell(f"[{what}: turn {answer.exchange.turn}, {answer.update_seconds * 1e3:.0f} ms{where}]")
        if answer.save_error is not None:
            report(answer.save_error)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """The types of arguments, used in commands: their refusals become sentences of their own."""
    try:
        yield
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{error}.") from None
