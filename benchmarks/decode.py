"""How long does one more token take? From the last token to the choice of the next, everything included.

A message of 64 tokens has been read; then the same tokens are fed to everybody, one after the other, each step ending with
the greedy choice. Every row is a conversation of its own, with its own memory. The floor is what a step has to read once:
the weights that its tokens use (a row needs 4 experts of a layer, 32 rows nearly all), the keys and values of its
memory and of its message. ``weights_floor`` is that of the weights alone, and ``weights_ratio`` the ratio to it.

    rxt bench decode --json decode.json --plot decode.png
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rxt_model.interaction.sampling import most_likely

from .contenders import (
    COMPILED,
    ELEMENT_BYTES,
    NATIVE,
    NATIVE_ENGINE,
    Decoder,
    Models,
    compiled_decoder,
    definition,
    distinct_experts,
    module_decoder,
    native_decoder,
    torch_dtype,
)
from .costs import Work
from .measuring import REFERENCE, Case, System, Task
from .running import ALPHA, BETA, Options, add_common_arguments, run_benchmark
from .running import main as common_main
from .upstream import upstream_systems

__all__ = ["add_arguments", "main", "run"]

NAME = "decode"
PROMPT = 64
CHECKED = 4
"""Steps that are compared with the reference, behind the logits of the prompt."""
BEGINNING = 2
"""Steps at the beginning of a round that are not counted: they find the caches as the system before left them, and within an
answer every token comes right behind another."""
STEPS = 20
"""Steps of a round that are counted: with the beginning an answer of the mean length of real dialogue."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench decode``."""
    add_common_arguments(parser, models=(BETA, ALPHA), repeats=12)
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="conversations at once (default: 1 8 32)")
    parser.add_argument(
        "--slots", type=int, nargs="+", metavar="S", help="memory slots (default: the model's own, and 8192)"
    )


class _Steps:
    """Feeds a decoder; one call is one round."""

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        self._decoder = decoder
        self._prompt, self._rest = tokens[:, :PROMPT], list(tokens[:, PROMPT:].T.contiguous())
        self._next = 0

    def result(self) -> Tensor:
        """Logits (1 + CHECKED, B, V) in float32: behind the prompt, and behind the first tokens after it."""
        found = [self._decoder.prefill(self._prompt).float().clone()]
        found += [self._decoder.step(token).float().clone() for token in self._rest[:CHECKED]]
        self._next = CHECKED
        return torch.stack(found)

    def run(self) -> Sequence[float]:
        """Seconds of each counted step of a round."""
        end = self._next + BEGINNING + STEPS
        if end > len(self._rest):
            self._decoder.prefill(self._prompt)
            self._next, end = 0, BEGINNING + STEPS
        seconds = []
        for token in self._rest[self._next : end]:
            start = time.perf_counter()
            most_likely(self._decoder.step(token))
            seconds.append(time.perf_counter() - start)
        self._next = end
        return seconds[BEGINNING:]


def _task(make: Callable[[], Decoder], tokens: Tensor) -> Task:
    steps = _Steps(make(), tokens)
    return Task(steps.result, steps.run)


def _systems(models: Models, tokens: Tensor, memory: Tensor, options: Options) -> list[System]:
    def system(backend: str, dtype: str, make: Callable[[], Decoder]) -> System:
        return System(backend, dtype, partial(_task, make, tokens))

    capacity = tokens.shape[1]
    systems = [
        system(backend, dtype, partial(module_decoder, models, memory, backend, dtype, capacity))
        for backend in (REFERENCE, NATIVE)
        for dtype in ("float32", "bfloat16")
    ]
    systems += [
        system(NATIVE_ENGINE, dtype, partial(native_decoder, models, memory, dtype, capacity))
        for dtype in ("float32", "bfloat16", "int8")
    ]
    if not options.short:
        systems.append(system(COMPILED, "float32", partial(compiled_decoder, models, memory, capacity)))
    if memory.shape[1] == 1:
        systems += upstream_systems(models, NAME, tokens[:, : PROMPT + CHECKED], memory)
    return [one for one in systems if options.wants(one.backend, one.dtype)]


def _cases(
    batches: Sequence[int] | None, slots: Sequence[int] | None, options: Options, skip: Callable[[str], None]
) -> Iterator[Case]:
    for name in options.models:
        models = Models(name, options.seed)
        own = models.full.decoder.config.stm_size
        rows_wanted = batches or ((1,) if options.short else (1, 8, 32))
        slots_wanted = slots or ((own,) if options.short else (own, 8192))
        for rows in rows_wanted:
            for count in slots_wanted:
                if (reason := _too_large(models, rows, count)) is not None:
                    skip(f"{name}, {rows} conversations, {count} slots: {reason}")
                    continue
                for threads in options.threads:
                    yield _case(models, rows, count, threads, options)


def _too_large(models: Models, rows: int, slots: int) -> str | None:
    """Why memories of this size do not fit beside the weights, or None."""
    config = models.full.decoder.config
    one = config.num_layers * rows * slots * 4
    heads, head_dim = config.cross_attention_heads[1], config.head_dim
    # The memory itself, and its keys and values in float32 for up to four systems and in bfloat16 for three.
    needed = one * (1.5 * config.embed_dim + 5.5 * 2 * heads * head_dim) / 2**30
    free = _available_gigabytes()
    if free is None or needed < 0.8 * free:
        return None
    return f"its systems need about {needed:.1f} GiB together, and {free:.1f} are free."


def _available_gigabytes() -> float | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) / 2**20


def _case(models: Models, rows: int, slots: int, threads: int, options: Options) -> Case:
    length = PROMPT + CHECKED + (BEGINNING + STEPS) * (options.repeats + 1)
    length = min(
        length, models.full.decoder.config.seq_len
    )  # a round that would go beyond it begins behind the prompt again
    tokens, memory = models.tokens(rows, length), models.memory(rows, slots)
    end = PROMPT + CHECKED
    expected, chosen = definition(models.full.decoder, tokens[:, :end], memory, PROMPT - 1)
    counts = [distinct_experts([layer[:, at] for layer in chosen]) for at in range(PROMPT, end)]
    experts = round(sum(counts) / len(counts))
    context = (PROMPT + length) // 2

    def work(dtype: str) -> Work:
        return models.costs.decode_step(
            rows, context, slots, experts, ELEMENT_BYTES[dtype], torch_dtype(dtype).itemsize
        )

    return Case(
        name=NAME,
        model=models.name,
        threads=threads,
        shape={"batch": rows, "slots": slots, "context": context},
        expected=expected,
        work=work,
        systems=_systems(models, tokens, memory, options),
        weights=lambda dtype: models.costs.decode_weights(experts) * ELEMENT_BYTES[dtype],
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`."""
    for name, least in (("batch", 1), ("slots", 1)):
        for value in getattr(arguments, name) or ():
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
    cases = partial(_cases, arguments.batch, arguments.slots)
    return run_benchmark(NAME, arguments, cases, {"prompt": PROMPT})


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.decode``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
