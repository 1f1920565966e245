"""Gradients of the shards of a step, computed by several processes at once.

Small matrices leave most of a second core idle; a second process does not. The main process keeps weights and optimizer.
Before a step it sends the weights to every worker, each computes the gradients of its own shards, and the main process
adds them up in the order of the shards, so that the number of workers changes nothing but the time.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

__all__ = ["ShardGradients", "ShardOutcome"]


@dataclass(frozen=True)
class ShardOutcome:
    """What the computation of one shard gave: numbers to report, and all gradients as one vector (P,)."""

    report: Any
    gradient: Tensor


ComputeShard = Callable[[nn.Module, int, int], Any]
"""(model, step, shard) to a report, after a backward pass that left gradients in the model. It must be picklable."""


def _outcome(model: nn.Module, compute: ComputeShard, step: int, shard: int) -> ShardOutcome:
    model.zero_grad(set_to_none=True)
    report = compute(model, step, shard)
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in model.parameters()]
    return ShardOutcome(report, torch.cat(parts))


def _load(model: nn.Module, values: bytes) -> None:
    vector = torch.frombuffer(bytearray(values), dtype=torch.float32)
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            # Copied into the memory it has: a view of the vector is aligned differently, and rounds differently.
            parameter.copy_(vector[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


def _serve(
    connection: Connection, model: nn.Module, compute: ComputeShard, shards: Sequence[int], threads: int
) -> None:
    """Answer requests until the main process hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    torch.set_num_threads(threads)
    model.train()
    try:
        while True:
            step = connection.recv()
            _load(model, connection.recv_bytes())
            for shard in shards:
                outcome = _outcome(model, compute, step, shard)
                connection.send(outcome.report)
                connection.send_bytes(outcome.gradient.numpy().data.cast("B"))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class ShardGradients:
    """Computes the mean gradient of all shards of a step, in this process and ``workers - 1`` others.

    Args:
        model: float32; its ``parameters()`` are sent to the other processes before every step.
        compute: runs forward and backward of one shard.
        shards: shards of a step.
        workers: processes in all; more than ``shards`` would be idle and are not started.

    Raises:
        ValueError: for fewer than one worker or shard.

    A program that asks for more than one worker must be importable by them: its entry point stands under
    ``if __name__ == "__main__":``.
    """

    def __init__(self, model: nn.Module, compute: ComputeShard, *, shards: int, workers: int) -> None:
        if shards < 1:
            raise ValueError(f"shards must be at least 1; it was {shards}.")
        if workers < 1:
            raise ValueError(f"workers must be at least 1; it was {workers}.")
        self.model = model
        self.compute = compute
        self.shards = shards
        self.workers = min(workers, shards)
        self._others: list[tuple[Any, Connection, list[int]]] = []
        self._threads = torch.get_num_threads()

    def __enter__(self) -> ShardGradients:
        if self.workers > 1:
            threads = max(1, self._threads // self.workers)
            torch.set_num_threads(threads)
            context = multiprocessing.get_context("spawn")
            for worker in range(1, self.workers):
                shards = list(range(worker, self.shards, self.workers))
                ours, theirs = context.Pipe()
                arguments = (theirs, self.model, self.compute, shards, threads)
                process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rxt-train-{worker}")
                process.start()
                theirs.close()
                self._others.append((process, ours, shards))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process, connection, _ in self._others:
            connection.close()
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._others.clear()
        torch.set_num_threads(self._threads)

    def __call__(self, step: int) -> list[Any]:
        """Leave the mean gradient of the step in the model; returns the reports of all shards, in their order.

        Raises:
            RuntimeError: if a worker stopped.
        """
        outcomes: dict[int, ShardOutcome] = {}
        try:
            if self._others:
                vector = nn.utils.parameters_to_vector(self.model.parameters()).detach().numpy()
                for _, connection, _ in self._others:
                    connection.send(step)
                    connection.send_bytes(vector.data.cast("B"))
            for shard in range(0, self.shards, self.workers):
                outcomes[shard] = _outcome(self.model, self.compute, step, shard)
            for _, connection, shards in self._others:
                for shard in shards:
                    report = connection.recv()
                    gradient = torch.from_numpy(numpy.frombuffer(connection.recv_bytes(), numpy.float32).copy())
                    outcomes[shard] = ShardOutcome(report, gradient)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(
                f"A training worker stopped at step {step + 1}; its error is above. Training resumes from its last checkpoint."
            ) from error
        total = outcomes[0].gradient.clone()
        for shard in range(1, self.shards):
            total += outcomes[shard].gradient
        total /= self.shards
        start = 0
        for parameter in self.model.parameters():
            count = parameter.numel()
            parameter.grad = total[start : start + count].view_as(parameter)
            start += count
        return [outcomes[shard].report for shard in range(self.shards)]
