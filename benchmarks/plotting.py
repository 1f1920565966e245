"""Plots of saved results, one PNG for light and one for dark pages.

python -m rxt_benchmarks.plotting results/scaling.json --plot scaling.png

:func:`plot_results` knows every picture; those that are not of ``scaling`` lie in modules of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_model.files import atomic_path

from .results import Results, read_results

__all__ = [
    "LABELS",
    "STYLES",
    "THEMES",
    "Theme",
    "draw_themes",
    "dress",
    "picture",
    "plot_results",
    "plot_scaling",
    "require_matplotlib",
]


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
        {
            "rxt": "#0969da", "stateless-reread": "#bc4c00", "stateless-cached": "#59636e", "smollm2-reread": "#8250df",
            "smollm2-cached": "#1a7f37",
        },
    ),
    Theme(
        "-dark", "#0d1117", "#e6edf3", "#3d444d",
        {
            "rxt": "#58a6ff", "stateless-reread": "#f0883e", "stateless-cached": "#9ea7b3", "smollm2-reread": "#bc8cff",
            "smollm2-cached": "#56d364",
        },
    ),
)  # fmt: skip

LABELS = {
    "rxt": "RxT",
    "stateless-reread": "stateless LLM, history re-read",
    "stateless-cached": "stateless LLM, KV cache kept",
    "smollm2-reread": "SmolLM2-135M, history re-read",
    "smollm2-cached": "SmolLM2-135M, KV cache kept",
}
STYLES: dict[str, Any] = {
    "rxt": "-",
    "stateless-reread": (0, (6, 1.5)),
    "stateless-cached": (0, (2, 1.2)),
    "smollm2-reread": (0, (6, 1.5, 1, 1.5)),
    "smollm2-cached": (0, (1, 1)),
}
_COMPARED = ("rxt", "stateless-reread", "stateless-cached")
"""Those of one size, whose costs stand in one picture."""
_SHORT = {"stateless-reread": "re-reading", "stateless-cached": "kept cache"}


@dataclass(frozen=True)
class Panel:
    """One of the four pictures: what it shows, in which unit, and how to take low, middle and high from a row."""

    measure: str
    title: str
    unit: str
    values: Callable[[Mapping[str, Any]], tuple[float, float, float]]


def _spread(spread: Mapping[str, float], scale: float) -> tuple[float, float, float]:
    return spread["p20"] * scale, spread["p50"] * scale, spread["p80"] * scale


_PANELS = (
    Panel("first_token", "Waiting for the first token", "milliseconds", lambda row: _spread(row["first_token"], 1e3)),
    Panel("latency", "Waiting for the whole answer", "milliseconds", lambda row: _spread(row, 1e3)),
    Panel(
        "cumulative",
        "Computing, conversation so far, updates included",
        "seconds",
        lambda row: _spread(row["cumulative"], 1.0),
    ),
    Panel("state_bytes", "State kept between turns", "megabytes", lambda row: (row["state_bytes"] / 1e6,) * 3),
)


def require_matplotlib() -> None:
    """Raises:
    ModuleNotFoundError: matplotlib is not installed, with how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed; install it with pip install 'rxt-kernels[plot]', or leave out "
            "--plot."
        )


def dress(axes: Any, theme: Theme, x: str, y: str = "", title: str = "", *, has_base: bool = True) -> None:
    """What axes of all pictures look like: labels, a title on the left, a faint grid, and no frame but a line at their base."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, color=theme.text)
    axes.set_ylabel(y, color=theme.text)
    if title:
        axes.set_title(title, loc="left", color=theme.text, fontsize=12, fontweight="bold", pad=9)
    axes.tick_params(colors=theme.text, which="both", length=0, pad=5)
    axes.grid(True, color=theme.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(has_base and side == "bottom")
        spine.set_color(theme.text)


@contextmanager
def picture(
    theme: Theme, file: Path, title: str, caption: str, *, height: float = 5.8, top: float = 0.72, bottom: float = 0.17
) -> Iterator[Any]:
    """One pair of axes to draw on, saved when the block ends: a title and a legend above them, a caption below."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8.6, height), dpi=130, facecolor=theme.background)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.975, top=top, bottom=bottom)
        yield axes
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.08, 0.92), ncols=2, frameon=False, labelcolor=theme.text, fontsize=9.5
        )
        figure.text(0.09, 0.935, title, color=theme.text, fontsize=15, fontweight="bold")
        figure.text(0.09, 0.03, caption, color=theme.text, fontsize=8.8, alpha=0.8, linespacing=1.5)
        figure.savefig(file, format="png", facecolor=theme.background)


def plot_scaling(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the result of ``scaling``: what a turn, a conversation and its state cost.

    Args:
        results: as measured or as read from a file.
        path: of the light PNG; the dark one has ``-dark`` before ``.png``. The suffix is added where it is missing.

    Returns:
        The files written: with the first steps of the dialogue beside the published ones, in ``-steps``, if there are enough,
        and how the cost of a turn grows beside that of a real language model, in ``-growth``, if that was measured.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no rows, or the path has the suffix of another format.
    """
    written = draw_themes(results, path, _draw)
    if results.summary.get("prompt_latency_by_step"):
        from .dialogue_steps import plot_steps

        target = Path(path)
        written += plot_steps(results, target.with_name(f"{target.stem}-steps.png"))
    if "smollm2-cached" in results.summary.get("cost_growth", ()):
        from .growth import plot_growth

        target = Path(path)
        written += plot_growth(results, target.with_name(f"{target.stem}-growth.png"))
    return written


def plot_results(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the results of any benchmark; arguments, result and errors as of :func:`plot_scaling`.

    Raises:
        ValueError: there is no picture of this benchmark.
    """
    if results.name == "scaling":
        return plot_scaling(results, path)
    if results.name == "sqa":
        from .sqa_plot import plot_sqa

        return plot_sqa(results, path)
    if results.name == "memory":
        from .memory_plot import plot_memory

        return plot_memory(results, path)
    if results.name == "drift":
        from .drift_plot import plot_drift

        return plot_drift(results, path)
    if results.name == "gpu_static":
        from .gpu_static_plot import plot_gpu_static

        return plot_gpu_static(results, path)
    from .ratio_plot import plot_ratios

    return plot_ratios(results, path)


def draw_themes(
    results: Results, path: str | os.PathLike[str], draw: Callable[[Results, Theme, Path], None]
) -> list[Path]:
    """Draw results once per theme; arguments, result and errors as of :func:`plot_scaling`, ``draw`` makes one file."""
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
            draw(results, theme, temporary)
        written.append(file)
    return written


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11.5, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(12, 9.2), dpi=130, facecolor=theme.background)
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.066, right=0.982, top=0.815, bottom=0.112, wspace=0.19, hspace=0.46)
        for axes, panel in zip(grid.flat, _PANELS, strict=True):
            _draw_panel(axes, results, theme, panel)
        handles, labels = grid[0, 1].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.056, 0.942), ncols=len(handles), frameon=False,
            labelcolor=theme.text, handlelength=2.6, columnspacing=1.6,
        )  # fmt: skip
        figure.text(0.066, 0.953, _headline(results), color=theme.text, fontsize=16.5, fontweight="bold")
        figure.text(0.066, 0.02, _caption(results), color=theme.text, fontsize=9.5, alpha=0.8, linespacing=1.5)
        figure.savefig(file, format="png", facecolor=theme.background)


def _headline(results: Results) -> str:
    return f"What a conversation of {results.summary['turns_measured']} turns costs"


def _caption(results: Results) -> str:
    settings, environment, counts = results.settings, results.environment, results.summary["parameters"]
    shape = results.rows[0]["shape"]
    tokens = f"{shape['prompt'] + shape['answer']} tokens a turn"
    if settings["lengths"] == "real":
        tokens = "messages of real length"
    repeats = results.summary["repeats_measured"]
    band = ", bands: 20th to 80th percentile" if repeats > 2 else ""
    backends = " and ".join(dict.fromkeys(row["backend"] for row in results.rows if row["name"] in _COMPARED))
    return (
        f"{settings['model']}: decoder {counts['rxt_decoder'] / 1e6:.1f} M parameters, stateless LLM "
        f"{counts['stateless'] / 1e6:.1f} M; {tokens} from {settings['dialogues']}.\n"
        f"float32, backend {backends}, torch {environment['torch']}, {environment['cpu']}, {environment['threads']} "
        f"thread{'s' if environment['threads'] > 1 else ''}; medians of {repeats} conversations{band}."
    )


def _rows(results: Results, name: str) -> list[Mapping[str, Any]]:
    return [row for row in results.rows if row["name"] == name]


def _draw_panel(axes: Any, results: Results, theme: Theme, panel: Panel) -> None:
    for name in _COMPARED:
        rows = _rows(results, name)
        turns = [row["turn"] for row in rows]
        colour = theme.series[name]
        values = [panel.values(row) for row in rows]
        axes.fill_between(
            turns, [low for low, _, _ in values], [high for _, _, high in values],
            color=colour, alpha=0.2, linewidth=0,
        )  # fmt: skip
        axes.plot(
            turns, [middle for _, middle, _ in values],
            color=colour, linestyle=STYLES[name], linewidth=2.6 if name == "rxt" else 2.1, label=LABELS[name],
        )  # fmt: skip
    if panel.measure == "latency":
        ours = _rows(results, "rxt")
        axes.plot(
            [row["turn"] for row in ours], [1e3 * (row["p50"] + row["memory_update"]["p50"]) for row in ours],
            color=theme.series["rxt"], linewidth=1.1, label="RxT and its memory update",
        )  # fmt: skip
    _dress_panel(axes, theme, panel, len(_rows(results, "rxt")))
    _say_overtaking(axes, results, theme, panel)


def _dress_panel(axes: Any, theme: Theme, panel: Panel, turns: int) -> None:
    from matplotlib.ticker import MaxNLocator

    dress(axes, theme, "turn", panel.unit)
    axes.set_xlim(1, turns)
    axes.set_ylim(0, axes.get_ylim()[1])
    if 16 <= turns <= 64:
        axes.set_xticks([tick for tick in (1, 8, 16, 24, 32, 40, 48, 56, 64) if tick <= turns])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _say_overtaking(axes: Any, results: Results, theme: Theme, panel: Panel) -> None:
    """A title, under it where RxT gets ahead in words, and a point there."""
    axes.text(0, 1.135, panel.title, transform=axes.transAxes, color=theme.text, fontsize=13, fontweight="bold")
    notes = []
    for found in results.summary["overtaking"]:
        if found["measure"] != panel.measure:
            continue
        turn, other = found["turn"], _SHORT[found["against"]]
        if turn is None:
            words = {
                "ahead": f"ahead of {other} at the end",
                "level": f"level with {other}",
                "behind": f"behind {other}",
            }
            notes.append(words[found["verdict"]])
        elif turn == 1:
            notes.append(f"ahead of {other} throughout")
        else:
            notes.append(f"ahead of {other} from turn {turn}")
            height = panel.values(_rows(results, "rxt")[turn - 1])[1]
            axes.plot(
                [turn], [height], marker="o", markersize=9, markerfacecolor=theme.background, linestyle="none",
                markeredgecolor=theme.series["rxt"], markeredgewidth=2.2, zorder=5, clip_on=False,
            )  # fmt: skip
    axes.text(0, 1.045, "RxT: " + ", ".join(notes), transform=axes.transAxes, color=theme.text, fontsize=10)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a saved result again."""
    parser = argparse.ArgumentParser(prog="python -m rxt_benchmarks.plotting", description="Draw a saved result.")
    parser.add_argument("results", help="JSON file of a benchmark")
    parser.add_argument("--plot", required=True, metavar="FILE", help="PNG to write; a dark one is written beside it")
    options = parser.parse_args(arguments)
    try:
        paths = plot_results(read_results(options.results), options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
