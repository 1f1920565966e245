"""Sizes, phases and rates: what is trained, on which conversations, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .sentences import VARIETIES
from .settings import Stage, TrainingSettings

__all__ = ["DEMO_PHASES", "DEMO_SHAPE", "STATELESS_PHASE", "STATELESS_SHAPE", "DemoShape", "Phase", "phase_steps"]


@dataclass(frozen=True)
class DemoShape:
    """Sizes of the demo model at the start of its training; the defaults give 1.97 M weights."""

    vocab_size: int = 2944
    embed_dim: int = 128
    num_layers: int = 3
    heads: int = 8
    query_heads: int = 4
    key_value_heads: int = 4
    slots: int = 48
    memory_heads: int = 8
    context_heads: int = 2
    encoder_ff: int = 160
    expert_ff: int = 80
    experts: int = 4
    active_experts: int = 2
    seq_len: int = 256
    variant: str = "interlayer"


DEMO_SHAPE = DemoShape()


@dataclass(frozen=True)
class Phase:
    """A part of the recipe.

    Attributes:
        settings: curriculum and rates.
        until: share of its steps after which the next phase takes over.
        variety: wording of its conversations, one of :data:`rxt_model.training.sentences.VARIETIES`.
        slots: memory slots that the model is given before it, see :mod:`rxt_model.training.growth`; None keeps those it has.

    Raises:
        ValueError: ``until`` is not above 0 and at most 1, or for another variety.
    """

    settings: TrainingSettings
    until: float = 1.0
    variety: str = "full"
    slots: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until must be above 0 and at most 1; it was {self.until}.")
        if self.variety not in VARIETIES:
            raise ValueError(f"variety must be one of {', '.join(VARIETIES)}; it was {self.variety!r}.")

    @property
    def steps(self) -> int:
        """Steps that are made."""
        return max(1, round(self.settings.steps * self.until))


DEMO_PHASES = (
    Phase(
        TrainingSettings(
            steps=2500,
            learning_rate=2e-3,
            stages=(
                Stage(0.08, (2,), 192, 3),
                Stage(0.15, (4,), 192, 5),
                Stage(0.25, (4, 8), 240, 8),
                Stage(0.40, (4, 8, 12, 18), 252, 14, rate=0.5),
                Stage(
                    1.00, (4, 8, 12, 18), 216, 14,
                    statement_rows=1.0, chat_rows=0.8, emphasis="answers", mistakes=0.35, rate=0.9,
                ),
            ),
        ),
        until=0.64,
        variety="plain",
    ),
    Phase(
        TrainingSettings(
            steps=2400,
            learning_rate=5e-4,
            final_learning_rate=0.02,
            warmup_steps=40,
            stages=(
                Stage(
                    1.00, (4, 8, 12, 18), 216, 13,
                    statement_rows=0.6, chat_rows=0.4, emphasis="answers", mistakes=0.35, changes=0.45,
                ),
            ),
        ),
        variety="plain",
    ),
    Phase(
        TrainingSettings(
            steps=3000,
            learning_rate=6e-4,
            final_learning_rate=0.02,
            warmup_steps=40,
            stages=(
                Stage(
                    1.00, (4, 8, 12, 18), 216, 13,
                    statement_rows=0.6, chat_rows=0.4, emphasis="answers", mistakes=0.35, changes=0.45,
                ),
            ),
        ),
    ),
    Phase(
        TrainingSettings(
            steps=2700,
            optimizer="muon",
            learning_rate=6e-4,
            final_learning_rate=0.02,
            warmup_steps=40,
            probes=6,
            stages=(
                Stage(
                    1.00, (6, 12, 18, 24), 240, 13,
                    statement_rows=0.35, chat_rows=0.35, emphasis="replies", mistakes=0.3, changes=0.45,
                ),
            ),
        ),
        variety="open",
        slots=96,
    ),
)  # fmt: skip
"""First what memory is for, in short and then in long conversations; its schedule is left early, while steps are still long.
Then the same with a rate that falls to nothing: that is when recall of old facts comes. Then four times as many sentences, for
what people say in other words than the first two heard. Then twice the slots and all sentences, by another optimizer, with
longer conversations and more questions about each of them.

Long episodes want small steps: at the full rate, training on eighteen turns became unstable, and a trained model that
went on at 1e-3 forgot within a hundred steps what it could do."""

STATELESS_SHAPE = replace(DEMO_SHAPE, num_layers=5, expert_ff=240)
"""Two layers more than the demo model has, which cost what its encoder and memory attention do, and wider experts."""

STATELESS_PHASE = Phase(
    TrainingSettings(
        steps=1200,
        learning_rate=1.5e-3,
        final_learning_rate=0.02,
        stages=(
            Stage(0.06, (2,), 192, 3),
            Stage(0.15, (2, 4), 192, 5),
            Stage(0.30, (4, 8), 240, 8),
            Stage(
                1.00, (4, 8, 12, 18), 216, 13,
                statement_rows=0.6, chat_rows=0.6, emphasis="answers", changes=0.45,
            ),
        ),
    ),
)  # fmt: skip
"""One phase is enough for a model that has no memory to grow."""


def phase_steps(phases: Sequence[Phase], steps: int | None) -> list[int]:
    """Steps made in every phase; ``steps`` in all are shared out as the recipe's are, each phase having at least one."""
    own = [phase.steps for phase in phases]
    if steps is None:
        return own
    if steps < len(phases):
        raise ValueError(f"steps must be at least {len(phases)}, one for each phase; it was {steps}.")
    shares = [max(1, round(steps * count / sum(own))) for count in own[:-1]]
    return [*shares, max(1, steps - sum(shares))]
