"""Plots of saved results, one PNG for light and one for dark pages.

    python -m rxt_benchmarks.plotting results/scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_model.files import atomic_path

from .results import Results, read_results

__all__ = ["THEMES", "Theme", "plot_scaling", "require_matplotlib"]


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; the series differ in lightness and in line style too, for whoever sees no hues."""

    suffix: str
    background: str
    text: str
    faint: str
    series: Mapping[str, str]


THEMES = (
    Theme(
        "", "#ffffff", "#1f2328", "#d1d9e0",
        {"rxt": "#0969da", "stateless-reread": "#bc4c00", "stateless-cached": "#59636e"},
    ),
    Theme(
        "-dark", "#0d1117", "#e6edf3", "#3d444d",
        {"rxt": "#58a6ff", "stateless-reread": "#f0883e", "stateless-cached": "#9ea7b3"},
    ),
)  # fmt: skip

_LABELS = {
    "rxt": "RxT",
    "stateless-reread": "stateless LLM, history re-read",
    "stateless-cached": "stateless LLM, KV cache kept",
}
_STYLES: dict[str, Any] = {"rxt": "-", "stateless-reread": (0, (6, 1.5)), "stateless-cached": (0, (2, 1.2))}
_SHORT = {"stateless-reread": "re-reading", "stateless-cached": "kept cache"}


def require_matplotlib() -> None:
    """Raises:
    ModuleNotFoundError: matplotlib is not installed, with how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed; install it with pip install 'rxt-kernels[plot]', or leave out "
            "--plot."
        )


def plot_scaling(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the result of ``scaling``: what a turn, a conversation and its state cost.

    Args:
        results: as measured or as read from a file.
        path: of the light PNG; the dark one has ``-dark`` before ``.png``. The suffix is added where it is missing.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no rows, or the path has the suffix of another format.
    """
    require_matplotlib()
    target = Path(path)
    if target.suffix not in ("", ".png"):
        raise ValueError(f"the plot is to be {target.name}; plots are PNG files: give a name that ends in .png.")
    if not results.rows:
        raise ValueError("the results have no rows; measure something before drawing it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for theme in THEMES:
        file = target.with_name(f"{target.stem}{theme.suffix}.png")
        with atomic_path(file) as temporary:
            _draw(results, theme, temporary)
        written.append(file)
    return written


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11.5, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(14, 5.1), dpi=130, facecolor=theme.background)
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.05, right=0.988, top=0.725, bottom=0.185, wspace=0.19)
        _latency(left, results, theme)
        _cumulative(middle, results, theme)
        _state(right, results, theme)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.042, 0.915), ncols=len(handles), frameon=False,
            labelcolor=theme.text, handlelength=2.6, columnspacing=1.8,
        )  # fmt: skip
        figure.text(0.05, 0.945, _headline(results), color=theme.text, fontsize=15, fontweight="bold")
        figure.text(0.05, 0.03, _caption(results), color=theme.text, fontsize=9.5, alpha=0.8)
        figure.savefig(file, format="png", facecolor=theme.background)


def _headline(results: Results) -> str:
    return f"What a conversation of {results.summary['turns_measured']} turns costs"


def _caption(results: Results) -> str:
    settings, environment, counts = results.settings, results.environment, results.summary["parameters"]
    shape = results.rows[0]["shape"]
    tokens = f"{shape['prompt'] + shape['answer']} tokens a turn"
    if settings["lengths"] == "real":
        tokens = "messages as long as they were"
    repeats = results.summary["repeats_measured"]
    band = ", bands: 20th to 80th percentile" if repeats > 2 else ""
    return (
        f"{settings['model']}: decoder {counts['rxt_decoder'] / 1e6:.1f} M parameters, stateless LLM "
        f"{counts['stateless'] / 1e6:.1f} M; {tokens}, {settings['dialogues']}; float32, eager torch "
        f"{environment['torch']}, {environment['cpu']}, {environment['threads']} threads; median of {repeats}{band}."
    )


def _rows(results: Results, name: str) -> list[Mapping[str, Any]]:
    return [row for row in results.rows if row["name"] == name]


def _prepare(axes: Any, theme: Theme, title: str, unit: str, turns: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(theme.background)
    axes.set_title(title, color=theme.text, fontsize=12.5, loc="left", pad=9)
    axes.set_xlabel("turn of the conversation", color=theme.text)
    axes.set_ylabel(unit, color=theme.text)
    axes.set_xlim(1, turns)
    axes.set_ylim(bottom=0)
    ticks = [tick for tick in (1, 8, 16, 24, 32, 40, 48, 56, 64) if tick <= turns]
    if turns > 64 or turns < 16:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xticks(ticks)
    axes.tick_params(colors=theme.text, length=0, pad=6)
    axes.grid(True, color=theme.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.text)


def _line(axes: Any, theme: Theme, name: str, rows: Sequence[Mapping[str, Any]], spread: Any, scale: float) -> None:
    turns = [row["turn"] for row in rows]
    colour = theme.series[name]
    axes.fill_between(
        turns, [spread(row)["p20"] * scale for row in rows], [spread(row)["p80"] * scale for row in rows],
        color=colour, alpha=0.2, linewidth=0,
    )  # fmt: skip
    axes.plot(
        turns, [spread(row)["p50"] * scale for row in rows],
        color=colour, linestyle=_STYLES[name], linewidth=2.6 if name == "rxt" else 2.1, label=_LABELS[name],
    )  # fmt: skip


def _mark_overtaking(axes: Any, results: Results, theme: Theme, measure: str, value: Any) -> None:
    """A point where RxT gets ahead, and a line of words for each comparison."""
    notes = []
    for found in results.summary["overtaking"]:
        if found["measure"] != measure:
            continue
        turn, other = found["turn"], _SHORT[found["against"]]
        if turn is None:
            notes.append(f"{other}: not overtaken")
        elif turn == 1:
            notes.append(f"{other}: RxT ahead from turn 1")
        else:
            notes.append(f"{other}: RxT ahead from turn {turn}")
            axes.plot(
                [turn], [value("rxt", turn)], marker="o", markersize=9, markerfacecolor=theme.background,
                markeredgecolor=theme.series["rxt"], markeredgewidth=2.2, zorder=5, linestyle="none",
            )  # fmt: skip
    axes.text(
        0.035, 0.965, "\n".join(notes), transform=axes.transAxes, va="top", color=theme.text, fontsize=10.5,
        linespacing=1.5, bbox={"facecolor": theme.background, "edgecolor": "none", "alpha": 0.8, "pad": 2.5},
    )  # fmt: skip


def _latency(axes: Any, results: Results, theme: Theme) -> None:
    for name in _LABELS:
        _line(axes, theme, name, _rows(results, name), lambda row: row, 1e3)
    ours = _rows(results, "rxt")
    axes.plot(
        [row["turn"] for row in ours], [1e3 * (row["p50"] + row["memory_update"]["p50"]) for row in ours],
        color=theme.series["rxt"], linewidth=1.1, alpha=0.9, label="RxT with its memory update, after the answer",
    )  # fmt: skip
    _prepare(axes, theme, "Waiting for the answer", "milliseconds per turn", len(ours))
    _mark_overtaking(axes, results, theme, "latency", lambda name, turn: 1e3 * _rows(results, name)[turn - 1]["p50"])
    _leave_room(axes)


def _cumulative(axes: Any, results: Results, theme: Theme) -> None:
    for name in _LABELS:
        _line(axes, theme, name, _rows(results, name), lambda row: row["cumulative"], 1.0)
    turns = len(_rows(results, "rxt"))
    _prepare(axes, theme, "Whole conversation so far, updates included", "seconds", turns)
    _mark_overtaking(
        axes, results, theme, "cumulative", lambda name, turn: _rows(results, name)[turn - 1]["cumulative"]["p50"]
    )
    _leave_room(axes)


def _state(axes: Any, results: Results, theme: Theme) -> None:
    for name in _LABELS:
        rows = _rows(results, name)
        axes.plot(
            [row["turn"] for row in rows], [row["state_bytes"] / 1e6 for row in rows],
            color=theme.series[name], linestyle=_STYLES[name], linewidth=2.6 if name == "rxt" else 2.1,
        )  # fmt: skip
    turns = len(_rows(results, "rxt"))
    _prepare(axes, theme, "State kept between turns", "megabytes", turns)
    _mark_overtaking(
        axes, results, theme, "state_bytes", lambda name, turn: _rows(results, name)[turn - 1]["state_bytes"] / 1e6
    )
    _leave_room(axes)


def _leave_room(axes: Any) -> None:
    """Space above the curves for the words in the corner."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a saved result again."""
    parser = argparse.ArgumentParser(prog="python -m rxt_benchmarks.plotting", description="Draw a saved result.")
    parser.add_argument("results", help="JSON file of a scaling benchmark")
    parser.add_argument("--plot", required=True, metavar="FILE", help="PNG to write; a dark one is written beside it")
    options = parser.parse_args(arguments)
    try:
        paths = plot_scaling(read_results(options.results, name="scaling"), options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
