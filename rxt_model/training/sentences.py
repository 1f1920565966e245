"""Reads the sentences of the folder ``wording``, and divides them into those of training and those held out.

A file has sections, ``[tell]`` for example, of one sentence per line; ``#`` begins a comment. Sections ``[tell more]``,
``[tell further]`` and ``[tell open]`` go on with ``[tell]``. The first are the *plain* wording that training begins with, those
with ``more`` make it the *full* one, those with ``further`` the *wide* one, those with ``open`` the *open* one.

One sentence in five is **held out**: never seen in training, and recall is measured on held-out ones alone. The draw is
made from a fixed seed, not chosen by hand, and in every section by itself. A sentence more in a section draws that section
anew, so what a model was trained on stays as it is; new sentences want a section of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from importlib import resources

__all__ = ["SPLITS", "VARIETIES", "Sections", "continued", "read_sections", "sentences"]

SPLITS = ("train", "held_out")
VARIETIES = ("plain", "full", "wide", "open")
_CONTINUATIONS = {
    "plain": (),
    "full": ("more",),
    "wide": ("more", "further"),
    "open": ("more", "further", "open"),
}
HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 20251123

Sections = dict[str, tuple[str, ...]]


@cache
def read_sections(name: str) -> Sections:
    """The sections of one file, by their names.

    Raises:
        ValueError: for a sentence before the first section, or a section that stands twice.

    Example:
        >>> "my name is {v}" in read_sections("name")["tell"]
        True
    """
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    text = (resources.files("rxt_model.training") / "wording" / f"{name}.txt").read_text(encoding="utf-8")
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            if section in sections:
                raise ValueError(f"The section [{section}] stands twice in wording/{name}.txt; join the two.")
            lines = sections[section] = []
        elif lines is None:
            raise ValueError(f"wording/{name}.txt begins with a sentence; put a section such as [tell] before it.")
        else:
            lines.append(line)
    return {section: tuple(found) for section, found in sections.items()}


def _divide(items: Sequence[str], split: str, salt: str) -> list[str]:
    """The sentences of one side, in the order of the file; one that is repeated to be more frequent is of training."""
    single = [item for item in items if items.count(item) == 1]
    order = list(range(len(single)))
    random.Random(f"{_SPLIT_SEED}/{salt}").shuffle(order)
    held_out = max(1, round(len(single) * HELD_OUT_SHARE))
    chosen = [single[index] for index in sorted(order[held_out:] if split == "train" else order[:held_out])]
    return chosen + [item for item in items if items.count(item) > 1] if split == "train" else chosen


def continued(sections: Sections, section: str, variety: str) -> dict[str, tuple[str, ...]]:
    """A section and those that go on with it in a variety, by their names; a file need not have these.

    Raises:
        ValueError: for another variety, or a section that is not there.

    Example:
        >>> list(continued(read_sections("age"), "ask", "full"))
        ['ask', 'ask more']
    """
    if variety not in VARIETIES:
        raise ValueError(f"variety must be one of {', '.join(VARIETIES)}; it was {variety!r}.")
    if section not in sections:
        raise ValueError(f"there is no section [{section}]; there are {', '.join(sections)}.")
    names = (section, *(f"{section} {word}" for word in _CONTINUATIONS[variety]))
    return {name: sections[name] for name in names if name in sections}


def sentences(name: str, section: str, split: str, variety: str = "full", *, salt: str = "") -> list[str]:
    """The sentences of a section and of those that go on with it in a variety.

    Args:
        name: file in the folder ``wording``, without its ending.
        section: for example ``"tell"``.
        split: ``"train"`` or ``"held_out"``.
        variety: one of :data:`VARIETIES`; each has the sentences of the one before.
        salt: what the draw is made with; by default file and section.

    Raises:
        ValueError: for another split or variety, or a section that the file lacks.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'held_out'; it was {split!r}.")
    salt = salt or f"{name}/{section}"
    chosen: list[str] = []
    for found, items in continued(read_sections(name), section, variety).items():
        chosen += _divide(items, split, salt + found.removeprefix(section))
    return chosen
