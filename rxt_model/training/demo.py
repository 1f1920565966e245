"""The recipe of the demo model: everything ``rxt train demo`` does, from texts to a loadable directory.

A small RxT-Alpha (sparse query attention, a mixture of experts in the decoder, interlayer memory attention) learns to
talk, and to keep what it is told, from synthetic conversations about personal facts mixed with real dialogue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rxt_model.config import MemoryAttentionConfig, TransformerConfig
from rxt_model.models import RxTAlpha
from rxt_model.tokenizer import Tokenizer, train_tokenizer

from .dialogue import DialogueTurns, load_dialogue, small_talk
from .episodes import EpisodeWriter
from .fact_values import VALUES
from .facts import ATTRIBUTES, UNKNOWN_ANSWER
from .growth import with_slots
from .initial_weights import prepare_for_copying
from .loop import train
from .memory_aware import StepResult
from .messages import Wording
from .output import checked_directory, training_state, training_states
from .recipe import DEMO_PHASES, DEMO_SHAPE, DemoShape, Phase, phase_steps

__all__ = ["demo_model", "demo_tokenizer", "train_demo"]


def _tokenizer_texts(dialogue: DialogueTurns, seed: int) -> Iterator[str]:
    """Training texts, with the values of facts often enough that most become one token."""
    rng = random.Random(f"{seed}/tokenizer")
    wording = Wording("train", "plain")
    for _ in range(20000):
        attribute = rng.choice(ATTRIBUTES)
        value = rng.choice(attribute.values)
        yield wording.tell(rng, [(attribute.key, value)])
        yield wording.ask(rng, attribute.key)
        yield wording.answer(attribute.key, value)
    for values in VALUES.values():
        for value in values:
            yield from [value] * 300
            yield from [value[:1].upper() + value[1:]] * 30
    for query, answer in dialogue.train[:8000]:
        yield query
        yield answer
    for query, answer in small_talk("plain") * 20:
        yield query
        yield answer
    yield from [UNKNOWN_ANSWER] * 20


def demo_tokenizer(dialogue: DialogueTurns, *, vocab_size: int = DEMO_SHAPE.vocab_size, seed: int = 0) -> Tokenizer:
    """The tokenizer of the demo model, trained on training texts only."""
    return train_tokenizer(_tokenizer_texts(dialogue, seed), vocab_size)


def demo_model(tokenizer: Tokenizer, shape: DemoShape = DEMO_SHAPE, *, seed: int = 0) -> RxTAlpha:
    """An untrained demo model, prepared for copying."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "embed_dim": shape.embed_dim,
        "att_heads": shape.heads,
        "seq_len": shape.seq_len,
        "stm_size": shape.slots,
    }
    transformer: dict[str, Any] = {
        **shared,
        "att_groups": shape.key_value_heads,
        "att_query_groups": shape.query_heads,
        "vocab_size": tokenizer.vocab_size,
        "num_shared_experts": 0,
        "moe_bias_mode": "local",
    }
    model = RxTAlpha(
        TransformerConfig(
            **transformer,
            ff_dim=shape.expert_ff,
            use_moe=shape.experts > 1,
            num_experts=shape.experts,
            moe_top_k=shape.active_experts,
            cross_att_groups=shape.memory_heads,
            cross_att_query_groups=shape.memory_heads,
        ),
        TransformerConfig(**transformer, ff_dim=shape.encoder_ff, skip_memory_cross_attention=True),
        MemoryAttentionConfig(
            **shared,
            att_groups=shape.memory_heads,
            att_query_groups=shape.memory_heads,
            interlayer_att_groups=shape.context_heads,
            interlayer_att_query_groups=shape.context_heads,
            use_gated_residual=True,
            residual_gate_type="linear",
            use_tanh_residual_gate=False,
        ),
        memory_attention_variant=shape.variant,
        tokenizer=tokenizer,
    )
    prepare_for_copying(model)
    return model


def train_demo(
    output_directory: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    start: RxTAlpha | None = None,
    shape: DemoShape = DEMO_SHAPE,
    phases: Sequence[Phase] = DEMO_PHASES,
    workers: int = 1,
    on_step: Callable[[int, StepResult], None] | None = None,
) -> Path:
    """Train the demo model, or continue a training that was interrupted.

    Args:
        output_directory: where the model goes; the state of the training is kept there too, and removed at the end.
        steps: optimizer steps of all phases together; None takes the recipe's. The curriculum stretches with them.
        seed: fixes data, initial weights and memories: on one machine, the same seed gives the same model.
        resume: continue from the state in ``output_directory`` if there is one.
        start: a float32 demo model that has been trained before: all phases but the last are left out, and the last begins
            with it.
        shape: sizes of the model.
        phases: the recipe; ``steps`` and ``seed`` replace those in it.
        workers: processes that share the work, see :func:`rxt_model.training.loop.train`.
        on_step: called after each step with its number, counted through all phases, and its result.

    Returns:
        The directory, to be given to ``RxTAlpha.from_pretrained`` and ``Tokenizer.from_pretrained``. Weights are saved in
        float16, which halves the file; compute with them in float32.

    Raises:
        ValueError: for arguments out of range, or a training state of other settings.
        ModuleNotFoundError: if the dialogue package is not installed.
    """
    counts = phase_steps(phases, steps)
    directory = checked_directory(output_directory)
    dialogue = load_dialogue()
    directory.mkdir(parents=True, exist_ok=True)
    if start is None:
        tokenizer = demo_tokenizer(dialogue, vocab_size=shape.vocab_size, seed=seed)
        model = demo_model(tokenizer, shape, seed=seed)
        first = 0
    elif start.tokenizer is None:
        raise ValueError("start has no tokenizer; load it with the one that it was trained with.")
    elif any(parameter.dtype is not torch.float32 for parameter in start.parameters()):
        raise ValueError("start has weights of another type than float32; load it with dtype=torch.float32.")
    else:
        model, tokenizer, first = start, start.tokenizer, len(phases) - 1
    for number in range(first, len(phases)):
        before = sum(counts[first:number])

        def tell(step: int, result: StepResult, before: int = before) -> None:
            if on_step is not None:
                on_step(before + step, result)

        model = with_slots(model, phases[number].slots)
        settings = replace(phases[number].settings, seed=seed, steps=round(counts[number] / phases[number].until))
        train(
            model,
            tokenizer,
            EpisodeWriter.for_split("train", dialogue, phases[number].variety),
            settings,
            checkpoint=training_state(directory, number + 1),
            resume=resume,
            workers=workers,
            on_step=tell,
            stop_after=counts[number],
        )
    model.to(torch.float16).save_pretrained(directory, embedding="once")
    for state in training_states(directory):
        state.unlink()
    return directory
