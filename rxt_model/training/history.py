"""The stateless control: a language model that reads the whole conversation, trained on the same episodes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rxt_model.stateless import SparseQueryTransformer

from .episodes import EpisodeBatch
from .memory_aware import AnswerScore, StepResult
from .settings import TrainingSettings

__all__ = ["history_objective"]


def history_objective(
    model: SparseQueryTransformer,
    batch: EpisodeBatch,
    rows: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator,
) -> StepResult:
    """Loss of the same answers, each read with all turns before it in the context instead of a memory.

    ``generator`` is not drawn from: a stateless model has no initial memory.
    """
    del generator
    score = AnswerScore(batch)
    answered = torch.zeros(len(batch.ids), dtype=torch.bool)
    answered[rows[rows < batch.size * batch.steps]] = True  # a probe would need a context of its own
    balance: list[Tensor] = []
    # Similar lengths together; a few episodes at a time keeps attention maps small.
    totals = batch.lengths[: batch.size * batch.steps].reshape(batch.size, batch.steps).sum(1)
    order = torch.argsort(totals, stable=True)
    for part in order.split(max(1, 96 // batch.steps)):
        sequences, places = [], []
        for episode in part.tolist():
            chosen = range(episode * batch.steps, (episode + 1) * batch.steps)
            lengths = [int(batch.lengths[row]) for row in chosen]
            sequences.append(torch.cat([batch.ids[row, :n] for row, n in zip(chosen, lengths, strict=True)]))
            row_of = torch.cat([torch.full((n,), row) for row, n in zip(chosen, lengths, strict=True)])
            places.append((row_of, torch.cat([torch.arange(n) for n in lengths])))
        states = model.hidden_states(pad_sequence(sequences, batch_first=True))
        if states.load_balance_loss is not None:
            balance.append(states.load_balance_loss * (len(part) / batch.size))
        for index, (row, column) in enumerate(places):
            counted = (batch.weights[row, column] > 0) & answered[row]
            hidden = states.hidden[index, : len(row) - 1][counted[1:]]
            score.add(model.logits(hidden), row[counted], column[counted])
    return score.result(balance, settings.load_balance_weight)
