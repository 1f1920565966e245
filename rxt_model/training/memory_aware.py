"""Supervised memory-aware training (spec 5.4) of whole conversations, with gradients through every memory update.

With reference answers known, only memory is sequential. The encoder therefore reads all turns of all episodes at once,
memory attention makes one cheap step per turn, and the decoder answers all turns at once, each with the memory it had:

    encoded  = encoder(all turns)                        # one pass, B * N rows
    memory_0 = initial draw;  memory_n+1 = memory_attention(memory_n, encoded turn n)
    loss     = decoder(all turns | memory before each)   # one pass, B * N rows

Unlike the upstream recipe, which detaches the memory after each step, the gradient flows through all updates, so a
question eighteen turns later teaches the telling turn what to write. Everything random in step *s* is drawn from
``(seed, s)``, so a run that is killed and resumed gives exactly the numbers of one that was not.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rxt_model.files import atomic_path
from rxt_model.tokenizer import Tokenizer

from .episodes import EMPHASES, EpisodeBatch, EpisodeWriter, batch_episodes

__all__ = ["Stage", "StepResult", "TrainingSettings", "episode_loss", "initial_memory", "learning_rate", "train"]

CHECKPOINT_FORMAT = "rxt-training-1"


class ReactiveModel(Protocol):
    """What training needs of a model: the three components of :class:`rxt_model.models.RxTAlpha`."""

    decoder: Any
    encoder: Any
    memory_attention: Any


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum.

    Attributes:
        until: share of all steps at which it ends.
        turns: lengths of episodes, one of which is drawn per step.
        rows: interactions per step; the number of episodes is ``rows // turns``.
        max_facts: most facts in one episode.
        statement_rows: share of statements whose answers are trained; all turns are read and written into memory.
        chat_rows: likewise for chat.
        emphasis: loss weights, one of :data:`rxt_model.training.episodes.EMPHASES`.
        mistakes: share of answers that memory hears wrong. A model that talks hears its own mistakes; it must remember
            what the user said, not what it made of it.
        rate: factor on the learning rate. Long episodes want a smaller one: their gradients pass through many updates.
    """

    until: float
    turns: tuple[int, ...]
    rows: int
    max_facts: int
    statement_rows: float = 0.4
    chat_rows: float = 0.3
    emphasis: str = "facts"
    mistakes: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("statement_rows", "chat_rows", "mistakes"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1; it was {getattr(self, name)}.")
        if self.emphasis not in EMPHASES:
            raise ValueError(f"emphasis must be one of {', '.join(EMPHASES)}; it was {self.emphasis!r}.")


DEFAULT_STAGES = (
    Stage(0.08, (2,), 384, 3),
    Stage(0.20, (2, 4), 384, 4),
    Stage(0.40, (4, 8), 384, 6),
    Stage(0.60, (8, 12), 432, 10),
    Stage(1.00, (8, 12, 18), 432, 14),
)


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train.

    ``probes`` is the number of further questions asked of every episode's last
    memory: cheap, because they are only decoded, and they ask for facts of every age.

    Raises:
        ValueError: for a value out of its range.
    """

    steps: int = 2000
    seed: int = 0
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05
    warmup_steps: int = 60
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    load_balance_weight: float = 0.01
    probes: int = 3
    token_limit: int = 56
    checkpoint_every: int = 100
    stages: tuple[Stage, ...] = DEFAULT_STAGES

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; it was {self.steps}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; it was {self.learning_rate}.")
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0; it was {self.probes}.")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1; it was {self.checkpoint_every}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0; it was {self.warmup_steps}.")
        if not self.stages or self.stages[-1].until != 1.0:
            raise ValueError("stages must be at least one, and the last must end at 1.0.")

    def stage(self, step: int) -> Stage:
        """The stretch of the curriculum that a step belongs to."""
        return next(stage for stage in self.stages if step < stage.until * self.steps or stage.until == 1.0)


@dataclass(frozen=True)
class StepResult:
    """Loss and recall of one batch. ``recall`` maps distance to (right, asked), by teacher-forced argmax."""

    loss: Tensor
    value_loss: float
    load_balance_loss: float
    recall: dict[int, tuple[int, int]]


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_learning_rate`` of the peak; times the rate of the stage."""
    peak = settings.learning_rate * settings.stage(step).rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_learning_rate
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


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


def training_batch(
    writer: EpisodeWriter, tokenizer: Tokenizer, settings: TrainingSettings, step: int
) -> tuple[EpisodeBatch, Tensor]:
    """The batch of a step and the rows its decoder answers: every question, a share of statements and of chat."""
    rng = random.Random(f"{settings.seed}/{step}/episodes")
    stage = settings.stage(step)
    turns = rng.choice(stage.turns)
    count = max(1, stage.rows // turns)
    episodes = [writer.episode(rng, turns, max_facts=stage.max_facts) for _ in range(count)]
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


Objective = Callable[[Any, EpisodeBatch, Tensor, "TrainingSettings", torch.Generator], StepResult]
"""(model, batch, rows to answer, settings, generator of this step) to the loss."""


def memory_objective(
    model: ReactiveModel, batch: EpisodeBatch, rows: Tensor, settings: TrainingSettings, generator: torch.Generator
) -> StepResult:
    """The loss of a model with memory: :func:`episode_loss` from a fresh initial memory."""
    memory = initial_memory(model, batch.size, generator)
    return episode_loss(model, batch, memory, rows=rows, load_balance_weight=settings.load_balance_weight)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each shared one once."""
    return dict(model.named_parameters())


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW; decay acts on matrices only."""
    decayed = [p for p in _parameters(model).values() if p.dim() >= 2]
    others = [p for p in _parameters(model).values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def _fingerprint(settings: TrainingSettings) -> str:
    """The settings that decide the course of a run, to refuse resuming a different one."""
    values = asdict(settings)
    values.pop("checkpoint_every")
    return json.dumps(values, sort_keys=True)


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings, step: int
) -> None:
    """Write model and optimizer to one safetensors file, under a temporary name first. ``step`` steps are done."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _parameters(model).items():
        tensors[f"model/{name}"] = parameter.detach().contiguous()
        state = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                tensors[f"{key}/{name}"] = state[key].contiguous()
    metadata = {"format": CHECKPOINT_FORMAT, "step": str(step), "settings": _fingerprint(settings)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> int:
    """Restore what :func:`save_checkpoint` wrote; returns the number of steps done.

    Raises:
        ValueError: if the file is not such a checkpoint, belongs to other settings, or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The training checkpoint {path} cannot be read ({error}); delete it to start again."
        ) from error
    if metadata.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a training checkpoint of this version; delete it to start again.")
    if metadata.get("settings") != _fingerprint(settings):
        raise ValueError(
            f"The training checkpoint {path} was made with other settings (steps, seed, rates or stages); "
            "give the same settings, another output directory, or resume=False."
        )
    step = int(metadata["step"])
    parameters = _parameters(model)
    expected = {f"model/{name}" for name in parameters}
    found = {name for name in tensors if name.startswith("model/")}
    if expected != found or any(tensors[f"model/{name}"].shape != p.shape for name, p in parameters.items()):
        raise ValueError(
            f"The training checkpoint {path} belongs to a model of another shape; delete it to start again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
            if f"exp_avg/{name}" in tensors:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"exp_avg/{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
                }
    return step


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    writer: EpisodeWriter,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    resume: bool = True,
    objective: Objective | None = None,
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
        objective: loss of a batch; None is that of a model with memory, see :func:`memory_objective`.
        on_step: called after each step with its number (from 1) and result.
        stop_after: end the run early after this many steps in all, as a kill would, but with a checkpoint.

    Returns:
        The losses of the steps made in this call.
    """
    objective = objective or memory_objective
    optimizer = make_optimizer(model, settings)
    done = 0
    if checkpoint is not None and resume and checkpoint.exists():
        done = load_checkpoint(checkpoint, model, optimizer, settings)
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    losses: list[float] = []
    model.train()
    running: float | None = None
    bar = tqdm(range(done, last), initial=done, total=settings.steps, disable=not sys.stderr.isatty(), unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        batch, rows = training_batch(writer, tokenizer, settings, step)
        torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, where a model has any
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        result = objective(model, batch, rows, settings, generator)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(float(result.loss.detach()))
        running = losses[-1] if running is None else 0.95 * running + 0.05 * losses[-1]
        bar.set_postfix(loss=f"{running:.3f}", turns=batch.steps)
        if on_step is not None:
            on_step(step + 1, result)
        if checkpoint is not None and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == last):
            save_checkpoint(checkpoint, model, optimizer, settings, step + 1)
    model.eval()
    return losses
