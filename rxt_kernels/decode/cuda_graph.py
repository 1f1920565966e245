"""The engine for GPUs: one step is recorded as a CUDA graph and then repeated, whatever its position.

At these sizes a step takes a GPU less time than the host needs to launch its kernels one by one. A graph launches all of
them at once. It repeats the same kernels on the same addresses, which is why everything a step reads lies in static
buffers: tokens, which rows go on, lengths, keys and values, and the memory, which a memory update refreshes in place.
Attention looks at as many keys of the buffers as the lengths say, so that one graph serves every position. Where buffers
move, because they grow or the memory gets more rows, the step is recorded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from rxt_kernels.decode.engine import EagerEngine
from rxt_kernels.decode.weights import DecoderWeights, ExpertWeights, with_stacked_experts
from rxt_kernels.dispatch import explain, operations, preferred_backend

__all__ = ["Capture", "CudaGraphEngine", "capture_cuda_graph"]

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""Records what a function does on a device; returns what does it again, and the tensor that then holds the result.

The function may run any number of times while it is recorded.
"""

_WARM_UPS = 2


def capture_cuda_graph(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record a function as a CUDA graph, after running it on a stream of its own so that its kernels are compiled."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                function()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
    return graph.replay, result


class CudaGraphEngine(EagerEngine):
    """As :class:`EagerEngine`, with the step recorded; logits are one tensor that every step overwrites.

    Experts that are separate modules are copied once into one tensor.

    Args:
        weights: the decoder, on a GPU.
        rows, capacity, limit: as in :class:`EagerEngine`.
        capture: how a step is recorded.

    Raises:
        ValueError: these weights cannot be decoded with a CUDA graph, with the reason.
    """

    name: ClassVar[str] = "cuda_graph"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def __init__(
        self,
        weights: DecoderWeights,
        rows: int,
        *,
        capacity: int = 256,
        limit: int | None = None,
        capture: Capture = capture_cuda_graph,
    ) -> None:
        if capture is capture_cuda_graph and (reason := self.supports(weights)) is not None:
            raise ValueError(f"a step cannot be recorded as a CUDA graph: {reason}")
        self._capture = capture
        self._recorded: tuple[Callable[[], None], Tensor] | None = None
        super().__init__(with_stacked_experts(weights), rows, capacity=capacity, limit=limit)

    @staticmethod
    def supports(weights: DecoderWeights) -> str | None:
        """None, or why a step with these weights cannot be recorded, in one sentence."""
        embedding = weights.embedding
        if embedding.device.type != "cuda":
            return f"the weights are on {embedding.device}; CUDA graphs run on a GPU."
        if torch.is_grad_enabled() and embedding.requires_grad:
            return (
                "gradients are being recorded, and a graph that is repeated records none; decode under torch.no_grad()."
            )
        if preferred_backend() not in ("auto", "triton"):
            return f"{preferred_backend()!r} is preferred in this block, and a graph repeats the kernels it was recorded with."
        return _waits_for_the_host(weights)

    def _buffers_moved(self) -> None:
        self._recorded = None

    def _run_step(self) -> Tensor:
        if self._recorded is None:
            self._recorded = self._record()
        replay, result = self._recorded
        replay()
        return result

    def _record(self) -> tuple[Callable[[], None], Tensor]:
        # Warming up runs the step. With no row active lengths stay, and what is written is written again by the real step.
        active = self._active.clone()
        self._active.zero_()
        try:
            return self._capture(lambda: self._step_on_buffers(self.capacity), self._tokens.device)
        finally:
            self._active.copy_(active)


def _waits_for_the_host(weights: DecoderWeights) -> str | None:
    """Why a step would wait for the host, which cannot be recorded: the eager mixture of experts reads group sizes."""
    experts = [layer.feed_forward for layer in weights.layers if isinstance(layer.feed_forward, ExpertWeights)]
    operation = operations()["mixture_of_experts"]
    backend = next((known for known in operation.accelerated if known.name == "triton"), None)
    for one in experts:
        if backend is None:
            return f"the eager mixture of experts waits for the host. {explain('mixture_of_experts', 'triton')}"
        tokens = weights.embedding
        reason = backend.supports(
            tokens, one.router, one.w1, one.w2, one.top_k, one.b1, one.b2, one.global_bias, one.activation, one.gated,
            one.shared, one.router_dtype,
        )  # fmt: skip
        if reason is not None:
            return f"the eager mixture of experts waits for the host, and Triton's cannot be used: {reason}"
    return None
