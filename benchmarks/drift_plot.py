"""Lines of what a long conversation does to a memory: its size, what a turn rewrites, shut and open gates, float32's error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plotting import Theme, draw_themes, dress
from .results import Results

__all__ = ["plot_drift"]

# A colour per kind of gate, in both themes; activations differ in line style.
_COLOURS = {
    "add": ("#59636e", "#9ea7b3"),
    "replace": ("#9a6700", "#d29922"),
    "static": ("#1a7f37", "#3fb950"),
    "elementwise": ("#bc4c00", "#f0883e"),
    "linear": ("#0969da", "#58a6ff"),
    "shipped model": ("#cf222e", "#ff7b72"),
}
_STYLES: Mapping[str, Any] = {"": "-", "sigmoid": "-", "tanh": (0, (4, 1.6))}
_LARGEST_SHOWN = 1e5
_PANELS = (
    ("rms", "Size of the memory", "root mean square", "log", 1.0),
    ("change", "Rewritten by one turn", "of the memory's size, %", "log", 100.0),
    ("saturated", "Gates shut or wide open", "%", "linear", 100.0),
    ("difference", "Numerical drift: float32 from float64", "of the memory's size", "log", 1.0),
)


def plot_drift(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the four curves of every gate against the turn; see :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(12.5, 9.2), dpi=120, facecolor=theme.background)
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.085, right=0.98, top=0.81, bottom=0.125, wspace=0.2, hspace=0.36)
        for axes, panel in zip(grid.flat, _PANELS, strict=True):
            _draw_panel(axes, results.rows, theme, *panel)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.077, 0.945), ncols=5, frameon=False,
            labelcolor=theme.text, handlelength=2.6, columnspacing=1.6,
        )  # fmt: skip
        title = f"{results.settings['turns']:,} memory updates in a row, by kind of residual gate"
        figure.text(0.085, 0.955, title, color=theme.text, fontsize=16, fontweight="bold")
        figure.text(0.085, 0.022, _caption(results), color=theme.text, fontsize=9, alpha=0.8, linespacing=1.5)
        figure.savefig(file, format="png", facecolor=theme.background)


def _caption(results: Results) -> str:
    shape = results.rows[0]["shape"]
    sizes = f"{shape['layers']} layers of {shape['slots']} slots of {shape['dim']}"
    ended = [
        f"{row['gate']}: turn {row['first_not_finite']}" for row in results.rows if row["first_not_finite"] is not None
    ]
    finite = "Every value stayed finite." if not ended else f"Not finite any more: {', '.join(ended)}."
    return (
        f"{sizes}, random weights but for the shipped model; 48 tokens of real dialogue a turn. {finite}\n"
        f"{results.environment['cpu']}, torch {results.environment['torch']}; float32 by {results.rows[0]['backend']} "
        "kernels, float64 by the definition."
    )


def _draw_panel(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    theme: Theme,
    name: str,
    title: str,
    unit: str,
    scale: str,
    factor: float,
) -> None:
    for row in rows:
        kind, _, activation = row["gate"].partition(", ")
        light, dark = _COLOURS[kind]
        points = [
            (turn, factor * value) for turn, value in zip(row["turns"], row[name], strict=True)
            if value is not None and (value > 0 or scale == "linear")
        ]  # fmt: skip
        label = row["gate"] if kind != "shipped model" else f"shipped model ({row['kind']}, trained)"
        axes.plot(
            [turn for turn, _ in points], [value for _, value in points], label=label,
            color=dark if theme.suffix else light, linestyle=_STYLES[activation],
            linewidth=2.6 if kind == "shipped model" else 1.9,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale(scale)
    if scale == "linear":
        axes.set_ylim(-3, 103)
    elif name == "rms" and axes.get_ylim()[1] > _LARGEST_SHOWN:
        axes.set_ylim(top=_LARGEST_SHOWN)  # what overflows leaves the picture, the others stay apart
    axes.xaxis.set_major_formatter("{x:,g}")
    dress(axes, theme, "turn", unit, title)
