"""The training loop: batches, gradients, optimizer, progress and checkpoints.

Everything random in shard *k* of step *s* is drawn from ``(seed, s, k)``, so a run that is killed and resumed gives
exactly the numbers of one that was not, and so does a run that is shared among several processes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rxt_model.tokenizer import Tokenizer

from .checkpoint import load_checkpoint, save_checkpoint
from .episodes import EpisodeBatch, EpisodeWriter, batch_episodes
from .memory_aware import StepResult, memory_objective
from .optimizer import NamedOptimizer
from .settings import TrainingSettings, learning_rate
from .workers import ShardGradients

__all__ = ["Objective", "train", "training_batch"]

Objective = Callable[[Any, EpisodeBatch, Tensor, TrainingSettings, torch.Generator], StepResult]
"""(model, batch, rows to answer, settings, generator of this shard) to the loss. A function that can be imported."""


def training_batch(
    writer: EpisodeWriter, tokenizer: Tokenizer, settings: TrainingSettings, step: int, shard: int = 0
) -> tuple[EpisodeBatch, Tensor]:
    """One shard of a step and the rows its decoder answers: every question, a share of statements and of chat."""
    stage = settings.stage(step)
    turns = random.Random(f"{settings.seed}/{step}/turns").choice(stage.turns)
    rng = random.Random(f"{settings.seed}/{step}/{shard}/episodes")
    count = max(1, stage.rows // settings.shards // turns)
    episodes = [writer.episode(rng, turns, max_facts=stage.max_facts, changes=stage.changes) for _ in range(count)]
    probes = [
        (index, probe)
        for index, episode in enumerate(episodes)
        for probe in writer.probes(rng, episode, min(settings.probes, turns - 1))
    ]
    mistakes = {
        row: writer.mistake(rng, turn)
        for row, turn in enumerate(turn for episode in episodes for turn in episode)
        if rng.random() < stage.mistakes
    }
    batch = batch_episodes(
        tokenizer,
        episodes,
        probes=probes,
        mistakes=mistakes,
        limit=settings.token_limit,
        emphasis=stage.emphasis,
    )
    share = {"chat": stage.chat_rows, "tell": stage.statement_rows, "update": stage.statement_rows}
    keep = [index for index, turn in enumerate(batch.row_turns) if rng.random() < share.get(turn.kind, 1.0)]
    return batch, torch.tensor(keep)


@dataclass(frozen=True)
class ShardTask:
    """Forward and backward of one shard of a step; picklable, so that any process can do it."""

    writer: EpisodeWriter
    tokenizer: Tokenizer
    settings: TrainingSettings
    objective: Objective

    def __call__(self, model: nn.Module, step: int, shard: int) -> StepResult:
        batch, rows = training_batch(self.writer, self.tokenizer, self.settings, step, shard)
        seed = (self.settings.seed * 1_000_003 + step) * self.settings.shards + shard
        torch.manual_seed(seed)  # dropout, where a model has any
        result = self.objective(model, batch, rows, self.settings, torch.Generator().manual_seed(seed))
        result.loss.backward()
        return result.detached()


def _mean_result(results: Sequence[StepResult]) -> StepResult:
    """The result of a step from those of its shards."""
    recall: dict[int, tuple[int, int]] = {}
    for result in results:
        for distance, (right, asked) in result.recall.items():
            before = recall.get(distance, (0, 0))
            recall[distance] = (before[0] + right, before[1] + asked)
    return StepResult(
        torch.stack([result.loss for result in results]).mean(),
        sum(result.value_loss for result in results) / len(results),
        sum(result.load_balance_loss for result in results) / len(results),
        dict(sorted(recall.items())),
    )


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    writer: EpisodeWriter,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    resume: bool = True,
    objective: Objective = memory_objective,
    workers: int = 1,
    on_step: Callable[[int, StepResult], None] | None = None,
    stop_after: int | None = None,
) -> list[float]:
    """Train a model in place.

    Args:
        model: an :class:`RxTAlpha`, or anything with the same three components.
        tokenizer: its tokenizer.
        writer: makes the episodes.
        settings: how.
        checkpoint: file for the state of the run, written every ``settings.checkpoint_every`` steps and at the end.
        resume: continue from ``checkpoint`` if it exists.
        objective: loss of a batch; by default that of a model with memory, :func:`memory_objective`.
        workers: processes that share the shards of a step; see :class:`ShardGradients`. They change the time alone.
        on_step: called after each step with its number (from 1) and result.
        stop_after: end the run early after this many steps in all, as a kill would, but with a checkpoint.

    Returns:
        The losses of the steps made in this call.

    Raises:
        ValueError: for a checkpoint that does not belong to this run, or ``workers`` below 1.
    """
    optimizer = NamedOptimizer(model, settings)
    done = 0
    if checkpoint is not None and resume and checkpoint.exists():
        done = load_checkpoint(checkpoint, model, optimizer, settings, writer.fingerprint())
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    losses: list[float] = []
    running: float | None = None
    model.train()
    task = ShardTask(writer, tokenizer, settings, objective)
    with ShardGradients(model, task, shards=settings.shards, workers=workers) as gradients:
        bar = tqdm(range(done, last), initial=done, total=settings.steps, disable=not sys.stderr.isatty(), unit="step")
        for step in bar:
            result = _mean_result(gradients(step))
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step(learning_rate(settings, step))
            losses.append(float(result.loss))
            running = losses[-1] if running is None else 0.95 * running + 0.05 * losses[-1]
            bar.set_postfix(loss=f"{running:.3f}")
            if on_step is not None:
                on_step(step + 1, result)
            if checkpoint is not None and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == last):
                save_checkpoint(checkpoint, model, optimizer, settings, step + 1, writer.fingerprint())
    model.eval()
    return losses
