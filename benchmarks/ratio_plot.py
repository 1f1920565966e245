"""Bars of how far every system is from the floor: one panel per model, one group per size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plotting import Theme, draw_themes
from .results import Results

__all__ = ["plot_ratios"]

_TITLES = {
    "decode": "One more token",
    "prefill": "Reading a message",
    "update": "A memory update",
    "moe": "A layer of experts",
    "train": "A training step of the decoder",
}
# A colour per way of computing, in both themes; dtypes differ in hatching, for whoever sees no hues.
_COLOURS = {
    "reference": ("#59636e", "#9ea7b3"),
    "native engine": ("#0969da", "#58a6ff"),
    "native": ("#1a7f37", "#3fb950"),
    "torch.compile": ("#8250df", "#a371f7"),
    "padded bmm": ("#9a6700", "#d29922"),
    "grouped_mm": ("#bf3989", "#db61a2"),
    "upstream": ("#bc4c00", "#f0883e"),
}
_HATCHES = {"float32": "", "bfloat16": "///", "int8": "..."}
_BAR = 0.26  # inches


def plot_ratios(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw p50 over floor of every row that was measured with the most threads.

    Args:
        results: of decode, prefill, update, moe or train.
        path: of the light PNG; the dark one has ``-dark`` before ``.png``. The suffix is added where it is missing.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no rows, or none with a floor, or the path has the suffix of another format.
    """
    if any("ratio" not in row for row in results.rows):
        raise ValueError(f"the results of {results.name} have no ratios to a floor, so there are no bars to draw.")
    return draw_themes(results, path, _draw)


def _panels(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each model."""
    threads = max(row["threads"] for row in results.rows)
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in results.rows:
        if row["threads"] == threads:
            panels.setdefault(row["model"], []).append(row)
    return panels


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each size, named by the sizes that differ."""
    shapes = [row["shape"] for row in rows]
    varying = [key for key in shapes[0] if len({shape.get(key) for shape in shapes}) > 1]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{key} {row['shape'][key]}" for key in varying), []).append(row)
    return groups


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(results)
    lines = max(sum(len(group) + 1 for group in _groups(rows).values()) for rows in panels.values())
    height = 1.7 + _BAR * (lines + 1)
    with matplotlib.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2 * len(panels), height), dpi=120, facecolor=theme.background)
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, (model, rows) in zip(grid.flat, panels.items(), strict=True):
            _draw_panel(axes, model, rows, theme)
        title = f"{_TITLES.get(results.name, results.name)}: time over the least that this machine allows"
        figure.text(0.012, 1 - 0.34 / height, title, color=theme.text, fontsize=14, fontweight="bold", va="center")
        figure.text(0.012, 0.16 / height, _caption(results), color=theme.text, fontsize=8.5, alpha=0.8, va="center")
        figure.tight_layout(rect=(0, 0.34 / height, 1, 1 - 0.62 / height))
        figure.savefig(file, format="png", facecolor=theme.background)


def _caption(results: Results) -> str:
    limits, environment = results.limits, results.environment
    threads = max(row["threads"] for row in results.rows)
    return (
        f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}: "
        f"{limits['read_bandwidth_bytes_per_second'] / 1e9:.0f} GB/s read, {limits['fma_flops_per_second'] / 1e9:.0f} "
        f"GFLOP/s float32; torch {environment['torch']}; medians, lines from the 20th to the 80th percentile."
    )


def _draw_panel(axes: Any, model: str, rows: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    place, ticks, labels = 0.0, [], []
    largest = max(row["ratio"] for row in rows)
    for name, group in _groups(rows).items():
        if name:
            axes.text(1.02, place, name, color=theme.text, fontsize=9, fontweight="bold", va="center")
            place += 1
        for row in group:
            _draw_bar(axes, place, row, theme)
            ticks.append(place)
            labels.append(f"{row['backend']} {row['dtype']}")
            place += 1
    axes.set_xscale("log")
    axes.set_xlim(min(1.0, *(0.9 * row["ratio"] for row in rows)), largest * 3.2)
    axes.set_ylim(place - 0.4, -0.8)
    axes.set_yticks(ticks, labels)
    axes.set_title(model, loc="left", color=theme.text, fontsize=11, fontweight="bold")
    axes.axvline(1.0, color=theme.text, linewidth=1.2)
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, length=0)
    axes.grid(True, axis="x", color=theme.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_bar(axes: Any, place: float, row: Mapping[str, Any], theme: Theme) -> None:
    light, dark = _COLOURS[row["backend"].split(" 0.")[0]]
    colour = dark if theme.suffix else light
    ratio, scale = row["ratio"], row["ratio"] / row["p50"]
    axes.barh(
        place, ratio, height=0.78, color=colour, edgecolor=theme.background, hatch=_HATCHES[row["dtype"]], linewidth=0
    )
    axes.plot([row["p20"] * scale, row["p80"] * scale], [place, place], color=theme.text, linewidth=1.1)
    end = max(ratio, row["p80"] * scale)
    axes.text(end * 1.08, place, f"{ratio:.3g}x  {_time(row['p50'])}", color=theme.text, fontsize=8.5, va="center")


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms"
