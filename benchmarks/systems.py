"""The three ways to hold a conversation that are compared, behind one interface.

* ``rxt``: a Reactive Transformer; nothing is kept between turns but its memory, which is updated after the answer.
* ``stateless-reread``: a decoder-only model of the same width, depth, heads and experts that reads the whole history
  again at the start of every turn, and uses a key/value cache within the answer.
* ``stateless-cached``: the same model with its key/value cache kept between turns.

Every answer is forced: the model computes it token by token exactly as it would for a user, the choice included, and then
the next token of the recorded answer takes the place of its own, so that all systems generate the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rxt_model.config import StatelessConfig, TokenIds
from rxt_model.interaction.sampling import Sampler, SamplingOptions
from rxt_model.interaction.stateless_conversation import StatelessConversation
from rxt_model.interaction.text import MEMORY_UPDATE_END, MEMORY_UPDATE_START
from rxt_model.models import ReactiveTransformer
from rxt_model.stateless import SparseQueryTransformer

from .costs import RxTCosts, StatelessCosts
from .devices import make_timer
from .dialogues import Turn

__all__ = ["CheckedSystem", "RxTSystem", "StatelessSystem", "System", "TurnTimes", "check_system", "make_systems"]

TOLERANCE = 1e-4
"""Relative difference that a cached float32 answer may have from the uncached one."""


@dataclass(frozen=True)
class TurnTimes:
    """One measured turn, in seconds.

    Attributes:
        first_token: from the message to the first token of the answer.
        latency: from the message to the last token: what the user waits for.
        memory_update: after the answer; 0 for systems without memory.
        state_bytes: what has to be kept until the next message.
    """

    first_token: float
    latency: float
    memory_update: float
    state_bytes: int


class TeacherForcing(Sampler):
    """Chooses greedily, as a user's sampler would, and then gives the next token of a fixed answer.

    Args:
        answer: the tokens to give.
        device: where the model is.
        keep_logits: keep what was chosen from, for checks.
    """

    def __init__(self, answer: Sequence[int], device: torch.device, *, keep_logits: bool = False) -> None:
        super().__init__(SamplingOptions(temperature=0.0))
        self._forced = list(torch.tensor(answer, device=device)[:, None])
        self._next = 0
        self.logits: list[Tensor] | None = [] if keep_logits else None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.logits is not None:
            self.logits.append(logits[0].clone())  # an engine may write the next ones over them
        super().__call__(logits)
        token = self._forced[self._next]
        self._next += 1
        return token


class System(Protocol):
    """One way to hold a conversation."""

    name: str
    title: str
    backend: str | None  # None where it is that of the run
    dtype: str

    def decoding(self) -> str:
        """How answers are decoded, and why, in one sentence."""

    def reset(self) -> None:
        """Begin a new conversation."""

    def turn(self, turn: Turn) -> TurnTimes:
        """Hold one turn and measure it."""

    def flops(self, turn: Turn, history: int) -> tuple[int, int]:
        """Operations of the answer and of the memory update of a turn behind ``history`` tokens."""

    def tokens_processed(self, turn: Turn, history: int) -> int:
        """Tokens that go through a network in this turn, those of the memory update included."""

    def bytes_per_step(self, context: int) -> int:
        """Bytes that decoding a token behind so many others has to read."""


class CheckedSystem(System, Protocol):
    """One of ours, whose answers are compared with their definition before it is timed."""

    def turn_logits(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """Hold one turn; the logits (answer tokens, V) it computed, and the same without any cache."""


class RxTSystem:
    """A Reactive Transformer with random or trained weights."""

    backend: str | None = None
    dtype = "float32"

    def __init__(self, model: ReactiveTransformer) -> None:
        self.name, self.title = "rxt", "RxT"
        self.model = model
        self.costs = RxTCosts(model.decoder.config, model.encoder.config, model.memory_attention.config)
        self._timer = make_timer(model.device)

    def decoding(self) -> str:
        return self.model.explain()

    def reset(self) -> None:
        self.model.reset_stm(seed=0)

    def _steps(self, turn: Turn, sampler: Sampler):  # type: ignore[no-untyped-def]
        # What interact() runs after its checks. RxT-Alpha appends [A] itself, RxT-Beta opens its answer with it.
        prompt = list(turn.prompt if self.model.thinks else turn.prompt[:-1])
        return self.model._stream([prompt], sampler, turn.tokens, True, ())

    def turn(self, turn: Turn) -> TurnTimes:
        sampler, timer = TeacherForcing(turn.answer, self.model.device), self._timer
        first: str | None = "first token"
        timer.start()
        for step in self._steps(turn, sampler):
            token = int(step.tokens[0])
            if token == MEMORY_UPDATE_START:
                timer.mark("last token")
            elif token == MEMORY_UPDATE_END:
                timer.mark("memory update")
            elif first is not None:
                timer.mark(first)
                first = None
        seconds = timer.seconds()
        if "memory update" not in seconds:
            raise RuntimeError("an interaction ended without its memory update")
        last = seconds["last token"]
        return TurnTimes(seconds["first token"], last, seconds["memory update"] - last, self._state_bytes())

    def _state_bytes(self) -> int:
        memory = self.model.stm.memory
        return memory.numel() * memory.element_size()

    @torch.no_grad()
    def turn_logits(self, turn: Turn) -> tuple[Tensor, Tensor]:
        before = self.model.export_stm_state()
        sampler = TeacherForcing(turn.answer, self.model.device, keep_logits=True)
        for _ in self._steps(turn, sampler):
            pass
        assert sampler.logits is not None
        ids = torch.tensor([[*turn.prompt, *turn.answer]], device=self.model.device)
        whole = self.model.decoder(ids[:, :-1], memory=before)[0, len(turn.prompt) - 1 :]
        written = self.model.memory_attention(self.model.encoder(ids), None, before)
        difference = _relative_difference(self.model.stm.memory, written)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the memory after an interaction differs from its definition by {difference:.2g}.")
        return torch.stack(sampler.logits), whole

    def flops(self, turn: Turn, history: int) -> tuple[int, int]:
        return self.costs.answer(len(turn.prompt), len(turn.answer)), self.costs.memory_update(turn.tokens)

    def tokens_processed(self, turn: Turn, history: int) -> int:
        return turn.tokens - 1 + turn.tokens  # the last token of an answer is encoded, but not decoded

    def bytes_per_step(self, context: int) -> int:
        return self.costs.bytes_per_step(context, 4)


class StatelessSystem:
    """A decoder-only model that is given its history."""

    backend: str | None = None
    dtype = "float32"

    def __init__(self, model: SparseQueryTransformer, token_ids: TokenIds, *, keep_cache: bool) -> None:
        self.name = "stateless-cached" if keep_cache else "stateless-reread"
        self.title = "LLM, KV cache kept" if keep_cache else "LLM, history re-read"
        self.conversation = StatelessConversation(model, token_ids, keep_cache=keep_cache)
        self.costs = StatelessCosts(model.config.transformer_config())
        self._timer = make_timer(self.conversation.device)

    def decoding(self) -> str:
        return self.conversation.explain()

    def reset(self) -> None:
        self.conversation.reset()

    def turn(self, turn: Turn) -> TurnTimes:
        sampler, timer = TeacherForcing(turn.answer, self.conversation.device), self._timer
        first: str | None = "first token"
        timer.start()
        for _ in self.conversation.stream(turn.prompt, sampler, len(turn.answer)):
            if first is not None:
                timer.mark(first)
                first = None
            timer.mark("last token")
        seconds = timer.seconds()
        return TurnTimes(seconds["first token"], seconds["last token"], 0.0, self.conversation.state_bytes())

    @torch.no_grad()
    def turn_logits(self, turn: Turn) -> tuple[Tensor, Tensor]:
        start = len(self.conversation.history)
        sampler = TeacherForcing(turn.answer, self.conversation.device, keep_logits=True)
        for _ in self.conversation.stream(turn.prompt, sampler, len(turn.answer)):
            pass
        assert sampler.logits is not None
        ids = torch.tensor([self.conversation.history[:-1]], device=self.conversation.device)
        whole = self.conversation.model(ids)[0, start + len(turn.prompt) - 1 :]
        return torch.stack(sampler.logits), whole

    def _cached(self, history: int) -> int:
        # All of the history but the last token, which was chosen and never read.
        return max(0, history - 1) if self.conversation.keep_cache else 0

    def flops(self, turn: Turn, history: int) -> tuple[int, int]:
        cached = self._cached(history)
        return self.costs.answer(history - cached + len(turn.prompt), cached, len(turn.answer)), 0

    def tokens_processed(self, turn: Turn, history: int) -> int:
        return history - self._cached(history) + turn.tokens - 1

    def bytes_per_step(self, context: int) -> int:
        return self.costs.bytes_per_step(context, 4)


def make_systems(model: ReactiveTransformer, *, seed: int) -> tuple[RxTSystem, StatelessSystem, StatelessSystem]:
    """The model, and the stateless model of the same size in both ways on its device, with weights drawn from ``seed``.

    Raises:
        ValueError: the decoder has parts that no stateless model of this package has, such as shared experts.
    """
    config = StatelessConfig.like(model.decoder.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stateless = SparseQueryTransformer(config).eval().to(model.device)
    return (
        RxTSystem(model.eval()),
        StatelessSystem(stateless, model.token_ids, keep_cache=False),
        StatelessSystem(stateless, model.token_ids, keep_cache=True),
    )


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    difference = ((actual - expected).abs().max() / scale).item()
    return difference if difference == difference else float("inf")


def check_system(system: CheckedSystem, turns: Sequence[Turn]) -> float:
    """Hold a short conversation and compare what is timed with what it means: every logit, without any cache.

    Returns:
        The largest relative difference.

    Raises:
        RuntimeError: it is above :data:`TOLERANCE`; nothing may be timed then.
    """
    system.reset()
    worst = 0.0
    for number, turn in enumerate(turns, start=1):
        cached, whole = system.turn_logits(turn)
        difference = _relative_difference(cached, whole)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{system.title}: the answer of turn {number} as it is timed differs from the uncached one by "
                f"{difference:.2g} of the largest logit (granted is {TOLERANCE:g}), so nothing is timed. If another --seed "
                "passes, two experts were nearly tied; if none does, this is a defect: please report it."
            )
        worst = max(worst, difference)
    system.reset()
    return worst
