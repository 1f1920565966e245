"""Does the memory stay sound over a long conversation? 1,000 memory updates with every kind of residual gate.

A short-term memory is rewritten after every turn, for as long as somebody talks; nothing ever resets it. Every gate that a
configuration can name is put into a memory attention of the shipped model's size, with random weights as before training, beside
its own trained one; all are given the same real dialogue, by the shipped encoder. Recorded are

    rms          root mean square of the memory
    largest      largest absolute value in it
    change       how much a turn rewrites: root mean square of the difference, over that of the memory
    saturated    share of gates that are shut or wide open: sigmoid below 0.01 or above 0.99, tanh beyond 0.99 on either side
    difference   numerical drift: from the same conversation in float64 by the definition, over the memory's root mean square

and the first turn after which a value is not finite. Nothing is timed. The first update of every gate is compared with the
definition in float64; one that differs is refused.

    rxt bench drift --json drift.json --plot drift.png
    rxt bench drift --short                                     # 100 turns
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from rxt_kernels.dispatch import available_backends, use_backend
from rxt_kernels.memory_update.reference import residual_gate_reference
from rxt_kernels.testing import error
from rxt_model.config import MemoryAttentionConfig
from rxt_model.demo_model import load_demo_model
from rxt_model.memory.memory_attention import ResidualGate
from rxt_model.memory_attention import RxTMemoryAttention
from rxt_model.models import ReactiveTransformer

from .dialogues import Turn, conversation_turns, long_conversation
from .environment import describe_environment, use_threads
from .results import Results, read_results, write_results
from .running import main as common_main

__all__ = ["GATES", "SHIPPED", "Settings", "add_arguments", "gate_openings", "main", "run"]

NAME = "drift"
SHIPPED = "shipped model"
GATES: Mapping[str, Mapping[str, Any]] = {
    "add": {"use_gated_residual": False},
    "replace": {"disable_residual": True, "use_gated_residual": False},
    **{
        f"{kind}, {activation}": {
            "use_gated_residual": True,
            "residual_gate_type": kind,
            "use_tanh_residual_gate": activation == "tanh",
        }
        for kind in ("static", "elementwise", "linear")
        for activation in ("sigmoid", "tanh")
    },
}
"""Kinds of residual gate (specification 2.10), as fields of a configuration."""

TOLERANCE = 1e-4
_MESSAGE_TOKENS = 22  # the mean message of the dialogue package
_SHUT = 0.01
_SAME_MACHINE = ("cpu", "threads", "torch", "rxt_kernels", "commit")


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        turns: of the conversation.
        seed: of weights, of the first memory, and of which conversation.
    """

    turns: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("turns", 4), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench drift``."""
    default = Settings()
    parser.add_argument("--turns", type=int, help=f"of the conversation (default: {default.turns}; short: 100)")
    parser.add_argument(
        "--gate", nargs="+", choices=(*GATES, SHIPPED), default=[*GATES, SHIPPED], metavar="GATE",
        help=f"kinds of gate: {'; '.join((*GATES, SHIPPED))} (default: every one)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, memory and conversation")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    parser.add_argument("--short", action="store_true", help="100 turns")
    parser.add_argument("--json", metavar="FILE", help="save the results, after every gate")
    parser.add_argument("--resume", action="store_true", help="leave out the gates that --json FILE has already")
    parser.add_argument("--plot", metavar="FILE", help="draw FILE.png and FILE-dark.png")


def recorded_turns(turns: int) -> list[int]:
    """Turns after which the memory is looked at: some early ones, then a hundred at equal distances.

    Example:
        >>> recorded_turns(300)[:7], recorded_turns(300)[-2:]
        ([1, 2, 3, 6, 9, 12, 15], [297, 300])
    """
    step = max(1, turns // 100)
    return sorted({1, 2, *range(step, turns + 1, step), turns})


def _main_gates(network: RxTMemoryAttention) -> list[ResidualGate]:
    """The gates of the memory write, a layer each."""
    return [cast(ResidualGate, gate) for gate in network.model.residual_gate_layers]


@contextmanager
def _main_gates_add(network: RxTMemoryAttention) -> Iterator[None]:
    """Makes the gates of the memory write add: the update is then what they would choose between, added up."""
    gates = _main_gates(network)
    kinds = [gate.kind for gate in gates]
    try:
        for gate in gates:
            gate.kind = "add"
        yield
    finally:
        for gate, kind in zip(gates, kinds, strict=True):
            gate.kind = kind


@torch.no_grad()
def gate_openings(network: RxTMemoryAttention, encoded: Tensor, memory: Tensor) -> Tensor | None:
    """How far the gates of the memory write open in an update: (L, B, S), or None if there are none.

    The opening G depends only on u, the sum of old and new memory. With u in the place of the old and 0 in that of the new
    memory a gate gives (1 - G) u, whatever its kind.
    """
    gates = _main_gates(network)
    if gates[0].kind in ("add", "replace"):
        return None
    with _main_gates_add(network):
        sums = network(encoded, None, memory)
    openings = []
    for gate, total in zip(gates, sums, strict=True):
        kept = residual_gate_reference(total, torch.zeros_like(total), gate.parameters_for_update())
        largest = total.abs().argmax(dim=-1, keepdim=True)
        openings.append((1 - kept.gather(-1, largest) / total.gather(-1, largest)).squeeze(-1))
    return torch.stack(openings)


def _is_saturated(openings: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return openings.abs() > 1 - _SHUT
    return (openings < _SHUT) | (openings > 1 - _SHUT)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt().item())


def _number(value: float) -> float | None:
    """A number for the file, which has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


class _Conversation:
    """What every memory hears: the turns as the encoder of the model gives them, each encoded once."""

    def __init__(self, model: ReactiveTransformer, turns: Sequence[Turn]) -> None:
        self._encoder = model.encoder
        self._turns = turns
        self._encoded: list[Tensor] = []

    @torch.no_grad()
    def encoded(self, number: int) -> Tensor:
        """States of every encoder layer after one turn, (L, 1, T, D)."""
        while len(self._encoded) <= number:
            turn = self._turns[len(self._encoded)]
            self._encoded.append(self._encoder(torch.tensor([[*turn.prompt, *turn.answer]])))
        return self._encoded[number]


def _turns(model: ReactiveTransformer, settings: Settings) -> list[Turn]:
    """The turns of a long conversation in this model's tokens and template."""
    messages, _ = long_conversation(settings.turns, settings.seed)
    return conversation_turns(
        messages, model.tokenizer, model.token_ids, settings.turns,
        lengths="equal", query_tokens=_MESSAGE_TOKENS, answer_tokens=_MESSAGE_TOKENS,
    )  # fmt: skip


def _network(config: MemoryAttentionConfig, fields: Mapping[str, Any], seed: int) -> RxTMemoryAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RxTMemoryAttention({**config.to_dict(), **fields}).eval()


@torch.no_grad()
def drift(
    network: RxTMemoryAttention, conversation: _Conversation, settings: Settings, progress: Any = None
) -> dict[str, Any]:
    """Hold the conversation; what is recorded of its memory.

    Raises:
        RuntimeError: the first update differs from its definition.
    """
    exact_network = copy.deepcopy(network).double()
    config = network.config
    shape = config.num_layers, 1, config.stm_size, config.embed_dim
    memory = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    exact = memory.double()
    wanted = set(recorded_turns(settings.turns))
    curves: dict[str, list[float | None]] = {
        name: [] for name in ("rms", "largest", "change", "saturated", "difference")
    }
    turns: list[int] = []
    first_not_finite: int | None = None
    for number in range(1, settings.turns + 1):
        encoded = conversation.encoded(number - 1)
        updated = network(encoded, None, memory)
        with use_backend("reference"):
            exact = exact_network(encoded.double(), None, exact)
        if number == 1 and not error(updated, exact) <= TOLERANCE:
            raise RuntimeError(
                f"the first update differs from its definition by {error(updated, exact):.2g} of the largest value (granted "
                f"is {TOLERANCE:g})."
            )
        if not torch.isfinite(updated).all():
            first_not_finite = number
            break
        if number in wanted:
            openings = gate_openings(network, encoded, memory)
            activation = _main_gates(network)[0].activation
            size = _rms(updated)
            turns.append(number)
            curves["rms"].append(_number(size))
            curves["largest"].append(_number(updated.abs().max().item()))
            curves["change"].append(_number(_rms(updated - memory) / max(_rms(memory), 1e-30)))
            curves["saturated"].append(
                None if openings is None else _number(_is_saturated(openings, activation).float().mean().item())
            )
            curves["difference"].append(_number(_rms(updated - exact) / max(_rms(exact), 1e-30)))
        memory = updated
        if progress is not None:
            progress.update()
    return {"turns": turns, **curves, "first_not_finite": first_not_finite}


def growth(turns: Sequence[int], rms: Sequence[float]) -> float | None:
    """The b of rms ~ turn^b over the later half, or None where there is no half.

    Example:
        >>> growth([1, 50, 100], [1.0, 5.0, 10.0])
        1.0
    """
    half = [at for at, turn in enumerate(turns) if 2 * turn <= turns[-1]] if turns else []
    if not half or min(rms[half[-1]], rms[-1]) <= 0:
        return None
    return math.log(rms[-1] / rms[half[-1]]) / math.log(turns[-1] / turns[half[-1]])


def _row(name: str, network: RxTMemoryAttention, recorded: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    config = network.config
    own = growth(recorded["turns"], recorded["rms"])
    return {
        "name": NAME,
        "model": SHIPPED if name == SHIPPED else "random weights",
        "gate": name,
        "backend": "native" if "native" in available_backends("memory_update") else "reference",
        "dtype": "float32",
        "shape": {
            "layers": config.num_layers, "slots": config.stm_size, "dim": config.embed_dim, "turns": settings.turns,
        },
        "kind": _kind(config),
        "growth": None if own is None else round(own, 3),
        **recorded,
    }  # fmt: skip


def _kind(config: MemoryAttentionConfig) -> str:
    if not config.use_gated_residual:
        return "replace" if config.disable_residual else "add"
    return f"{config.residual_gate_type}, {'tanh' if config.use_tanh_residual_gate else 'sigmoid'}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'gate':<32}{'turns':>6}{'rms: first':>12}{'last':>10}{'~ N^b':>8}{'largest':>10}{'change':>9}{'saturated':>11}"
        f"{'float32 - float64':>19}  {'not finite':>10}"
    ]
    for row in rows:
        name = row["gate"] if row["gate"] != SHIPPED else f"{SHIPPED} ({row['kind']})"
        if not row["turns"]:
            lines.append(f"{name:<32}{'':>96}  turn {row['first_not_finite']}")
            continue
        saturated = "none" if row["saturated"][-1] is None else f"{100 * row['saturated'][-1]:.1f}%"
        end = "never" if row["first_not_finite"] is None else f"turn {row['first_not_finite']}"
        bend = "" if row["growth"] is None else f"{row['growth']:.2f}"
        lines.append(
            f"{name:<32}{row['turns'][-1]:>6}{row['rms'][0]:>12.3g}{row['rms'][-1]:>10.3g}{bend:>8}{row['largest'][-1]:>10.3g}"
            f"{row['change'][-1]:>9.2g}{saturated:>11}{_shown(row['difference'][-1]):>19}  {end:>10}"
        )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _resumed(path: str, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of the file to continue.

    Raises:
        ValueError: they are of other settings or of another environment.
    """
    if not Path(path).is_file():
        return []
    found = read_results(path, name=NAME)
    for name, value in settings.items():
        if found.settings.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} = {found.settings.get(name)!r} and now it is {value!r}; write to another file."
            )
    for name in _SAME_MACHINE:
        if found.environment.get(name) != environment.get(name):
            raise ValueError(
                f"{path} was made with {name} = {found.environment.get(name)!r} and now it is {environment.get(name)!r}; "
                "write to another file."
            )
    return list(found.rows)


def run(arguments: argparse.Namespace) -> int:
    """Hold the conversations, print, save and draw; the exit status is 1 if a gate was refused, 130 if interrupted.

    Raises:
        ValueError, OSError: arguments that do not fit, before anything is run.
    """
    turns = arguments.turns if arguments.turns is not None else 100 if arguments.short else Settings.turns
    settings = Settings(turns, arguments.seed)
    if arguments.resume and arguments.json is None:
        raise ValueError("--resume is given without --json; name the file to continue.")
    if arguments.plot is not None:
        from .plotting import require_matplotlib

        require_matplotlib()
    use_threads(arguments.threads)
    environment = describe_environment()
    rows = _resumed(arguments.json, asdict(settings), environment) if arguments.resume else []
    results = Results(NAME, asdict(settings), environment, {}, rows)
    missing = [gate for gate in dict.fromkeys(arguments.gate) if gate not in {row["gate"] for row in rows}]
    refused: list[dict[str, str]] = []
    status = 0

    def save(*, complete: bool) -> None:
        results.rows, results.complete = rows, complete
        results.summary = {"refused": refused}
        if arguments.json is not None and rows:
            write_results(results, arguments.json)

    try:
        with tqdm(total=len(missing) * settings.turns, disable=None, unit="turn", leave=False) as progress:
            for gate, network, conversation in _networks(missing, settings):
                try:
                    recorded = drift(network, conversation, settings, progress)
                except RuntimeError as failure:
                    refused.append({"gate": gate, "reason": str(failure)})
                    continue
                rows.append(_row(gate, network, recorded, settings))
                save(complete=False)
    except KeyboardInterrupt:
        status = 130
    save(complete=status == 0 and not refused)
    for one in refused:
        print(f"refused: {one['gate']}: {one['reason']}")
    if not rows:
        print("Nothing was recorded.", file=sys.stderr)
        return status or 1
    print(_table(rows))
    if arguments.json is not None:
        print(f"Results: {arguments.json}")
    if arguments.plot is not None:
        from .plotting import plot_results

        print("Plots: " + ", ".join(str(path) for path in plot_results(results, arguments.plot)))
    return status or int(bool(refused))


def _networks(gates: Sequence[str], settings: Settings) -> Iterator[tuple[str, RxTMemoryAttention, _Conversation]]:
    """Every gate's network, and what it hears."""
    shipped = load_demo_model()
    heard = _Conversation(shipped, _turns(shipped, settings))
    for gate in gates:
        own = shipped.memory_attention
        yield gate, own if gate == SHIPPED else _network(own.config, GATES[gate], settings.seed), heard


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.drift``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
