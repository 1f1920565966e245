"""The tokenizer: what goes in comes out, user text controls nothing, and bad files are refused in one sentence."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from rxt_model.tokenizer import (
    BatchTokenStream,
    Tokenizer,
    TokenStream,
    as_tokenizer,
    load_tokenizer_from_hf_hub,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
CORPUS = [
    "Hello there, how are you today?",
    "hello again; the answer is [A] and the query is [Q]",
    "naïve café — 日本語 👋🏽 and the rest",
    "the cat sat on the mat and the hat",
] * 4
SPECIAL_STRINGS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]", "[Q]", "[A]", "[I]", "[T]", "[U]", "[C]"]
TRAINED = train_tokenizer(CORPUS, vocab_size=340)

# Any text Python can hold, with what tokenizers stumble over made frequent.
single = " \n\t\u00a0\u200d\u0301\x00\ufffd\ufeff\U0010ffffĠĊſ١]"
several = ["  ", "\r\n", "e\u0301", "👩‍👩‍👧‍👦", "👋🏽", "日本", "'s", "[A]", "[EOS]", "[A", "hello"]
awkward = st.sampled_from([*single, *several])
texts = st.one_of(st.text(), st.lists(st.one_of(awkward, st.text(max_size=3)), max_size=8).map("".join))


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """The parsed tokenizer.json, as the published models have it: without a decoder."""
    parsed = json.loads(TRAINED.to_json())
    parsed["decoder"] = None
    return parsed


def one_sentence(caught: pytest.ExceptionInfo[BaseException]) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert message[0].isupper() or "is" in message
    assert message.rstrip().endswith((".", "'"))


# --- Encoding and decoding ------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(texts)
@example("")
@example("[BOS][Q]hello[A]")
def test_text_comes_back(text: str) -> None:
    expected = text[1:] if text.startswith(" ") else text
    ids = TRAINED.encode_ordinary(text)
    assert TRAINED.decode(ids) == expected
    assert TRAINED.decode(ids, keep_prefix_space=True) == (" " + expected if text else "")


@settings(max_examples=200, deadline=None)
@given(texts)
def test_ordinary_text_controls_nothing(text: str) -> None:
    assert TRAINED.special_ids.isdisjoint(TRAINED.encode_ordinary(text))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SPECIAL_STRINGS), texts), max_size=5))
def test_templates_come_back(parts: list[tuple[str, str]]) -> None:
    parts = [(special, text.replace("[", "(").lstrip(" ")) for special, text in parts]
    assert TRAINED.decode(TRAINED.encode("".join(s + t for s, t in parts))) == "".join(s + t for s, t in parts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(11, TRAINED.vocab_size - 1), max_size=30))
def test_decode_is_the_bytes_read_as_utf8(ids: list[int]) -> None:
    raw = b"".join(TRAINED.token_bytes(i) for i in ids)
    assert TRAINED.decode(ids, keep_prefix_space=True) == raw.decode("utf-8", errors="replace")
    assert TRAINED.decode(ids) == raw.removeprefix(b" ").decode("utf-8", errors="replace")


def test_ids_are_those_of_the_file() -> None:
    backend = TRAINED.backend
    for text in ["Hello", " Hello", "[BOS][Q]Hello there[A]", "日本語", ""]:
        assert TRAINED.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_special_tokens_are_parsed_in_templates_and_not_in_ordinary_text() -> None:
    q, a = TRAINED.special_tokens.query, TRAINED.special_tokens.answer
    ids = TRAINED.encode("[Q]hi[A]")
    assert ids[0] == q
    assert ids[-1] == a
    assert TRAINED.decode(TRAINED.encode_ordinary("hi[A] no")) == "hi[A] no"


def test_nothing_is_added_at_the_ends() -> None:
    assert TRAINED.decode(TRAINED.encode("hello")) == "hello"
    assert TRAINED.encode("") == TRAINED.encode_ordinary("") == []


def test_the_file_names_bos_and_eos_in_its_post_processor() -> None:
    assert TRAINED.backend.encode("hi").ids == [2, *TRAINED.encode("hi"), 3]


def test_skipped_special_tokens_keep_texts_apart() -> None:
    ids = TRAINED.encode("[BOS][T]a thought[A]the answer[EOS]")
    assert TRAINED.decode(ids, skip_special_tokens=True) == "a thought the answer"
    assert TRAINED.decode(ids) == "[BOS][T]a thought[A]the answer[EOS]"


def test_no_byte_characters_in_the_output_without_a_decoder(content: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_json(json.dumps(content))
    assert tokenizer.decode(tokenizer.encode("a b\nc – d")) == "a b\nc – d"
    assert "Ġ" in tokenizer.backend.decode(tokenizer.encode("a b"))


def test_invalid_utf8_becomes_the_replacement_character() -> None:
    euro = TRAINED.encode_ordinary("€")
    assert len(euro) == 4  # the prefix space and three bytes
    assert TRAINED.decode(euro[:-1]) == "\ufffd"
    assert TRAINED.decode([*euro[:-1], *TRAINED.encode("[EOS]")]) == "\ufffd[EOS]"


def test_batches_equal_single_texts() -> None:
    lines = [*CORPUS, "[A]", ""]
    assert TRAINED.encode_batch(lines) == [TRAINED.encode(line) for line in lines]
    assert TRAINED.encode_ordinary_batch(lines) == [TRAINED.encode_ordinary(line) for line in lines]


def test_decode_takes_tensors_and_arrays() -> None:
    ids = TRAINED.encode("hello there")
    assert TRAINED.decode(torch.tensor(ids)) == TRAINED.decode(np.array(ids)) == TRAINED.decode(tuple(ids))
    assert TRAINED.decode(iter(ids)) == "hello there"
    assert TRAINED.decode(torch.empty(0, dtype=torch.long)) == TRAINED.decode([]) == ""


@pytest.mark.parametrize(
    "bad", [3, "hello", b"x", None, [1.0], [True], ["a"], torch.tensor([1.0]), torch.tensor([True])]
)
def test_decode_refuses_other_types(bad: Any) -> None:
    with pytest.raises(TypeError, match="ids"):
        TRAINED.decode(bad)


def test_decode_refuses_what_is_not_in_the_vocabulary() -> None:
    size = TRAINED.vocab_size
    with pytest.raises(
        ValueError, match=rf"ids\[1\] is {size}, which is not in the vocabulary.*0 to {size - 1}"
    ) as caught:
        TRAINED.decode([5, size])
    one_sentence(caught)
    with pytest.raises(ValueError, match="signal that memory"):
        TRAINED.decode([-1])
    with pytest.raises(ValueError, match="-3, which is not in the vocabulary"):
        TRAINED.decode([-3])
    with pytest.raises(ValueError, match="shape"):
        TRAINED.decode(torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("method", ["encode", "encode_ordinary"])
def test_encode_refuses_what_is_not_text(method: str) -> None:
    for bad in (3, None, b"x", ["a"]):
        with pytest.raises(TypeError, match="give a str"):
            getattr(TRAINED, method)(bad)
    with pytest.raises(ValueError, match=r"U\+D800 at character 1"):
        getattr(TRAINED, method)("a\ud800")
    with pytest.raises(TypeError, match="list of str"):
        getattr(TRAINED, f"{method}_batch")("text")
    with pytest.raises(TypeError, match=r"texts\[1\]"):
        getattr(TRAINED, f"{method}_batch")(["a", 3])


def test_merges_that_spell_a_special_token_are_undone(content: dict[str, Any]) -> None:
    """A file that does not split at brackets can merge its way to a special token, or look it up whole."""
    hostile = copy.deepcopy(content)
    hostile["pre_tokenizer"]["use_regex"] = False
    hostile["pre_tokenizer"]["add_prefix_space"] = False
    hostile["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_json(json.dumps(hostile))
    ids = tokenizer.encode_ordinary("[A]")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "[A]"
    assert tokenizer.encode_ordinary_batch(["[A]"]) == [ids]
    for token in "[A]":
        del hostile["model"]["vocab"][token]
    hostile["model"]["merges"] = []
    with pytest.raises(ValueError, match="only write as a special token"):
        Tokenizer.from_json(json.dumps(hostile)).encode_ordinary("[A]")


def test_a_byte_without_a_token_is_not_dropped(content: dict[str, Any]) -> None:
    partial = copy.deepcopy(content)
    partial["model"]["unk_token"] = None
    partial["model"]["merges"] = []
    del partial["model"]["vocab"]["x"]
    tokenizer = Tokenizer.from_json(json.dumps(partial))
    with pytest.raises(ValueError, match="byte 0x78"):
        tokenizer.encode("axb")
    partial["model"]["unk_token"] = "[UNK]"
    tokenizer = Tokenizer.from_json(json.dumps(partial))
    assert tokenizer.special_tokens.unk in tokenizer.encode_ordinary("axb")


def test_a_file_without_prefix_space_loses_nothing(content: dict[str, Any]) -> None:
    plain = copy.deepcopy(content)
    plain["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    }
    tokenizer = Tokenizer.from_json(json.dumps(plain))
    for text in ("hello", " hello", "  ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_and_truncation_of_a_file_are_not_applied(content: dict[str, Any]) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


# --- Vocabulary and roles -------------------------------------------------------------------------------------------


def test_ids_of_special_tokens() -> None:
    assert [TRAINED.token_to_id(token) for token in SPECIAL_STRINGS] == list(range(11))
    roles = TRAINED.special_tokens
    assert (roles.pad, roles.unk, roles.bos, roles.eos, roles.mask, roles.query, roles.answer) == tuple(range(7))
    assert (roles.internal, roles.think, roles.tool_use, roles.tool_call) == (7, 8, 9, 10)
    assert TRAINED.special_ids == frozenset(range(11))


def test_vocabulary_lookups() -> None:
    assert TRAINED.id_to_token(6) == "[A]"
    assert TRAINED.token_to_id("no such token") is None
    assert TRAINED.id_to_token(TRAINED.vocab_size) is None
    assert TRAINED.id_to_token(torch.tensor(6)) == "[A]"
    assert len(TRAINED) == TRAINED.vocab_size == TRAINED.backend.get_vocab_size()
    assert TRAINED.token_bytes(TRAINED.token_to_id("Ġ")) == b" "  # type: ignore[arg-type]
    assert "answer=6" in repr(TRAINED)
    with pytest.raises(TypeError, match="token is a int"):
        TRAINED.token_to_id(6)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="token_id is a str"):
        TRAINED.id_to_token("[A]")  # type: ignore[arg-type]


def test_roles_missing_from_a_file_are_none(content: dict[str, Any]) -> None:
    alpha = train_tokenizer(CORPUS, 300, special_tokens={"bos": "[BOS]", "eos": "[EOS]", "answer": "<answer>"})
    assert (alpha.special_tokens.bos, alpha.special_tokens.answer, alpha.special_tokens.think) == (0, 2, None)
    reloaded = Tokenizer.from_json(alpha.to_json())
    assert reloaded.special_tokens.answer is None
    assert Tokenizer.from_json(alpha.to_json(), special_tokens={"answer": "<answer>"}).special_tokens.answer == 2
    with pytest.raises(ValueError, match=r"special_tokens names the role 'ask'"):
        Tokenizer.from_json(alpha.to_json(), special_tokens={"ask": "<answer>"})
    with pytest.raises(ValueError, match=r"special_tokens\['query'\] is '<q>'"):
        Tokenizer.from_json(alpha.to_json(), special_tokens={"query": "<q>"})


def test_role_tokens_not_marked_special_are_control_tokens_all_the_same(content: dict[str, Any]) -> None:
    unmarked = copy.deepcopy(content)
    for token in unmarked["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer.from_json(json.dumps(unmarked))
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_ordinary("x[A]y"))
    assert tokenizer.decode(tokenizer.encode("[A]y"), skip_special_tokens=True) == "y"


def test_names_that_the_transformers_wrapper_invents_are_no_tokens(content: dict[str, Any]) -> None:
    size = TRAINED.vocab_size
    wrapped = copy.deepcopy(content)
    for offset, name in enumerate(["[SEP]", "[CLS]"]):
        wrapped["added_tokens"].append({**wrapped["added_tokens"][0], "id": size + offset, "content": name})
    assert tokenizers.Tokenizer.from_str(json.dumps(wrapped)).get_vocab_size() == size + 2
    tokenizer = Tokenizer.from_json(json.dumps(wrapped))
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("[CLS]x")) == "[CLS]x"
    assert max(tokenizer.encode("[CLS]x")) < size
    with pytest.raises(ValueError, match="not in the vocabulary"):
        tokenizer.decode([size])
    # A token that really was added behind them keeps its id, and so they keep theirs.
    wrapped["added_tokens"].append({**wrapped["added_tokens"][0], "id": size + 2, "content": "[X]"})
    assert Tokenizer.from_json(json.dumps(wrapped)).token_to_id("[X]") == size + 2


# --- Streaming ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, TRAINED.vocab_size - 1), max_size=30), st.booleans(), st.booleans())
def test_the_stream_joined_is_the_decoded_text(ids: list[int], skip: bool, keep: bool) -> None:
    stream = TokenStream(TRAINED, skip_special_tokens=skip, keep_prefix_space=keep)
    streamed = "".join([stream.push(token_id) for token_id in ids]) + stream.finish()
    assert streamed == TRAINED.decode(ids, skip_special_tokens=skip, keep_prefix_space=keep)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_the_stream_of_valid_text_never_shows_a_broken_character(text: str) -> None:
    text = text.replace("\ufffd", "?").lstrip(" ")
    stream = TokenStream(TRAINED)
    shown = ""
    for token_id in TRAINED.encode_ordinary(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert stream.finish() == ""
    assert shown == text


def test_a_character_that_spans_tokens_is_held_until_complete() -> None:
    ids = TRAINED.encode_ordinary("€")
    stream = TokenStream(TRAINED)
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "€"]
    assert stream.finish() == ""


def test_an_unfinished_character_ends_as_the_replacement_character() -> None:
    stream = TokenStream(TRAINED)
    for token_id in TRAINED.encode_ordinary("€")[:-1]:
        assert stream.push(token_id) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="finished"):
        stream.push(20)


def test_special_tokens_in_a_stream() -> None:
    assert TokenStream(TRAINED).push(3) == ""
    assert TokenStream(TRAINED, skip_special_tokens=False).push(3) == "[EOS]"


def test_streams_refuse_what_is_no_token_and_stay_usable() -> None:
    stream = TokenStream(TRAINED)
    first, *rest = TRAINED.encode_ordinary("€")
    shown = stream.push(torch.tensor(first))
    for bad, error in ((-1, ValueError), (-2, ValueError), (10**6, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="token_id"):
            stream.push(bad)  # type: ignore[arg-type]
    assert shown + "".join(stream.push(token_id) for token_id in rest) == "€"
    with pytest.raises(TypeError, match="as_tokenizer"):
        TokenStream("tokenizer")  # type: ignore[arg-type]


def test_batch_stream_gives_each_row_what_it_would_get_alone() -> None:
    rows = [TRAINED.encode(text) for text in ("日本語 and more[EOS]", "hi[EOS]", "€ 👋 the cat sat on the mat")]
    steps = max(map(len, rows))
    padded = torch.tensor([row + row[-1:] * (steps - len(row)) for row in rows])
    stream = BatchTokenStream(TRAINED, 3, skip_special_tokens=False)
    pieces = [stream.push(step) for step in padded.T]
    joined = ["".join(row) + last for row, last in zip(zip(*pieces, strict=True), stream.finish(), strict=True)]
    assert joined[:2] == [TRAINED.decode(row) for row in rows[:2]]
    assert joined[2] == TRAINED.decode(padded[2])
    assert stream.done == (True, True, False)


def test_batch_stream_errors() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchTokenStream(TRAINED, 0)
    stream = BatchTokenStream(TRAINED, 2)
    with pytest.raises(ValueError, match="has 3 ids: give one for each of the 2 rows"):
        stream.push([20, 20, 20])
    with pytest.raises(ValueError, match=r"token_ids\[1\] is -1"):
        stream.push(torch.tensor([20, -1]))
    with pytest.raises(TypeError, match="token_ids"):
        stream.push(5)
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push([20, 20])


# --- Training -------------------------------------------------------------------------------------------------------


def test_training_is_deterministic_across_processes() -> None:
    script = (
        "import hashlib; from rxt_model.tokenizer import train_tokenizer;"
        f"print(hashlib.sha256(train_tokenizer({CORPUS!r}, 340).to_json().encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert train_tokenizer(iter(CORPUS), 340).to_json() == TRAINED.to_json()


def test_training_keeps_the_size_asked_for_and_the_whole_alphabet() -> None:
    assert TRAINED.vocab_size == 340
    assert {TRAINED.token_bytes(i) for i in range(11, 267)} == {bytes([b]) for b in range(256)}
    assert train_tokenizer(["a"], 100_000).vocab_size == 267
    assert len(TRAINED.encode_ordinary("the")) == 1


def test_training_errors() -> None:
    with pytest.raises(TypeError, match="texts is a str"):
        train_tokenizer("one text", 300)
    with pytest.raises(TypeError, match="position 1"):
        train_tokenizer(["a", 3], 300)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"position 0.*not text"):
        train_tokenizer(["\udc00"], 300)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(iter([""]), 300)
    with pytest.raises(ValueError, match="at least 267"):
        train_tokenizer(["a"], 266)
    with pytest.raises(TypeError, match="vocab_size is a float"):
        train_tokenizer(["a"], 300.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_frequency is 0"):
        train_tokenizer(["a"], 300, min_frequency=0)
    with pytest.raises(ValueError, match="two roles"):
        train_tokenizer(["a"], 300, special_tokens={"bos": "[X]", "eos": "[X]"})
    with pytest.raises(ValueError, match="role 'start'"):
        train_tokenizer(["a"], 300, special_tokens={"start": "[X]"})
    with pytest.raises(ValueError, match="at least two characters"):
        train_tokenizer(["a"], 300, special_tokens={"bos": "x"})

    def broken() -> Any:
        yield "a"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        train_tokenizer(broken(), 300)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path: Path) -> None:
    written = TRAINED.save(tmp_path / "new" / "model")
    assert written == tmp_path / "new" / "model" / "tokenizer.json"
    assert TRAINED.save(tmp_path / "other.json") == tmp_path / "other.json"
    for loaded in (
        Tokenizer.from_file(written),
        Tokenizer.from_file(str(tmp_path / "other.json")),
        Tokenizer.from_pretrained(written.parent),
        load_tokenizer_from_hf_hub(str(written.parent), local_files_only=True),
        Tokenizer.from_pretrained(written),
    ):
        assert loaded.to_json() == TRAINED.to_json()
        assert loaded.special_tokens == TRAINED.special_tokens
    TRAINED.save(written.parent)  # over an existing file
    assert [p.name for p in written.parent.iterdir()] == ["tokenizer.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINED.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        TRAINED.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_save_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="existing file"):
        TRAINED.save(tmp_path / "file")
    with pytest.raises(ValueError, match="existing file"):
        TRAINED.save(tmp_path / "file" / "deeper")
    with pytest.raises(TypeError, match="directory_or_file is a int"):
        TRAINED.save(3)  # type: ignore[arg-type]


def test_the_saved_file_loads_in_the_tokenizers_library(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(TRAINED.save(tmp_path)))
    assert backend.encode("hello", add_special_tokens=False).ids == TRAINED.encode("hello")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer file at") as caught:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    one_sentence(caught)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_sentence(caught)
    with pytest.raises(FileNotFoundError, match="no directory"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    for name in ("./absent", "a/b/c", "", "no spaces allowed/in hub ids", "~/absent"):
        with pytest.raises(FileNotFoundError, match="not a hub id either"):
            Tokenizer.from_pretrained(name)
    with pytest.raises(ValueError, match="is a directory"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match="has no revisions"):
        Tokenizer.from_pretrained(TRAINED.save(tmp_path).parent, revision="main")
    for call in (Tokenizer.from_file, Tokenizer.from_pretrained, load_tokenizer_from_hf_hub):
        with pytest.raises(TypeError, match="as a string or path"):
            call(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        load_tokenizer_from_hf_hub(tmp_path, local_file_only=True)  # type: ignore[call-arg]


def damaged_files(content: dict[str, Any]) -> dict[str, bytes]:
    whole = json.dumps(content).encode()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "pickle": pickle.dumps({"model": {}}),
        "zip": b"PK\x03\x04" + bytes(30),
        "binary": bytes(range(256)),
        "latin-1": '{"model": "é"}'.encode("latin-1"),
        "list": b"[1, 2]",
        "number": b"3",
        "deep": b"[" * 100_000,
        "config": b'{"vocab_size": 3}',
        "model-is-text": b'{"model": "bpe"}',
        "empty-model": b'{"model": {}, "pre_tokenizer": {"type": "ByteLevel"}}',
        "no-pre-tokenizer": json.dumps({**content, "pre_tokenizer": None}).encode(),
        "whitespace": json.dumps({**content, "pre_tokenizer": {"type": "Whitespace"}}).encode(),
        "added-tokens": json.dumps({**content, "added_tokens": 3}).encode(),
        "added-token": json.dumps({**content, "added_tokens": [{"id": 1}]}).encode(),
        "merges": json.dumps({**content, "model": {**content["model"], "merges": [["zz", "yy"]]}}).encode(),
        "vocab": json.dumps({**content, "model": {**content["model"], "vocab": {"a": -1}, "merges": []}}).encode(),
        "no-tokens": json.dumps(
            {**content, "added_tokens": [], "model": {**content["model"], "vocab": {}, "merges": [], "unk_token": None}}
        ).encode(),
        "version": json.dumps({**content, "version": "9.0"}).encode(),
    }


@pytest.mark.parametrize("name", list(damaged_files({"model": {}})))
def test_damaged_and_foreign_files_are_refused(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged_files(content)[name])
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_sentence(caught)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(data: st.DataObject) -> None:
    text = TRAINED.to_json()
    with pytest.raises(ValueError, match="text is"):
        Tokenizer.from_json(text[: data.draw(st.integers(0, len(text) - 2))])


def test_from_json_errors() -> None:
    with pytest.raises(TypeError, match="text is a dict"):
        Tokenizer.from_json({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no 'model' object"):
        Tokenizer.from_json("{}")


def test_hub_downloads_pass_every_argument_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = TRAINED.save(tmp_path)
    seen: dict[str, Any] = {}

    def download(repo_id: str, filename: str, **arguments: Any) -> str:
        seen.update(arguments, repo_id=repo_id, filename=filename)
        return str(written)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_tokenizer_from_hf_hub("owner/name", revision="v1", token="t", cache_dir=tmp_path, local_files_only=True)
    assert seen == {
        "repo_id": "owner/name",
        "filename": "tokenizer.json",
        "revision": "v1",
        "token": "t",
        "cache_dir": str(tmp_path),
        "local_files_only": True,
    }


def test_a_hub_model_that_is_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="'owner/name' is not in the local cache and local_files_only"
    ) as caught:
        Tokenizer.from_pretrained("owner/name", local_files_only=True, cache_dir=tmp_path)
    one_sentence(caught)


@pytest.mark.parametrize(
    ("failure", "error", "sentence"),
    [
        ("RepositoryNotFoundError", FileNotFoundError, "no hub repository 'owner/name'"),
        ("GatedRepoError", OSError, "is gated"),
        ("RevisionNotFoundError", FileNotFoundError, "no revision 'v1'"),
        ("EntryNotFoundError", FileNotFoundError, r"at revision 'v1' has no tokenizer\.json"),
        ("HfHubHTTPError", OSError, "could not be fetched"),
        ("OfflineModeIsEnabled", OSError, "could not be fetched"),
        ("LocalEntryNotFoundError", FileNotFoundError, "hub could not be reached"),
    ],
)
def test_hub_failures_are_sentences(
    failure: str, error: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, failure)
    raised = kind.__new__(kind)  # their constructors differ between versions and want a response
    raised.args = ("one reason",)

    def download(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(error, match=sentence):
        Tokenizer.from_pretrained("owner/name", revision="v1")


# --- Other libraries ------------------------------------------------------------------------------------------------


def test_as_tokenizer_of_this_library_and_of_tokenizers() -> None:
    assert as_tokenizer(TRAINED) is TRAINED
    assert as_tokenizer(TRAINED.backend).to_json() == TRAINED.to_json()
    bare = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="byte-level"):
        as_tokenizer(bare)
    bare.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ValueError, match="empty vocabulary"):
        as_tokenizer(bare)


@pytest.mark.parametrize("other", [None, "path/to/tokenizer.json", {"vocab": {}}, str.split, object()])
def test_as_tokenizer_refuses_others(other: Any) -> None:
    with pytest.raises(TypeError, match="tokenizer is a") as caught:
        as_tokenizer(other)
    one_sentence(caught)


def test_as_tokenizer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TRAINED.save(tmp_path)),
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    assert wrapped.cls_token_id >= TRAINED.vocab_size
    tokenizer = as_tokenizer(wrapped)
    assert tokenizer.vocab_size == TRAINED.vocab_size
    assert tokenizer.special_tokens == TRAINED.special_tokens
    text = "[BOS][Q]hello 👋[A]"
    assert tokenizer.encode(text) == wrapped(text, add_special_tokens=False)["input_ids"] == TRAINED.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert Tokenizer.from_pretrained(tmp_path / "wrapped").vocab_size == TRAINED.vocab_size


def test_as_tokenizer_takes_the_roles_that_transformers_declares(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = train_tokenizer(CORPUS, 300, special_tokens={"eos": "<|end|>", "answer": "[A]"})
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(other.save(tmp_path)), eos_token="<|end|>", unk_token="<|end|>"
    )
    tokenizer = as_tokenizer(wrapped)
    assert (tokenizer.special_tokens.eos, tokenizer.special_tokens.unk, tokenizer.special_tokens.answer) == (0, 0, 1)
    assert tokenizer.special_tokens.bos is None


def test_slow_transformers_tokenizers_are_refused() -> None:
    class SlowTokenizer:
        pass

    SlowTokenizer.__module__ = "transformers.models.slow"
    with pytest.raises(TypeError, match="without a fast backend"):
        as_tokenizer(SlowTokenizer())


def test_transformers_is_not_imported() -> None:
    script = "import sys, rxt_model.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
