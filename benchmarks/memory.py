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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rxt_model.demo_model import demo_model_directory
from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer
from rxt_model.training.recall import RecallReport, measure_history_recall, measure_recall, wilson_interval

from .devices import add_device_argument, choose_device
from .environment import describe_environment, use_threads
from .results import Results, read_results, write_results
from .running import main as common_main

__all__ = ["add_arguments", "main", "run"]

NAME = "memory"
_FEW = (1, 2, 4, 8, 12, 16)
# What has to be the same for two parts of one result.
_SAME = ("torch", "rxt_kernels", "commit")


@dataclass(frozen=True)
class Settings:
    """What is measured: conversations per point, distances in turns, and the models, by the folders they were in."""

    conversations: int
    distances: tuple[int, ...]
    model: str
    history: str | None

    def __post_init__(self) -> None:
        for name, least in (("conversations", self.conversations), ("distances", min(self.distances))):
            if least < 1:
                raise ValueError(f"{name} is {least}; it must be at least 1.")


@dataclass(frozen=True)
class Curve:
    """One condition at some distances; ``measure`` takes them as ``distances=``."""

    condition: str
    changed: bool
    distances: tuple[int, ...]
    measure: Callable[..., RecallReport]


def _curves(settings: Settings, device: torch.device) -> Iterator[Curve]:
    model = RxTAlpha.from_pretrained(settings.model, dtype=torch.float32)
    few = tuple(distance for distance in settings.distances if distance in _FEW) or settings.distances
    for condition, changed in (("memory", False), ("memory", True), ("reference", False), ("reset", False)):
        distances = settings.distances if condition == "memory" else few
        yield Curve(condition, changed, distances, partial(measure_recall, model, condition=condition, changed=changed))
    if settings.history is not None:
        stateless = SparseQueryTransformer.from_pretrained(settings.history).to(device)
        tokenizer = model.tokenizer or Tokenizer.from_pretrained(settings.model)
        for changed in (False, True):
            yield Curve("history", changed, few, partial(measure_history_recall, stateless, tokenizer, changed=changed))


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
    settings = Settings(
        arguments.conversations,
        tuple(arguments.distances),
        str(arguments.model or demo_model_directory().name),
        None if arguments.history is None else str(arguments.history),
    )
    if arguments.threads < 1:
        raise ValueError(f"threads is {arguments.threads}; it must be at least 1.")
    if arguments.resume and arguments.json is None:
        raise ValueError("--resume is given without --json; name the file to continue.")
    if arguments.plot is not None:
        from .plotting import require_matplotlib

        require_matplotlib()
    device = choose_device(arguments.device)
    use_threads(arguments.threads)
    recorded = {**asdict(settings), "distances": list(settings.distances)}
    results = Results(NAME, recorded, describe_environment(device), {})
    rows = _resumed(arguments.json, results) if arguments.resume else []
    where = settings if arguments.model else Settings(
        settings.conversations, settings.distances, str(demo_model_directory()), settings.history
    )  # fmt: skip
    status = 0

    def save(*, complete: bool) -> None:
        results.rows, results.complete = rows, complete
        if arguments.json is not None and rows:
            write_results(results, arguments.json)

    try:
        with tqdm(disable=None, unit="point", leave=False) as progress:
            for curve in _curves(where, device):
                for distance in curve.distances:
                    if (curve.condition, curve.changed, distance) not in map(_key, rows):
                        measured = curve.measure(distances=(distance,), conversations=settings.conversations)
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
