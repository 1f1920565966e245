"""The conversation of ``rxt demo``: facts told early are asked for later, and every answer is marked.

The script was written once, before the answers were seen. What the shipped model gets wrong stays in it and is marked
as wrong; recall as a number, over many conversations in unseen wording, is what ``rxt train demo`` and the README report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rxt_model.models import ReactiveTransformer
from rxt_model.training.facts import UNKNOWN_ANSWER, values_in_answer

__all__ = ["SCRIPT", "Line", "Reply", "hold_conversation", "is_right"]


@dataclass(frozen=True)
class Line:
    """One message of the script.

    Attributes:
        message: what is said.
        attribute: the kind of fact a question asks for, by its name in ``rxt_model.training.facts``; None for no question.
        expected: the right value; empty where nothing was told, and saying so is right.
        told: the turn, from 1, in which the value was told last.
    """

    message: str
    attribute: str | None = None
    expected: str = ""
    told: int = 0


SCRIPT: tuple[Line, ...] = (
    Line("Hello! My name is Emma and I live in Lisbon."),
    Line("I work as a nurse."),
    Line("I have a dog called Rex."),
    Line("What do you think about the weather today?"),
    Line("What is my name?", "name", "Emma", 1),
    Line("My favourite colour is green."),
    Line("I watched a good film last night."),
    Line("By the way, I just moved to Oslo."),
    Line("Do you like music?"),
    Line("What is my pet called?", "pet_name", "Rex", 3),
    Line("What do I do for a living?", "job", "nurse", 2),
    Line("Where do I live now?", "city", "Oslo", 8),
    Line("How old am I?", "age"),
    Line("What is my favourite colour?", "colour", "green", 6),
    Line("Do you remember what people call me?", "name", "Emma", 1),
)


@dataclass(frozen=True)
class Reply:
    """One turn of the conversation that was held.

    Attributes:
        turn: from 1.
        line: the message, and what it asks.
        answer: what the model said.
        right: whether a question was answered right; None where nothing was asked.
    """

    turn: int
    line: Line
    answer: str
    right: bool | None

    @property
    def distance(self) -> int:
        """Turns since the fact was told; 0 where none was."""
        return self.turn - self.line.told if self.line.told else 0


def is_right(line: Line, answer: str) -> bool | None:
    """Whether an answer has the expected value and no other of its kind; None for a line that asks nothing.

    Example:
        >>> line = Line("Where do I live now?", "city", "Oslo", 8)
        >>> is_right(line, "You live in Oslo."), is_right(line, "You live in Lisbon, not in Oslo.")
        (True, False)
    """
    if line.attribute is None:
        return None
    found = values_in_answer(line.attribute, answer)
    if line.expected:
        return found == {line.expected}
    return not found and UNKNOWN_ANSWER.rstrip(".") in answer


def hold_conversation(
    model: ReactiveTransformer, *, seed: int = 0, forget: bool = False, script: tuple[Line, ...] = SCRIPT
) -> Iterator[Reply]:
    """Hold the scripted conversation, greedily, and yield each turn as it ends.

    Args:
        model: a full model with a tokenizer; its memory is reset first.
        seed: of the first memory.
        forget: draw the memory anew before every turn, which leaves only guessing: the control.
        script: what is said.
    """
    model.reset_stm(seed=seed)
    for turn, line in enumerate(script, start=1):
        if forget:
            model.reset_stm(seed=seed + turn)
        limit = min(model.default_max_seq_len, model.decoder.config.seq_len)
        query = model.tokenize_query(line.message, limit, model.device)
        tokens = model.interact(query["input_ids"], query["attention_mask"], temperature=0.0, max_seq_len=limit)
        answer = "".join(model.stringify_token(token) for token in tokens).strip()
        yield Reply(turn, line, answer, is_right(line, answer))
