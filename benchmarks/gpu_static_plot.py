"""Points of what compilers make of every GPU kernel: registers, occupancy, wide loads, a colour per GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plotting import Theme, draw_themes, dress
from .results import Results

__all__ = ["plot_gpu_static"]

_GPUS = {
    # architecture: GPU, colours of both themes, marker
    "sm_80": ("A100", "#1a7f37", "#3fb950", "o"),
    "sm_90": ("H100", "#0969da", "#58a6ff", "s"),
    "sm_100": ("B200", "#8250df", "#bc8cff", "D"),
    "gfx942": ("MI300X", "#bc4c00", "#f0883e", "^"),
}
_PANELS = (
    ("registers", "Registers of a thread", "registers", 1.0),
    ("occupancy", "Occupancy", "% of the threads a processor holds", 100.0),
    ("wide_share", "Wide accesses", "% of bytes that move 16 or more at a time, inner loops", 100.0),
)


def plot_gpu_static(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw every kernel on every GPU, median with the range over its variants; see :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _draw(results: Results, theme: Theme, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kernels = sorted({row["kernel"] for row in results.rows}, reverse=True)
    height = 2.1 + 0.3 * len(kernels)
    with matplotlib.rc_context({"font.size": 10.5, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(15, height), dpi=110, facecolor=theme.background)
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, 3, sharey=True)
        figure.subplots_adjust(left=0.192, right=0.985, top=1 - 1.35 / height, bottom=0.95 / height, wspace=0.06)
        for axes, panel in zip(grid, _PANELS, strict=True):
            _draw_panel(axes, results, kernels, theme, *panel)
        grid[0].set_yticks(range(len(kernels)), [name.replace("_", " ") for name in kernels])
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.184, 1 - 0.45 / height), ncols=4, frameon=False,
            labelcolor=theme.text,
        )  # fmt: skip
        title = f"{results.summary['kernels']:,} GPU kernels as compiled: none was run or timed on a GPU"
        figure.text(0.192, 1 - 0.42 / height, title, color=theme.text, fontsize=15, fontweight="bold")
        caption = (
            f"{results.settings['note']} Points: median over tiles, dtypes and switches; lines: all of them. "
            f"Triton {results.settings['triton']}."
        )
        figure.text(0.192, 0.16 / height, caption, color=theme.text, fontsize=8.8, alpha=0.8)
        figure.savefig(file, format="png", facecolor=theme.background)


def _draw_panel(
    axes: Any, results: Results, kernels: list[str], theme: Theme, measure: str, title: str, unit: str, scale: float
) -> None:
    for number, (target, (gpu, light, dark, marker)) in enumerate(_GPUS.items()):
        colour = dark if theme.suffix else light
        label: str | None = f"{gpu} ({target})"
        for row in results.rows:
            if row["target"] != target or measure not in row:
                continue
            spread: Mapping[str, float] = row[measure]
            place = kernels.index(row["kernel"]) + 0.27 - 0.18 * number
            axes.plot(
                [scale * spread["least"], scale * spread["most"]],
                [place, place],
                color=colour,
                linewidth=1.3,
                alpha=0.6,
            )
            axes.plot(
                [scale * spread["median"]],
                [place],
                marker=marker,
                markersize=4.2,
                color=colour,
                linestyle="none",
                label=label,
            )
            label = None
    axes.set_xlim(left=0)
    axes.set_ylim(-0.7, len(kernels) - 0.3)
    dress(axes, theme, unit, title=title, has_base=False)
