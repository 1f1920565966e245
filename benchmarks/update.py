"""How long does a memory update take? A whole interaction is encoded and written into every layer of short-term memory.

The floor is the arithmetic of encoder and memory attention; exponentials, of which there are millions, are left out of it.

    rxt bench update --json update.json --plot update.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rxt_kernels.dispatch import use_backend
from rxt_model.interaction.encoding import encode
from rxt_model.models import ReactiveTransformer
from rxt_model.presets import parameter_counts

from .contenders import COMPILED, NATIVE, Models, compiled, needs_backend, token_counts, torch_dtype
from .costs import Work
from .measuring import REFERENCE, Case, System, Task, timed
from .running import ALPHA, BETA, Options, add_common_arguments, run_benchmark
from .running import main as common_main
from .upstream import upstream_systems

__all__ = ["add_arguments", "main", "run"]

NAME = "update"
DEFAULT_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench update``."""
    add_common_arguments(parser, models=(BETA, ALPHA), repeats=8)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="T",
        help="tokens of the interaction (default: 1024, at most what a model takes)",
    )


def _written(model: ReactiveTransformer, tokens: Tensor, memory: Tensor, *, as_talking: bool = False) -> Tensor:
    """The memory (L, 1, S, D) after an interaction, encoded by modules or as a conversation does it."""
    encoded = encode(model.encoder, tokens) if as_talking else model.encoder(tokens)
    updated: Tensor = model.memory_attention(encoded, None, memory)
    return updated


def _task(models: Models, tokens: Tensor, memory: Tensor, backend: str, dtype: str) -> Task:
    needs_backend(backend, dtype)
    kind = torch_dtype(dtype)
    model, own = models.of(kind), memory.to(kind)
    write: Callable[[], Tensor] = partial(_written, model, tokens, own, as_talking=backend == NATIVE)
    if backend == COMPILED:
        write = compiled(write)

    @torch.no_grad()
    def work() -> Tensor:
        with use_backend(NATIVE if backend == NATIVE else REFERENCE):
            return write()

    return Task(lambda: work().float().clone(), timed(work))


def _systems(models: Models, tokens: Tensor, memory: Tensor, options: Options) -> list[System]:
    systems = [
        System(backend, dtype, partial(_task, models, tokens, memory, backend, dtype))
        for backend in (REFERENCE, NATIVE)
        for dtype in ("float32", "bfloat16")
    ]
    if not options.short:
        systems.append(System(COMPILED, "float32", partial(_task, models, tokens, memory, COMPILED, "float32")))
    systems += upstream_systems(models, NAME, tokens, memory)
    return [one for one in systems if options.wants(one.backend, one.dtype)]


def _cases(tokens: Sequence[int] | None, options: Options, skip: Callable[[str], None]) -> Iterator[Case]:
    for name in options.models:
        models = Models(name, options.seed)
        encoder, attention = models.full.encoder, models.full.memory_attention
        slots = attention.config.stm_size
        embedding = encoder.model.embedding.weight.numel()
        parameters = parameter_counts(encoder).total - embedding + parameter_counts(attention).total
        for count in token_counts(name, tokens, DEFAULT_TOKENS, encoder.config.seq_len, skip):
            ids, memory = models.tokens(1, count), models.memory(1, slots)
            with torch.no_grad(), use_backend(REFERENCE):
                expected = _written(models.full, ids, memory)
            read = parameters + memory.numel() + count * encoder.config.embed_dim
            flops = models.costs.memory_update(count)
            for threads in options.threads:
                yield Case(
                    name=NAME,
                    model=name,
                    threads=threads,
                    shape={"batch": 1, "tokens": count, "slots": slots},
                    expected=expected,
                    work=partial(_work, read, flops),
                    systems=_systems(models, ids, memory, options),
                )


def _work(values: int, flops: int, dtype: str) -> Work:
    return Work(values * torch_dtype(dtype).itemsize, flops)


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`."""
    return run_benchmark(NAME, arguments, partial(_cases, arguments.tokens), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.update``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
