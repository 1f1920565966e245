"""How fast is one layer of experts? Router, dispatch, gated experts and combination, at one token and at many.

Beside the native backend stand the ways in which it is commonly done with torch:

    reference    the loop over the experts that have tokens
    padded bmm   every expert's tokens padded to the longest list, one batched product per matrix
    grouped_mm   tokens sorted by expert, torch's own grouped product

A model has as many of these layers as it has, up to half a gigabyte, and they take turns: in decoding, too, a layer's weights
have left the caches when its next token comes. All systems read the same stacked weights. The floor is the reading of the
experts that were chosen, each once, or the arithmetic of the tokens.

    rxt bench moe --json moe.json --plot moe.png
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels import mixture_of_experts, route
from rxt_kernels.dispatch import available_backends, explain
from rxt_model.config import TransformerConfig
from rxt_model.presets import preset

from .contenders import COMPILED, NATIVE, compiled, distinct_experts, token_counts, torch_dtype
from .costs import Work, mixture_of_experts_work
from .measuring import REFERENCE, Absent, Case, System, Task, timed
from .running import ALPHA, BETA, Options, add_common_arguments, run_benchmark
from .running import main as common_main

__all__ = ["Layer", "add_arguments", "grouped", "main", "padded", "run"]

NAME = "moe"
PADDED, GROUPED = "padded bmm", "grouped_mm"
DEFAULT_TOKENS = (1, 64, 1024)
_MOST_BYTES = 1 << 29
_MOST_TOKENS = 1 << 20


class Layer(NamedTuple):
    """A layer of E gated experts, stacked, and the tokens it is given."""

    x: Tensor
    """(N, D)."""
    router: Tensor
    """(E, D)."""
    w1: Tensor
    """(E, D, 2F), linear half first."""
    w2: Tensor
    """(E, F, D)."""
    b1: Tensor
    """(E, 2F)."""
    b2: Tensor
    """(E, D)."""

    def to(self, dtype: torch.dtype) -> Layer:
        """The layer in another dtype."""
        return Layer(*(tensor.to(dtype) for tensor in self))


def by_operation(layer: Layer, top_k: int, backend: str) -> Tensor:
    """The package's own operation on a backend, (N, D)."""
    return mixture_of_experts(
        layer.x, layer.router, layer.w1, layer.w2, top_k=top_k, b1=layer.b1, b2=layer.b2, backend=backend
    ).output


def _gated(hidden: Tensor) -> Tensor:
    linear, gate = hidden.chunk(2, dim=-1)
    return linear * F.silu(gate)


def _combined(results: Tensor, back: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (N * K, D) sorted by expert, summed per token with their routing weights (N, K)."""
    columns = results.index_select(0, back).unflatten(0, tuple(weights.shape))
    return (columns.float() * weights[..., None]).sum(1).to(dtype)


def _sorted(experts: Tensor) -> tuple[Tensor, Tensor]:
    """The choices (N, K), flattened, expert by expert: their order, and where each of them went."""
    order = experts.flatten().argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    return order, back


def padded(layer: Layer, top_k: int) -> Tensor:
    """Batched products over tokens padded to the longest list, (N, D)."""
    routing = route(layer.x, layer.router, top_k)
    order, back = _sorted(routing.experts)
    expert = routing.experts.flatten()[order]
    counts = torch.bincount(expert, minlength=layer.router.shape[0])
    place = torch.arange(order.numel()) - (counts.cumsum(0) - counts)[expert]
    tokens = layer.x.new_zeros(counts.numel(), int(counts.max()), layer.x.shape[1])
    tokens[expert, place] = layer.x[order // top_k]
    hidden = torch.baddbmm(layer.b1[:, None], tokens, layer.w1)
    results = torch.baddbmm(layer.b2[:, None], _gated(hidden), layer.w2)
    return _combined(results[expert, place], back, routing.weights, layer.x.dtype)


def grouped(layer: Layer, top_k: int) -> Tensor:
    """Torch's grouped product over tokens sorted by expert, (N, D)."""
    routing = route(layer.x, layer.router, top_k)
    order, back = _sorted(routing.experts)
    expert = routing.experts.flatten()[order]
    ends = torch.bincount(expert, minlength=layer.router.shape[0]).cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(layer.x[order // top_k], layer.w1, offs=ends) + layer.b1[expert]
    results = F.grouped_mm(_gated(hidden), layer.w2, offs=ends) + layer.b2[expert]
    return _combined(results, back, routing.weights, layer.x.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench moe``."""
    add_common_arguments(parser, models=(BETA, ALPHA), repeats=20)
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="(default: 1 64 1024; short: 64)")


def make_layers(config: TransformerConfig, tokens: int, generator: torch.Generator) -> list[Layer]:
    """Random layers of a decoder's sizes, fewer than it has if they are large."""
    dim, hidden, experts = config.embed_dim, config.ff_dim, config.num_experts

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def layer() -> Layer:
        return Layer(
            draw(tokens, dim, scale=1.0), draw(experts, dim, scale=dim**-0.5),
            draw(experts, dim, 2 * hidden, scale=dim**-0.5), draw(experts, hidden, dim, scale=hidden**-0.5),
            draw(experts, 2 * hidden, scale=0.1), draw(experts, dim, scale=0.1),
        )  # fmt: skip

    first = layer()
    size = 4 * sum(weights.numel() for weights in first[1:])
    return [first, *(layer() for _ in range(min(config.num_layers, max(1, _MOST_BYTES // size)) - 1))]


def _task(layers: Sequence[Layer], dtype: str, compute: Callable[[Layer], Tensor]) -> Task:
    own = [layer.to(torch_dtype(dtype)) for layer in layers]
    turns = itertools.cycle(own)

    @torch.no_grad()
    def work() -> Tensor:
        return compute(next(turns))

    @torch.no_grad()
    def result() -> Tensor:
        return torch.stack([compute(layer) for layer in own]).float()

    return Task(result, timed(work))


def _native_task(layers: Sequence[Layer], dtype: str, top_k: int) -> Task:
    if "native" not in available_backends("mixture_of_experts"):
        raise Absent(explain("mixture_of_experts", "native"))
    return _task(layers, dtype, partial(by_operation, top_k=top_k, backend="native"))


def _grouped_task(layers: Sequence[Layer], dtype: str, top_k: int) -> Task:
    if not hasattr(F, "grouped_mm"):
        raise Absent("this build of torch has no torch.nn.functional.grouped_mm.")
    rows = (layers[0].x.shape[1], layers[0].w2.shape[1], layers[0].w1.shape[2])
    if any(width * torch_dtype(dtype).itemsize % 16 for width in rows):
        raise Absent("torch's grouped product takes rows of a multiple of 16 bytes, and these are not.")
    return _task(layers, dtype, partial(grouped, top_k=top_k))


def _compiled_task(layers: Sequence[Layer], dtype: str, top_k: int) -> Task:
    return _task(layers, dtype, compiled(partial(by_operation, top_k=top_k, backend=REFERENCE)))


def _systems(layers: Sequence[Layer], top_k: int, options: Options) -> list[System]:
    dtypes = ("float32", "bfloat16")
    loop = partial(by_operation, top_k=top_k, backend=REFERENCE)
    systems = [System(REFERENCE, dtype, partial(_task, layers, dtype, loop)) for dtype in dtypes]
    systems += [System(NATIVE, dtype, partial(_native_task, layers, dtype, top_k)) for dtype in dtypes]
    systems += [System(PADDED, dtype, partial(_task, layers, dtype, partial(padded, top_k=top_k))) for dtype in dtypes]
    systems += [System(GROUPED, dtype, partial(_grouped_task, layers, dtype, top_k)) for dtype in dtypes]
    if not options.short:
        systems.append(System(COMPILED, "float32", partial(_compiled_task, layers, "float32", top_k)))
    return [one for one in systems if options.wants(one.backend, one.dtype)]


def _cases(wanted: Sequence[int] | None, options: Options, skip: Callable[[str], None]) -> Iterator[Case]:
    for name in options.models:
        config = preset(name).configs["decoder"]
        top_k = config.moe_top_k
        counts = wanted or ((64,) if options.short else DEFAULT_TOKENS)
        for count in token_counts(name, counts, 1, _MOST_TOKENS, skip):
            generator = torch.Generator().manual_seed(options.seed)
            layers = make_layers(config, count, generator)
            loop = partial(by_operation, top_k=top_k, backend=REFERENCE)
            with torch.no_grad():
                expected = torch.stack([loop(layer) for layer in layers])
            chosen = [route(layer.x, layer.router, top_k).experts for layer in layers]
            experts = round(distinct_experts(chosen) / len(layers))
            for threads in options.threads:
                yield Case(
                    name=NAME,
                    model=name,
                    threads=threads,
                    shape={"tokens": count, "experts": config.num_experts, "top_k": top_k},
                    expected=expected,
                    work=partial(_work, config, count, experts),
                    systems=_systems(layers, top_k, options),
                )


def _work(config: TransformerConfig, tokens: int, experts: int, dtype: str) -> Work:
    return mixture_of_experts_work(config, tokens, experts, torch_dtype(dtype).itemsize)


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`."""
    return run_benchmark(NAME, arguments, partial(_cases, arguments.tokens), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.moe``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
