"""Choosing the next token: one sampler for single and batched conversations (spec 2.14; spec 7, defect 29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn from logits.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens (and whatever ties with the k-th); None keeps all.
        top_p: keep the most likely tokens until their probability passes p, the one that passes it included; None
            keeps all. Applied after ``top_k``.
        seed: makes the draws repeatable. An integer seeds row b of a batch with ``seed + b``; a sequence gives one seed
            per row, so that a row draws what it would draw alone.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}; it must be a finite number of at least 0.")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; it must be an integer of at least 1, or None.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p!r}; it must lie in (0, 1], or be None.")


def token_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Probabilities after temperature, top-k and top-p; filtered tokens have exactly 0.

    Args:
        logits: (B, V).
        options: temperature above 0.

    Returns:
        (B, V) float32, rows summing to 1.

    Example:
        >>> token_probabilities(torch.tensor([[2.0, 1.0, 0.0]]), SamplingOptions(top_k=1)).tolist()
        [[1.0, 0.0, 0.0]]
    """
    scaled = logits.float() / options.temperature
    if options.top_k is not None:
        if options.top_k > scaled.shape[-1]:
            raise ValueError(f"top_k is {options.top_k}; the vocabulary has {scaled.shape[-1]} tokens.")
        threshold = scaled.topk(options.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if options.top_p is not None and options.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= options.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


class Sampler:
    """Draws one token per row and step; every row has its own stream of random numbers.

    Args:
        options: how to draw.
        rows: rows B of the batch.
    """

    def __init__(self, options: SamplingOptions, rows: int = 1) -> None:
        self.options = options
        self._generators: list[torch.Generator] | None = None
        if options.seed is not None:
            seeds = [options.seed + row for row in range(rows)] if isinstance(options.seed, int) else list(options.seed)
            if len(seeds) != rows:
                raise ValueError(f"seed holds {len(seeds)} seeds and there are {rows} rows; give one per row, or one.")
            self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def _uniform(self, rows: int) -> Tensor:
        if self._generators is None:
            return torch.rand(rows, 1, dtype=torch.float64)
        return torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids (B,) int64 from logits (B, V), on the device of the logits.

        Raises:
            ValueError: logits hold NaN, so that no token can be chosen.
        """
        if self.options.temperature == 0.0:
            return logits.argmax(dim=-1)
        probabilities = token_probabilities(logits, self.options)
        if bool(torch.isnan(probabilities).any()):
            raise ValueError("logits hold NaN or infinite values, so no token can be drawn; check weights and memory.")
        # Inverse of the cumulative distribution at one uniform number per row: independent of batch size and device.
        cumulative = probabilities.double().cumsum(dim=-1)
        uniform = self._uniform(logits.shape[0]).to(logits.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, uniform, right=True).squeeze(-1)
        last_possible = logits.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
        return torch.minimum(drawn, last_possible)
