"""What was said, kept as text beside the memory so that a person can read a saved conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

__all__ = ["Exchange", "Transcript"]

#: A transcript is for people; beyond this many bytes the oldest exchanges are left out of the file.
_LONGEST = 4_000_000


@dataclass(frozen=True)
class Exchange:
    """One message and its answer.

    Attributes:
        turn: which interaction of the conversation it was, from 1.
        message: what the user wrote.
        answer: what was answered.
        thinking: thoughts in front of the answer, of models that think.
        tool_call: what the model asked a tool for.
        stopped: whether the user stopped the answer.
    """

    turn: int
    message: str
    answer: str
    thinking: str = ""
    tool_call: str = ""
    stopped: bool = False


@dataclass
class Transcript:
    """The exchanges of a conversation, to and from the notes of its file.

    Example:
        >>> transcript = Transcript([Exchange(1, "hello", "good morning")])
        >>> Transcript.from_notes(transcript.notes()).exchanges == transcript.exchanges
        True
    """

    exchanges: list[Exchange] = field(default_factory=list)

    def notes(self) -> dict[str, str]:
        """The notes to save; the newest exchanges that fit."""
        lines: list[str] = []
        size = 0
        for exchange in reversed(self.exchanges):
            values = {name: value for name, value in asdict(exchange).items() if value not in ("", False)}
            line = json.dumps(values)
            size += len(line)
            if size > _LONGEST:
                break
            lines.append(line)
        return {"transcript": "[" + ",".join(reversed(lines)) + "]"}

    @classmethod
    def from_notes(cls, notes: Mapping[str, str]) -> Transcript:
        """Read the notes of a file; without a transcript, or with one that is not ours, an empty one."""
        try:
            values = json.loads(notes.get("transcript", "[]"))
            return cls([Exchange(**{"answer": "", **value}) for value in values])
        except (ValueError, TypeError):
            return cls()
