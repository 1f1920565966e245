"""Conversations that state facts, change them, talk about other things, and ask; and their batches of token ids.

An episode is a list of :class:`Turn`. Training episodes mix everything at random; evaluation episodes
(:func:`recall_episode`) hold one question whose distance to the telling is chosen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rxt_model.tokenizer import Tokenizer

from .dialogue import DialogueTurns, neutral_reply, small_talk
from .facts import ATTRIBUTES, UNKNOWN_ANSWER, attribute_named
from .messages import Wording

__all__ = ["EpisodeBatch", "EpisodeWriter", "Turn", "batch_episodes", "encode_turn"]


SMALL_TALK_SHARE = 0.4
"""Share of chat that is small talk written for the model; the rest is real dialogue."""
NEUTRAL_SHARE = 0.7
"""Share of messages from real dialogue that get a neutral reply instead of what a human said."""
DISTANCE_OF_DOUBLE_WEIGHT = 4.0
"""Turns after which the value in an answer counts twice as much as it would at once."""
UNKNOWN_PROBE_SHARE = 0.2
"""Share of episodes that are also asked, at the end, for something that was never told."""
_SMALL_TALK = frozenset(small_talk())


@dataclass(frozen=True)
class Turn:
    """One interaction.

    Attributes:
        query: the user's message.
        answer: the reference answer.
        kind: ``"tell"``, ``"update"``, ``"ask"``, ``"unknown"`` (asked, never told) or ``"chat"``.
        facts: the (attribute, value) pairs told or asked.
        distance: for ``"ask"``, turns since the fact was last told: 1 is the next turn.
    """

    query: str
    answer: str
    kind: str
    facts: tuple[tuple[str, str], ...] = ()
    distance: int = 0


@dataclass
class _State:
    """What an episode has established so far."""

    known: dict[str, str] = field(default_factory=dict)
    told_at: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def learn(self, key: str, value: str, turn: int) -> None:
        self.known[key] = value
        self.told_at[key] = turn
        self.asked.discard(key)


class EpisodeWriter:
    """Writes episodes with one split of the wording and one split of the dialogue.

    Args:
        wording: the split of the grammar.
        dialogue: real exchanges of the same split; may be empty, then small talk stands in for them.

    Example:
        >>> writer = EpisodeWriter(Wording("train"), ())
        >>> turns = writer.episode(random.Random(7), 6)
        >>> len(turns), turns[-1].kind
        (6, 'ask')
    """

    def __init__(self, wording: Wording, dialogue: Sequence[tuple[str, str]]) -> None:
        self.wording = wording
        self.small_talk = small_talk(wording.variety)
        self.dialogue = tuple(dialogue) or self.small_talk

    @classmethod
    def for_split(cls, split: str, dialogue: DialogueTurns, variety: str = "full") -> EpisodeWriter:
        """The writer for ``"train"`` or ``"held_out"``, in the wording of a :data:`.sentences.VARIETIES`."""
        return cls(Wording(split, variety), dialogue.train if split == "train" else dialogue.held_out)

    def fingerprint(self) -> str:
        """Changes with the sentences and the dialogue that episodes are written from."""
        own = self.wording
        parts = (
            own.tells,
            own.asks,
            own.updates,
            own.pairs,
            own.tell_frames,
            own.update_frames,
            own.ask_frames,
            own.small_talk,
        )
        return hashlib.sha256(repr((parts, self.small_talk, self.dialogue)).encode()).hexdigest()

    def episode(self, rng: random.Random, turns: int, *, max_facts: int = 12, changes: float = 0.25) -> list[Turn]:
        """A training episode: statements, changes, questions and chat in random proportions, ending in a question.

        ``changes`` is the share of statements that change what is known instead of telling something new.
        """
        if turns < 2:
            raise ValueError(f"turns must be at least 2, one to tell and one to ask; it was {turns}.")
        state = _State()
        chattiness = rng.uniform(0.0, 0.75)
        curiosity = rng.uniform(0.1, 0.5)
        written: list[Turn] = []
        for index in range(turns):
            last = index == turns - 1
            if not state.known:
                if not last and index < turns - 2 and rng.random() < 0.15:
                    written.append(self.unknown(rng, state) if rng.random() < 0.4 else self.chat(rng))
                else:
                    written.append(self._tell(rng, state, index, max_facts))
                continue
            draw = rng.random()
            if last or draw < curiosity:
                written.append(
                    self.unknown(rng, state) if not last and rng.random() < 0.1 else self._ask(rng, state, index)
                )
            elif draw < curiosity + (1.0 - curiosity) * chattiness:
                written.append(self.chat(rng))
            elif rng.random() < changes or len(state.known) >= max_facts:
                written.append(self._update(rng, state, index))
            else:
                written.append(self._tell(rng, state, index, max_facts))
        return written

    def probes(self, rng: random.Random, turns: Sequence[Turn], count: int) -> list[Turn]:
        """Up to ``count`` questions about different facts that are known before the last of these turns.

        Now and then one more follows, about something that was never told.
        """
        known: dict[str, tuple[str, int]] = {}
        for index, turn in enumerate(turns[:-1]):
            if turn.kind in ("tell", "update"):
                known.update({key: (value, index) for key, value in turn.facts})
        keys = rng.sample(list(known), min(count, len(known)))
        questions = [self._question(rng, key, known[key][0], len(turns) - 1 - known[key][1]) for key in keys]
        if count and rng.random() < UNKNOWN_PROBE_SHARE:
            questions.append(self.unknown(rng, _State(known={key: value for key, (value, _) in known.items()})))
        return questions

    def mistake(self, rng: random.Random, turn: Turn) -> str:
        """An answer as a model that is wrong might give it: about another fact, another value, or beside the point."""
        draw = rng.random()
        if draw < 0.25:
            return self.chat(rng).answer
        if draw < 0.5 and turn.facts:
            facts = [(key, rng.choice(attribute_named(key).values)) for key, _ in turn.facts]
        else:
            attribute = rng.choice(ATTRIBUTES)
            facts = [(attribute.key, rng.choice(attribute.values))]
        if turn.kind in ("ask", "unknown"):
            return self.wording.answer(*facts[0])
        return self.wording.acknowledge(rng, facts, changed=rng.random() < 0.3)

    def _question(self, rng: random.Random, key: str, value: str, distance: int) -> Turn:
        return Turn(self.wording.ask(rng, key), self.wording.answer(key, value), "ask", ((key, value),), distance)

    def recall_episode(
        self,
        rng: random.Random,
        distance: int,
        *,
        changed: bool = False,
        other_facts: float = 0.35,
        lead: int | None = None,
    ) -> list[Turn]:
        """An evaluation episode: lead-in, one fact told (and, if ``changed``, replaced), then asked ``distance`` turns on.

        Between the (last) telling and the question lie ``distance - 1`` turns of real dialogue and of other facts, in the
        share ``other_facts``; the fact itself is not mentioned again. The question is the last turn.
        """
        if distance < 1:
            raise ValueError(f"distance must be at least 1 (asked in the next turn); it was {distance}.")
        state = _State()
        attribute = rng.choice(ATTRIBUTES)
        value = rng.choice(attribute.values)
        written: list[Turn] = []

        def filler() -> None:
            if rng.random() < other_facts and len(state.known) < len(ATTRIBUTES) - 1:
                written.append(self._tell(rng, state, len(written), 99, avoid=attribute.key, several=False))
            else:
                written.append(self.distraction(rng))

        for _ in range(rng.randint(0, 2) if lead is None else lead):
            filler()
        if changed:
            old = rng.choice([v for v in attribute.values if v != value])
            written.append(self._tell_facts(rng, state, len(written), [(attribute.key, old)]))
            for _ in range(rng.randint(0, 3)):
                filler()
            state.learn(attribute.key, value, len(written))
            answer = self.wording.acknowledge(rng, [(attribute.key, value)], changed=True)
            query = self.wording.update(rng, attribute.key, value)
            written.append(Turn(query, answer, "update", ((attribute.key, value),)))
        else:
            facts = [(attribute.key, value)]
            if rng.random() < 0.3:
                other = rng.choice([a for a in ATTRIBUTES if a.key != attribute.key])
                if other.key not in state.known:
                    facts.append((other.key, rng.choice(other.values)))
                    rng.shuffle(facts)
            written.append(self._tell_facts(rng, state, len(written), facts))
        told_at = len(written) - 1
        while len(written) < told_at + distance:
            filler()
        written.append(self._question(rng, attribute.key, value, distance))
        return written

    def chat(self, rng: random.Random) -> Turn:
        """A turn about nothing: of real dialogue, or of small talk written for the model."""
        if rng.random() < SMALL_TALK_SHARE:
            return Turn(*rng.choice(self.small_talk), "chat")
        return self.distraction(rng)

    def distraction(self, rng: random.Random) -> Turn:
        """A turn of real dialogue."""
        query, answer = rng.choice(self.dialogue)
        if rng.random() < NEUTRAL_SHARE and (query, answer) not in _SMALL_TALK:
            answer = neutral_reply(query, rng)
        return Turn(query, answer, "chat")

    def unknown(self, rng: random.Random, state: _State) -> Turn:
        """A question about something that was not told."""
        key = rng.choice([a.key for a in ATTRIBUTES if a.key not in state.known])
        return Turn(self.wording.ask(rng, key), UNKNOWN_ANSWER, "unknown", ((key, ""),))

    def _tell(
        self, rng: random.Random, state: _State, turn: int, max_facts: int, *, avoid: str = "", several: bool = True
    ) -> Turn:
        free = [a for a in ATTRIBUTES if a.key not in state.known and a.key != avoid]
        rng.shuffle(free)
        draw = rng.random() if several else 0.0
        count = 1 if draw < 0.65 else 2 if draw < 0.92 else 3
        count = max(1, min(count, max_facts - len(state.known), len(free)))
        keys = [a.key for a in free[:count]]
        if count >= 2 and rng.random() < 0.4:
            pair = rng.choice(self.wording.pairs)
            if {pair[0], pair[1]} <= {a.key for a in free}:
                keys = [pair[0], pair[1]]
        return self._tell_facts(rng, state, turn, [(key, rng.choice(attribute_named(key).values)) for key in keys])

    def _tell_facts(self, rng: random.Random, state: _State, turn: int, facts: list[tuple[str, str]]) -> Turn:
        for key, value in facts:
            state.learn(key, value, turn)
        query = self.wording.tell(rng, facts)
        return Turn(query, self.wording.acknowledge(rng, facts), "tell", tuple(facts))

    def _update(self, rng: random.Random, state: _State, turn: int) -> Turn:
        key = rng.choice(list(state.known))
        value = rng.choice([v for v in attribute_named(key).values if v != state.known[key]])
        state.learn(key, value, turn)
        query = self.wording.update(rng, key, value)
        return Turn(query, self.wording.acknowledge(rng, [(key, value)], changed=True), "update", ((key, value),))

    def _ask(self, rng: random.Random, state: _State, turn: int) -> Turn:
        # Facts not asked since they were told: an answer repeats the fact, and so refreshes the memory of it.
        fresh = [key for key in state.known if key not in state.asked]
        key = rng.choice(fresh) if fresh and rng.random() < 0.75 else rng.choice(list(state.known))
        state.asked.add(key)
        return self._question(rng, key, state.known[key], turn - state.told_at[key])


@dataclass(frozen=True)
class EncodedTurn:
    """Token ids of ``[BOS][Q]query[A]answer[EOS]``; ``answer_start`` is the position of the first answer token.

    ``weights`` has one loss weight per token from ``answer_start`` on; ``value`` marks there the tokens of fact values.
    """

    ids: list[int]
    answer_start: int
    weights: list[float]
    value: list[bool]


EMPHASES: dict[str, dict[str, tuple[float, float]]] = {
    # kind of turn: (weight of value tokens, weight of other answer tokens); and of the tokens of queries
    "facts": {
        "ask": (4.0, 0.5), "tell": (1.0, 0.2), "update": (1.0, 0.2), "unknown": (1.0, 1.0), "chat": (0.1, 0.1),
        "small talk": (0.1, 0.1), "query": (0.0, 0.0),
    },
    "answers": {
        "ask": (3.0, 1.0), "tell": (4.0, 2.0), "update": (4.0, 2.0), "unknown": (2.0, 2.0), "chat": (1.0, 1.0),
        "small talk": (3.0, 3.0), "query": (0.0, 0.15),
    },
    "replies": {
        "ask": (3.0, 1.0), "tell": (4.0, 2.0), "update": (4.0, 2.0), "unknown": (2.0, 2.0), "chat": (1.0, 1.0),
        "small talk": (3.0, 3.0), "query": (0.0, 0.0),
    },
}  # fmt: skip
"""Loss weights: ``"facts"`` teaches memory first, ``"answers"`` whole answers and a little language modelling of queries.
``"replies"`` leaves the latter out: a fifth of the time of a step.

A value tells more than the sentence around it. Chat is most of what is said and least of what can be learned."""


def encode_turn(
    tokenizer: Tokenizer,
    turn: Turn,
    query: list[int],
    answer: list[int],
    values: Sequence[list[int]],
    limit: int,
    emphasis: str = "answers",
) -> EncodedTurn:
    """Put the encoded parts of a turn into the Alpha template, cut to ``limit`` tokens at the end of the query."""
    special = tokenizer.special_tokens
    assert special.bos is not None
    assert special.query is not None
    assert special.answer is not None
    assert special.eos is not None
    query = query[: max(1, limit - len(answer) - 4)]
    ids = [special.bos, special.query, *query, special.answer, *answer, special.eos]
    is_small_talk = turn.kind == "chat" and (turn.query, turn.answer) in _SMALL_TALK
    on_value, elsewhere = EMPHASES[emphasis]["small talk" if is_small_talk else turn.kind]
    # Old facts are asked for less often than new ones, and what keeps them is learned more slowly.
    on_value *= 1.0 + turn.distance / DISTANCE_OF_DOUBLE_WEIGHT
    is_value = [False] * (len(answer) + 1)
    for part in values:
        for start in range(len(answer) - len(part) + 1):
            if answer[start : start + len(part)] == part:
                is_value[start : start + len(part)] = [True] * len(part)
                break
    weights = [on_value if flag else elsewhere for flag in is_value]
    return EncodedTurn(ids, len(query) + 3, weights, is_value)


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes of N turns as rows, row ``b * N + n`` being turn n of episode b, followed by the rows of probes.

    A probe is a further question that is answered with the memory of the last turn but is no part of the conversation.

    Attributes:
        ids: (R, T) int64, right-padded.
        lengths: (R,) int64.
        answer_start: (R,) int64, position of the first answer token.
        weights: (R, T) loss weight of predicting the token at each position; small in queries, 0 at control tokens.
        is_value: (R, T) bool, tokens of the value in answers to questions.
        heard_ids: (B * N, T') int64, the turns as memory hears them: like ``ids``, or with a mistaken answer in it.
        heard_lengths: (B * N,) int64.
        memory_rows: (R,) int64, the turn whose memory a row is answered with: its own, or the last one for a probe.
        turns: the text, per episode.
        probes: the further questions, in the order of their rows.
    """

    ids: Tensor
    lengths: Tensor
    answer_start: Tensor
    weights: Tensor
    is_value: Tensor
    heard_ids: Tensor
    heard_lengths: Tensor
    memory_rows: Tensor
    turns: list[list[Turn]]
    probes: list[Turn]

    @property
    def row_turns(self) -> list[Turn]:
        """The turn of every row."""
        return [turn for episode in self.turns for turn in episode] + self.probes

    @property
    def size(self) -> int:
        """Number of episodes B."""
        return len(self.turns)

    @property
    def steps(self) -> int:
        """Turns per episode N."""
        return len(self.turns[0])


def batch_episodes(
    tokenizer: Tokenizer,
    episodes: Sequence[Sequence[Turn]],
    *,
    probes: Sequence[tuple[int, Turn]] = (),
    mistakes: Mapping[int, str] | None = None,
    limit: int = 56,
    emphasis: str = "answers",
) -> EpisodeBatch:
    """Encode episodes of equal length.

    Args:
        tokenizer: of the model.
        episodes: their turns.
        probes: (episode, question) pairs, see :class:`EpisodeBatch`.
        mistakes: answers that memory hears instead of the reference, by row.
        limit: most tokens of a turn; longer messages lose their end.
        emphasis: loss weights, one of :data:`EMPHASES`.

    Raises:
        ValueError: if there are none or their lengths differ.
    """
    if not episodes or len({len(episode) for episode in episodes}) != 1:
        raise ValueError("episodes must be at least one, all with the same number of turns.")
    turns = [turn for episode in episodes for turn in episode] + [turn for _, turn in probes]
    steps = len(episodes[0])
    last_rows = [episode * steps + steps - 1 for episode, _ in probes]
    values = [value for turn in turns for _, value in turn.facts if value]
    texts = [turn.query for turn in turns] + [turn.answer for turn in turns] + values
    encoded = tokenizer.encode_ordinary_batch(texts)
    rows: list[EncodedTurn] = []
    position = 2 * len(turns)
    for index, turn in enumerate(turns):
        count = sum(1 for _, value in turn.facts if value)
        parts = encoded[position : position + count]
        position += count
        answer = encoded[len(turns) + index]
        rows.append(encode_turn(tokenizer, turn, encoded[index], answer, parts, limit, emphasis))
    longest = max(len(row.ids) for row in rows)
    pad = tokenizer.special_tokens.pad or 0
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    is_value = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        weights[index, 2 : row.answer_start - 1] = EMPHASES[emphasis]["query"][1]
        weights[index, row.answer_start : len(row.ids)] = torch.tensor(row.weights)
        if turn.kind == "ask":
            is_value[index, row.answer_start : len(row.ids)] = torch.tensor(row.value)
    count = len(episodes) * steps
    wrong = dict(mistakes or {})
    wrong_ids = dict(zip(wrong, tokenizer.encode_ordinary_batch(list(wrong.values())), strict=True)) if wrong else {}
    heard = [
        encode_turn(tokenizer, turns[row], encoded[row], wrong_ids[row], [], limit).ids
        if row in wrong_ids
        else rows[row].ids
        for row in range(count)
    ]
    heard_ids = torch.full((count, max(map(len, heard))), pad, dtype=torch.long)
    for index, heard_row in enumerate(heard):
        heard_ids[index, : len(heard_row)] = torch.tensor(heard_row)
    return EpisodeBatch(
        heard_ids=heard_ids,
        heard_lengths=torch.tensor([len(heard_row) for heard_row in heard]),
        ids=ids,
        lengths=torch.tensor([len(row.ids) for row in rows]),
        answer_start=torch.tensor([row.answer_start for row in rows]),
        weights=weights,
        is_value=is_value,
        memory_rows=torch.tensor([*range(len(episodes) * steps), *last_rows]),
        turns=[list(episode) for episode in episodes],
        probes=[turn for _, turn in probes],
    )
