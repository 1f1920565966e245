"""The paper's own experiment: how long a message takes to be read, by the step of the dialogue, 1 to 8.

Published are 0.09 s at step 1 and over 0.22 s at step 8 for a stateless language model, and about 0.06 s at every step for RxT.
Machines, models and messages were other ones, so what can be compared is the shape: ratios to step 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plotting import LABELS, STYLES, Theme, draw_themes, dress, picture
from .results import Results
from .statistics import percentiles

__all__ = ["PUBLISHED", "STEPS", "plot_steps", "prompt_latency", "text_of_steps"]

STEPS = 8
PUBLISHED: Mapping[str, tuple[float, float]] = {"stateless-reread": (0.09, 0.22), "rxt": (0.06, 0.06)}
"""Published seconds at the first and at the last step; what lies between is not known here."""


def prompt_latency(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Time to the first token at each of the first steps, over that of step 1 in the same conversation.

    Args:
        rows: of a result of ``scaling``.

    Returns:
        Per system ``seconds`` at step 1, and ``p20``, ``p50``, ``p80`` of the ratios, a list over steps each; empty if
        there are fewer than :data:`STEPS` turns.
    """
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row["samples"]["first_token"] for row in rows if row["name"] == name and row["turn"] <= STEPS]
        if len(own) < STEPS:
            return {}
        repeats = min(map(len, own))
        times = np.array([samples[:repeats] for samples in own])
        spreads = [percentiles(ratios.tolist()) for ratios in times / times[0]]
        found[name] = {
            "seconds": round(float(np.median(times[0])), 9),
            **{part: [round(getattr(spread, part), 4) for spread in spreads] for part in ("p20", "p50", "p80")},
        }
    return found


def _published_ratio(name: str) -> float | None:
    return PUBLISHED[name][1] / PUBLISHED[name][0] if name in PUBLISHED else None


def text_of_steps(found: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """The ratios as lines of a table; none if there are too few turns."""
    if not found:
        return []
    lines = ["Time to the first token by step of the dialogue, over that of step 1 (published: at step 8):"]
    lines.append(f"  {'':<24}{'step 1':>10}" + "".join(f"{step:>7}" for step in range(2, STEPS + 1)) + "   published")
    for name, of in found.items():
        ratios = "".join(f"{ratio:>7.2f}" for ratio in of["p50"][1:])
        published = _published_ratio(name)
        end = "" if published is None else f"{published:.2f}"
        lines.append(f"  {titles[name]:<24}{1e3 * of['seconds']:>7.1f} ms{ratios}{end:>12}")
    return [*lines, ""]


def plot_steps(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the ratios beside the published ones; arguments, result and errors as of :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _draw(results: Results, theme: Theme, file: Path) -> None:
    steps = list(range(1, STEPS + 1))
    environment = results.environment
    caption = (
        f"{results.settings['model']} and a stateless LLM of its size, {environment['cpu']}, {environment['threads']} "
        "threads. Medians over conversations of the ratio\nto step 1, bands from the 20th to the 80th percentile. Published: "
        "other models on another machine, first and last step."
    )
    with picture(theme, file, "Waiting for the first token", caption, bottom=0.2) as axes:
        for name, of in results.summary["prompt_latency_by_step"].items():
            colour, style = theme.series[name], STYLES[name]
            label = f"{LABELS[name]}: {1e3 * of['seconds']:.0f} ms at step 1"
            axes.fill_between(steps, of["p20"], of["p80"], color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, of["p50"], color=colour, linestyle=style, linewidth=2.2, label=label)
            if (ratio := _published_ratio(name)) is not None:
                axes.plot(
                    [1, STEPS], [1, ratio], color=colour, linestyle=":", linewidth=1.3, marker="*", markersize=11,
                    label=f"published: {PUBLISHED[name][0]:.2f} s, then {PUBLISHED[name][1]:.2f} s",
                )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xticks(steps)
        dress(axes, theme, "step of the dialogue", "times that of step 1")
