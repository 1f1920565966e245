"""How long does a training step of the decoder take? Forward, backward and the optimizer's step, on 8 messages of 256 tokens.

Loss: cross-entropy of the next token, and 0.01 of the load-balance loss. Every system trains a copy of its own with AdamW
(fused). Compared before anything is timed: the loss, and the gradient of every parameter. The floor is the arithmetic
forward and twice that backward; the optimizer has to read four values per parameter.

    rxt bench train --json train.json --plot train.png
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rxt_kernels import linear_cross_entropy
from rxt_kernels.dispatch import use_backend
from rxt_model.decoder import RxTDecoder

from .contenders import COMPILED, NATIVE, Models, compiled, needs_backend, torch_dtype
from .costs import Work
from .measuring import REFERENCE, Case, System, Task
from .running import ALPHA, Options, add_common_arguments, run_benchmark
from .running import main as common_main
from .upstream import upstream_systems

__all__ = ["add_arguments", "loss_of", "main", "run"]

NAME = "train"
LOAD_BALANCE = 0.01
BEGINNING = 1
"""Steps at the beginning of a round that are not counted: they find caches and the allocator's memory as the system before
left them, and in a training every step comes right behind another."""
STEPS = 2
"""Steps of a round that are counted."""
LEARNING_RATE = 1e-6  # of no matter for the time, and small enough that rounds stay alike


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rxt bench train``."""
    add_common_arguments(parser, models=(ALPHA,), repeats=8)
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="messages (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, metavar="T", help="of each message (default: %(default)s)")


def loss_of(decoder: RxTDecoder, tokens: Tensor, memory: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, and the load-balance loss; a scalar."""
    found = decoder.hidden_states(tokens, None, memory)
    network = decoder.model
    hidden = found.hidden if network.head_norm is None else network.head_norm(found.hidden)
    loss = linear_cross_entropy(hidden[:, :-1], network.head.weight, tokens[:, 1:], bias=network.head.bias)
    return loss if found.load_balance_loss is None else loss + LOAD_BALANCE * found.load_balance_loss


def _gradients(decoder: RxTDecoder) -> dict[str, Tensor]:
    """The gradient of every parameter in float32, by its name; zeros for those that the loss does not depend on."""
    return {
        name: torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad.float()
        for name, parameter in decoder.named_parameters()
    }


class _Expected:
    """Loss and gradients of the reference in float32.

    Gradients of large and of small parameters count alike: each is divided by its largest value here.
    """

    def __init__(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        self._scales = {name: gradient.abs().max().clamp_min(1e-12) for name, gradient in gradients.items()}
        self._loss = loss.abs()
        self.vector = self.scaled(loss, gradients)
        self.norms = torch.stack([loss, *(gradients[name].norm() for name in sorted(gradients))])

    def scaled(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """Loss and gradients as one vector."""
        parts = [(gradient / self._scales[name]).flatten() for name, gradient in gradients.items()]
        return torch.cat([(loss / self._loss).reshape(1), *parts])


class _Training:
    """One decoder being trained."""

    def __init__(self, models: Models, tokens: Tensor, memory: Tensor, backend: str, dtype: str) -> None:
        kind = torch_dtype(dtype)
        self._backend = NATIVE if backend == NATIVE else REFERENCE
        self.decoder = copy.deepcopy(models.full.decoder).to(kind).train()
        self._loss: Callable[[], Tensor] = partial(loss_of, self.decoder, tokens, memory.to(kind))
        if backend == COMPILED:
            self._loss = compiled(self._loss)
        self._optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=LEARNING_RATE, fused=True)

    def _forward_and_backward(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with use_backend(self._backend):
            loss = self._loss()
            loss.backward()
        return loss

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients, before any step."""
        loss = self._forward_and_backward()
        return loss.detach().float(), _gradients(self.decoder)

    def run(self) -> Sequence[float]:
        """Seconds of each counted step of a round."""
        seconds = []
        for _ in range(BEGINNING + STEPS):
            start = time.perf_counter()
            self._forward_and_backward()
            self._optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds[BEGINNING:]


def _task(models: Models, tokens: Tensor, memory: Tensor, expected: _Expected, backend: str, dtype: str) -> Task:
    needs_backend(backend, dtype)
    training = _Training(models, tokens, memory, backend, dtype)
    result = expected.scaled(*training.result())  # before it is trained
    return Task(lambda: result, training.run)


def _eager(models: Models, tokens: Tensor, memory: Tensor, expected: _Expected, dtype: str) -> Tensor:
    return expected.scaled(*_Training(models, tokens, memory, REFERENCE, dtype).result())


def _systems(models: Models, tokens: Tensor, memory: Tensor, expected: _Expected, options: Options) -> list[System]:
    systems = [
        System(backend, dtype, partial(_task, models, tokens, memory, expected, backend, dtype))
        for backend in (REFERENCE, NATIVE)
        for dtype in ("float32", "bfloat16")
    ]
    if not options.short:
        make = partial(_task, models, tokens, memory, expected, COMPILED, "float32")
        systems.append(System(COMPILED, "float32", make))
    systems += upstream_systems(models, NAME, tokens, memory, expected=expected.norms)
    return [one for one in systems if options.wants(one.backend, one.dtype)]


def _cases(rows: int, count: int, options: Options, skip: Callable[[str], None]) -> Iterator[Case]:
    for name in options.models:
        models = Models(name, options.seed)
        config = models.full.decoder.config
        if count > config.seq_len:
            skip(f"{name}, {count} tokens: it takes at most {config.seq_len}.")
            continue
        tokens, memory = models.tokens(rows, count), models.memory(1, config.stm_size)
        expected = _Expected(*_Training(models, tokens, memory, REFERENCE, "float32").result())
        parameters = sum(parameter.numel() for parameter in models.full.decoder.parameters())
        flops = models.costs.training_step(rows, count)
        for threads in options.threads:
            yield Case(
                name=NAME,
                model=name,
                threads=threads,
                shape={"batch": rows, "tokens": count, "slots": config.stm_size},
                expected=expected.vector,
                work=partial(_work, 4 * parameters, flops),
                systems=_systems(models, tokens, memory, expected, options),
                eager=partial(_eager, models, tokens, memory, expected),
            )


def _work(values: int, flops: int, dtype: str) -> Work:
    return Work(values * torch_dtype(dtype).itemsize, flops)


def run(arguments: argparse.Namespace) -> int:
    """Measure, save, print and draw; see :func:`.running.run_benchmark`."""
    for name, least in (("batch", 1), ("tokens", 2)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} is {getattr(arguments, name)}; it must be at least {least}.")
    return run_benchmark(NAME, arguments, partial(_cases, arguments.batch, arguments.tokens), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rxt_benchmarks.train``."""
    return common_main(sys.modules[__name__], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
