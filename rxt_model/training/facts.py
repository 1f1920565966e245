"""The kinds of personal facts that the demo model can be told, and how the assistant states them.

How a user says and asks for them stands in the folder ``wording``, one file for each kind or family of kinds;
:mod:`.messages` puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .fact_values import VALUES

__all__ = ["ATTRIBUTES", "UNKNOWN_ANSWER", "Attribute", "attribute_named", "values_in_answer"]

UNKNOWN_ANSWER = "You have not told me that yet."
"""The answer to a question about a fact that was never told."""


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about the user.

    Attributes:
        key: identifier, for example ``"city"``.
        values: everything this attribute can be.
        canonical: how the assistant states it, with ``{v}`` for the value or ``{a}`` for article and value.
        wording: file with the clauses about it. Attributes may share one, and with it what is held out.
        nouns: what stands for the names in braces of a shared file.
    """

    key: str
    values: tuple[str, ...]
    canonical: str
    wording: str
    nouns: Mapping[str, str] = field(default_factory=dict)

    def fill(self, text: str) -> str:
        """A clause of the shared file as it is for this attribute."""
        for name, noun in self.nouns.items():
            text = text.replace(f"{{{name}}}", noun)
        return text


def _own(key: str, kind: str, canonical: str) -> Attribute:
    return Attribute(key, VALUES[kind], canonical, key)


def _favourite(key: str, kind: str, noun: str, plural: str) -> Attribute:
    canonical = f"your favourite {noun} is {{v}}"
    return Attribute(key, VALUES[kind], canonical, "favourite", {"n": noun, "ns": plural})


def _relative(key: str, kind: str, noun: str) -> Attribute:
    return Attribute(key, VALUES[kind], f"your {noun} is called {{v}}", "relative", {"r": noun})


ATTRIBUTES: tuple[Attribute, ...] = (
    _own("name", "people", "your name is {v}"),
    _own("city", "cities", "you live in {v}"),
    _own("hometown", "cities", "you were born in {v}"),
    _own("job", "jobs", "you work as {a}"),
    _own("age", "ages", "you are {v} years old"),
    _own("pet", "animals", "your pet is {a}"),
    _relative("pet_name", "pets", "pet"),
    _relative("sister", "women", "sister"),
    _relative("brother", "men", "brother"),
    _relative("friend", "people", "best friend"),
    _own("car", "cars", "you drive {a}"),
    _own("birthday", "months", "your birthday is in {v}"),
    _favourite("colour", "colours", "colour", "colours"),
    _favourite("food", "foods", "food", "foods"),
    _favourite("drink", "drinks", "drink", "drinks"),
    _favourite("sport", "sports", "sport", "sports"),
    _favourite("animal", "wild_animals", "wild animal", "wild animals"),
    _favourite("number", "numbers", "number", "numbers"),
    _favourite("season", "seasons", "season", "seasons"),
    _favourite("music", "music", "music", "kinds of music"),
    _own("instrument", "instruments", "you play the {v}"),
    _own("language", "languages", "your mother tongue is {v}"),
    _own("country", "countries", "you want to visit {v}"),
)
"""Every attribute, in a fixed order."""

_BY_KEY = {attribute.key: attribute for attribute in ATTRIBUTES}


def attribute_named(key: str) -> Attribute:
    """The attribute with this key.

    Raises:
        ValueError: if there is none, naming those that exist.

    Example:
        >>> attribute_named("city").canonical
        'you live in {v}'
    """
    if key not in _BY_KEY:
        raise ValueError(f"attribute must be one of {', '.join(_BY_KEY)}; it was {key!r}.")
    return _BY_KEY[key]


_VALUE_PATTERNS: dict[str, re.Pattern[str]] = {}


def values_in_answer(key: str, text: str) -> set[str]:
    """All values of an attribute that occur in a text as whole words, longest match first.

    Example:
        >>> values_in_answer("country", "You want to visit New Zealand.")
        {'New Zealand'}
    """
    pattern = _VALUE_PATTERNS.get(key)
    if pattern is None:
        values = sorted(attribute_named(key).values, key=lambda value: (-len(value), value))
        pattern = _VALUE_PATTERNS[key] = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, values)) + r")(?!\w)")
    return set(pattern.findall(text))
