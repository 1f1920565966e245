"""Conversations that a model holds itself, many at once: it answers greedily and remembers its own answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rxt_model.models import ReactiveTransformer
from rxt_model.tokenizer import Tokenizer

from .episodes import Turn

__all__ = ["ANSWER_LIMIT", "MESSAGE_LIMIT", "answer_queries", "own_answers"]

MESSAGE_LIMIT = 96
"""Most tokens of a message and its answer."""
ANSWER_LIMIT = 28
"""Most tokens of an answer; answers are one sentence."""


def answer_queries(model: ReactiveTransformer, tokenizer: Tokenizer, queries: Sequence[str]) -> list[str]:
    """Answer the next message of each of the B conversations in the model's memory, and update it.

    Args:
        model: in evaluation mode, with a memory of B conversations.
        tokenizer: its tokenizer.
        queries: B messages; long ones lose their end.
    """
    special = tokenizer.special_tokens
    prompts = [
        [special.bos, special.query, *ids[: MESSAGE_LIMIT - ANSWER_LIMIT - 3]]
        for ids in tokenizer.encode_ordinary_batch(list(queries))
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.arange(longest) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    # Room for the longest message, [A] and an answer.
    produced, kept = model.batch_interactions(ids, mask, temperature=0.0, max_seq_len=longest + ANSWER_LIMIT)
    return [
        tokenizer.decode(row[keep].tolist(), skip_special_tokens=True).strip()
        for row, keep in zip(produced, kept, strict=True)
    ]


@torch.no_grad()
def own_answers(
    model: ReactiveTransformer, tokenizer: Tokenizer, episodes: Sequence[Sequence[Turn]], seed: int
) -> list[list[str]]:
    """What the model answers to every message of these conversations but the last, held from fresh memories.

    The last answer is left out, because nobody reads the memory of it. Conversation state and training mode of the
    model are left as they were found.

    Args:
        model: with a memory.
        tokenizer: its tokenizer.
        episodes: B conversations of N turns.
        seed: of the initial memories.

    Returns:
        B lists of N - 1 answers.
    """
    state, turns, training = model.export_stm_state(), model.turns, model.training
    model.eval()
    try:
        model.stm.reset(batch_size=len(episodes), seed=seed)
        answers = [
            answer_queries(model, tokenizer, [episode[turn].query for episode in episodes])
            for turn in range(len(episodes[0]) - 1)
        ]
    finally:
        model.load_stm_state(state)
        model.turns = turns
        model.train(training)
    return [[turn[row] for turn in answers] for row in range(len(episodes))]
