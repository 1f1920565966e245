"""``rxt demo``: a short scripted conversation with the shipped model, and a short scaling measurement."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxt_model.cli.errors import UserError, tell

if TYPE_CHECKING:
    from rxt_model.demo_conversation import Reply
    from rxt_model.models import ReactiveTransformer

__all__ = ["add_arguments", "run"]

_EPILOG = """\
Facts that are told early are asked for later, and every answer is marked as right or wrong. As a control, the same
questions are put to the same weights with their memory drawn anew before every turn.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt demo``."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model",
        default="demo",
        metavar="PATH|HUB_ID|demo",
        help="a model of the demo's kind (default: the shipped one)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), metavar="DIR", help="where the measurement and its plot go (runs)"
    )
    parser.add_argument("--no-scaling", action="store_true", help="only the conversation")
    parser.add_argument("--json", action="store_true", help="the conversation as JSON, without the measurement")


def run(options: argparse.Namespace) -> int:
    """Talk, mark, measure."""
    from rxt_model.cli.loading import load_full_model

    output: Path = options.output.expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"demo: --output {output} is a file; name a directory.")
    model = load_full_model(options.model)
    replies = _converse(model, silent=options.json)
    from rxt_model.demo_conversation import hold_conversation

    control = list(hold_conversation(model, forget=True))
    if options.json:
        print(json.dumps(_as_json(model, replies, control), indent=2, ensure_ascii=False))
        return 0
    _print_marks(model, replies, control)
    if options.no_scaling:
        return 0
    return _measure(output)


def _converse(model: ReactiveTransformer, *, silent: bool) -> list[Reply]:
    from rxt_model.demo_conversation import hold_conversation

    if not silent:
        print("A conversation with the shipped model. It reads one message at a time; what was said before, it only")
        print(f"knows from its memory of {_memory_bytes(model):,} bytes.\n")
    replies = []
    for reply in hold_conversation(model):
        replies.append(reply)
        if not silent:
            print(f"{reply.turn:>4}  you    {reply.line.message}")
            print(f"      model  {reply.answer}{_mark(reply)}", flush=True)
    return replies


def _mark(reply: Reply) -> str:
    if reply.right is None:
        return ""
    since = f", told {reply.distance} turns ago" if reply.distance else ", never told"
    return f"    <- right{since}" if reply.right else f"    <- WRONG: {reply.line.expected or 'not known'}{since}"


def _count(replies: list[Reply]) -> tuple[int, int]:
    asked = [reply.right for reply in replies if reply.right is not None]
    return sum(asked), len(asked)


def _memory_bytes(model: ReactiveTransformer) -> int:
    return model.stm.memory.numel() * model.stm.memory.element_size()


def _print_marks(model: ReactiveTransformer, replies: list[Reply], control: list[Reply]) -> None:
    right, asked = _count(replies)
    blind, _ = _count(control)
    print(f"\n{right} of {asked} questions answered right.")
    print(f"With its memory drawn anew before every turn, the same model answers {blind} of {asked}.")
    print(f"The memory has {_memory_bytes(model):,} bytes after {len(replies)} turns, as many as after the first.\n")


def _as_json(model: ReactiveTransformer, replies: list[Reply], control: list[Reply]) -> dict[str, Any]:
    right, asked = _count(replies)
    return {
        "turns": [
            {
                "turn": reply.turn,
                "message": reply.line.message,
                "answer": reply.answer,
                "asked_for": reply.line.attribute,
                "expected": reply.line.expected if reply.line.attribute else None,
                "distance": reply.distance,
                "right": reply.right,
            }
            for reply in replies
        ],
        "asked": asked,
        "right": right,
        "right_without_memory": _count(control)[0],
        "memory_bytes": _memory_bytes(model),
    }


def _measure(output: Path) -> int:
    """The short version of ``rxt bench scaling``."""
    from rxt_model.cli.bench import run_benchmark

    print("What such a conversation costs, beside a language model without memory (about a minute):\n", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    arguments = ["--short", "--json", str(output / "demo-scaling.json")]
    if importlib.util.find_spec("matplotlib") is None:
        tell("rxt: there will be no plot, because matplotlib is not installed; pip install 'rxt-kernels[plot]'.")
    else:
        arguments += ["--plot", str(output / "demo-scaling.png")]
    return run_benchmark("scaling", arguments)
