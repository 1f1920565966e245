"""How many kernels does a token cost, and how many a memory update? Launches of Triton's kernels and of torch's own.

At the sizes of these models a GPU waits for launches more than for arithmetic, so their number is what to make small. It
follows from a model's structure alone (layers, their kinds, options), not from its widths: every published model is
counted on a stand-in with all of its layers and experts but a few channels. Triton's kernels are counted where they would
be launched and not run; that all paths compute the same is held by the tests of models and engines.

    eager    modules on the eager definitions
    triton   modules on Triton's kernels
    engine   one step of the decode engine on Triton's kernels: what a CUDA graph repeats, and the host launches as one

Counted are Triton's kernels and every operation of torch (ATen) that computes or copies: views and allocations launch
nothing. Some operations of torch, a sort for instance, launch several kernels and are counted as one.

    rxt bench launches --json launches.json
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_kernels import triton_runtime, use_backend
from rxt_kernels.decode import CudaGraphEngine
from rxt_model.interaction.weights import decoder_weights
from rxt_model.models import ReactiveTransformer, RxTAlpha, RxTBeta
from rxt_model.presets import PRESETS, preset

from .devices import add_device_argument, choose_device
from .environment import describe_environment
from .results import Results, write_results

__all__ = ["WORK", "Counts", "add_arguments", "count_model", "main", "run", "stand_in"]

NAME = "launches"
WORK: Mapping[str, tuple[str, ...]] = {
    "decode token": ("eager", "triton", "engine"),
    "encode interaction": ("eager", "triton"),
    "memory update": ("eager", "triton"),
}
"""What is counted, and on which paths."""

_FULL = tuple(name for name, item in PRESETS.items() if item.component in ("rxt_alpha", "rxt_beta"))
# Enough keys, in a message and in memory, that attention splits them as it does at the published sizes.
_TOKENS, _SLOTS = 80, 96


@dataclass(frozen=True)
class Counts:
    """What one piece of work launches."""

    triton: int
    torch: int

    @property
    def total(self) -> int:
        """Everything that is launched."""
        return self.triton + self.torch


class _TorchOperations(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel, also inside of this package's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function.namespace == "rxt_kernels":
            # The operation itself is no kernel; what it consists of is seen by entering this mode again.
            with self:
                return OPDEFS[function.name()]._init_fn(*arguments, **options)
        if _launches(function):
            self.counter[function.name()] += 1
        return function(*arguments, **options)


_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::_reshape_alias")


def _launches(operation: Any) -> bool:
    """Whether an ATen operation computes or copies, by its schema: a view's result aliases an input it does not write."""
    is_view = any(
        result.alias_info is not None and not result.alias_info.is_write for result in operation._schema.returns
    )
    return not is_view and not operation.name().startswith(_ALLOCATIONS)


@contextmanager
def _counting() -> Iterator[Callable[[], Counts]]:
    # Kernels are recorded, not run: the interpreter works with operations of torch, which would count.
    recorded = triton_runtime.record_launches()
    with recorded, triton_runtime.count_launches() as kernels, _TorchOperations() as operations:
        yield lambda: Counts(kernels.total(), operations.counter.total())


def stand_in(name: str) -> ReactiveTransformer:
    """A published model with all of its layers and experts, and as few channels as its heads allow.

    Raises:
        ValueError: there is no full model of this name.
    """
    if name not in _FULL:
        raise ValueError(f"model is {name!r}; accepted are the full models {', '.join(_FULL)}.")
    config = preset(name).config()
    for part in ("decoder_config", "encoder_config", "memory_attention_config"):
        own = config[part]
        small = {
            "embed_dim": 2 * own["att_heads"],
            "stm_size": _SLOTS,
            "vocab_size": 16,
            "ff_dim": 8,
            "dense_layer_dim": 8,
        }
        if own.get("shared_expert_dim") is not None:
            small["shared_expert_dim"] = 8
        config[part] = {**own, **{field: value for field, value in small.items() if field in own}}
    family = RxTAlpha if preset(name).component == "rxt_alpha" else RxTBeta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family(**config).eval()


@torch.no_grad()
def count_model(model: ReactiveTransformer) -> dict[str, dict[str, Counts]]:
    """Counts by work and path; see :data:`WORK`."""
    counts: dict[str, dict[str, Counts]] = {work: {} for work in WORK}
    for path, backend, measure in (
        ("eager", "reference", _through_modules),
        ("triton", "triton", _through_modules),
        ("engine", "triton", _through_engine),
    ):
        with use_backend(backend), triton_runtime.record_launches():
            for work, counted in measure(model).items():
                counts[work][path] = counted
    return counts


def _message(model: ReactiveTransformer) -> Tensor:
    ids = torch.arange(_TOKENS, device=model.device) % model.decoder.config.vocab_size
    return ids[None]


def _through_modules(model: ReactiveTransformer) -> dict[str, Counts]:
    decoder, ids, stored = model.decoder, _message(model), model.stm.memory
    memory, cache = decoder.project_memory(stored), decoder.new_cache(1)
    decoder.hidden_states(ids, None, memory, cache)
    cache.advance(ids.shape[1])
    found: dict[str, Counts] = {}

    def count(work: str, compute: Callable[[], Tensor]) -> Tensor:
        with _counting() as counted:
            result = compute()
            found[work] = counted()
        return result

    count("decode token", lambda: decoder.logits(decoder.hidden_states(ids[:, :1], None, memory, cache).hidden))
    encoded = count("encode interaction", lambda: model.encoder(ids))
    count("memory update", lambda: model.memory_attention(encoded, None, stored))
    return found


def _through_engine(model: ReactiveTransformer) -> dict[str, Counts]:
    counts: list[Counts] = []

    def capture(step: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], None], Tensor]:
        with _counting() as counted:
            result = step()
            counts.append(counted())
        return lambda: None, result

    ids = _message(model)
    engine = CudaGraphEngine(decoder_weights(model.decoder), 1, capture=capture)
    engine.set_memory(model.stm.memory)
    engine.prefill(ids, [ids.shape[1]])
    engine.step(ids[:, 0])
    return {"decode token": counts[0]}


def _rows(name: str, device: torch.device) -> list[dict[str, Any]]:
    model = stand_in(name).to(device)
    shape = {
        "batch": 1,
        "decoder_layers": model.decoder.model.depth,
        "memory_layers": model.decoder.config.num_layers,
        "experts": "stacked" if model.decoder.config.use_vectorized_moe else "separate",
    }
    return [
        {
            "name": work, "model": name, "backend": path, "dtype": "float32", "shape": shape,
            "triton": of.triton, "torch": of.torch, "total": of.total,
        }
        for work, paths in count_model(model).items()
        for path, of in paths.items()
    ]  # fmt: skip


def _report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The counts for a person."""
    counts = {(row["model"], row["name"], row["backend"]): row for row in rows}
    shapes = {row["model"]: row["shape"] for row in rows}
    header, names = f"{'':<22}{'':>6}", f"{'model':<22}{'layers':>6}"
    for work, paths in WORK.items():
        header += f"  {work:^{12 * len(paths)}}"
        names += "  " + "".join(f"{path:>12}" for path in paths)
    lines = ["Launches: all (of these Triton's kernels).", "", header.rstrip(), names]
    for model, shape in shapes.items():
        line = f"{model:<22}{shape['decoder_layers']:>6}"
        for work, paths in WORK.items():
            found = (counts[model, work, path] for path in paths)
            line += "  " + "".join(f"{row['total']} ({row['triton']})".rjust(12) for row in found)
        lines.append(line)
    if any(shape["experts"] == "separate" for shape in shapes.values()):
        lines += [
            "",
            "Experts of RxT-Alpha and RxT-Beta Micro are separate tensors. Triton's kernels take stacked ones: modules stack "
            "them again in every call, the engine once.",
        ]
    return "\n".join(
        [
            *lines,
            "",
            "The numbers follow from the structure of a model, not from its widths; they were counted on stand-ins of a few "
            "channels. An operation of torch counts as one launch, though some launch several kernels. A CUDA graph launches "
            "all of the engine's at once.",
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench launches``."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="PRESET",
        choices=_FULL,
        help="full model, repeatable (default: all of them)",
    )
    add_device_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="save the counts")


def run(arguments: argparse.Namespace) -> int:
    """Count, print and save.

    Raises:
        ValueError: the device is not here.
        RuntimeError: Triton is not installed.
    """
    device = choose_device(arguments.device)
    if device.type == "cpu" and not triton_runtime.INTERPRETED:
        return _interpreted(arguments)
    models = list(arguments.model or _FULL)
    rows = [row for name in models for row in _rows(name, device)]
    print(_report(rows))
    if arguments.json is not None:
        results = Results(NAME, {"models": models}, describe_environment(device), {}, rows, complete=True)
        print(f"Results: {write_results(results, arguments.json)}")
    return 0


def _interpreted(arguments: argparse.Namespace) -> int:
    """The same in a process of its own where kernels are interpreted, which has to be chosen before they exist."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(triton_runtime.unavailable())
    command = [sys.executable, "-m", "rxt_benchmarks.launches"]
    for name in arguments.model or ():
        command += ["--model", name]
    if arguments.json is not None:
        command += ["--json", arguments.json]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.launches``."""
    parser = argparse.ArgumentParser(
        prog="python -m rxt_benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
