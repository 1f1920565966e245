"""Real dialogue for the turns between telling and asking: the Chit-Chat Challenge conversations.

The package ``chitchat-dataset`` (MIT) carries 7,168 human conversations in its wheel. A message becomes a query and the
reply to it the answer. Kept are short exchanges that neither state nor ask for the facts of :mod:`.facts` (those would
be unanswered questions and untold facts), carry no address or number, and are fit for a shipped model to repeat.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

from .sentences import continued, read_sections

__all__ = ["DialogueTurns", "load_dialogue", "neutral_reply", "small_talk"]

_ABOUT_FACTS = re.compile(
    r"my name|your name|i'?m from|i am from|you from|i live|you live|born|grew up|years old|how old|your age|my age"
    r"|birthday|favou?rite|what do you do|for a living|do you work|i work|my job|your job|my (?:sister|brother|dog|cat|pet)"
    r"|your (?:sister|brother|dog|cat|pet|car|major)|my car|i drive|do you speak|i speak|do you play|i play|country"
    r"|remember|who are you|what'?s up with your|do you have (?:any )?(?:pets|siblings)|hometown|snapchat|instagram",
)
_UNFIT = re.compile(
    r"fuck|shit|bitch|\bass\b|asshole|damn|\bhell\b|sex|porn|nude|naked|dick|cock|pussy|tits|boob|slut|whore|rape|kill"
    r"|suicid|murder|nigg|fag|gay|lesbian|retard|nazi|hitler|jew|muslim|islam|black people|white people|drug|weed|cocaine"
    r"|drunk|stupid|idiot|hate you|racis|trump|terror|\bdie\b|dead|death|abuse|virgin|orgasm|horny|sucks?\b|crap|piss"
    r"|@|http|www\.|\.com|\d{3,}|[^\x20-\x7e]",
)

_TO_QUESTIONS = ("I do not know, I am only a small model.",)
_TO_STATEMENTS = ("I see.", "I see.", "That is interesting.")


@cache
def small_talk(variety: str = "full") -> tuple[tuple[str, str], ...]:
    """Exchanges written for this model, so that it can greet, say what it is, and hear what is no fact.

    Args:
        variety: ``"plain"`` for those that training begins with, or another of :data:`.sentences.VARIETIES`.

    Example:
        >>> small_talk("plain")[0]
        ('Hello', 'Hello! How are you?')
    """
    sections = continued(read_sections("chat"), "chat", variety)
    exchanges = [line.split("|") for lines in sections.values() for line in lines]
    return tuple((query.strip(), answer.strip()) for query, answer in exchanges)


def neutral_reply(query: str, rng: random.Random) -> str:
    """What can be said to any message that is no statement and no question about the user's facts.

    Real replies are so various that none of them is likely. A model that has learned nothing else gives, where it is not
    quite sure that a message is chat, the likelier answer to a statement of facts, and remembers facts that were never told.

    Example:
        >>> neutral_reply("do you like trains?", random.Random(0))
        'I do not know, I am only a small model.'
    """
    return rng.choice(_TO_QUESTIONS if "?" in query else _TO_STATEMENTS)


@dataclass(frozen=True)
class DialogueTurns:
    """(query, answer) pairs; the two lists come from different conversations."""

    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]


def _clean(text: str) -> str:
    return " ".join(text.split())


def _usable(text: str, max_words: int) -> bool:
    words = text.split()
    if not 1 <= len(words) <= max_words or len(text) > 6 * max_words:
        return False
    lowered = text.lower()
    return _ABOUT_FACTS.search(lowered) is None and _UNFIT.search(lowered) is None


@lru_cache(maxsize=4)
def load_dialogue(
    *, max_words: int = 10, max_reply_words: int = 6, held_out_share: float = 0.1, seed: int = 20251123
) -> DialogueTurns:
    """Reads the dialogue package and splits its conversations into training and held-out ones.

    Args:
        max_words: longest message kept as a query.
        max_reply_words: longest message kept as an answer. Short replies are the ones that a small model can learn.
        held_out_share: share of conversations set aside for evaluation.
        seed: of the split.

    Returns:
        The exchanges of both splits, in the data set's order.

    Raises:
        ValueError: if ``max_words`` or ``held_out_share`` is out of range.
        ModuleNotFoundError: if the package is missing, saying how to install it.
    """
    if max_words < 2:
        raise ValueError(f"max_words must be at least 2; it was {max_words}.")
    if max_reply_words < 1:
        raise ValueError(f"max_reply_words must be at least 1; it was {max_reply_words}.")
    if not 0.0 < held_out_share < 1.0:
        raise ValueError(f"held_out_share must lie between 0 and 1; it was {held_out_share}.")
    try:
        import chitchat_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Training mixes in real dialogue from the package chitchat-dataset, which is not installed. "
            "Install it with: pip install 'rxt-kernels[train]'."
        ) from error
    rng = random.Random(seed)
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for conversation in chitchat_dataset.Dataset().values():
        target = held_out if rng.random() < held_out_share else train
        messages = [_clean(" ".join(part["text"] for part in message)) for message in conversation["messages"]]
        usable = [_usable(message, max(max_words, max_reply_words)) for message in messages]
        for (query, answer), fits in zip(pairwise(messages), pairwise(usable), strict=True):
            if all(fits) and len(query.split()) <= max_words and len(answer.split()) <= max_reply_words:
                target.append((query, answer))
    return DialogueTurns(tuple(train), tuple(held_out))
