"""``rxt train``: train the shipped model again, or the control that it is compared with."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxt_model.cli.arguments import ArgumentParser, integer
from rxt_model.cli.errors import INTERRUPTED, UserError, tell

if TYPE_CHECKING:
    from rxt_model.models import RxTAlpha
    from rxt_model.tokenizer import Tokenizer
    from rxt_model.training.memory_aware import StepResult

__all__ = ["add_arguments", "run"]

_EPILOG = """\
The state of the training is kept in the directory, so that the same command continues a training that was killed.
Needs the extra packages of training: pip install 'rxt-kernels[train]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt train``."""
    recipes = parser.add_subparsers(title="recipes", dest="recipe", metavar="RECIPE", required=True)

    def recipe(name: str, what: str) -> ArgumentParser:
        own = recipes.add_parser(
            name,
            help=what,
            description=f"Train {what}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        assert isinstance(own, ArgumentParser)
        output = Path("runs") / name
        own.add_argument("--output", type=Path, default=output, metavar="DIR", help=f"where it goes ({output})")
        own.add_argument("--steps", type=integer(1), metavar="N", help="optimizer steps (default: the recipe's)")
        own.add_argument("--seed", type=integer(0), default=0, metavar="N", help="fixes data and weights (0)")
        own.add_argument(
            "--workers",
            type=integer(1),
            default=min(2, os.cpu_count() or 1),
            metavar="N",
            help="processes that share the work; they change the time alone (one per core, at most 2)",
        )
        own.add_argument("--no-resume", action="store_true", help="begin anew, even where a training was interrupted")
        own.add_argument("--overwrite", action="store_true", help="replace a model that is already in the directory")
        return own

    demo = recipe("demo", "the small model that is shipped as the default of rxt chat")
    demo.add_argument(
        "--start",
        metavar="PATH|HUB_ID|demo",
        help="go on from this model of the demo's kind: only the last phase of the recipe is run",
    )
    stateless = recipe(
        "stateless", "the demo model's control: as large, without memory, reading the whole conversation"
    )
    stateless.add_argument(
        "--model",
        default="demo",
        metavar="PATH|HUB_ID|demo",
        help="the model it is a control of, whose tokenizer it shares (demo)",
    )


def run(options: argparse.Namespace) -> int:
    """Train, or continue a training that was interrupted."""
    output: Path = options.output.expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"train: --output {output} is a file; name a directory.")
    from rxt_model.training.output import training_states

    use = f"rxt chat --model {output}" if options.recipe == "demo" else _measurement(options.model, output)
    interrupted = bool(training_states(output))
    if (output / "model.safetensors").exists() and not interrupted and not options.overwrite:
        raise UserError(
            f"train: there is a finished model in {output}; use it with `{use}`, name another --output, or add --overwrite."
        )
    if interrupted and not options.no_resume:
        tell(f"continuing the training in {output}")
    try:
        _train(options, output)
    except ModuleNotFoundError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        saved = bool(training_states(output))
        rest = "the same command continues from its last saved state" if saved else "before anything was saved"
        tell(f"\nrxt: interrupted, {rest}.")
        return INTERRUPTED
    print(f"trained: {output}; use it with `{use}`")
    return 0


def _measurement(model: str, control: Path) -> str:
    from rxt_model.cli.loading import DEMO

    of = "" if model == DEMO else f" --model {model}"
    return f"rxt bench memory{of} --history {control}"


def _train(options: argparse.Namespace, output: Path) -> None:
    from rxt_model.training.demo import train_demo
    from rxt_model.training.stateless_control import train_stateless

    shared: dict[str, Any] = {
        "steps": options.steps,
        "seed": options.seed,
        "resume": not options.no_resume,
        "workers": options.workers,
        "on_step": None if sys.stderr.isatty() else _Progress(),
    }
    if options.recipe == "demo":
        train_demo(output, start=None if options.start is None else _start(options.start), **shared)
    else:
        train_stateless(output, _tokenizer(options.model), **shared)


def _tokenizer(name: str) -> Tokenizer:
    from rxt_model.cli.loading import load_full_model

    tokenizer = load_full_model(name).tokenizer
    assert tokenizer is not None
    return tokenizer


def _start(name: str) -> RxTAlpha:
    from rxt_model.cli.loading import load_full_model
    from rxt_model.models import RxTAlpha

    model = load_full_model(name)
    if not isinstance(model, RxTAlpha):
        raise UserError(f"train: --start {name} is {type(model).__name__}; the demo model is an RxTAlpha.")
    return model


class _Progress:
    """A line now and then, where there is no terminal for a progress bar: loss, and recall since the last line."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds = seconds
        self._told = time.monotonic()
        self._right = [0, 0, 0]
        self._asked = [0, 0, 0]

    def __call__(self, step: int, result: StepResult) -> None:
        for distance, (right, asked) in result.recall.items():
            age = 0 if distance < 4 else 1 if distance < 8 else 2
            self._right[age] += right
            self._asked[age] += asked
        now = time.monotonic()
        if step == 1 or now - self._told >= self._seconds:
            self._told = now
            ages = zip(("1 to 3", "4 to 7", "8 and more"), self._right, self._asked, strict=True)
            recall = ", ".join(f"{100 * right / asked:.0f}% at {age}" for age, right, asked in ages if asked)
            tell(f"step {step}: loss {float(result.loss):.3f}, recall {recall or 'not asked'}")
            self._right, self._asked = [0, 0, 0], [0, 0, 0]
