"""Lines of what fewer query heads bring: time against length, and speed against grouped-query attention."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plotting import Theme, draw_themes, dress
from .results import Results

__all__ = ["plot_sqa"]

# A colour and a marker per kind of attention, in both themes; backends differ in line style.
_COLOURS = {
    "MHA": ("#59636e", "#9ea7b3"),
    "GQA": ("#bc4c00", "#f0883e"),
    "SQA": ("#1a7f37", "#3fb950"),
    "sSQA": ("#8250df", "#bc8cff"),
    "xSQA": ("#0969da", "#58a6ff"),
}
_MARKERS = {"MHA": "s", "GQA": "D", "SQA": "o", "sSQA": "v", "xSQA": "^"}
_BACKENDS: Mapping[str, Any] = {"native": "-", "torch SDPA": (0, (4, 1.6))}


def plot_sqa(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw forward times, and the speed against GQA forward and with backward; see :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _colour(variant: str, theme: Theme) -> str:
    light, dark = _COLOURS[variant]
    return dark if theme.suffix else light


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = max(row["threads"] for row in results.rows)
    rows = [row for row in results.rows if row["threads"] == threads]
    compared = [one for one in results.summary["speedup_over_gqa"] if one["threads"] == threads]
    with matplotlib.rc_context({"font.size": 11, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(15.5, 5.6), dpi=120, facecolor=theme.background)
        FigureCanvasAgg(figure)
        times, forward, backward = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.062, right=0.985, top=0.76, bottom=0.19, wspace=0.2)
        _draw_times(times, rows, theme)
        _draw_speed(forward, results, [one for one in compared if not one["backward"]], theme, has_published=True)
        _draw_speed(backward, results, [one for one in compared if one["backward"]], theme, has_published=False)
        for axes, title, unit in (
            (times, "Time, forward", "milliseconds"),
            (forward, "Speed, forward", "times as fast as GQA"),
            (backward, "Speed, forward and backward", "times as fast as GQA"),
        ):
            _dress_lengths(axes, theme, title, unit)
        figure.legend(
            handles=_legend(theme, results), loc="upper left", bbox_to_anchor=(0.055, 0.925), ncols=9, frameon=False,
            labelcolor=theme.text, handlelength=2.4, columnspacing=1.3, fontsize=10,
        )  # fmt: skip
        title = "Attention with fewer query heads, at one model width"
        figure.text(0.062, 0.935, title, color=theme.text, fontsize=16, fontweight="bold")
        figure.text(0.062, 0.025, _caption(results, threads), color=theme.text, fontsize=9, alpha=0.8, linespacing=1.5)
        figure.savefig(file, format="png", facecolor=theme.background)


def _legend(theme: Theme, results: Results) -> list[Any]:
    from matplotlib.lines import Line2D

    variants = results.summary["variants"]
    handles = [
        Line2D(
            [], [], color=_colour(name, theme), marker=_MARKERS[name], markersize=5,
            label=f"{name} {variants[name]['query_heads']}/{variants[name]['key_heads']}",
        )
        for name in _COLOURS
        if any(row["model"] == name for row in results.rows)
    ]  # fmt: skip
    handles += [
        Line2D([], [], color=theme.text, linestyle=style, label=backend)
        for backend, style in _BACKENDS.items()
        if any(row["backend"] == backend for row in results.rows)
    ]
    handles.append(Line2D([], [], color=theme.text, linewidth=0.9, alpha=0.55, label="by arithmetic"))
    published = Line2D(
        [], [], color=theme.text, linestyle=":", marker="*", markersize=8, label="published (A100, whole model)"
    )
    return [*handles, published]


def _caption(results: Results, threads: int) -> str:
    limits, environment = results.limits, results.environment
    return (
        "Query/key heads of 16 values, causal, one sequence, float32; projections left out. Medians, bands from the 20th to "
        "the 80th percentile.\n"
        f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}: "
        f"{limits['fma_flops_per_second'] / 1e9:.0f} GFLOP/s float32; torch {environment['torch']}. Published: seconds of a "
        "forward step of whole models on a GPU, as ratios."
    )


def _draw_times(axes: Any, rows: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for backend, style in _BACKENDS.items():
        for variant in _COLOURS:
            own = sorted(
                (
                    row
                    for row in rows
                    if (row["model"], row["backend"]) == (variant, backend) and not row["shape"]["backward"]
                ),
                key=lambda row: row["shape"]["tokens"],
            )
            if not own:
                continue
            at = [row["shape"]["tokens"] for row in own]
            colour = _colour(variant, theme)
            axes.plot(
                at, [1e3 * row["p50"] for row in own],
                color=colour, linestyle=style, marker=_MARKERS[variant], markersize=5, linewidth=1.9,
            )  # fmt: skip
            low, high = [1e3 * row["p20"] for row in own], [1e3 * row["p80"] for row in own]
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_speed(
    axes: Any, results: Results, compared: Sequence[Mapping[str, Any]], theme: Theme, *, has_published: bool
) -> None:
    for variant in _COLOURS:
        colour = _colour(variant, theme)
        own = [one for one in compared if one["variant"] == variant]
        if variant == "GQA" or not own:
            continue
        axes.axhline(own[0]["arithmetic"], color=colour, linewidth=0.9, alpha=0.55)
        for backend, style in _BACKENDS.items():
            points = sorted((one["tokens"], one["speedup"]) for one in own if one["backend"] == backend)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour, linestyle=style, marker=_MARKERS[variant], markersize=5, linewidth=1.9,
                )  # fmt: skip
        if has_published:
            seconds = results.summary["published_seconds"]
            at = sorted(map(int, seconds[variant]))
            ratios = [seconds["GQA"][str(tokens)] / seconds[variant][str(tokens)] for tokens in at]
            axes.plot(at, ratios, color=colour, linestyle=":", marker="*", markersize=8, linewidth=1.2)
    axes.set_ylim(0, 4.9)
    axes.yaxis.set_major_formatter("{x:g}x")


def _dress_lengths(axes: Any, theme: Theme, title: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    dress(axes, theme, "tokens", unit, title)
