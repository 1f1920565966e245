"""The recipe of the demo model: everything ``rxt train demo`` does, from texts to a loadable directory.

A small RxT-Alpha (sparse query attention, a mixture of experts in the decoder, interlayer memory attention) learns to
talk, and to keep what it is told, from synthetic conversations about personal facts mixed with real dialogue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rxt_model.config import MemoryAttentionConfig, StatelessConfig, TransformerConfig
from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer, train_tokenizer

from .dialogue import DialogueTurns, load_dialogue, small_talk
from .episodes import EpisodeWriter
from .fact_values import VALUES
from .facts import ATTRIBUTES, UNKNOWN_ANSWER
from .history import history_objective
from .loop import train
from .memory_aware import StepResult
from .messages import Wording
from .sentences import VARIETIES
from .settings import Stage, TrainingSettings
from .widening import widened

__all__ = [
    "DEMO_PHASES",
    "DEMO_SHAPE",
    "DemoShape",
    "Phase",
    "demo_model",
    "demo_tokenizer",
    "prepare_for_copying",
    "stateless_model",
    "train_demo",
    "train_stateless",
    "training_states",
]


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
        variety: wording of its conversations, ``"plain"`` or ``"full"``, see :mod:`rxt_model.training.sentences`.
        encoder_ff, expert_ff: hidden widths that the model is given before it, see :mod:`rxt_model.training.widening`; None
            keeps those it has.

    Raises:
        ValueError: ``until`` is not above 0 and at most 1, or for another variety.
    """

    settings: TrainingSettings
    until: float = 1.0
    variety: str = "full"
    encoder_ff: int | None = None
    expert_ff: int | None = None

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
            steps=2600,
            learning_rate=6e-4,
            final_learning_rate=0.02,
            warmup_steps=40,
            stages=(
                Stage(
                    1.00, (6, 12, 18), 216, 13,
                    statement_rows=0.6, chat_rows=0.6, emphasis="answers", mistakes=0.35, changes=0.45,
                ),
            ),
        ),
        encoder_ff=480,
        expert_ff=240,
    ),
)  # fmt: skip
"""First what memory is for, in short and then in long conversations; its schedule is left early, while steps are still long.
Then the same with a rate that falls to nothing: that is when recall of old facts comes. Then four times as many sentences, for
what people say in other words than the first two heard. Then the same with wider networks, where the narrow ones had
learned what they could: recall of training's own wording had come no higher than that of held-out wording.

Long episodes want small steps: at the full rate, training on eighteen turns became unstable, and a trained model that
went on at 1e-3 forgot within a hundred steps what it could do."""


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


def _matching_heads(attention: Any, basis: Tensor) -> None:
    """Let queries find what resembles them: query and key projections start as the same orthonormal map."""
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.copy_(basis[: projection.weight.shape[0]])


def _copying_heads(attention: Any, basis: Tensor) -> None:
    """Let values go in and come out unchanged, in a subspace that is the same everywhere."""
    value, output = attention.v_proj.weight, attention.out_proj.weight
    value.copy_(basis[: value.shape[0]])
    if output.shape[1] == value.shape[0]:
        output.copy_(basis[: value.shape[0]].t())
    else:  # several query heads share a key/value head: spread its value over them
        repeats = output.shape[1] // value.shape[0]
        heads = basis[: value.shape[0]].unflatten(0, (-1, value.shape[0] // attention.key_value_heads))
        output.copy_(heads.repeat_interleave(repeats, 0).flatten(0, 1).t() / repeats)


@torch.no_grad()
def prepare_for_copying(model: RxTAlpha | SparseQueryTransformer) -> None:
    """Start from weights with which a token's identity survives on its way through memory.

    Recalling a fact means copying a token: embedding, encoder, memory attention, memory, memory read, head. With random
    weights that chain must first be found by chance, with these it exists at the start and training only has to learn
    *what* to keep and *when* to read it:

    * embeddings are small (standard deviation 0.25) and the head starts as their copy;
    * all attentions that carry facts share one orthonormal value subspace, with outputs the transpose of values;
    * memory is written and read by resemblance at first: there queries and keys start as the same projection, so a new
      fact goes where something like it is, and a question finds what is like it;
    * memory gates start rather closed, some slots more than others, and depend on their own slot's status: slots keep
      what they have for shorter or longer, and are opened by what is written.
    """
    width = model.config.embed_dim if isinstance(model, SparseQueryTransformer) else model.decoder.config.embed_dim
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    network = model.model if isinstance(model, SparseQueryTransformer) else model.decoder.model
    network.embedding.weight.mul_(0.25)
    network.head.weight.copy_(network.embedding.weight)
    network.head.bias.zero_()
    for layer in network.layers:
        _copying_heads(layer.attention, basis)
        if hasattr(layer, "memory_cross_attention"):
            _copying_heads(layer.memory_cross_attention, basis)
            _matching_heads(layer.memory_cross_attention, basis)
    if isinstance(model, SparseQueryTransformer):
        return
    memory = model.memory_attention.model
    for attention in memory.attention_layers:
        _copying_heads(attention, basis)
        _matching_heads(attention, basis)
    gates = [(memory.residual_gate_layers, -1.0)]
    if hasattr(memory, "mean_residual_gate_layers"):
        gates.append((memory.mean_residual_gate_layers, -3.0))
    for layers, bias in gates:
        for gate in layers:
            if isinstance(linear := gate.gate, nn.Linear):
                linear.bias.copy_(torch.linspace(bias - 1.0, bias + 1.0, len(linear.bias)))
                linear.weight.mul_(0.3)
                linear.weight.diagonal().add_(8.0)


def stateless_model(tokenizer: Tokenizer, shape: DemoShape = DEMO_SHAPE, *, seed: int = 0) -> SparseQueryTransformer:
    """A stateless language model of about the demo model's size: the same decoder layers, more of them."""
    torch.manual_seed(seed)
    model = SparseQueryTransformer(
        StatelessConfig(
            num_layers=shape.num_layers + 2,
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


def _phase_steps(phases: Sequence[Phase], steps: int | None) -> list[int]:
    """Steps made in every phase; ``steps`` in all are shared out as the recipe's are, each phase having at least one."""
    own = [phase.steps for phase in phases]
    if steps is None:
        return own
    if steps < len(phases):
        raise ValueError(f"steps must be at least {len(phases)}, one for each phase; it was {steps}.")
    shares = [max(1, round(steps * count / sum(own))) for count in own[:-1]]
    return [*shares, max(1, steps - sum(shares))]


def _state_of(directory: Path, phase: int) -> Path:
    return directory / f"training-state-{phase}.safetensors"


def training_states(directory: Path) -> list[Path]:
    """The files in which an unfinished training of the demo model is kept."""
    return sorted(directory.glob("training-state-*.safetensors"))


def _prepared(output_directory: str | Path) -> Path:
    directory = Path(output_directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_directory must be a directory; {directory} is a file.")
    return directory


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
    counts = _phase_steps(phases, steps)
    directory = _prepared(output_directory)
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

        model = widened(model, encoder_ff=phases[number].encoder_ff, expert_ff=phases[number].expert_ff, seed=seed)
        settings = replace(phases[number].settings, seed=seed, steps=round(counts[number] / phases[number].until))
        train(
            model,
            tokenizer,
            EpisodeWriter.for_split("train", dialogue, phases[number].variety),
            settings,
            checkpoint=_state_of(directory, number + 1),
            resume=resume,
            workers=workers,
            on_step=tell,
            stop_after=counts[number],
        )
    model.to(torch.float16).save_pretrained(directory, embedding="once")
    for state in training_states(directory):
        state.unlink()
    return directory


def train_stateless(
    output_directory: str | Path,
    tokenizer: Tokenizer,
    *,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    shape: DemoShape = DEMO_SHAPE,
    phase: Phase = DEMO_PHASES[0],
    workers: int = 1,
    on_step: Callable[[int, StepResult], None] | None = None,
) -> Path:
    """Train the stateless model that reads the whole history, on the same data; arguments as in :func:`train_demo`.

    One phase is enough: it has no memory that could grow.
    """
    directory = _prepared(output_directory)
    settings = replace(phase.settings, seed=seed, steps=_phase_steps([phase], steps)[0])
    dialogue = load_dialogue()
    directory.mkdir(parents=True, exist_ok=True)
    model = stateless_model(tokenizer, shape, seed=seed)
    state = _state_of(directory, 1)
    train(
        model,
        tokenizer,
        EpisodeWriter.for_split("train", dialogue, phase.variety),
        settings,
        checkpoint=state,
        resume=resume,
        objective=history_objective,
        workers=workers,
        on_step=on_step,
    )
    model.save_pretrained(directory)
    state.unlink(missing_ok=True)
    return directory
