"""How long, how fast and on what conversations a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .episodes import EMPHASES

__all__ = ["OPTIMIZERS", "Stage", "TrainingSettings", "learning_rate"]

OPTIMIZERS = ("adamw", "muon")


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
        changes: share of statements that change a known fact instead of telling a new one.
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
    changes: float = 0.25

    def __post_init__(self) -> None:
        for name in ("statement_rows", "chat_rows", "mistakes", "changes"):
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

    Attributes:
        steps: optimizer steps.
        seed: of everything that is drawn.
        optimizer: one of :data:`OPTIMIZERS`, see :mod:`rxt_model.training.optimizer`.
        learning_rate: its peak.
        final_learning_rate: what remains of the peak at the end.
        warmup_steps: steps in which the rate rises to its peak.
        weight_decay: of matrices; memory gates, norms and biases have none.
        clip_norm: largest norm of a gradient.
        load_balance_weight: weight of the experts' load-balance loss.
        probes: further questions asked of every episode's last memory: cheap, because they are only decoded, and they ask
            for facts of every age.
        token_limit: most tokens of a turn.
        shards: parts a step's batch is drawn in. Each has its own episodes, their gradients are averaged, and several
            processes can work on them.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: for a value out of its range.
    """

    steps: int = 2000
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05
    warmup_steps: int = 60
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    load_balance_weight: float = 0.01
    probes: int = 3
    token_limit: int = 56
    shards: int = 2
    checkpoint_every: int = 100
    stages: tuple[Stage, ...] = DEFAULT_STAGES

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; it was {self.steps}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; it was {self.optimizer!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; it was {self.learning_rate}.")
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1; it was {self.shards}.")
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


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_learning_rate`` of the peak; times the rate of the stage."""
    peak = settings.learning_rate * settings.stage(step).rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_learning_rate
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
