"""Supervised memory-aware training (spec 5.4) of whole conversations, with gradients through every memory update.

With reference answers known, only memory is sequential. The encoder therefore reads all turns of all episodes at once,
memory attention makes one cheap step per turn, and the decoder answers all turns at once, each with the memory it had:

    encoded  = encoder(all turns)                        # one pass, B * N rows
    memory_0 = initial draw;  memory_n+1 = memory_attention(memory_n, encoded turn n)
    loss     = decoder(all turns | memory before each)   # one pass, B * N rows

Unlike the upstream recipe, which detaches the memory after each step, the gradient flows through all updates, so a
question eighteen turns later teaches the telling turn what to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .episodes import EpisodeBatch
from .settings import TrainingSettings

__all__ = ["StepResult", "episode_loss", "initial_memory", "memory_objective", "unroll_memory"]


class ReactiveModel(Protocol):
    """What training needs of a model: the three components of :class:`rxt_model.models.RxTAlpha`."""

    decoder: Any
    encoder: Any
    memory_attention: Any


@dataclass(frozen=True)
class StepResult:
    """Loss and recall of one batch. ``recall`` maps distance to (right, asked), by teacher-forced argmax."""

    loss: Tensor
    value_loss: float
    load_balance_loss: float
    recall: dict[int, tuple[int, int]]

    def detached(self) -> StepResult:
        """The same numbers without their graph."""
        return replace(self, loss=self.loss.detach())


def initial_memory(model: ReactiveModel, batch: int, generator: torch.Generator) -> Tensor:
    """A fresh draw of the model's initial memory for every conversation, (L, B, S, D)."""
    layers, _, slots, width = model.decoder.stm.memory.shape
    return torch.randn(layers, batch, slots, width, generator=generator)


class AnswerScore:
    """Adds up the weighted loss of answer tokens and counts the questions answered right."""

    def __init__(self, batch: EpisodeBatch) -> None:
        self.batch = batch
        self.total: Tensor | float = 0.0
        self.weight = 0.0
        self.value_total, self.value_count = 0.0, 0
        self.wrong = torch.zeros(len(batch.ids), dtype=torch.bool)
        self.seen = torch.zeros(len(batch.ids), dtype=torch.bool)

    def add(self, logits: Tensor, row: Tensor, column: Tensor) -> None:
        """Count predictions (n, V) of the tokens at these rows and columns of the batch."""
        target, weights = self.batch.ids[row, column], self.batch.weights[row, column]
        losses = functional.cross_entropy(logits.float(), target, reduction="none")
        self.total = self.total + (losses * weights).sum()
        self.weight += float(weights.sum())
        with torch.no_grad():
            on_value = self.batch.is_value[row, column]
            self.value_total += float(losses[on_value].sum())
            self.value_count += int(on_value.sum())
            self.seen[row] = True
            self.wrong[row[on_value & (logits.argmax(-1) != target)]] = True

    def result(self, balance: list[Tensor], load_balance_weight: float) -> StepResult:
        """The loss of everything that was added."""
        loss = self.total / max(self.weight, 1e-9)
        assert isinstance(loss, Tensor)
        balance_value = 0.0
        if balance:
            summed = torch.stack(balance).sum()
            balance_value = float(summed.detach())
            loss = loss + load_balance_weight * summed
        recall: dict[int, list[int]] = {}
        for turn, seen, wrong in zip(self.batch.row_turns, self.seen.tolist(), self.wrong.tolist(), strict=True):
            if seen and turn.kind == "ask":
                counts = recall.setdefault(turn.distance, [0, 0])
                counts[0] += not wrong
                counts[1] += 1
        return StepResult(
            loss, self.value_total / max(self.value_count, 1), balance_value,
            {distance: (right, asked) for distance, (right, asked) in sorted(recall.items())},
        )  # fmt: skip


def _length_sorted(rows: Tensor, lengths: Tensor, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """Rows in chunks of similar length, with the longest length of each chunk."""
    order = rows[torch.argsort(lengths[rows], stable=True)]
    for part in order.split(chunk):
        yield part, int(lengths[part].max())


def encode_turns(model: ReactiveModel, batch: EpisodeBatch, *, chunk: int = 96) -> list[Tensor]:
    """Encoder states of every turn but the last, whose memory nobody reads: N - 1 tensors (L, B, T, D), zero-padded."""
    rows = (
        torch.arange(batch.size * batch.steps).reshape(batch.size, batch.steps)[:, :-1].t().reshape(-1)
    )  # turn by turn
    longest = int(batch.heard_lengths[rows].max())
    parts, orders = [], []
    for part, length in _length_sorted(rows, batch.heard_lengths, chunk):
        mask = torch.arange(length) < batch.heard_lengths[part][:, None]
        parts.append(functional.pad(model.encoder(batch.heard_ids[part, :length], mask), (0, 0, 0, longest - length)))
        orders.append(part)
    position = torch.empty(len(batch.heard_ids), dtype=torch.long)
    position[torch.cat(orders)] = torch.arange(len(rows))
    encoded = torch.cat(parts, dim=1).index_select(1, position[rows])
    return list(encoded.unflatten(1, (batch.steps - 1, batch.size)).unbind(1))


def unroll_memory(
    model: ReactiveModel, batch: EpisodeBatch, memory: Tensor, *, reset: Callable[[int], Tensor] | None = None
) -> Tensor:
    """The memory that each turn is answered with, (L, B * N, S, D); gradients pass through all updates.

    Args:
        model: the model.
        batch: B episodes of N turns.
        memory: initial memory, (L, B, S, D).
        reset: if given, memory before turn n is ``reset(n)`` instead: the memory-less control.
    """
    episodes, steps = batch.size, batch.steps
    before = [memory]
    index = torch.arange(episodes) * steps
    if reset is not None:
        before += [reset(turn) for turn in range(1, steps)]
    elif steps > 1:
        for turn, encoded in enumerate(encode_turns(model, batch)):
            lengths = batch.heard_lengths[index + turn]
            longest = int(lengths.max())
            mask = torch.arange(longest) < lengths[:, None]
            memory = model.memory_attention(encoded[:, :, :longest], mask, memory)
            before.append(memory)
    return torch.stack(before, dim=2).flatten(1, 2)


def episode_loss(
    model: ReactiveModel,
    batch: EpisodeBatch,
    memory: Tensor,
    *,
    rows: Tensor | None = None,
    load_balance_weight: float = 0.01,
    chunk: int = 96,
    reset: Callable[[int], Tensor] | None = None,
) -> StepResult:
    """Weighted cross-entropy of the answers of a batch, each read with the memory of its turn.

    Args:
        model: the model.
        batch: B episodes of N turns.
        memory: initial memory, (L, B, S, D).
        rows: rows that the decoder answers; None takes all.
        load_balance_weight: weight of the experts' load-balance loss.
        chunk: rows per decoder call.
        reset: see :func:`unroll_memory`.
    """
    memories = unroll_memory(model, batch, memory, reset=reset)
    rows = torch.arange(len(batch.ids)) if rows is None else rows
    score = AnswerScore(batch)
    balance: list[Tensor] = []
    chunks = list(_length_sorted(rows, batch.lengths, chunk))
    order = batch.memory_rows[torch.cat([part for part, _ in chunks])]
    ordered = memories.index_select(1, order).split([len(part) for part, _ in chunks], 1)
    for (part, length), memory_of_part in zip(chunks, ordered, strict=True):
        mask = torch.arange(length) < batch.lengths[part][:, None]
        states = model.decoder.hidden_states(batch.ids[part, :length], mask, memory_of_part)
        if states.load_balance_loss is not None:
            balance.append(states.load_balance_loss * (len(part) / len(rows)))
        chosen = batch.weights[part, 1:length] > 0
        row, column = torch.nonzero(chosen, as_tuple=True)
        score.add(model.decoder.logits(states.hidden[:, :-1][chosen]), part[row], column + 1)
    return score.result(balance, load_balance_weight)


def memory_objective(
    model: ReactiveModel, batch: EpisodeBatch, rows: Tensor, settings: TrainingSettings, generator: torch.Generator
) -> StepResult:
    """The loss of a model with memory: :func:`episode_loss` from a fresh initial memory."""
    memory = initial_memory(model, batch.size, generator)
    return episode_loss(
        model,
        batch,
        memory,
        rows=rows,
        load_balance_weight=settings.load_balance_weight,
    )
