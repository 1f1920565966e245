"""Does attention get faster as query heads are taken away? Multi-head, grouped-query and sparse query attention.

Five kinds of attention of one width, with the head counts of the published SQAT models (width 256, 16 heads of 16): causal
self-attention of one sequence, forward, and forward with backward, by the native kernels and by torch's
scaled_dot_product_attention. Projections are left out.

    MHA   16 query heads, 16 key heads          SQA    8 query heads, 4 key heads
    GQA   16 query heads, 4 key heads           sSQA   8 query heads, 8 key heads
                                                xSQA   4 query heads, 4 key heads

Arithmetic says that the time goes with the query heads: SQA and sSQA twice as fast as GQA, xSQA four times. Printed beside
it is what was published of whole models on a GPU (A100, a forward step).

Before anything is timed, output and gradients are compared with the definition, block by block of queries so that the
scores fit into memory; beyond 4,096 tokens in 16 blocks spread over the sequence, the gradient of all other outputs being 0.

    rxt bench sqa --json sqa.json --plot sqa.png
    rxt bench sqa --lengths 32768 --variant GQA xSQA --pass forward --backend native --json sqa.json --add
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels import sparse_query_attention
from rxt_kernels.sparse_query_attention import sparse_query_attention_reference
from rxt_model.presets import preset

from .contenders import NATIVE, needs_native
from .costs import Work, causal_pairs
from .measuring import Case, System, Task, timed
from .running import Options, add_common_arguments, run_benchmark
from .running import main as common_main

__all__ = ["PUBLISHED", "VARIANTS", "Variant", "add_arguments", "compare_with_gqa", "main", "run"]

NAME = "sqa"
SDPA = "torch SDPA"
FORWARD, BACKWARD = "forward", "forward and backward"
LENGTHS, SHORT_LENGTHS = (1024, 2048, 4096), (1024, 2048)
LONGEST = 1 << 18
_BLOCK = 128  # queries whose scores are computed at once in the check
_BLOCKS_CHECKED = 16  # of a sequence that is not checked as a whole
_CHECKED_WHOLE = 4096
_LONG_RUN = 0.5  # seconds; work that takes longer is not repeated to be warm


class Variant(NamedTuple):
    """One kind of attention, by its heads."""

    name: str
    query_heads: int
    key_heads: int
    head_dim: int


def _variant(name: str) -> Variant:
    config = preset(f"sqat-m-{name.lower()}").configs["stateless"].transformer_config()
    query_heads, key_heads = config.self_attention_heads
    return Variant(name, query_heads, key_heads, config.head_dim)


VARIANTS = {name: _variant(name) for name in ("MHA", "GQA", "SQA", "sSQA", "xSQA")}
"""The kinds of attention that are compared, with the head counts of the published models."""

PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "MHA": {1024: 0.0869, 4096: 0.1114, 32768: 0.3727, 131072: 1.2648, 200000: 2.8734},
    "GQA": {1024: 0.0785, 4096: 0.1027, 32768: 0.3637, 131072: 1.2558, 200000: 2.8596},
    "SQA": {1024: 0.0642, 4096: 0.0750, 32768: 0.1991, 131072: 0.6308, 200000: 1.4116},
    "sSQA": {1024: 0.0669, 4096: 0.0793, 32768: 0.2117, 131072: 0.6630, 200000: 1.4824},
    "xSQA": {1024: 0.0570, 4096: 0.0637, 32768: 0.1348, 131072: 0.3759, 200000: 0.8194},
}
"""Published seconds of a forward step of whole models on an A100 (40 GB), by tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench sqa``."""
    add_common_arguments(
        parser, models=(), repeats=8, dtypes=("float32",), backends=(NATIVE, SDPA), with_one_thread=False
    )
    lengths = " ".join(map(str, LENGTHS))
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="T", help=f"tokens (default: {lengths}; short: 1024 2048)"
    )
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="kinds of attention (default: every one)"
    )
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"],
        help="backward: forward and backward (default: both)",
    )  # fmt: skip


def heads_of(variant: Variant, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value (1, tokens, heads, head_dim)."""
    shapes = [(1, tokens, heads, variant.head_dim) for heads in (variant.query_heads, *[variant.key_heads] * 2)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def checked_queries(tokens: int) -> list[slice]:
    """Blocks of queries to compare: all of a short sequence, else some that are spread evenly, the last one included.

    Example:
        >>> checked_queries(300)
        [slice(0, 128, None), slice(128, 256, None), slice(256, 300, None)]
        >>> [block.start for block in checked_queries(8192)][:3]
        [0, 537, 1075]
    """
    if tokens <= _CHECKED_WHOLE:
        return [slice(start, min(start + _BLOCK, tokens)) for start in range(0, tokens, _BLOCK)]
    starts = torch.linspace(0, tokens - _BLOCK, _BLOCKS_CHECKED, dtype=torch.float64).long().tolist()
    return [slice(start, start + _BLOCK) for start in starts]


def _scaled(out: Tensor, blocks: Sequence[slice], gradients: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Outputs of the blocks, and gradients, each over its largest value in the definition, as one vector."""
    parts = [torch.cat([out[:, block] for block in blocks], dim=1), *gradients]
    return torch.cat([part.flatten() / scale for part, scale in zip(parts, scales, strict=True)])


class _Attention:
    """One kind of attention at one length: its inputs, and what has to come out."""

    def __init__(self, variant: Variant, tokens: int, has_backward: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = heads_of(variant, tokens, generator)
        for tensor in self.inputs:
            tensor.requires_grad_(has_backward)
        self.has_backward = has_backward
        self.gradient = torch.randn(self.inputs[0].shape, generator=generator)
        self.blocks = checked_queries(tokens)
        self._scales: list[float] = []

    def expected(self) -> Tensor:
        """Output and gradients by the definition."""
        query, key, value = self.inputs
        out = torch.zeros_like(query, requires_grad=False)
        for block in self.blocks:
            # The last query of a block sees the last key it is given.
            of_block = sparse_query_attention_reference(
                query[:, block], key[:, : block.stop], value[:, : block.stop], causal=True
            )
            out[:, block] = of_block.detach()
            if self.has_backward:
                of_block.backward(self.gradient[:, block])
        gradients = self._take_gradients()
        parts = [torch.cat([out[:, block] for block in self.blocks], dim=1), *gradients]
        self._scales = [max(part.abs().max().item(), 1e-30) for part in parts]
        return _scaled(out, self.blocks, gradients, self._scales)

    def result(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The same by someone else, from one pass over the whole sequence."""
        with torch.set_grad_enabled(self.has_backward):
            out = attend(*self.inputs)
            if self.has_backward:
                kept = torch.zeros_like(self.gradient)
                for block in self.blocks:
                    kept[:, block] = self.gradient[:, block]
                out.backward(kept)
        return _scaled(out.detach(), self.blocks, self._take_gradients(), self._scales)

    def _take_gradients(self) -> list[Tensor]:
        gradients = []
        for tensor in self.inputs if self.has_backward else ():
            assert tensor.grad is not None
            gradients.append(tensor.grad)
            tensor.grad = None
        return gradients

    def work(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """What is timed."""
        with torch.set_grad_enabled(self.has_backward):
            out = attend(*self.inputs)
            if self.has_backward:
                torch.autograd.grad(out, self.inputs, self.gradient)


def _native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sparse_query_attention(query, key, value, causal=True, backend=NATIVE)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    is_grouped = query.shape[2] > key.shape[2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped).transpose(1, 2)


def _task(attention: _Attention, expected: Tensor, backend: str) -> Task:
    if backend == NATIVE:
        needs_native()
    attend = _native if backend == NATIVE else _sdpa
    start = time.perf_counter()
    result = attention.result(attend)
    work = partial(attention.work, attend)
    if time.perf_counter() - start < _LONG_RUN:
        return Task(lambda: result, timed(work), expected)

    def once() -> list[float]:
        before = time.perf_counter()
        work()
        return [time.perf_counter() - before]

    return Task(lambda: result, once, expected, is_warm=True)


def attention_work(variant: Variant, tokens: int, has_backward: bool) -> Work:
    """Scores and weighted sums of the pairs a causal mask leaves, twice that backward; heads read and written once.

    Example:
        >>> attention_work(Variant("xSQA", 4, 4, 16), 3, False)
        Work(bytes=3072, flops=1536)
    """
    passes = 3 if has_backward else 1
    values = 2 * tokens * (variant.query_heads + variant.key_heads) * variant.head_dim
    return Work(4 * values * passes, 4 * causal_pairs(tokens) * variant.query_heads * variant.head_dim * passes)


def _systems(variant: Variant, tokens: int, has_backward: bool, options: Options) -> list[System]:
    attention = _Attention(variant, tokens, has_backward, options.seed)
    expected = attention.expected()
    work = attention_work(variant, tokens, has_backward)
    return [
        System(backend, "float32", partial(_task, attention, expected, backend), variant.name, work)
        for backend in (NATIVE, SDPA)
        if options.wants(backend, "float32")
    ]


def _cases(
    lengths: Sequence[int] | None,
    variants: Sequence[str],
    passes: Sequence[str],
    options: Options,
    skip: Callable[[str], None],
) -> Iterator[Case]:
    for tokens in lengths or (SHORT_LENGTHS if options.short else LENGTHS):
        for name in dict.fromkeys(passes):
            has_backward = name == "backward"
            for threads in options.threads:
                torch.set_num_threads(threads)
                systems = [
                    system
                    for variant in dict.fromkeys(variants)
                    for system in _systems(VARIANTS[variant], tokens, has_backward, options)
                ]
                yield Case(
                    name=NAME,
                    model="attention of width 256",
                    threads=threads,
                    shape={"batch": 1, "tokens": tokens, "backward": int(has_backward)},
                    expected=torch.empty(0),
                    work=lambda dtype: Work(0, 0),
                    systems=systems,
                )


def compare_with_gqa(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast as grouped-query attention everyone is, in the same rounds, by arithmetic and as published.

    Args:
        rows: of a result of this benchmark.

    Returns:
        One mapping per row whose GQA was measured too: ``variant, backend, threads, tokens, backward, speedup,
        arithmetic, published``; the last one is None where nothing was published of that length.
    """

    def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["backend"], row["threads"], row["shape"]["tokens"], row["shape"]["backward"]

    grouped = {case_of(row): row["p50"] for row in rows if row["model"] == "GQA"}
    found = []
    for row in rows:
        if case_of(row) not in grouped:
            continue
        backend, threads, tokens, has_backward = case_of(row)
        published = PUBLISHED[row["model"]].get(tokens) if not has_backward else None
        found.append(
            {
                "variant": row["model"],
                "backend": backend,
                "threads": threads,
                "tokens": tokens,
                "backward": has_backward,
                "speedup": round(grouped[case_of(row)] / row["p50"], 3),
                "arithmetic": VARIANTS["GQA"].query_heads / VARIANTS[row["model"]].query_heads,
                "published": None if published is None else round(PUBLISHED["GQA"][tokens] / published, 3),
            }
        )
    return sorted(found, key=lambda one: (one["threads"], one["backward"], one["backend"], one["tokens"]))


def _sentences(compared: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as a table: a line per backend and length, a column per kind of attention."""
    if not compared:
        return "Speed against GQA: it was not among what was measured."
    lines = ["Speed against GQA in the same rounds, in brackets what was published of whole models on an A100:"]
    names = list(dict.fromkeys(one["variant"] for one in compared))
    arithmetic = {one["variant"]: one["arithmetic"] for one in compared}
    lines.append(f"  {'':<22}{'threads':>8}{'tokens':>9}" + "".join(f"{name:>16}" for name in names))
    lines.append(f"  {'by arithmetic (Hq)':<39}" + "".join(f"{arithmetic[name]:>15.2f}x" for name in names))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for one in compared:
        published = "" if one["published"] is None else f" ({one['published']:.2f})"
        key = BACKWARD if one["backward"] else FORWARD, one["backend"], one["threads"], one["tokens"]
        cells.setdefault(key, {})[one["variant"]] = f"{one['speedup']:.2f}x{published}"
    title = ""
    for (work, backend, threads, tokens), found in cells.items():
        if work != title:
            lines.append(f"  {work}")
            title = work
        row = "".join(f"{found.get(name, ''):>16}" for name in names)
        lines.append(f"    {backend:<20}{threads:>8}{tokens:>9,}{row}")
    return "\n".join(lines)


def _conclude(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    compared = compare_with_gqa(rows)
    variants = {name: variant._asdict() for name, variant in VARIANTS.items()}
    return {"variants": variants, "speedup_over_gqa": compared, "published_seconds": _with_text_keys()}, _sentences(
        compared
    )


def _with_text_keys() -> dict[str, dict[str, float]]:
    return {name: {str(tokens): seconds for tokens, seconds in of.items()} for name, of in PUBLISHED.items()}


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`.

    Raises:
        ValueError: a length that is not accepted, and what :func:`.running.run_benchmark` refuses.
    """
    for tokens in arguments.lengths or ():
        if not 2 <= tokens <= LONGEST:
            raise ValueError(f"lengths holds {tokens}; it must lie between 2 and {LONGEST:,}.")
    cases = partial(_cases, arguments.lengths, arguments.variant, arguments.passes)
    return run_benchmark(NAME, arguments, cases, {"causal": True}, _conclude)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.sqa``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
