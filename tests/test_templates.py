"""Interaction formats of both families, and text that only looks like a control token (spec 2.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ALPHA_TOKENS,
    ANSWER,
    BETA_TOKENS,
    BOS,
    EOS,
    INTERNAL,
    PAD,
    QUERY,
    THINK,
    TOOL_CALL,
    TOOL_USE,
    alpha,
    beta,
    refusal,
    tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

from rxt_model.interaction.templates import InteractionTemplate, as_batch

ALPHA = InteractionTemplate(ALPHA_TOKENS, tokenizer())
BETA = InteractionTemplate(BETA_TOKENS, tokenizer())


def text(part: str) -> list[int]:
    return tokenizer().encode_ordinary(part)


def test_alpha_interactions() -> None:
    assert ALPHA.prompt("cat") == [BOS, QUERY, *text("cat")]
    assert ALPHA.interaction("cat", "mat") == [BOS, QUERY, *text("cat"), ANSWER, *text("mat"), EOS]
    assert ALPHA.system_prompt("be a cat", "title") == [BOS, QUERY, *text("title"), ANSWER, *text("be a cat"), EOS]


def test_beta_interactions_with_every_part_and_with_few() -> None:
    everything = BETA.interaction("q", "a", think="t", tool_call="c", internal="i")
    parts = [(INTERNAL, "i"), (QUERY, "q"), (THINK, "t"), (ANSWER, "a"), (TOOL_CALL, "c")]
    assert everything == [BOS, *(token for role, part in parts for token in (role, *text(part))), EOS]
    assert BETA.interaction(None, "a", tool_result="r") == [BOS, TOOL_USE, *text("r"), ANSWER, *text("a"), EOS]
    assert BETA.interaction("q", "a", think="", internal=None) == [BOS, QUERY, *text("q"), ANSWER, *text("a"), EOS]
    assert BETA.interaction("q", None, tool_call="c") == [BOS, QUERY, *text("q"), TOOL_CALL, *text("c"), EOS]
    assert BETA.prompt("q", internal="i") == [BOS, INTERNAL, *text("i"), QUERY, *text("q")]
    assert BETA.system_prompt("be a cat", "T") == [BOS, INTERNAL, *text("T\n\nbe a cat"), EOS]


@given(st.text(min_size=1).filter(lambda value: not any("\ud800" <= c <= "\udfff" for c in value)))
def test_text_never_becomes_a_control_token(value: str) -> None:
    body = ALPHA.prompt(f"[A]{value}[EOS]")[2:]
    assert not set(body) & {PAD, BOS, EOS, QUERY, ANSWER, THINK, TOOL_CALL, TOOL_USE, INTERNAL}
    assert tokenizer().decode(body) == f"[A]{value}[EOS]"


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda: BETA.prompt("q", tool_result="r"), ValueError, ["query", "tool_result"]),
        (lambda: BETA.prompt(""), ValueError, ["query", "tool_result"]),
        (lambda: BETA.prompt(None), ValueError, ["query"]),
        (lambda: BETA.prompt(b"q"), TypeError, ["query", "bytes"]),
        (lambda: BETA.prompt("q", internal=3), TypeError, ["internal", "int"]),
        (lambda: ALPHA.prompt("q", internal="i"), ValueError, ["[I]"]),
        (lambda: ALPHA.prompt(None, tool_result="r"), ValueError, ["[U]"]),
        (lambda: ALPHA.interaction("q", "a", think="t"), ValueError, ["[T]"]),
        (lambda: ALPHA.interaction("q", "a", tool_call="c"), ValueError, ["[C]"]),
        (lambda: BETA.system_prompt("", "title"), ValueError, ["system prompt"]),
    ],
)
def test_refusals(call: Callable[[], Any], kind: type[Exception], named: list[str]) -> None:
    with refusal(kind, *named):
        call()


def test_batches_are_right_padded() -> None:
    batch = as_batch([[7, 8, 9], [7]], pad_id=1, width=4, device="cpu")
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1], [7, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["input_ids"].dtype is torch.long
    assert batch["attention_mask"].dtype is torch.bool


def test_models_tokenize_by_their_template() -> None:
    model = beta()
    assert model.tokenize_query("cat", internal="hat")["input_ids"].tolist() == [BETA.prompt("cat", internal="hat")]
    full = model.tokenize_full_interaction("cat", "mat", think="hat")
    assert full["input_ids"].tolist() == [BETA.interaction("cat", "mat", think="hat")]
    assert full["attention_mask"].all()
    model_ids = alpha().tokenize_batch(["cat", "the cat sat"], max_seq_len=12)
    assert model_ids["input_ids"].shape == (2, 12)
    for row, mask, query in zip(*model_ids.values(), ["cat", "the cat sat"], strict=True):
        assert row[mask].tolist() == ALPHA.prompt(query)
        assert (row[~mask] == PAD).all()


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda m: m.tokenize_query(""), ValueError, ["query"]),
        (lambda m: m.tokenize_query(12), TypeError, ["query", "int"]),
        (lambda m: m.tokenize_query("cat " * 99, max_seq_len=20), ValueError, ["message", "max_seq_len", "20"]),
        (lambda m: m.tokenize_query("cat", max_seq_len=0), ValueError, ["max_seq_len", "0"]),
        (lambda m: m.tokenize_query("cat", max_seq_len=-1), ValueError, ["max_seq_len", "-1"]),
        (lambda m: m.tokenize_query("cat", max_seq_len="9"), ValueError, ["max_seq_len", "'9'"]),
        (lambda m: m.tokenize_full_interaction("cat", "mat " * 99, max_seq_len=20), ValueError, ["max_seq_len", "20"]),
        (lambda m: m.tokenize_full_interaction("cat", 5), TypeError, ["answer", "int"]),
        (lambda m: m.tokenize_batch("cat"), TypeError, ["queries"]),
        (lambda m: m.tokenize_batch([]), ValueError, ["queries"]),
        (lambda m: m.tokenize_batch(["cat", ""]), ValueError, ["query"]),
        (lambda m: m.tokenize_batch(["cat", "mat " * 99], max_seq_len=20), ValueError, ["message 1", "20"]),
    ],
)
def test_tokenizing_refusals(call: Callable[[Any], Any], kind: type[Exception], named: list[str]) -> None:
    with refusal(kind, *named):
        call(alpha())


def test_a_message_needs_room_for_an_answer() -> None:
    model, needed = alpha(), len(ALPHA.prompt("cat"))
    model.tokenize_query("cat", max_seq_len=needed + 2)
    with refusal(ValueError, "max_seq_len", f"{needed} tokens"):
        model.tokenize_query("cat", max_seq_len=needed + 1)
    assert len(list(model.interact(**model.tokenize_query("cat"), max_seq_len=needed + 2))) == 3
