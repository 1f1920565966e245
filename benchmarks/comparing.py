"""What two results of one benchmark differ in: ratios, which mean the same on every machine, and times, which do not.

A ratio is taken within one run: a time over its floor, the speed of one kind of attention against another, what a
stateless model costs against RxT. It carries the range from its 20th to its 80th percentile. Two ratios differ *beyond
noise* if these ranges do not touch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import Results

__all__ = ["WORSE", "Change", "Quantity", "add_check_argument", "changes", "check", "checked", "quantities", "report"]

WORSE = 0.15
"""By how much a ratio may worsen before a check fails."""
_OVER_BEST, _OVER_OWN = "over its floor:", "over the floor of its moment:"
_SAME_MACHINE = ("cpu", "cores", "threads", "torch")


@dataclass(frozen=True)
class Quantity:
    """A number of a result with its spread.

    Attributes:
        label: what it is, the same in every result.
        low, middle, high: its 20th, 50th and 80th percentile.
        is_better: ``lower`` or ``higher``.
        is_ratio: whether it was taken within one run; a time was not.
    """

    label: str
    low: float
    middle: float
    high: float
    is_better: str
    is_ratio: bool


@dataclass(frozen=True)
class Change:
    """One quantity before and after."""

    before: Quantity
    after: Quantity

    @property
    def worsening(self) -> float:
        """By which share it is worse; negative if it is better.

        Example:
            >>> def at(value): return Quantity("any", value, value, value, "higher", True)
            >>> Change(at(4.0), at(3.2)).worsening
            0.25
        """
        earlier, later = self.before.middle, self.after.middle
        if self.before.is_better == "higher":
            earlier, later = later, earlier
        return later / earlier - 1 if earlier else float("inf")

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the ranges from the 20th to the 80th percentile do not touch."""
        return self.after.low > self.before.high or self.after.high < self.before.low


def _label(row: Mapping[str, Any]) -> str:
    """What a row is about, in words."""
    words = [row["name"]]
    words += [str(row[name]) for name in ("model", "backend", "dtype") if name in row]
    if "threads" in row:
        words.append(f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}")
    words += [f"{name} {value}" for name, value in row["shape"].items()]
    if "turn" in row:
        words.append(f"turn {row['turn']}")
    return ", ".join(words)


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[Quantity]:
    for row in rows:
        if "p50" not in row:
            continue
        spread = row["p20"], row["p50"], row["p80"]
        yield Quantity(f"seconds: {_label(row)}", *spread, "lower", False)
        if "ratio" in row:
            scale = row["ratio"] / row["p50"]
            low, middle, high = (scale * value for value in spread)
            yield Quantity(f"{_OVER_BEST} {_label(row)}", low, middle, high, "lower", True)
        if "paired_ratio" in row:
            own = row["paired_ratio"]
            yield Quantity(f"{_OVER_OWN} {_label(row)}", own["p20"], own["p50"], own["p80"], "lower", True)


def _of_attention(results: Results) -> Iterator[Quantity]:
    """Speed against grouped-query attention."""
    if results.name != "sqa":
        return

    def others(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["backend"], row["threads"], tuple(row["shape"].items())

    grouped = {others(row): row for row in results.rows if row["model"] == "GQA"}
    for row in results.rows:
        base = grouped.get(others(row))
        if base is None or base is row:
            continue
        label = f"speed against GQA: {_label(row)}"
        spread = base["p20"] / row["p80"], base["p50"] / row["p50"], base["p80"] / row["p20"]
        yield Quantity(label, *spread, "higher", True)


def _of_conversations(results: Results) -> Iterator[Quantity]:
    """What a stateless model costs against RxT at the end of a conversation."""
    for found in results.summary.get("overtaking", ()) if results.name == "scaling" else ():
        end = found["ratio_at_end"]
        label = f"{found['measure']} of {found['against']} over RxT's, turn {found['turns_measured']}"
        yield Quantity(label, end["p20"], end["p50"], end["p80"], "higher", True)


def quantities(results: Results) -> dict[str, Quantity]:
    """Everything of a result that can be compared, by its label."""
    found = [*_of_rows(results.rows), *_of_attention(results), *_of_conversations(results)]
    return {quantity.label: quantity for quantity in found}


def changes(before: Results, after: Results) -> list[Change]:
    """Every quantity that both results have.

    Raises:
        ValueError: they are of different benchmarks, or have nothing in common.
    """
    if before.name != after.name:
        raise ValueError(f"the results are of {before.name} and of {after.name}; compare two results of one benchmark.")
    earlier, later = quantities(before), quantities(after)
    common = [Change(quantity, later[label]) for label, quantity in earlier.items() if label in later]
    if not common:
        raise ValueError(
            f"the two results of {before.name} have no measurement in common; measure the same models, sizes and threads."
        )
    return common


def _line(change: Change) -> str:
    before, after = change.before, change.after
    share = 100 * change.worsening
    word = f"{share:.0f}% worse" if share > 0 else f"{-share:.0f}% better"
    unit, scale = ("x", 1.0) if before.is_ratio else (" ms", 1e3)
    values = " -> ".join(
        f"{scale * one.middle:.3g}{unit} ({scale * one.low:.3g} to {scale * one.high:.3g})" for one in (before, after)
    )
    return f"  {word:>12}  {values:<58}  {before.label}"


def report(before: Results, after: Results) -> str:
    """What changed beyond noise, for a person: ratios first, then times."""
    found = changes(before, after)
    lines = []
    for name in _SAME_MACHINE:
        one, other = before.environment.get(name), after.environment.get(name)
        if one != other:
            lines.append(f"{name}: {one} -> {other}; times are of different machines, ratios can be compared.")
    for is_ratio, title in ((True, "Ratios"), (False, "Times")):
        own = [change for change in found if change.before.is_ratio == is_ratio]
        moved = sorted((change for change in own if change.is_beyond_noise), key=lambda change: -change.worsening)
        lines.append(
            f"{title}: {len(moved)} of {len(own)} changed beyond noise (20th to 80th percentiles do not touch)."
        )
        lines += [_line(change) for change in moved]
    only = [len(set(quantities(one)) - set(quantities(other))) for one, other in ((before, after), (after, before))]
    if any(only):
        lines.append(f"Not in both: {only[0]} quantities of the first only, {only[1]} of the second only.")
    return "\n".join(lines)


def check(before: Results, after: Results, *, worse: float = WORSE) -> tuple[bool, str]:
    """Whether no stored ratio has worsened by more than ``worse``, and the sentences that say it.

    Raises:
        ValueError: the results have no ratio in common.
    """
    ratios = [change for change in changes(before, after) if change.before.is_ratio]
    # Over the floor of its own moment, a time means the same in both runs, whatever else the machine did in either.
    known = {change.before.label for change in ratios}
    replaced = {label.replace(_OVER_OWN, _OVER_BEST) for label in known if label.startswith(_OVER_OWN)}
    ratios = [change for change in ratios if change.before.label not in replaced]
    if not ratios:
        raise ValueError(f"the two results of {before.name} have no ratio in common, so there is nothing to check.")
    failed = sorted((change for change in ratios if change.worsening > worse), key=lambda change: -change.worsening)
    said = f"Check: {len(failed)} of {len(ratios)} stored ratios worsened by more than {100 * worse:g}%."
    return not failed, "\n".join([said, *(_line(change) for change in failed)])


def add_check_argument(parser: argparse.ArgumentParser) -> None:
    """The option ``--check`` of a benchmark; see :func:`checked`."""
    parser.add_argument(
        "--check", metavar="FILE", help="exit status 1 if a ratio is more than 15%% worse than in this earlier result"
    )


def checked(results: Results, earlier: Results | None) -> int:
    """Compare with an earlier result and say so; 1 if a ratio got worse, 0 if none did or there is nothing earlier."""
    if earlier is None:
        return 0
    passed, said = check(earlier, results)
    print(said)
    return int(not passed)
