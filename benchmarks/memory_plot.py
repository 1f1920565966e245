"""The picture of ``memory``: recall against distance, with 95% Wilson intervals."""

from __future__ import annotations

import os
from pathlib import Path

from .plotting import Theme, draw_themes, dress, picture
from .results import Results

__all__ = ["plot_memory"]

_CURVES = {
    # (condition, changed): label, colours on a light and on a dark page, marker
    ("memory", False): ("RxT, fixed-size memory", ("#0969da", "#58a6ff"), "o"),
    ("reference", False): ("RxT, hearing reference answers", ("#8250df", "#bc8cff"), "D"),
    ("memory", True): ("RxT, fact changed on the way", ("#bc4c00", "#f0883e"), "s"),
    ("history", False): ("stateless LLM re-reading the whole history", ("#1a7f37", "#56d364"), "^"),
    ("history", True): ("stateless LLM, fact changed", ("#7d8b15", "#c6d05a"), "v"),
    ("reset", False): ("RxT, memory reset every turn", ("#59636e", "#9ea7b3"), "x"),
}


def plot_memory(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the curves; arguments, result and errors as of :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _draw(results: Results, theme: Theme, file: Path) -> None:
    asked = results.rows[0]["shape"]["conversations"]
    title = "What is remembered, in wording never seen in training"
    caption = f"{asked} conversations per point, answers by greedy decoding, bands: 95% Wilson intervals."
    with picture(theme, file, title, caption, height=6.2, top=0.74, bottom=0.14) as axes:
        for (condition, changed), (label, colours, marker) in _CURVES.items():
            points = sorted(
                (row["shape"]["distance"], row["recall"], *row["wilson_95"])
                for row in results.rows
                if (row["name"], row["shape"]["changed"]) == (condition, changed)
            )
            if not points:
                continue
            at, *shares = zip(*points, strict=True)
            share, low, high = ([100 * value for value in values] for values in shares)
            colour = colours[bool(theme.suffix)]
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(at, share, color=colour, marker=marker, markersize=5, linewidth=2.1, label=label)
        axes.set_ylim(0, 102)
        axes.set_xticks(sorted({row["shape"]["distance"] for row in results.rows}))
        dress(axes, theme, "turns between telling a fact and asking for it", "answered right (%)")
