"""What does a conversation of N turns cost? A Reactive Transformer beside a stateless language model of its size.

The same conversations of real dialogue, token by token the same for everyone, are held by RxT, by an LLM of the same width,
depth, heads and experts that re-reads its history at every turn, and by that LLM keeping its key/value cache between turns.
Before anything is timed, every logit of a short conversation is compared with the uncached model. NOTES.md says how it is
measured and what to expect. --smollm2 adds a language model that people run on CPUs today, for how its cost grows.

The saved figure takes about ten minutes on two cores:
    rxt bench scaling --turns 128 --json scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from rxt_kernels.dispatch import available_backends, operations
from rxt_model.config import StatelessConfig
from rxt_model.models import ReactiveTransformer
from rxt_model.presets import PRESETS, build, preset
from rxt_model.tokenizer import Tokenizer

from .comparing import add_check_argument, checked
from .devices import add_device_argument, choose_device
from .dialogues import Lengths, Turn, conversation_turns, dialogue_tokenizer, load_dialogues
from .environment import describe_environment, machine_limits, use_threads
from .results import Results, read_results, write_results
from .scaling_report import Samples, make_rows, parameters, samples_of_rows, summarise, text_report
from .smollm2 import require_smollm2, smollm2_systems
from .systems import System, check_system, make_systems

__all__ = ["Settings", "add_arguments", "main", "run"]

NAME = "scaling"
_WARM_UP_TURNS = 2
_CHECKED_TURNS = 3
# What has to be the same for two parts of one result.
_SAME_MACHINE = ("cpu", "gpu", "threads", "python", "torch", "rxt_kernels", "commit")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: preset of a full model; its weights are random, because cost does not depend on them.
        turns: turns of a conversation.
        repeats: conversations; percentiles are taken over them.
        lengths: ``equal`` or ``real`` (:mod:`.dialogues`).
        query_tokens, answer_tokens: tokens of a turn without control tokens; the defaults are the mean message of the
            dialogue package.
        seed: of weights, and of which conversations are taken.
    """

    model: str = "rxt-alpha-micro-plus"
    turns: int = 64
    repeats: int = 5
    lengths: Lengths = "equal"
    query_tokens: int = 22
    answer_tokens: int = 22
    seed: int = 0

    def __post_init__(self) -> None:
        full = [name for name, item in PRESETS.items() if item.component in ("rxt_alpha", "rxt_beta")]
        if self.model not in full:
            raise ValueError(f"model is {self.model!r}; accepted are the full models {', '.join(full)}.")
        for name, least in (("turns", 4), ("repeats", 1), ("query_tokens", 1), ("answer_tokens", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench scaling``."""
    default = Settings()
    parser.add_argument("--model", default=default.model, metavar="PRESET", help="full model (default: %(default)s)")
    parser.add_argument("--turns", type=int, help=f"turns of a conversation (default: {default.turns})")
    parser.add_argument("--repeats", type=int, help=f"conversations measured (default: {default.repeats})")
    parser.add_argument(
        "--lengths",
        choices=("equal", "real"),
        default=default.lengths,
        help="equal: every turn has the same number of tokens of real dialogue; real: every message as it was, cut at "
        "--query-tokens and --answer-tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--query-tokens", type=int, metavar="N", help="tokens of a query (default: 22; real: at most 96)"
    )
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="likewise of an answer")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json (default: one trained on the dialogues)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights and conversations")
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    parser.add_argument("--short", action="store_true", help="32 turns, 2 repeats, at most a minute of measuring")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop measuring after S seconds and report")
    parser.add_argument("--json", metavar="FILE", help="save the results; also when interrupted")
    parser.add_argument("--plot", metavar="FILE", help="draw FILE.png and FILE-dark.png")
    parser.add_argument("--resume", action="store_true", help="continue the results in --json FILE")
    parser.add_argument(
        "--smollm2",
        action="store_true",
        help="SmolLM2-135M-Instruct by llama.cpp as well, where `make smollm2` has put it",
    )
    add_check_argument(parser)


def _settings(arguments: argparse.Namespace) -> tuple[Settings, float | None]:
    def given(value: Any, otherwise: Any) -> Any:
        return otherwise if value is None else value

    most = 22 if arguments.lengths == "equal" else 96
    settings = Settings(
        model=arguments.model,
        turns=given(arguments.turns, 32 if arguments.short else Settings.turns),
        repeats=given(arguments.repeats, 2 if arguments.short else Settings.repeats),
        lengths=arguments.lengths,
        query_tokens=given(arguments.query_tokens, most),
        answer_tokens=given(arguments.answer_tokens, most),
        seed=arguments.seed,
    )
    limit = given(arguments.time_limit, 60.0 if arguments.short else None)
    if limit is not None and limit <= 0:
        raise ValueError(f"time limit is {limit}; it must be a positive number of seconds.")
    if arguments.resume and arguments.json is None:
        raise ValueError("--resume is given without --json; name the file to continue.")
    return settings, limit


def make_model(settings: Settings) -> ReactiveTransformer:
    """The preset with weights drawn from the seed, in evaluation mode.

    Raises:
        ValueError: there is no stateless model of the same shape to compare with.
    """
    StatelessConfig.like(preset(settings.model).configs["decoder"])  # refuse before weights are drawn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return cast(ReactiveTransformer, build(settings.model)).eval()


def make_conversations(
    settings: Settings, model: ReactiveTransformer, tokenizer_path: str | None
) -> tuple[list[list[Turn]], str]:
    """One conversation per repeat, and where they are from.

    Raises:
        ValueError: the tokenizer knows more tokens than the model.
    """
    vocab_size = model.decoder.config.vocab_size
    dialogues = load_dialogues(settings.turns)
    if tokenizer_path is None:
        tokenizer = dialogue_tokenizer(dialogues, vocab_size)
    else:
        path = Path(tokenizer_path)
        tokenizer = Tokenizer.from_pretrained(path) if path.is_dir() else Tokenizer.from_file(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} tokens and {settings.model} a vocabulary of {vocab_size}; give a smaller "
            "tokenizer or leave it out."
        )
    count = len(dialogues.conversations)
    conversations = [
        conversation_turns(
            dialogues.conversations[(settings.seed + repeat) % count],
            tokenizer,
            model.token_ids,
            settings.turns,
            lengths=settings.lengths,
            query_tokens=settings.query_tokens,
            answer_tokens=settings.answer_tokens,
        )
        for repeat in range(settings.repeats)
    ]
    return conversations, dialogues.source


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _measure_conversation(
    systems: Sequence[System], turns: Sequence[Turn], samples: Samples, progress: Any, stop_at: float | None, first: int
) -> bool:
    """One repeat, turn by turn, the systems taking turns in going first; False if time ran out.

    Measuring all systems within the same second, again and again, lets what else the machine does hit them alike.
    """
    for system in systems:
        system.reset()
    with _without_garbage_collection():
        for number, turn in enumerate(turns):
            if stop_at is not None and time.monotonic() >= stop_at:
                return False
            # A turn is counted for all systems or for none.
            order = [systems[(first + number + offset) % len(systems)] for offset in range(len(systems))]
            measured = [(system.name, system.turn(turn)) for system in order]
            for name, times in measured:
                samples[name][number].append(times)
            progress.update()
    return True


def _warm_up(systems: Sequence[System], turns: Sequence[Turn]) -> None:
    for system in systems:
        system.reset()
        for turn in turns[:_WARM_UP_TURNS]:
            system.turn(turn)


def _backend() -> str:
    """What `auto`, which the models ask for, comes down to."""
    has_others = any(len(available_backends(name)) > 1 for name in operations())
    return "auto" if has_others else "reference"


def _resumed(path: str, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> Results:
    """Results to continue.

    Raises:
        ValueError: they were measured with other settings or on something else.
    """
    found = read_results(path, name=NAME)
    for name, value in settings.items():
        if name != "repeats" and found.settings.get(name) != value:
            raise ValueError(
                f"{path} was measured with {name} = {found.settings.get(name)!r} and now it is {value!r}; a run continues "
                "only with the same settings. Repeat them, or write to another file."
            )
    for name in _SAME_MACHINE:
        if found.environment.get(name) != environment.get(name):
            raise ValueError(
                f"{path} was measured with {name} = {found.environment.get(name)!r} and now it is "
                f"{environment.get(name)!r}; timings of two environments are not mixed. Write to another file."
            )
    return found


class _Run:
    """The state of one run, so that it can be saved at any moment."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings, self.time_limit = _settings(arguments)
        if arguments.smollm2:
            require_smollm2()
        self.path: str | None = arguments.json
        self.should_resume: bool = arguments.resume
        self.device = choose_device(arguments.device)
        use_threads(arguments.threads)
        self.environment = describe_environment(self.device)
        self.model = make_model(self.settings).to(self.device)
        self.conversations, source = make_conversations(self.settings, self.model, arguments.tokenizer)
        self.recorded = {
            **asdict(self.settings),
            "dialogues": source,
            "tokenizer": arguments.tokenizer is not None,
            "smollm2": arguments.smollm2,
        }
        self.compared = make_systems(self.model, seed=self.settings.seed)
        longest = max(sum(turn.tokens for turn in conversation) for conversation in self.conversations)
        self.systems: tuple[System, ...] = (
            (*self.compared, *smollm2_systems(longest)) if arguments.smollm2 else self.compared
        )
        self.samples: Samples = {system.name: [[] for _ in range(self.settings.turns)] for system in self.systems}
        self.results = Results(NAME, self.recorded, self.environment, {})
        self.differences: dict[str, float] = {}

    def prepare(self) -> int:
        """Measure the machine, check every system, warm up; returns the repeats that are done already."""
        done = 0
        path = self.path
        if self.should_resume and path is not None and Path(path).is_file():
            found = _resumed(path, self.recorded, self.environment)
            self.samples, done = samples_of_rows(found.rows, self.samples)
            self.results.limits, self.results.created = found.limits, found.created
        else:
            self.results.limits = machine_limits(self.device)
        for system in self.compared:
            self.differences[system.name] = check_system(system, self.conversations[0][:_CHECKED_TURNS])
        _warm_up(self.systems, self.conversations[0])
        return done

    def measure(self, done: int) -> None:
        """All repeats that are missing, saved after each."""
        stop_at = None if self.time_limit is None else time.monotonic() + self.time_limit
        missing = self.settings.repeats - done
        with tqdm(total=missing * self.settings.turns, disable=None, unit="turn", leave=False) as progress:
            for repeat in range(done, self.settings.repeats):
                turns = self.conversations[repeat]
                if not _measure_conversation(self.systems, turns, self.samples, progress, stop_at, repeat):
                    return
                self.save(complete=repeat + 1 == self.settings.repeats)

    def save(self, *, complete: bool) -> None:
        """Write what has been measured so far, if there is a file to write to."""
        results = self.results
        results.complete = complete
        results.rows = make_rows(self.systems, self.conversations, self.samples, backend=_backend())
        if not results.rows:
            return
        results.summary = {
            "parameters": parameters(self.model, self.compared[1].conversation.model),
            "decoding": {system.name: system.decoding() for system in self.systems},
            "largest_relative_difference_from_uncached": self.differences,
            **summarise(results, self.systems),
        }
        if self.path is not None:
            write_results(results, self.path)


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; returns the exit status: 130 if interrupted, what was measured being saved.

    Raises:
        ValueError, OSError: arguments that do not fit, before anything is measured.
        RuntimeError: a system does not compute what it should, so nothing was timed.
    """
    if arguments.plot is not None:
        from .plotting import require_matplotlib

        require_matplotlib()
    earlier = None if arguments.check is None else read_results(arguments.check, name=NAME)
    status = 0
    running = _Run(arguments)
    try:
        running.measure(running.prepare())
    except KeyboardInterrupt:
        status = 130
    results = running.results
    if not results.complete:
        running.save(complete=False)
    if not results.rows:
        print("Nothing was measured.", file=sys.stderr)
        return status or 1
    print(text_report(results, running.systems))
    if running.path is not None:
        note = "" if results.complete else " (incomplete; --resume continues it)"
        print(f"Results: {running.path}{note}")
    if arguments.plot is not None:
        from .plotting import plot_scaling

        print("Plots: " + ", ".join(str(path) for path in plot_scaling(results, arguments.plot)))
    return status or checked(results, earlier)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.scaling``."""
    parser = argparse.ArgumentParser(
        prog="python -m rxt_benchmarks.scaling",
        description=(__doc__ or "").split("\n\n")[0],
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
