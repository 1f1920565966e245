"""How the cost of a turn grows, for systems of different size: each over its own first turns.

This is how a real language model of another size can stand beside RxT (:mod:`.smollm2`): what it costs says nothing about
RxT, and how its cost grows does.
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

__all__ = ["cost_growth", "plot_growth", "text_of_growth"]

_FIRST_TURNS = 3


def cost_growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Answer and memory update of every turn over the median of the first three, conversation by conversation.

    Args:
        rows: of a result of ``scaling``.

    Returns:
        Per system ``seconds``, the median of the first turns, and ``p20``, ``p50``, ``p80`` of the ratios, a list over turns
        each; empty if there are fewer than six turns.
    """
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row["samples"] for row in rows if row["name"] == name]
        if len(own) < 2 * _FIRST_TURNS:
            return {}
        repeats = len(own[-1]["latency"])
        times = np.array(
            [np.add(of["latency"][:repeats], of["memory_update"][:repeats]) for of in own]
        )  # (turns, repeats)
        start = np.median(times[:_FIRST_TURNS], axis=0)
        spreads = [percentiles(ratios.tolist()) for ratios in times / start]
        found[name] = {
            "seconds": round(float(np.median(start)), 9),
            **{part: [round(getattr(spread, part), 4) for spread in spreads] for part in ("p20", "p50", "p80")},
        }
    return found


def text_of_growth(found: Mapping[str, Mapping[str, Any]], turns: Sequence[int]) -> list[str]:
    """The ratios at these turns as lines of a table."""
    lines = ["Answer and memory update of a turn, over those of the first three:"]
    lines.append(f"  {'':<28}{'turns 1-3':>12}" + "".join(f"{turn:>8}" for turn in turns))
    for name, of in found.items():
        ratios = "".join(f"{of['p50'][turn - 1]:>8.2f}" for turn in turns)
        lines.append(f"  {LABELS[name]:<28}{1e3 * of['seconds']:>9.1f} ms{ratios}")
    return [*lines, ""]


def plot_growth(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Draw the ratios; arguments, result and errors as of :func:`.plotting.plot_scaling`."""
    return draw_themes(results, path, _draw)


def _draw(results: Results, theme: Theme, file: Path) -> None:
    environment = results.environment
    caption = (
        f"Answer and memory update over the median of the first three turns, {environment['cpu']}, "
        f"{environment['threads']} threads; medians and 20th to 80th percentile\nover conversations. SmolLM2 is a "
        "trained model with weights of 4 bits, run by llama.cpp; the others have random weights, float32."
    )
    with picture(theme, file, "How a turn's cost grows", caption, top=0.70) as axes:
        for name, of in results.summary["cost_growth"].items():
            turns = range(1, len(of["p50"]) + 1)
            colour = theme.series[name]
            axes.fill_between(turns, of["p20"], of["p80"], color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                turns, of["p50"], color=colour, linestyle=STYLES[name], linewidth=2.2,
                label=f"{LABELS[name]}: {1e3 * of['seconds']:.0f} ms at first",
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlim(1, len(turns))
        dress(axes, theme, "turn", "times the first turns")
