"""The control of the demo model: a language model without memory that reads the whole conversation at every turn.

``rxt train stateless`` trains it on the demo model's conversations, and ``rxt bench memory --history DIR`` measures it beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from rxt_model.config import StatelessConfig
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer

from .dialogue import load_dialogue
from .episodes import EpisodeWriter
from .history import history_objective
from .initial_weights import prepare_for_copying
from .loop import train
from .memory_aware import StepResult
from .output import checked_directory, training_state
from .recipe import STATELESS_PHASE, STATELESS_SHAPE, DemoShape, Phase, phase_steps

__all__ = ["stateless_model", "train_stateless"]


def stateless_model(
    tokenizer: Tokenizer, shape: DemoShape = STATELESS_SHAPE, *, seed: int = 0
) -> SparseQueryTransformer:
    """A stateless language model of the demo model's kind of decoder layers; sizes of encoder and memory are not used."""
    torch.manual_seed(seed)
    model = SparseQueryTransformer(
        StatelessConfig(
            num_layers=shape.num_layers,
            vocab_size=tokenizer.vocab_size,
            embed_dim=shape.embed_dim,
            ff_dim=shape.expert_ff,
            att_heads=shape.heads,
            att_groups=shape.key_value_heads,
            att_num_query_groups=shape.query_heads,
            use_moe_ff=shape.experts > 1,
            ff_num_experts=shape.experts,
            ff_moe_top_k=shape.active_experts,
            use_vectorized_moe=True,
            seq_len=1024,
        )
    )
    prepare_for_copying(model)
    return model


def train_stateless(
    output_directory: str | Path,
    tokenizer: Tokenizer,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    shape: DemoShape = STATELESS_SHAPE,
    phase: Phase = STATELESS_PHASE,
    workers: int = 1,
    on_step: Callable[[int, StepResult], None] | None = None,
) -> Path:
    """Train the control, or continue a training that was interrupted.

    Args:
        output_directory: where the model goes; the state of the training is kept there too, and removed at the end.
        tokenizer: that of the model it is compared with.
        steps, seed, resume, shape, workers, on_step: as in :func:`rxt_model.training.demo.train_demo`.
        phase: the recipe: one phase, of which the widths are not used.

    Returns:
        The directory, to be given to ``SparseQueryTransformer.from_pretrained``.

    Raises:
        ValueError: for arguments out of range, or a training state of other settings.
        ModuleNotFoundError: if the dialogue package is not installed.
    """
    steps = phase_steps([phase], steps)[0]
    directory = checked_directory(output_directory)
    dialogue = load_dialogue()
    directory.mkdir(parents=True, exist_ok=True)
    model = stateless_model(tokenizer, shape, seed=seed)
    state = training_state(directory, 1)
    train(
        model,
        tokenizer,
        EpisodeWriter.for_split("train", dialogue, phase.variety),
        replace(phase.settings, seed=seed, steps=round(steps / phase.until)),
        checkpoint=state,
        resume=resume,
        objective=history_objective,
        workers=workers,
        on_step=on_step,
        stop_after=steps,
    )
    model.save_pretrained(directory)
    state.unlink(missing_ok=True)
    return directory
