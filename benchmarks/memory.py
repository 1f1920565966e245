"""How long does the model remember? Recall against distance, with its controls.

The curves: the model; the model while it hears reference answers instead of its own; the model asked for facts that were
changed on the way; the same weights with memory drawn anew before every turn; and, if ``--history`` names one, a
stateless language model that reads the whole conversation again.

    rxt bench memory --json memory.json --plot memory.png [--model DIRECTORY] [--history DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rxt_model.demo_model import demo_model_directory
from rxt_model.interaction.state import model_fingerprint
from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.training.recall import RecallReport, measure_history_recall, measure_recall, wilson_interval
from rxt_model.training.sentences import VARIETIES

from .devices import add_device_argument, choose_device
from .environment import describe_environment, use_threads
from .results import Results, read_results, write_results
from .running import main as common_main

__all__ = ["add_arguments", "main", "run"]

NAME = "memory"
_FEW = (1, 2, 4, 8, 12, 16)
# What has to be the same for two parts of one result.
_SAME = ("gpu", "torch", "rxt_kernels", "commit")


@dataclass(frozen=True)
class Curve:
    """One condition at some distances; ``measure`` takes them as ``distances=``."""

    condition: str
    changed: bool
    distances: tuple[int, ...]
    measure: Callable[..., RecallReport]


def _curves(
    model: RxTAlpha, history: SparseQueryTransformer | None, distances: Sequence[int], variety: str
) -> Iterator[Curve]:
    every = tuple(distances)
    few = tuple(distance for distance in distances if distance in _FEW) or every
    for condition, changed in (("memory", False), ("memory", True), ("reference", False), ("reset", False)):
        own = every if condition == "memory" else few
        measure = partial(measure_recall, model, condition=condition, changed=changed, variety=variety)
        yield Curve(condition, changed, own, measure)
    if history is not None:
        assert model.tokenizer is not None  # or the first curve would have been refused
        for changed in (False, True):
            read = partial(measure_history_recall, history, model.tokenizer, changed=changed, variety=variety)
            yield Curve("history", changed, few, read)


def _told(model: nn.Module) -> dict[str, Any]:
    """What is recorded of a model: where it was may hold another one tomorrow."""
    return {"fingerprint": model_fingerprint(model), "parameters": sum(one.numel() for one in model.parameters())}


def _row(report: RecallReport) -> dict[str, Any]:
    (point,) = report.points
    low, high = wilson_interval(point.right, point.asked)
    return {
        "name": point.condition,
        "backend": "auto",
        "dtype": "float32",
        "shape": {"distance": point.distance, "changed": point.changed, "conversations": point.asked},
        "right": point.right,
        "recall": round(point.share, 4),
        "wilson_95": [round(low, 4), round(high, 4)],
        "stale": point.stale,
        "by_attribute": point.by_attribute,
        "examples": report.examples,
    }


def _key(row: Mapping[str, Any]) -> tuple[str, bool, int]:
    return row["name"], row["shape"]["changed"], row["shape"]["distance"]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one line per distance."""
    shares = {_key(row): row["recall"] for row in rows}
    curves = list(dict.fromkeys((name, changed) for name, changed, _ in shares))
    lines = [
        "| distance | " + " | ".join(name + (", changed fact" if changed else "") for name, changed in curves) + " |"
    ]
    lines.append("|---" * (len(curves) + 1) + "|")
    for distance in sorted({distance for _, _, distance in shares}):
        cells = ("" if (share := shares.get((*curve, distance))) is None else f"{100 * share:.1f}%" for curve in curves)
        lines.append(f"| {distance} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt bench memory``."""
    parser.add_argument("--model", type=Path, help="directory of the model (default: the shipped one)")
    parser.add_argument("--history", type=Path, help="directory of a trained stateless model")
    parser.add_argument("--conversations", type=int, default=150, help="per distance and curve (150)")
    parser.add_argument("--distances", type=int, nargs="+", default=list(range(1, 17)), help="turns (1 to 16)")
    parser.add_argument(
        "--wording",
        choices=VARIETIES,
        default="full",
        help="sentences never seen in training: of the wording that training begins with (plain) or of more (full)",
    )
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--json", metavar="FILE", help="save the results; also when interrupted")
    parser.add_argument("--plot", metavar="FILE", help="draw FILE.png and FILE-dark.png")
    parser.add_argument("--resume", action="store_true", help="continue the results in --json FILE")


def _resumed(path: str, results: Results) -> list[dict[str, Any]]:
    """The rows of an earlier run.

    Raises:
        ValueError: it had other settings, or ran on something else.
    """
    if not Path(path).is_file():
        return []
    found = read_results(path, name=NAME)
    if found.settings != results.settings or any(
        found.environment.get(name) != results.environment.get(name) for name in _SAME
    ):
        raise ValueError(
            f"{path} was measured with other settings or another version; a run continues only with the same. Repeat them, "
            "or write to another file."
        )
    return [dict(row) for row in found.rows]


def run(arguments: argparse.Namespace) -> int:
    """Measure recall, save it, draw it, print it; the exit status is 130 if interrupted, what was measured being saved.

    Raises:
        ValueError, OSError: arguments that do not fit, before anything is measured.
    """
    for name, least in (("conversations", arguments.conversations), ("distances", min(arguments.distances))):
        if least < 1:
            raise ValueError(f"{name} is {least}; it must be at least 1.")
    if arguments.resume and arguments.json is None:
        raise ValueError("--resume is given without --json; name the file to continue.")
    if arguments.plot is not None:
        from .plotting import require_matplotlib

        require_matplotlib()
    device = choose_device(arguments.device)
    use_threads(arguments.threads)
    model = RxTAlpha.from_pretrained(arguments.model or demo_model_directory(), dtype=torch.float32)
    history = (
        None if arguments.history is None else SparseQueryTransformer.from_pretrained(arguments.history).to(device)
    )
    if history is not None and history.config.vocab_size != model.decoder.config.vocab_size:
        raise ValueError(
            f"--history {arguments.history} has a vocabulary of {history.config.vocab_size} tokens and the model one of "
            f"{model.decoder.config.vocab_size}; name the control of this model (rxt train stateless --model)."
        )
    settings = {
        "conversations": arguments.conversations,
        "distances": list(arguments.distances),
        "wording": arguments.wording,
        "model": _told(model),
        "history": None if history is None else _told(history),
    }
    results = Results(NAME, settings, describe_environment(device), {})
    rows = _resumed(arguments.json, results) if arguments.resume else []
    status = 0

    def save(*, complete: bool) -> None:
        results.rows, results.complete = rows, complete
        if arguments.json is not None and rows:
            write_results(results, arguments.json)

    try:
        with tqdm(disable=None, unit="point", leave=False) as progress:
            for curve in _curves(model, history, arguments.distances, arguments.wording):
                for distance in curve.distances:
                    if (curve.condition, curve.changed, distance) not in map(_key, rows):
                        measured = curve.measure(distances=(distance,), conversations=arguments.conversations)
                        rows.append(_row(measured))
                        save(complete=False)
                    progress.update()
    except KeyboardInterrupt:
        status = 130
    save(complete=status == 0)
    if not rows:
        print("Nothing was measured.", file=sys.stderr)
        return status or 1
    print(_table(rows))
    if arguments.json is not None:
        print(f"Results: {arguments.json}")
    if arguments.plot is not None:
        from .plotting import plot_results

        print("Plots: " + ", ".join(str(path) for path in plot_results(results, arguments.plot)))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.memory``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
