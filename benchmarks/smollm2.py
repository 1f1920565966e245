"""SmolLM2-135M-Instruct by llama.cpp, a language model that people run on CPUs today, as further systems of ``scaling``.

It is another model of another size, with weights of 4 bits (Q4_1), and it says sense; what is compared is how its cost grows, not
what it knows, and its answers are not checked. The tokens of its turns are as many as everyone's, and numbers below its
vocabulary: cost does not depend on them.
It lies in ``$RXT_SMOLLM2_DIR`` or ``.smollm2`` beside this package, where ``make smollm2`` puts it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from .dialogues import Turn
from .install_smollm2 import is_installed, smollm2_directory
from .systems import TurnTimes
from .worker import Worker

__all__ = ["SmolLM2System", "require_smollm2", "smollm2_systems"]

_SCRIPT = Path(__file__).with_name("smollm2_worker.py")
_TOKEN_ID_BYTES = 8
_PAUSE = 0.02  # seconds that thread pools of either process go on spinning for


def require_smollm2() -> Path:
    """Where it is.

    Raises:
        FileNotFoundError: it is not installed, with how to do that.
    """
    directory = smollm2_directory()
    if not is_installed(directory):
        raise FileNotFoundError(
            "SmolLM2 and llama.cpp are not installed beside this package; `make smollm2` does that."
        )
    return directory


class SmolLM2System:
    """SmolLM2, reading its history again or keeping its cache, in a process of its own.

    Args:
        tokens: most tokens of a conversation.
        keep_cache: whether keys and values stay between turns.

    Raises:
        FileNotFoundError: it is not installed.
    """

    backend: str | None = "llama.cpp"
    dtype = "q4_1"

    def __init__(self, tokens: int, *, keep_cache: bool) -> None:
        directory = require_smollm2()
        self.name = "smollm2-cached" if keep_cache else "smollm2-reread"
        self.title = "SmolLM2-135M, KV cache kept" if keep_cache else "SmolLM2-135M, history re-read"
        self._keep_cache = keep_cache
        self._worker = Worker("llama.cpp", _SCRIPT, directory)
        # llama.cpp takes contexts in steps of 256 tokens.
        self.model: dict[str, Any] = self._worker.ask(
            do="load", tokens=-(-tokens // 256) * 256 + 256, threads=torch.get_num_threads()
        )
        self._history = 0

    def decoding(self) -> str:
        """What decodes."""
        return f"Answers are decoded by llama.cpp ({self.model['llama_cpp']}) with the weights of {self.model['file']}."

    def reset(self) -> None:
        """Begin a new conversation."""
        self._history = 0
        self._worker.ask(do="reset")

    def turn(self, turn: Turn) -> TurnTimes:
        """Hold one turn and measure it."""
        prompt, answer = ([token % self.model["vocabulary"] for token in ids] for ids in (turn.prompt, turn.answer))
        time.sleep(_PAUSE)
        found = self._worker.ask(do="turn", prompt=prompt, answer=answer, keep=self._keep_cache)
        time.sleep(_PAUSE)
        self._history += turn.tokens
        state = found["state_bytes"] + _TOKEN_ID_BYTES * self._history
        return TurnTimes(found["first_token"], found["latency"], 0.0, state)

    def _read(self, turn: Turn, history: int) -> int:
        # All of a kept history but the last token, which was chosen and never read.
        cached = max(0, history - 1) if self._keep_cache else 0
        return history - cached + turn.tokens - 1

    def flops(self, turn: Turn, history: int) -> tuple[int, int]:
        """Products with all weights, and attention over what stands before each token."""
        model, last = self.model, history + turn.tokens - 1
        read = self._read(turn, history)
        before = read * (last - read) + read * (read + 1) // 2
        attention = 4 * model["layers"] * model["query_heads"] * model["head_dim"] * before
        return 2 * model["parameters"] * read + attention, 0

    def tokens_processed(self, turn: Turn, history: int) -> int:
        """Tokens that go through the network in this turn."""
        return self._read(turn, history)

    def bytes_per_step(self, context: int) -> int:
        """Weights, and keys and values in float16."""
        model = self.model
        return int(model["weight_bytes"]) + context * 2 * 2 * model["layers"] * model["key_value_width"]


def smollm2_systems(tokens: int) -> tuple[SmolLM2System, SmolLM2System]:
    """SmolLM2 in both ways, each in a process of its own, with room for so many tokens."""
    return SmolLM2System(tokens, keep_cache=False), SmolLM2System(tokens, keep_cache=True)
