"""How long does the model remember? Recall against distance, with its controls, saved and drawn.

    rxt bench memory [--model DIRECTORY] [--history DIRECTORY] [--conversations 150]
    rxt bench memory --plot-only

The curves: the model; the model while it hears reference answers instead of its own; the model asked for facts that were
changed on the way; the same weights with memory drawn anew before every turn; and, if ``--history`` names one, a
stateless language model that reads the whole conversation again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rxt_model.demo_model import demo_model_directory
from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer
from rxt_model.training.recall import (
    RecallPoint,
    RecallReport,
    measure_history_recall,
    measure_recall,
    save_report,
    wilson_interval,
)

from .devices import add_device_argument, choose_device

NAME = "recall"

_CURVES = {
    # (condition, changed): label, colour legible on light and dark, marker
    ("memory", False): ("RxT, fixed-size memory", "#2f81f7", "o"),
    ("reference", False): ("RxT, hearing reference answers", "#a371f7", "D"),
    ("memory", True): ("RxT, fact changed on the way", "#e8590c", "s"),
    ("history", False): ("stateless LLM re-reading the whole history", "#2f9e44", "^"),
    ("history", True): ("stateless LLM, fact changed", "#94a336", "v"),
    ("reset", False): ("RxT, memory reset every turn", "#8b949e", "x"),
}


def measure(
    model_path: Path, history_path: Path | None, conversations: int, distances: Sequence[int], device: torch.device
) -> RecallReport:
    """All curves for a model directory; prints each point as it is measured."""

    def show(point: RecallPoint) -> None:
        low, high = wilson_interval(point.right, point.asked)
        changed = ", changed" if point.changed else ""
        print(
            f"{point.condition}{changed}, distance {point.distance}: {point.share:.3f} ({low:.3f} to {high:.3f})",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    model = RxTAlpha.from_pretrained(model_path, dtype=torch.float32)
    report = measure_recall(model, distances=distances, conversations=conversations, progress=show)
    report.environment["model_parameters"] = sum(p.numel() for p in model.parameters())
    few = [d for d in distances if d in (1, 2, 4, 8, 12, 16)] or list(distances)
    report.extend(measure_recall(model, distances=distances, conversations=conversations, changed=True, progress=show))
    for condition in ("reference", "reset"):
        report.extend(
            measure_recall(model, distances=few, conversations=conversations, condition=condition, progress=show)
        )
    if history_path is not None:
        stateless = SparseQueryTransformer.from_pretrained(history_path).to(device)
        tokenizer = model.tokenizer or Tokenizer.from_pretrained(model_path)
        report.environment["history_parameters"] = sum(p.numel() for p in stateless.parameters())
        for changed in (False, True):
            report.extend(
                measure_history_recall(
                    stateless, tokenizer, distances=few, conversations=conversations, changed=changed, progress=show
                )
            )
    return report


def plot(report: RecallReport, path: Path) -> None:
    """Draw recall against distance with 95% Wilson intervals, legible on a light and on a dark page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Mid-grey ink on a transparent ground reads on white and on black.
    ink = "#7d8590"
    figure, axes = plt.subplots(figsize=(8, 5.2), dpi=160)
    for (condition, changed), (label, colour, marker) in _CURVES.items():
        points = sorted(
            (p for p in report.points if (p.condition, p.changed) == (condition, changed)), key=lambda p: p.distance
        )
        if not points:
            continue
        at = [p.distance for p in points]
        share = [100 * p.share for p in points]
        bounds = [wilson_interval(p.right, p.asked) for p in points]
        steps = report.environment.get("history_training_steps"), report.environment.get("model_training_steps")
        if condition == "history" and all(steps):
            label += f" (trained {steps[0]:,} steps; RxT {steps[1]:,})"
        axes.plot(at, share, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
        axes.fill_between(
            at, [100 * b[0] for b in bounds], [100 * b[1] for b in bounds], color=colour, alpha=0.18, lw=0
        )
    asked = report.points[0].asked if report.points else 0
    axes.set_xlabel("turns between telling a fact and asking for it", color=ink)
    axes.set_ylabel("answered right (%)", color=ink)
    axes.set_title(
        f"Recall on wording never seen in training (n = {asked} per point, 95% interval)", color=ink, fontsize=10
    )
    axes.set_ylim(0, 102)
    axes.set_xticks(sorted({p.distance for p in report.points}))
    axes.tick_params(colors=ink)
    axes.grid(color=ink, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(ink)
        spine.set_alpha(0.5)
    legend = axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    for text in legend.get_texts():
        text.set_color(ink)
    figure.tight_layout()
    figure.savefig(path, transparent=True)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``rxt bench memory``."""
    parser.add_argument("--model", type=Path, help="directory of the model (default: the shipped one)")
    parser.add_argument("--history", type=Path, help="directory of a trained stateless model")
    parser.add_argument("--conversations", type=int, default=150, help="per distance and curve (150)")
    parser.add_argument("--distances", type=int, nargs="+", default=list(range(1, 17)), help="turns (1 to 16)")
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where recall.json and recall.png go (runs)")
    parser.add_argument("--plot-only", action="store_true", help="draw the saved results again")


def run(arguments: argparse.Namespace) -> int:
    """Measure recall, save it, draw it, print it.

    Raises:
        ValueError, OSError: arguments that do not fit, before anything is measured.
    """
    for name, values in (
        ("conversations", [arguments.conversations]),
        ("threads", [arguments.threads]),
        ("distances", arguments.distances),
    ):
        if min(values) < 1:
            raise ValueError(f"{name} is {min(values)}; it must be at least 1.")
    device = choose_device(arguments.device)
    target = arguments.output / f"{NAME}.json"
    if arguments.plot_only:
        if not target.is_file():
            raise FileNotFoundError(f"there are no saved results at {target}; run without --plot-only first.")
        report = RecallReport.from_json(target.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(arguments.threads)
        arguments.output.mkdir(parents=True, exist_ok=True)
        model = demo_model_directory() if arguments.model is None else arguments.model
        report = measure(model, arguments.history, arguments.conversations, arguments.distances, device)
        save_report(report, target)
    plot(report, arguments.output / f"{NAME}.png")
    print(report.table())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.memory``."""
    parser = argparse.ArgumentParser(prog="python -m rxt_benchmarks.memory", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
