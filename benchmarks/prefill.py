"""How long until the first token? A message is read, up to the logits behind its last token.

The memory's keys and values are there already: they are projected once per memory update. Only one position asks for the
vocabulary head. The floor is the arithmetic of the tokens and of attention over message and memory, or the reading of
every expert that a token chose, whichever takes longer.

    rxt bench prefill --json prefill.json --plot prefill.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rxt_kernels.dispatch import use_backend
from rxt_model.decoder import RxTDecoder

from .contenders import (
    COMPILED,
    ELEMENT_BYTES,
    NATIVE,
    NATIVE_ENGINE,
    Decoder,
    Models,
    compiled,
    definition,
    distinct_experts,
    module_decoder,
    native_decoder,
    token_counts,
    torch_dtype,
)
from .costs import Work
from .measuring import REFERENCE, Case, System, Task, timed
from .running import ALPHA, BETA, Options, add_common_arguments, run_benchmark
from .running import main as common_main
from .upstream import upstream_systems

__all__ = ["add_arguments", "main", "run"]

NAME = "prefill"
DEFAULT_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench prefill``."""
    add_common_arguments(parser, models=(BETA, ALPHA), repeats=8)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="T",
        help="tokens of the message (default: 512, at most what a model takes)",
    )


def _decoder_task(make: Callable[[], Decoder], tokens: Tensor) -> Task:
    decoder = make()
    return Task(lambda: decoder.prefill(tokens).float().clone(), timed(lambda: decoder.prefill(tokens)))


def _compiled_task(decoder: RxTDecoder, tokens: Tensor, memory: Tensor) -> Task:
    """The modules from tokens to logits as one compiled function, without a cache to fill."""
    with torch.no_grad(), use_backend(REFERENCE):
        projected = decoder.project_memory(memory)
    read = compiled(lambda ids: decoder.logits(decoder.hidden_states(ids, None, projected).hidden[:, -1]))

    @torch.no_grad()
    def work() -> Tensor:
        with use_backend(REFERENCE):
            result: Tensor = read(tokens)
            return result

    return Task(lambda: work().clone(), timed(work))


def _systems(models: Models, tokens: Tensor, memory: Tensor, options: Options) -> list[System]:
    capacity = tokens.shape[1]
    systems = [
        System(
            backend,
            dtype,
            partial(_decoder_task, partial(module_decoder, models, memory, backend, dtype, capacity), tokens),
        )
        for backend in (REFERENCE, NATIVE)
        for dtype in ("float32", "bfloat16")
    ]
    systems += [
        System(
            NATIVE_ENGINE,
            dtype,
            partial(_decoder_task, partial(native_decoder, models, memory, dtype, capacity), tokens),
        )
        for dtype in ("float32", "bfloat16", "int8")
    ]
    if not options.short:
        systems.append(System(COMPILED, "float32", partial(_compiled_task, models.full.decoder, tokens, memory)))
    systems += upstream_systems(models, NAME, tokens, memory)
    return [one for one in systems if options.wants(one.backend, one.dtype)]


def _cases(tokens: Sequence[int] | None, options: Options, skip: Callable[[str], None]) -> Iterator[Case]:
    for name in options.models:
        models = Models(name, options.seed)
        limit = models.full.decoder.config.seq_len
        for count in token_counts(name, tokens, DEFAULT_TOKENS, limit, skip):
            ids, memory = models.tokens(1, count), models.memory(1, models.full.decoder.config.stm_size)
            expected, chosen = definition(models.full.decoder, ids, memory, count - 1)
            for threads in options.threads:
                yield _case(models, ids, memory, expected[0], distinct_experts(chosen), threads, options)


def _case(
    models: Models, ids: Tensor, memory: Tensor, expected: Tensor, experts: int, threads: int, options: Options
) -> Case:
    tokens, slots = ids.shape[1], memory.shape[2]

    def work(dtype: str) -> Work:
        return models.costs.prefill(tokens, slots, experts, ELEMENT_BYTES[dtype], torch_dtype(dtype).itemsize)

    return Case(
        name=NAME,
        model=models.name,
        threads=threads,
        shape={"batch": 1, "tokens": tokens, "slots": slots},
        expected=expected,
        work=work,
        systems=_systems(models, ids, memory, options),
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`."""
    return run_benchmark(NAME, arguments, partial(_cases, arguments.tokens), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.prefill``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
