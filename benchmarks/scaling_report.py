"""What the measurements of :mod:`.scaling` say: rows for the file, conclusions, a table and plain sentences.

Everything is computed from the rows, so a saved result gives the same report again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from rxt_model.models import ReactiveTransformer
from rxt_model.presets import parameter_counts

from .dialogue_steps import prompt_latency, text_of_steps
from .dialogues import Turn
from .growth import cost_growth, text_of_growth
from .results import Results
from .statistics import (
    Estimate,
    exponent,
    mean_with_interval,
    overtaking_turn,
    percentiles,
    running_median,
)
from .systems import System, TurnTimes

__all__ = ["TITLES", "Samples", "make_rows", "parameters", "samples_of_rows", "summarise", "text_report"]

Samples = dict[str, list[list[TurnTimes]]]
"""System name to a list per turn of one :class:`TurnTimes` per repeat."""

RXT, REREAD, CACHED = "rxt", "stateless-reread", "stateless-cached"
TITLES = {
    RXT: "RxT",
    REREAD: "LLM, history re-read",
    CACHED: "LLM, KV cache kept",
    "smollm2-reread": "SmolLM2, history re-read",
    "smollm2-cached": "SmolLM2, KV cache kept",
}
_IN_SENTENCES = {
    REREAD: "the LLM that re-reads its history",
    CACHED: "the LLM that keeps its KV cache",
}
_TIMES = ("first_token", "latency", "memory_update")
_ARITHMETIC_HORIZON = 10_000  # turns that operations are counted for; counting is cheap
_SMOOTHED_TURNS = 5


def parameters(model: ReactiveTransformer, stateless: nn.Module) -> dict[str, Any]:
    """Parameters of both models; shared ones count once in a total."""
    full, other = parameter_counts(model), parameter_counts(stateless)
    parts = {f"rxt_{name}": counts.total for name, counts in full.parts.items()}
    return {
        "rxt": full.total,
        **parts,
        "rxt_decoder_active": full.parts["decoder"].active,
        "stateless": other.total,
        "stateless_active": other.active,
    }


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 9) for name, value in percentiles(samples)._asdict().items()}


def _middle(values: Sequence[int]) -> int:
    return int(np.median(values))


def make_rows(
    systems: Sequence[System], conversations: Sequence[Sequence[Turn]], samples: Samples, *, backend: str
) -> list[dict[str, Any]]:
    """One row per system and turn; ``p20``, ``p50`` and ``p80`` are of the latency, over repeats."""
    turns = len(next(iter(samples.values())))
    # Histories, costs and counts follow from the tokens of each repeat.
    before = [np.cumsum([0, *(turn.tokens for turn in conversation)]) for conversation in conversations]
    rows = []
    for system in systems:
        cumulative = [0.0] * len(conversations)
        for number in range(turns):
            # A turn that was interrupted may have been counted for some of the systems only.
            repeats = min(len(samples[other.name][number]) for other in systems)
            if repeats == 0:
                break
            times = samples[system.name][number][:repeats]
            pairs = [(conversations[repeat][number], int(before[repeat][number])) for repeat in range(repeats)]
            for repeat, one in enumerate(times):
                cumulative[repeat] += one.latency + one.memory_update
            flops = [system.flops(turn, history) for turn, history in pairs]
            rows.append(
                {
                    "name": system.name,
                    "turn": number + 1,
                    "backend": system.backend or backend,
                    "dtype": system.dtype,
                    "shape": {
                        "batch": 1,
                        "history": _middle([history for _, history in pairs]),
                        "prompt": _middle([len(turn.prompt) for turn, _ in pairs]),
                        "answer": _middle([len(turn.answer) for turn, _ in pairs]),
                    },
                    **_spread([one.latency for one in times]),
                    "first_token": _spread([one.first_token for one in times]),
                    "memory_update": _spread([one.memory_update for one in times]),
                    "cumulative": _spread(cumulative[:repeats]),
                    "state_bytes": _middle([one.state_bytes for one in times]),
                    "tokens_processed": _middle([system.tokens_processed(turn, history) for turn, history in pairs]),
                    "answer_flops": _middle([answer for answer, _ in flops]),
                    "memory_update_flops": _middle([update for _, update in flops]),
                    "samples": {
                        **{name: [round(getattr(one, name), 9) for one in times] for name in _TIMES},
                        "state_bytes": [one.state_bytes for one in times],
                    },
                }
            )
    return rows


def samples_of_rows(rows: Sequence[Mapping[str, Any]], empty: Samples) -> tuple[Samples, int]:
    """The samples of all repeats that were finished, and how many those are.

    Args:
        rows: of a saved result.
        empty: the samples of a run that has not begun.
    """
    turns = len(next(iter(empty.values())))
    samples: Samples = {name: [[] for _ in range(turns)] for name in empty}
    for row in rows:
        kept = row["samples"]
        samples[row["name"]][row["turn"] - 1] = [
            TurnTimes(*times) for times in zip(*(kept[name] for name in (*_TIMES, "state_bytes")), strict=True)
        ]
    done = min(len(of_turn[-1]) for of_turn in samples.values())
    return {name: [times[:done] for times in of_turn] for name, of_turn in samples.items()}, done


class _Curves:
    """Costs by repeat and turn, (repeats, turns), of the repeats that got as far as any did."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        self.rows = [row for row in rows if row["name"] == name]
        repeats = len(self.rows[-1]["samples"]["latency"])

        def curve(key: str) -> np.ndarray:
            return np.array([row["samples"][key][:repeats] for row in self.rows]).T

        self.latency = curve("latency")
        self.memory_update = curve("memory_update")
        self.first_token = curve("first_token")
        self.state_bytes = curve("state_bytes").astype(float)
        self.cumulative = np.cumsum(self.latency + self.memory_update, axis=1)

    @property
    def repeats(self) -> int:
        return int(self.latency.shape[0])

    @property
    def turns(self) -> int:
        return int(self.latency.shape[1])


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in estimate._asdict().items()}


def _exponents(curves: _Curves) -> dict[str, Any] | None:
    if curves.turns < 8:  # fewer than four turns in the upper half say nothing
        return None
    per_turn = curves.latency + curves.memory_update
    return {
        "latency_per_turn": _estimate(mean_with_interval([exponent(row.tolist()) for row in curves.latency])),
        "cost_per_turn": _estimate(mean_with_interval([exponent(row.tolist()) for row in per_turn])),
        "cumulative_cost": _estimate(mean_with_interval([exponent(row.tolist()) for row in curves.cumulative])),
    }


def _late_over_early(curves: _Curves) -> dict[str, float | None]:
    """Latency of the last turns over that of turns 2 to 6: 1 for a cost that does not grow."""
    early = np.median(curves.latency[:, 1 : 1 + _SMOOTHED_TURNS], axis=1)
    late = np.median(curves.latency[:, -_SMOOTHED_TURNS:], axis=1)
    return _estimate(mean_with_interval((late / early).tolist()))


def _significant(value: float) -> float:
    # Ratios span from a few bytes against megabytes to the reverse: decimals would lose the small ones.
    return float(f"{value:.5g}")


def _overtaking(ours: _Curves, other: _Curves, measure: str, against: str) -> dict[str, Any]:
    """Whether RxT ends ahead, and from which turn on: the ratio of the other's cost to RxT's, turn by turn.

    Ahead, or behind, means that at least four of five paired measurements at the end say so; otherwise they are level.
    """
    by_repeat = getattr(other, measure) / getattr(ours, measure)
    by_turn = np.median(by_repeat, axis=0).tolist()
    is_noisy = measure in ("latency", "first_token")
    last_turns = min(ours.turns, max(_SMOOTHED_TURNS, ours.turns // 8)) if is_noisy else 1
    if is_noisy:
        by_turn = running_median(by_turn, _SMOOTHED_TURNS)
    end = percentiles(by_repeat[:, -last_turns:].ravel().tolist())
    verdict = "ahead" if end.p20 > 1 else "behind" if end.p80 < 1 else "level"
    found = {
        "measure": measure,
        "against": against,
        "verdict": verdict,
        "turn": overtaking_turn(by_turn) if verdict == "ahead" else None,
        "turns_measured": ours.turns,
        "ratio_at_first_turn": _significant(by_turn[0]),
        "ratio_at_end": {name: _significant(value) for name, value in end._asdict().items()},
        "turns_at_end": last_turns,
    }
    return {**found, "sentence": _sentence(found)}


_SUBJECTS = {
    "first_token": "waiting for the first token",
    "latency": "waiting for the whole answer",
    "cumulative": "computing, memory updates included",
    "state_bytes": "state kept between turns",
}
_ADVANTAGE = {
    "latency": ("times as fast", "times as long"),
    "first_token": ("times as fast", "times as long"),
    "cumulative": ("times as cheap", "times as much"),
    "state_bytes": ("times as small", "times as much"),
}


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _verdict(found: Mapping[str, Any]) -> str:
    """What is said of RxT, without naming what it is compared with."""
    better, worse = _ADVANTAGE[found["measure"]]
    turn, last = found["turn"], found["turns_measured"]
    end, start = found["ratio_at_end"], found["ratio_at_first_turn"]
    where = f"at turn {last}" if found["turns_at_end"] == 1 else f"over the last {found['turns_at_end']} turns"
    beginning = f"{_factor(1 / start)} {worse}" if start <= 1 else f"{_factor(start)} {better}"
    if found["verdict"] == "level":
        return f"level within the noise {where}, ratio {end['p20']:.2f} to {end['p80']:.2f} (turn 1: {beginning})"
    if found["verdict"] == "behind":
        return f"behind, not overtaking within {last} turns; {_factor(1 / end['p50'])} {worse} {where} (turn 1: {beginning})"
    ahead = f"{_factor(end['p50'])} {better} {where}"
    if turn == 1:
        return f"ahead from the first turn on; {ahead}"
    return f"ahead from turn {turn} on; {ahead} (turn 1: {beginning})" if turn else f"ahead at the very end; {ahead}"


def _sentence(found: Mapping[str, Any]) -> str:
    subject = _SUBJECTS[found["measure"]]
    return f"{subject[0].upper()}{subject[1:]}, RxT against {_IN_SENTENCES[found['against']]}: {_verdict(found)}."


def _arithmetic(systems: Sequence[System], shape: Mapping[str, int]) -> list[dict[str, Any]]:
    """The same question for counted operations, far beyond the measured turns, at one turn size."""
    turn = Turn((0,) * shape["prompt"], (0,) * shape["answer"])
    ours = next(system for system in systems if system.name == RXT)
    found = []
    for other in systems:
        if other.name not in (REREAD, CACHED):
            continue
        turns: dict[str, int | None] = {"answer": None, "cumulative": None}
        own_total = other_total = 0
        for number in range(_ARITHMETIC_HORIZON):
            own, theirs = ours.flops(turn, number * turn.tokens), other.flops(turn, number * turn.tokens)
            own_total, other_total = own_total + sum(own), other_total + sum(theirs)
            if turns["answer"] is None and own[0] < theirs[0]:
                turns["answer"] = number + 1
            if own_total < other_total:
                turns["cumulative"] = number + 1
                break
        found.append(
            {"against": other.name, "answer_turn": turns["answer"], "cumulative_turn": turns["cumulative"],
             "turns_counted": _ARITHMETIC_HORIZON}
        )  # fmt: skip
    return found


def _against_limits(curves: _Curves, system: System, limits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """How far the last turn is from what the machine could do: bytes to be read, and operations to be done."""
    shape = curves.rows[-1]["shape"]
    steps = shape["answer"] - 1
    per_token = float(np.median((curves.latency - curves.first_token)[:, -1])) / steps
    context = shape["prompt"] + shape["answer"] // 2 + (0 if system.name == RXT else shape["history"])
    floors = {"decode_token": (per_token, system.bytes_per_step(context) / limits["read_bandwidth_bytes_per_second"])}
    update = float(np.median(curves.memory_update[:, -1]))
    if update > 0:
        floors["memory_update"] = update, curves.rows[-1]["memory_update_flops"] / limits["fma_flops_per_second"]
    return {
        name: {"seconds": round(seconds, 9), "floor_seconds": round(floor, 9), "ratio": round(seconds / floor, 3)}
        for name, (seconds, floor) in floors.items()
    }


def summarise(results: Results, systems: Sequence[System]) -> dict[str, Any]:
    """Exponents, overtaking turns and distances from the machine's limits."""
    curves = {system.name: _Curves(results.rows, system.name) for system in systems}
    ours = curves[RXT]
    by_system = {
        name: {
            "latency_first_turn_p50": of.rows[0]["p50"],
            "latency_last_turn_p50": of.rows[-1]["p50"],
            "latency_last_over_early_turns": _late_over_early(of),
            "memory_update_last_turn_p50": of.rows[-1]["memory_update"]["p50"],
            "cumulative_p50": of.rows[-1]["cumulative"]["p50"],
            "tokens_processed": sum(row["tokens_processed"] for row in of.rows),
            "flops": sum(row["answer_flops"] + row["memory_update_flops"] for row in of.rows),
            "state_bytes_last_turn": of.rows[-1]["state_bytes"],
            "exponents": _exponents(of),
            "against_limits": _against_limits(of, next(s for s in systems if s.name == name), results.limits),
        }
        for name, of in curves.items()
    }
    return {
        "turns_measured": ours.turns,
        "repeats_measured": ours.repeats,
        "systems": by_system,
        "overtaking": [
            _overtaking(ours, curves[against], measure, against)
            for measure in _SUBJECTS
            for against in (REREAD, CACHED)
        ],
        "overtaking_by_arithmetic": _arithmetic(systems, ours.rows[-1]["shape"]),
        "prompt_latency_by_step": prompt_latency(results.rows),
        "cost_growth": cost_growth(results.rows),
    }


# the report in words


def _shown_turns(turns: int) -> list[int]:
    shown = [1 << power for power in range(turns.bit_length()) if 1 << power <= turns]
    return shown if shown[-1] == turns else [*shown, turns]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by_key = {(row["name"], row["turn"]): row for row in rows}
    turns = max(row["turn"] for row in rows)
    header = ("turn", "history", "RxT", "+ update", "re-read", "cached", "RxT", "re-read", "cached", "RxT", "cached")
    table: list[tuple[str, ...]] = [header]
    for turn in _shown_turns(turns):
        ours, reread, cached = (by_key[name, turn] for name in (RXT, REREAD, CACHED))
        table.append(
            (
                str(turn),
                str(ours["shape"]["history"]),
                *(_milliseconds(seconds) for seconds in (
                    ours["p50"], ours["memory_update"]["p50"], reread["p50"], cached["p50"],
                )),
                *(f"{row['cumulative']['p50']:.2f}" for row in (ours, reread, cached)),
                *(_bytes(row["state_bytes"]) for row in (ours, cached)),
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    widths = [max(width, 8) if column > 1 else width for column, width in enumerate(widths)]

    def group(first: int, last: int) -> int:
        return sum(widths[first:last]) + 2 * (last - first - 1)

    title = "  ".join(
        (
            " " * group(0, 2),
            "answer, ms".center(group(2, 6), "-"),
            "everything so far, s".center(group(6, 9), "-"),
            "state kept".center(group(9, 11), "-"),
        )
    )
    return [title, *("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in table)]


def _with_interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def _arithmetic_verdict(found: Mapping[str, Any]) -> str:
    def when(turn: int | None) -> str:
        return f"behind for {found['turns_counted']} turns" if turn is None else f"ahead from turn {turn} on"

    return f"answer {when(found['answer_turn'])}; conversation with updates {when(found['cumulative_turn'])}"


def _comparison(summary: Mapping[str, Any], against: str) -> list[str]:
    """Everything that is said about RxT and one other system."""
    lines = [
        (_SUBJECTS[found["measure"]], _verdict(found)) for found in summary["overtaking"] if found["against"] == against
    ]
    lines += [
        ("counted operations", _arithmetic_verdict(found))
        for found in summary["overtaking_by_arithmetic"]
        if found["against"] == against
    ]
    return [f"RxT against {_IN_SENTENCES[against]}:", *(f"  {subject:<35} {said}" for subject, said in lines), ""]


def _decoding(sentences: Mapping[str, str]) -> list[str]:
    """How answers are decoded, once if all systems say the same."""
    if len(set(sentences.values())) == 1:
        return [f"All systems: {next(iter(sentences.values()))}"]
    own = {name: sentence for name, sentence in sentences.items() if not name.startswith("smollm2")}
    others = [f"SmolLM2: {sentence}" for name, sentence in sentences.items() if name == "smollm2-cached"]
    if others:
        return [*_decoding(own), *others]
    return [f"{TITLES[name]}: {sentence}" for name, sentence in sentences.items()]


def text_report(results: Results, systems: Sequence[System]) -> str:
    """The table and the conclusions, for a terminal."""
    summary, environment, limits = results.summary, results.environment, results.limits
    counts, threads, repeats = summary["parameters"], environment["threads"], summary["repeats_measured"]
    lines = [
        f"{results.settings['model']} ({counts['rxt'] / 1e6:.1f} M parameters, decoder "
        f"{counts['rxt_decoder'] / 1e6:.1f} M) and a stateless LLM of its width and depth "
        f"({counts['stateless'] / 1e6:.1f} M), float32",
        f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}, torch {environment['torch']}, load average "
        f"{environment['load_average']} before; reads {limits['read_bandwidth_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"multiplies {limits['fma_flops_per_second'] / 1e9:.0f} GFLOP/s",
        f"{results.settings['dialogues']}, {repeats} conversation{'s' if repeats > 1 else ''} of "
        f"{summary['turns_measured']} turns; medians",
        *_decoding(summary["decoding"]),
        "",
        *_table(results.rows),
        "",
    ]
    operations = {name: of["flops"] for name, of in summary["systems"].items()}
    lines.append(
        "Operations of the whole conversation, the proxy of its energy: "
        + ", ".join(f"{TITLES[name]} {count / 1e9:,.0f} GFLOP" for name, count in operations.items())
        + "."
    )
    exponents = {name: of["exponents"] for name, of in summary["systems"].items()}
    if all(exponents.values()):
        lines.append("Cost ~ N^b over the later half of the turns (95% interval over conversations):")
        for system in systems:
            of = exponents[system.name]
            lines.append(
                f"  {TITLES[system.name]:<22} each turn b = {_with_interval(of['cost_per_turn'])}, conversation "
                f"b = {_with_interval(of['cumulative_cost'])}"
            )
    flat = summary["systems"][RXT]["latency_last_over_early_turns"]
    ours = summary["systems"][RXT]["against_limits"]
    lines += [
        f"RxT's last turns take {_with_interval(flat)} times as long as its first ones (turns 2 to 6).",
        "",
        *text_of_steps(summary["prompt_latency_by_step"], TITLES),
        *(
            text_of_growth(growth, _shown_turns(summary["turns_measured"]))
            if (growth := summary["cost_growth"])
            else []
        ),
        *_comparison(summary, REREAD),
        *_comparison(summary, CACHED),
        f"Against this machine's limits, RxT takes {ours['decode_token']['ratio']:.1f} times as long as reading its weights "
        f"for a token,\nand {ours['memory_update']['ratio']:.1f} times as long as the arithmetic of a memory update.",
    ]
    return "\n".join(lines)
