"""Prompts and interactions as text, and the requests that ask upstream for their token ids."""

from __future__ import annotations

import json
from typing import Any

from rxt_model import Tokenizer
from rxt_model.tokenizer import DEFAULT_SPECIAL_TOKENS, train_tokenizer
from tests.upstream.cases import full_cases

TEXTS = ["Hello there, my name is Ada.", "what is my name?", "Grüße aus Köln — 東京 🙂\ttabs\nlines", "  spaces  "]
SHORT = ["Hi!", "Why?"]


def calls(beta: bool) -> list[dict[str, Any]]:
    """Calls by upstream's name, and by ours where ours has another."""

    def call(method: str, *positional: Any, ours: dict[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        return {"method": method, "positional": positional, "named": named, "ours": ours}

    found = [call("tokenize_query", text) for text in TEXTS]
    found += [
        call("tokenize_full_interaction", text, answer) for text, answer in zip(TEXTS, reversed(TEXTS), strict=True)
    ]
    found += [call("tokenize_batch", SHORT, max_seq_len=24)]
    if beta:
        parts: dict[str, Any] = {
            "query": "Hi!",
            "answer": "Yes.",
            "think": "Hm, so",
            "tool_call": "run(1)",
            "internal": "be kind",
        }
        found += [
            call("tokenize_query", "Hi!", internal="be kind"),
            call("tokenize_full_interaction", **parts),
            call("tokenize_full_interaction", query="Hi!", answer="Yes.", think="Hm"),
            call(
                "tokenize_full_interaction",
                tool_use="done",
                answer="Yes.",
                ours={
                    "method": "tokenize_full_interaction",
                    "named": {"query": None, "tool_result": "done", "answer": "Yes."},
                },
            ),
            call(
                "tokenize_tool_result",
                "done",
                ours={"method": "tokenize_query", "named": {"text": None, "tool_result": "done"}},
            ),
        ]
    return found


def tokenizer() -> Tokenizer:
    """A small tokenizer with the control tokens of both families; the same one every time."""
    return train_tokenizer([*TEXTS, *SHORT] * 3, 320)


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments of a model of class `name` for that tokenizer, understood by us and by every version."""
    found: dict[str, Any] = json.loads(json.dumps(full_cases("0.2.31")[0]["arguments"]))
    words = tokenizer()
    for part in ("decoder_config", "encoder_config"):
        found[part].update(vocab_size=words.vocab_size, use_moe=False)
    wanted = ["bos", "eos", "query", "answer", "pad"]
    if name == "RxTBeta":
        wanted += ["think", "tool_call", "tool_use", "internal"]
    found["tokenizer_config"] = {f"{role}_token_id": getattr(words.special_tokens, role) for role in wanted}
    return found


def request(name: str) -> dict[str, Any]:
    """The oracle's request for a model of class `name`."""
    return {
        "name": f"templates-{name}",
        "task": "templates",
        "class": name,
        "arguments": arguments(name),
        "tokenizer": tokenizer().to_json(),
        "control_tokens": DEFAULT_SPECIAL_TOKENS,
        "calls": calls(name == "RxTBeta"),
    }
