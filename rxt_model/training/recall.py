"""Recall: is a fact still known, N turns after it was told?

Every conversation is played as a user would play it. The model answers each turn by itself, greedily, and remembers
its own answers, not reference ones. A fact is told in wording never seen in training, turns of held-out real dialogue
and of other facts follow, and then it is asked for, again in unseen wording. Right means that the answer contains the
right value and no other value of that kind of fact.

Four conditions: ``memory`` (the model as it is), ``reference`` (it hears reference answers instead of its own until the
question, which is what training measures), ``reset`` (the same weights, memory drawn anew before every turn, so what is
left is guessing) and ``history`` (a stateless language model that reads the whole conversation again).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rxt_model.models import ReactiveTransformer
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer

from .dialogue import load_dialogue
from .episodes import EpisodeWriter, Turn, batch_episodes
from .facts import values_in_answer

__all__ = ["RecallPoint", "RecallReport", "measure_history_recall", "measure_recall", "wilson_interval"]

MESSAGE_LIMIT = 96
ANSWER_LIMIT = 28


def wilson_interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval of a share.

    Example:
        >>> low, high = wilson_interval(95, 100)
        >>> round(low, 3), round(high, 3)
        (0.888, 0.978)
    """
    if asked == 0:
        return 0.0, 1.0
    share = right / asked
    scale = 1 + z * z / asked
    centre = (share + z * z / (2 * asked)) / scale
    margin = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / scale
    return max(0.0, centre - margin), min(1.0, centre + margin)


@dataclass(frozen=True)
class RecallPoint:
    """Recall at one distance.

    Attributes:
        condition: ``"memory"``, ``"reference"``, ``"reset"`` or ``"history"``.
        changed: whether the fact had been told with another value before.
        distance: turns from the (last) telling to the question.
        right: conversations answered right.
        asked: conversations.
        by_attribute: (right, asked) of every kind of fact.
        stale: conversations in which a changed fact was answered with its old value.
    """

    condition: str
    changed: bool
    distance: int
    right: int
    asked: int
    by_attribute: dict[str, tuple[int, int]] = field(default_factory=dict)
    stale: int = 0

    @property
    def share(self) -> float:
        """Share of conversations answered right."""
        return self.right / self.asked if self.asked else 0.0


@dataclass
class RecallReport:
    """Points of one or more measurements, and some of the conversations."""

    points: list[RecallPoint] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, condition: str = "memory", changed: bool = False) -> dict[int, float]:
        """Recall by distance."""
        return {p.distance: p.share for p in self.points if (p.condition, p.changed) == (condition, changed)}

    def extend(self, other: RecallReport) -> None:
        """Add the points of another measurement."""
        self.points += other.points
        self.examples += other.examples


Answerer = Callable[[Sequence[Turn], bool], list[str]]
"""Answers one turn of every conversation, all at once, being told whether it is the last one."""


def _play(
    episodes: Sequence[Sequence[Turn]], answer: Answerer, condition: str, changed: bool, distance: int
) -> tuple[RecallPoint, list[dict[str, Any]]]:
    """Play conversations of equal length to their final question, and judge the last answers."""
    answers: list[str] = []
    transcripts: list[list[dict[str, str]]] = [[] for _ in episodes]
    for turn in range(len(episodes[0])):
        answers = answer([episode[turn] for episode in episodes], turn == len(episodes[0]) - 1)
        for transcript, episode, text in zip(transcripts, episodes, answers, strict=True):
            transcript.append({"user": episode[turn].query, "model": text})
    right = stale = 0
    by_attribute: dict[str, list[int]] = {}
    examples: list[dict[str, Any]] = []
    for index, (episode, text) in enumerate(zip(episodes, answers, strict=True)):
        key, value = episode[-1].facts[0]
        found = values_in_answer(key, text)
        is_right = found == {value}
        right += is_right
        older = {v for turn in episode[:-1] for k, v in turn.facts if k == key and v != value}
        stale += bool(found & older)
        counts = by_attribute.setdefault(key, [0, 0])
        counts[0] += is_right
        counts[1] += 1
        if index < 1 or (not is_right and len(examples) < 3):
            examples.append({
                "condition": condition, "changed": changed, "distance": distance, "expected": value,
                "right": is_right, "turns": transcripts[index],
            })  # fmt: skip
    counted = {key: (a, b) for key, (a, b) in sorted(by_attribute.items())}
    return RecallPoint(condition, changed, distance, right, len(episodes), counted, stale), examples


def _episode_groups(
    writer: EpisodeWriter, distances: Sequence[int], conversations: int, changed: bool, seed: int
) -> list[tuple[int, list[list[list[Turn]]]]]:
    """For every distance, episodes grouped by length so that each group can be played as one batch."""
    result = []
    for distance in distances:
        rng = random.Random(f"{seed}/{distance}/{changed}/recall")
        episodes = [writer.recall_episode(rng, distance, changed=changed) for _ in range(conversations)]
        groups: dict[int, list[list[Turn]]] = {}
        for episode in episodes:
            groups.setdefault(len(episode), []).append(episode)
        result.append((distance, [groups[length] for length in sorted(groups)]))
    return result


def _measure(
    make_answerer: Callable[[int], Answerer],
    writer: EpisodeWriter,
    condition: str,
    distances: Sequence[int],
    conversations: int,
    changed: bool,
    seed: int,
    progress: Callable[[RecallPoint], None] | None,
) -> RecallReport:
    report = RecallReport()
    for distance, groups in _episode_groups(writer, distances, conversations, changed, seed):
        total = RecallPoint(condition, changed, distance, 0, 0)
        examples: list[dict[str, Any]] = []
        for group in groups:
            point, found = _play(group, make_answerer(len(group)), condition, changed, distance)
            merged = dict(total.by_attribute)
            for key, (right, asked) in point.by_attribute.items():
                before = merged.get(key, (0, 0))
                merged[key] = (before[0] + right, before[1] + asked)
            total = RecallPoint(
                condition, changed, distance, total.right + point.right, total.asked + point.asked,
                dict(sorted(merged.items())), total.stale + point.stale,
            )  # fmt: skip
            examples += found
        report.points.append(total)
        failures = [example for example in examples if not example["right"]][:2]
        report.examples += [example for example in examples if example["right"]][:1] + failures
        if progress is not None:
            progress(total)
    return report


def _check(distances: Sequence[int], conversations: int) -> None:
    if not distances or min(distances) < 1:
        raise ValueError(f"distances must be turns of at least 1; they were {list(distances)}.")
    if conversations < 1:
        raise ValueError(f"conversations must be at least 1; it was {conversations}.")


def measure_recall(
    model: ReactiveTransformer,
    *,
    distances: Sequence[int] = tuple(range(1, 17)),
    conversations: int = 200,
    condition: str = "memory",
    changed: bool = False,
    split: str = "held_out",
    variety: str = "full",
    seed: int = 1,
    writer: EpisodeWriter | None = None,
    progress: Callable[[RecallPoint], None] | None = None,
) -> RecallReport:
    """Recall of a model against the distance between telling and asking.

    Args:
        model: an :class:`RxTAlpha` with its tokenizer. Its conversation state is left as it was found.
        distances: turns between the last telling and the question.
        conversations: per distance.
        condition: ``"memory"``; ``"reference"`` to write reference answers into memory instead of the model's own;
            ``"reset"`` to draw the memory anew before every turn.
        changed: tell each fact twice with different values; only the newer one is right.
        split: ``"held_out"`` wording and dialogue, or ``"train"``.
        variety: wording, one of :data:`.sentences.VARIETIES`; ``"plain"`` is what training begins with.
        seed: of conversations and initial memories.
        writer: episodes to use instead of those of ``split`` and ``variety``.
        progress: called after each distance.

    Returns:
        The report, one point per distance.

    Raises:
        ValueError: for an argument out of range, or a model without tokenizer.
    """
    _check(distances, conversations)
    if condition not in ("memory", "reference", "reset"):
        raise ValueError(f"condition must be 'memory', 'reference' or 'reset'; it was {condition!r}.")
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer; load it with one, because recall is measured on text.")
    tokenizer = model.tokenizer
    writer = writer or EpisodeWriter.for_split(split, load_dialogue(), variety)
    state, turns, training = model.export_stm_state(), model.turns, model.training
    model.eval()

    def answerer(rows: int) -> Answerer:
        model.reset_stm(seed=seed)
        model.stm.reset(batch_size=rows, seed=seed + rows)
        played = 0

        def answer(turns: Sequence[Turn], is_last: bool) -> list[str]:
            nonlocal played
            played += 1
            if condition == "reference" and not is_last:
                batch = batch_episodes(tokenizer, [[turn] for turn in turns], limit=MESSAGE_LIMIT)
                model.init_stm_state(batch.ids, torch.arange(batch.ids.shape[1]) < batch.lengths[:, None])
                return [turn.answer for turn in turns]
            if condition == "reset":
                model.stm.reset(seed=seed + 7919 * played + rows)
            special = tokenizer.special_tokens
            prompts = [
                [special.bos, special.query, *ids[: MESSAGE_LIMIT - ANSWER_LIMIT - 3]]
                for ids in tokenizer.encode_ordinary_batch([turn.query for turn in turns])
            ]
            longest = max(map(len, prompts))
            ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
            mask = torch.arange(longest) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
            # Room for the longest message, [A] and an answer; answers are one sentence.
            produced, kept = model.batch_interactions(ids, mask, temperature=0.0, max_seq_len=longest + ANSWER_LIMIT)
            return [
                tokenizer.decode(row[keep].tolist(), skip_special_tokens=True).strip()
                for row, keep in zip(produced, kept, strict=True)
            ]

        return answer

    try:
        with torch.no_grad():
            report = _measure(answerer, writer, condition, distances, conversations, changed, seed, progress)
    finally:
        model.load_stm_state(state)
        model.turns = turns
        model.train(training)
    return report


def measure_history_recall(
    model: SparseQueryTransformer,
    tokenizer: Tokenizer,
    *,
    distances: Sequence[int] = tuple(range(1, 17)),
    conversations: int = 200,
    changed: bool = False,
    split: str = "held_out",
    variety: str = "full",
    seed: int = 1,
    writer: EpisodeWriter | None = None,
    progress: Callable[[RecallPoint], None] | None = None,
) -> RecallReport:
    """The same measurement for a stateless model that is given the whole conversation; arguments as above.

    Raises:
        ValueError: for an argument out of range.
    """
    _check(distances, conversations)
    writer = writer or EpisodeWriter.for_split(split, load_dialogue(), variety)
    special = tokenizer.special_tokens
    end = special.eos
    training = model.training
    model.eval()

    def answerer(rows: int) -> Answerer:
        histories: list[list[int]] = [[] for _ in range(rows)]

        def answer(turns: Sequence[Turn], is_last: bool) -> list[str]:
            del is_last  # a stateless model answers every turn the same way
            for history, ids in zip(histories, tokenizer.encode_ordinary_batch([t.query for t in turns]), strict=True):
                limited = ids[: MESSAGE_LIMIT - ANSWER_LIMIT - 3]
                history += [special.bos, special.query, *limited, special.answer]  # type: ignore[list-item]
            starts = [len(history) for history in histories]
            longest = max(starts)
            cache = model.new_cache(rows, capacity=longest + ANSWER_LIMIT)
            device = model.model.embedding.weight.device
            padded = torch.tensor([history + [0] * (longest - len(history)) for history in histories], device=device)
            lengths = torch.tensor(starts, device=device)
            mask = torch.arange(longest, device=device) < lengths[:, None]
            hidden = model.hidden_states(padded, mask, cache).hidden
            cache.advance(longest, starts)
            last = hidden[torch.arange(rows, device=device), lengths - 1]
            open_rows = torch.ones(rows, dtype=torch.bool, device=device)
            for step in range(ANSWER_LIMIT):
                tokens = model.logits(last).argmax(-1)
                for row in torch.nonzero(open_rows).flatten().tolist():
                    histories[row].append(int(tokens[row]))
                open_rows &= tokens != end
                if step == ANSWER_LIMIT - 1 or not bool(open_rows.any()):
                    break
                last = model.hidden_states(tokens[:, None], None, cache).hidden[:, -1]
                cache.advance(1)
            texts = []
            for history, start in zip(histories, starts, strict=True):
                texts.append(tokenizer.decode(history[start:], skip_special_tokens=True).strip())
                if history[-1] != end:
                    history.append(end)  # type: ignore[arg-type]
            return texts

        return answer

    try:
        with torch.no_grad():
            report = _measure(answerer, writer, "history", distances, conversations, changed, seed, progress)
    finally:
        model.train(training)
    return report
