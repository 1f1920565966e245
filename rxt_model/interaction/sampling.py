"""Choosing the next token: one sampler for single and batched conversations (spec 2.14; spec 7, defect 29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Below this a division in float32 would overflow to a temperature of 0.
_SMALLEST_TEMPERATURE = 1e-30


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
        if not _is_number(self.temperature) or not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}; it must be a finite number of at least 0.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; it must be an integer of at least 1, or None.")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p is {self.top_p!r}; it must be a number in (0, 1], or None.")
        if self.seed is None:
            return
        is_sequence = isinstance(self.seed, Sequence) and not isinstance(self.seed, (str, bytes))
        for seed in self.seed if is_sequence else [self.seed]:  # type: ignore[union-attr]
            if type(seed) is not int or not 0 <= seed < 2**63:
                raise ValueError(
                    f"seed is {self.seed!r}; it must be an integer from 0 to 2^63 - 1, one for each row, or None."
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse options that no model with this vocabulary can follow.

        Raises:
            ValueError: ``top_k`` is larger than the vocabulary.
        """
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(f"top_k is {self.top_k}; the vocabulary has {vocab_size} tokens.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    options.check_vocabulary(logits.shape[-1])
    if options.temperature == 0.0:
        raise ValueError(
            "temperature is 0, which is the limit of no distribution; the sampler takes the likeliest token."
        )
    # The largest logit becomes 0, so that the smallest temperatures cannot overflow; they are greedy.
    scaled = logits.float()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / max(options.temperature, _SMALLEST_TEMPERATURE)
    if options.top_k is not None:
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


_NO_TOKEN = "logits hold NaN or infinite values, so no token can be chosen; check weights and memory."


def most_likely(logits: Tensor, choices: Tensor | None = None) -> Tensor:
    """The token with the largest logit, of all or of some; the first of equal ones.

    Args:
        logits: (B, V).
        choices: ids (N,) to choose from, or None.

    Returns:
        (B,) int64.

    Raises:
        ValueError: the largest logit is NaN or infinite.
    """
    if choices is not None:
        logits = logits[:, choices]
    if logits.device.type == "cpu":  # torch compares one number at a time there, numpy a vector
        token = torch.from_numpy(logits.detach().float().numpy().argmax(axis=-1))
        largest = logits.gather(-1, token[:, None])
    else:
        largest, token = logits.max(dim=-1)
    # To both, NaN is the largest.
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(_NO_TOKEN)
    return token if choices is None else choices[token]


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
            self.options.check_vocabulary(logits.shape[-1])
            return most_likely(logits)
        probabilities = token_probabilities(logits, self.options)
        if bool(torch.isnan(probabilities).any()):
            raise ValueError(_NO_TOKEN)
        # Inverse of the cumulative distribution at one uniform number per row: independent of batch size and device.
        cumulative = probabilities.double().cumsum(dim=-1)
        uniform = self._uniform(logits.shape[0]).to(logits.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, uniform, right=True).squeeze(-1)
        last_possible = logits.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
        return torch.minimum(drawn, last_possible)
