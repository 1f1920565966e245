"""From prompts to a stream of tokens: prefill, one step per token, budgets and end tokens (spec 1, steps 3 and 4).

Every forward pass is guarded by its own ``no_gradients``; none is held while a caller has control (spec 7, defect 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rxt_model.cache import SelfAttentionCache
from rxt_model.gradients import no_gradients
from rxt_model.interaction.sampling import Sampler

HiddenFunction = Callable[[Tensor, "SelfAttentionCache | None"], Tensor]
LogitsFunction = Callable[[Tensor], Tensor]


class Decoding(Protocol):
    """Something that turns prompts into logits, then one token per row into the next logits."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, V) after the last token of every prompt."""

    def step(self, tokens: Tensor, active: Sequence[bool] | None) -> Tensor:
        """Logits (B, V) after one more token per row; rows that are not active do not count.

        The logits may be overwritten by the next step.
        """


class CachedDecoding:
    """Decoding over a key/value cache; the vocabulary head is computed at one position per row.

    Args:
        hidden_states: ids (B, T) and a cache to hidden states (B, T, D).
        logits: the vocabulary head.
        cache: the cache to fill; it may already hold a conversation.
        device: where ids go.
    """

    def __init__(
        self,
        hidden_states: HiddenFunction,
        logits: LogitsFunction,
        cache: SelfAttentionCache,
        device: torch.device,
    ) -> None:
        self._hidden_states = hidden_states
        self._logits = logits
        self.cache = cache
        self._device = device

    @no_gradients()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        input_ids, lengths = padded(prompts, self._device)
        hidden = self._hidden_states(input_ids, self.cache)
        same_length = min(map(len, prompts)) == max(map(len, prompts))
        self.cache.advance(input_ids.shape[1], None if same_length else list(map(len, prompts)))
        return self._logits(last_rows(hidden, lengths))

    @no_gradients()
    def step(self, tokens: Tensor, active: Sequence[bool] | None) -> Tensor:
        hidden = self._hidden_states(tokens[:, None], self.cache)
        self.cache.advance(1, None if active is None else list(map(int, active)))
        return self._logits(hidden[:, -1])


class UncachedDecoding:
    """Decoding that runs the whole message again for every token: slow, and the meaning the cache is held to."""

    def __init__(self, hidden_states: HiddenFunction, logits: LogitsFunction, device: torch.device) -> None:
        self._hidden_states = hidden_states
        self._logits = logits
        self._device = device
        self._rows: list[list[int]] = []

    @no_gradients()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._rows = [list(prompt) for prompt in prompts]
        return self._run()

    @no_gradients()
    def step(self, tokens: Tensor, active: Sequence[bool] | None) -> Tensor:
        alive = [True] * len(self._rows) if active is None else active
        for row, token, is_active in zip(self._rows, tokens.tolist(), alive, strict=True):
            if is_active:
                row.append(token)
        return self._run()

    def _run(self) -> Tensor:
        input_ids, lengths = padded(self._rows, self._device)
        return self._logits(last_rows(self._hidden_states(input_ids, None), lengths))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as one right-padded tensor (B, T), and their lengths (B,).

    The filler is id 0: causal attention never lets a real token see what stands behind it.
    """
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return input_ids.to(device), lengths.to(device)


def last_rows(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden state (B, D) of the last real token of every row of (B, T, D)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


class Step(NamedTuple):
    """One step of a batch: the tokens (B,), and which rows they are news for (B,) bool."""

    tokens: Tensor
    active: Tensor


def stream_tokens(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler,
    budgets: Sequence[int],
    eos_id: int,
    opening: int | Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Yield the tokens of every row until each has ended.

    The vocabulary head is computed once per token that is chosen, at the position it is chosen from.

    Args:
        decoding: where logits come from.
        prompts: token ids per row, each with at least one.
        sampler: chooses tokens.
        budgets: most tokens each row may generate, at least 1 each, or 2 if the opening is a token.
        eos_id: ends a row; it is yielded.
        opening: how every answer begins, if not with what the sampler chooses: a token, which is then read together with
            the prompt, or what chooses it from the first logits (B, V).

    Yields:
        :class:`Step`; a row that has ended repeats its last token and is inactive.
    """
    given = [opening] if isinstance(opening, int) else []
    logits = decoding.prefill([[*prompt, *given] for prompt in prompts])
    remaining = torch.tensor(list(budgets), device=logits.device) - len(given)
    active = torch.ones(len(prompts), dtype=torch.bool, device=logits.device)
    for token in given:
        yield Step(torch.full_like(remaining, token), active)
    tokens = opening(logits) if callable(opening) else sampler(logits)
    while True:
        yield Step(tokens, active)
        remaining = remaining - active.long()
        active = active & (tokens != eos_id) & (remaining > 0)
        alive = active.tolist()  # the caller reads every token anyway, so this adds no synchronisation
        if not any(alive):
            return
        logits = decoding.step(tokens, None if all(alive) else alive)
        tokens = torch.where(active, sampler(logits), tokens)
