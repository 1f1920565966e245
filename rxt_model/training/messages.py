"""How a user states, changes and asks for personal facts, and what the assistant answers.

Every kind of fact has *clauses* ("my name is Anna", "people call me Anna") that are put into *frames* ("By the way, ...",
"Do you remember ...?") and wrapped in small talk. All of them stand in the folder ``wording``; :mod:`.sentences` says
which are held out.

Everything is drawn from the ``random.Random`` that the caller passes, so a seed fixes the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .fact_values import VALUES
from .facts import ATTRIBUTES, attribute_named
from .sentences import sentences

__all__ = ["Wording"]

_ACKNOWLEDGE = ("Got it, {s}.", "Okay, {s}.", "I see, {s}.", "Thank you, {s}.")
_ACKNOWLEDGE_CHANGE = ("All right, {s} now.", "Okay, now {s}.")
_ACKNOWLEDGE_PLAIN = ("Thank you for telling me.", "I will remember that.")


def _article(value: str) -> str:
    return f"an {value}" if value[0].lower() in "aeiou" else f"a {value}"


def _fill(text: str, value: str) -> str:
    return text.replace("{a}", _article(value)).replace("{v}", value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _question(text: str) -> tuple[str, str]:
    """``direct | indirect``; a line without a bar is the same both ways."""
    direct, _, indirect = text.partition("|")
    return direct.strip(), indirect.strip() or direct.strip()


def _pair(text: str) -> tuple[str, str, str]:
    """``first second | clause``: two facts in one breath, {0} and {1} their values, {a0} and {a1} with their articles."""
    keys, _, clause = text.partition("|")
    first, second = keys.split()
    return first, second, clause.strip()


class Wording:
    """Writes queries and answers about facts with one split of the grammar.

    Args:
        split: ``"train"`` or ``"held_out"``. The two never share a clause or a frame.
        variety: one of :data:`.sentences.VARIETIES`, from ``"plain"``, which training begins with, to ``"open"``.

    Raises:
        ValueError: for any other split or variety.

    Example:
        >>> import random
        >>> wording = Wording("train")
        >>> wording.answer("city", "Oslo")
        'You live in Oslo.'
        >>> "Oslo" in wording.tell(random.Random(1), [("city", "Oslo")])
        True
    """

    def __init__(self, split: str = "train", variety: str = "full") -> None:
        def clauses(section: str) -> dict[str, list[str]]:
            return {a.key: [a.fill(text) for text in sentences(a.wording, section, split, variety)] for a in ATTRIBUTES}

        def frames(section: str) -> list[str]:
            return sentences(
                "frames", section, split, variety, salt=section if section == "small talk" else f"{section} frames"
            )

        self.split, self.variety = split, variety
        self.tells, self.updates = clauses("tell"), clauses("update")
        self.asks = {key: [_question(text) for text in texts] for key, texts in clauses("ask").items()}
        self.pairs = [_pair(text) for text in sentences("pairs", "tell", split, variety, salt="pairs")]
        self.tell_frames, self.update_frames, self.ask_frames = frames("tell"), frames("update"), frames("ask")
        self.small_talk = frames("small talk")

    def tell(self, rng: random.Random, facts: Sequence[tuple[str, str]]) -> str:
        """One message that states these (attribute, value) facts, in this order."""
        clauses = []
        rest = list(facts)
        while rest:
            pairs = [p for p in self.pairs if len(rest) > 1 and (p[0], p[1]) == (rest[0][0], rest[1][0])]
            if pairs and rng.random() < 0.7:
                (_, first), (_, second) = rest[:2]
                text = rng.choice(pairs)[2]
                text = text.replace("{a0}", _article(first)).replace("{a1}", _article(second))
                clauses.append(text.replace("{0}", first).replace("{1}", second))
                rest = rest[2:]
            else:
                key, value = rest.pop(0)
                clauses.append(_fill(rng.choice(self.tells[key]), value))
        joiner = rng.choice((" and ", ", and ", ". ", ", "))
        text = clauses[0]
        for clause in clauses[1:]:
            text += joiner + (_capital(clause) if joiner == ". " else clause)
        return self._dress(rng, self._frame(rng.choice(self.tell_frames), text))

    def update(self, rng: random.Random, key: str, value: str) -> str:
        """One message that replaces the value of an attribute."""
        if rng.random() < 0.5:
            clause = _fill(rng.choice(self.updates[key]), value)
            plain = rng.random() < 0.5
        else:
            clause, plain = _fill(rng.choice(self.tells[key]), value), False
        frame = "{X}." if plain else rng.choice(self.update_frames)
        return self._dress(rng, self._frame(frame, clause))

    def ask(self, rng: random.Random, key: str) -> str:
        """One message that asks for an attribute."""
        direct, indirect = rng.choice(self.asks[key])
        frame = rng.choice(self.ask_frames)
        text = frame.replace("{d}", direct).replace("{D}", _capital(direct)).replace("{i}", indirect)
        return self._dress(rng, text)

    def answer(self, key: str, value: str) -> str:
        """The assistant's answer to a question about a known fact."""
        return _capital(_fill(attribute_named(key).canonical, value)) + "."

    def acknowledge(self, rng: random.Random, facts: Sequence[tuple[str, str]], changed: bool = False) -> str:
        """The assistant's answer to a statement: mostly it says the facts back."""
        if rng.random() < 0.12:
            return rng.choice(_ACKNOWLEDGE_PLAIN)
        if len(facts) == 1 and facts[0][0] == "name" and not changed and rng.random() < 0.7:
            return f"Nice to meet you, {facts[0][1]}!"
        statement = " and ".join(_fill(attribute_named(key).canonical, value) for key, value in facts)
        return rng.choice(_ACKNOWLEDGE_CHANGE if changed else _ACKNOWLEDGE).replace("{s}", statement)

    @staticmethod
    def _frame(frame: str, clause: str) -> str:
        # A clause that begins with a lower-case value or article still needs its capital at the start of a sentence.
        return frame.replace("{x}", clause).replace("{X}", _capital(clause))

    def _dress(self, rng: random.Random, text: str) -> str:
        """Small talk around the message and the sloppiness of real typing."""
        draw = rng.random()
        if draw < 0.12:
            text = f"{rng.choice(self.small_talk)} {text}"
        elif draw < 0.18:
            text = f"{text} {rng.choice(self.small_talk)}"
        if rng.random() < 0.15:
            text = text.rstrip(".?!")
        if rng.random() < 0.15 and not text.startswith(("I ", "I'")):
            text = text[:1].lower() + text[1:] if not _starts_with_value(text) else text
        if rng.random() < 0.08:
            text = re.sub(r"\bI\b", "i", text)
        return text


_CAPITAL_VALUES = {value.split()[0] for values in VALUES.values() for value in values if value[0].isupper()}


def _starts_with_value(text: str) -> bool:
    return re.split(r"[\s,.!?]", text, maxsplit=1)[0] in _CAPITAL_VALUES
