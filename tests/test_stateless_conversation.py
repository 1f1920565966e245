"""A conversation without memory: both ways of keeping its history give the same tokens, and nothing is lost or invented.

On CPUs answers come out of the native engine; what only one way of decoding can go wrong with is asked of both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rxt_kernels import native_runtime
from rxt_model import SparseQueryTransformer, StatelessConfig, TokenIds, train_tokenizer
from rxt_model.interaction.sampling import Sampler, SamplingOptions
from rxt_model.interaction.stateless_conversation import StatelessConversation

TOKENS = TokenIds(bos_token_id=2, eos_token_id=3, query_token_id=5, answer_token_id=6)


@pytest.fixture(scope="module")
def model() -> SparseQueryTransformer:
    torch.manual_seed(0)
    config = StatelessConfig(
        num_layers=2, vocab_size=60, embed_dim=32, ff_dim=32, att_heads=4, att_groups=2, att_num_query_groups=2,
        seq_len=16, use_moe_ff=True, ff_num_experts=4, ff_moe_top_k=2,
    )  # fmt: skip
    return SparseQueryTransformer(config).eval()


@pytest.fixture(params=["modules", "eager", "native"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every conversation of a test decodes in this way."""
    if request.param == "native" and (reason := native_runtime.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(StatelessConversation, "decode_engine", request.param)
    return str(request.param)


def message(*ids: int) -> Tensor:
    return torch.tensor([[TOKENS.bos_token_id, TOKENS.query_token_id, *ids]])


MESSAGES = [message(20, 21, 22), message(30), message(11, 12, 13, 14, 15), message(40, 41)]


def talk(conversation: StatelessConversation, **options: float | int | bool) -> list[list[int]]:
    return [list(conversation.interact(ids, max_seq_len=14, **options)) for ids in MESSAGES]  # type: ignore[arg-type]


def greedy_without_cache(model: SparseQueryTransformer, history: list[int], steps: int) -> Iterator[int]:
    for _ in range(steps):
        token = int(model(torch.tensor([history]))[0, -1].argmax())
        history = [*history, token]
        yield token


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("keep_cache", [False, True])
@torch.no_grad()
def test_answers_are_the_greedy_continuation_of_the_whole_history(
    model: SparseQueryTransformer, keep_cache: bool
) -> None:
    conversation = StatelessConversation(model, TOKENS, keep_cache=keep_cache)
    history: list[int] = []
    for ids, answer in zip(MESSAGES, talk(conversation, temperature=0.0), strict=True):
        history += [*ids[0].tolist(), TOKENS.answer_token_id]
        assert answer == list(greedy_without_cache(model, history, len(answer)))
        assert answer[-1] == TOKENS.eos_token_id or len(answer) == 14 - ids.shape[1] - 1
        history += answer
    assert conversation.history == history
    assert conversation.turns == len(MESSAGES)
    assert len(history) > model.config.seq_len  # rotary angles exist for every position


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sampled_answers_do_not_depend_on_how_the_history_is_kept(model: SparseQueryTransformer, seed: int) -> None:
    talks = [
        talk(StatelessConversation(model, TOKENS, keep_cache=keep_cache), seed=seed, use_self_attn_cache=use_cache)
        for keep_cache, use_cache in ((False, False), (False, True), (True, True))
    ]
    assert talks[0] == talks[1] == talks[2]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("read", [1, 2, 5])
def test_a_caller_that_stops_reading_is_remembered_up_to_there(model: SparseQueryTransformer, read: int) -> None:
    answers = []
    for keep_cache in (False, True):
        conversation = StatelessConversation(model, TOKENS, keep_cache=keep_cache)
        stream = conversation.interact(MESSAGES[0], temperature=0.0, max_seq_len=14)
        first = [next(stream) for _ in range(read)]
        assert conversation.history == [*MESSAGES[0][0].tolist(), TOKENS.answer_token_id, *first]
        answers.append((first, list(conversation.interact(MESSAGES[1], temperature=0.0, max_seq_len=14))))
        with pytest.raises(RuntimeError, match="read an answer to its end"):
            next(stream)
        answers.append((first, list(conversation.interact(MESSAGES[2], temperature=0.0, max_seq_len=14))))
    assert answers[:2] == answers[2:]


class FailsAtThirdToken(Sampler):
    def __init__(self) -> None:
        super().__init__(SamplingOptions(temperature=0.0))
        self.calls = 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("no more")
        return super().__call__(logits)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("keep_cache", [False, True])
def test_an_exception_leaves_the_history_as_it_was(model: SparseQueryTransformer, keep_cache: bool) -> None:
    conversation = StatelessConversation(model, TOKENS, keep_cache=keep_cache)
    list(conversation.interact(MESSAGES[0], temperature=0.0))
    history = list(conversation.history)
    with pytest.raises(ValueError, match="no more"):
        list(conversation.stream([2, 5, 20, 6], FailsAtThirdToken(), 8))
    assert (conversation.history, conversation.turns) == (history, 1)
    untroubled = StatelessConversation(model, TOKENS, keep_cache=keep_cache)
    list(untroubled.interact(MESSAGES[0], temperature=0.0))
    expected = list(untroubled.interact(MESSAGES[1], temperature=0.0))
    assert list(conversation.interact(MESSAGES[1], temperature=0.0)) == expected


@pytest.mark.usefixtures("engine")
def test_state_is_what_has_to_be_kept(model: SparseQueryTransformer) -> None:
    reread = StatelessConversation(model, TOKENS)
    kept = StatelessConversation(model, TOKENS, keep_cache=True)
    talk(reread, temperature=0.0)
    talk(kept, temperature=0.0)
    tokens = len(reread.history)
    assert reread.state_bytes() == 8 * tokens
    # 2 layers, key and value, 2 heads of 8, 4 bytes; the last token of the last answer was never read.
    assert kept.state_bytes() == 8 * tokens + (tokens - 1) * 2 * 2 * 2 * 8 * 4
    kept.reset()
    assert (kept.state_bytes(), kept.turns, kept.history) == (0, 0, [])


def test_text_in_and_text_out() -> None:
    tokenizer = train_tokenizer(["hello there", "how are you"], vocab_size=300)
    model = SparseQueryTransformer(
        StatelessConfig(
            num_layers=1, vocab_size=tokenizer.vocab_size, embed_dim=32, ff_dim=32, att_heads=4, att_groups=2,
            att_num_query_groups=2,
        )
    ).eval()  # fmt: skip
    roles = tokenizer.special_tokens
    assert (roles.bos, roles.eos, roles.query, roles.answer) == (2, 3, 5, 6)
    conversation = StatelessConversation(model, TOKENS, tokenizer, keep_cache=True)
    query = conversation.tokenize_query("hello [A]")
    answer = list(conversation.interact(**query, temperature=0.0, max_seq_len=30))  # type: ignore[arg-type]
    text = "".join(conversation.stringify_token(token) for token in answer)
    shown = tokenizer.decode(answer, skip_special_tokens=True)
    assert shown.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda m: StatelessConversation(torch.nn.Linear(1, 1), TOKENS), TypeError, "model is a Linear"),  # type: ignore[arg-type]
        (lambda m: StatelessConversation(m, TOKENS, max_history=0), ValueError, "max_history is 0"),
        (lambda m: StatelessConversation(m, TOKENS.replace(pad_token_id=60)), ValueError, "the id 60"),
        (lambda m: StatelessConversation(m, TOKENS).interact(torch.ones(2, 3).long()), ValueError, "2 rows"),
        (lambda m: StatelessConversation(m, TOKENS).interact(torch.ones(1, 3)), TypeError, "float32"),
        (lambda m: StatelessConversation(m, TOKENS).interact(message(60)), ValueError, "0 to 59"),
        (
            lambda m: StatelessConversation(m, TOKENS).interact(message(1), max_seq_len=4),
            ValueError,
            "max_seq_len is 4",
        ),
        (lambda m: StatelessConversation(m, TOKENS).interact(message(1), temperature=-1.0), ValueError, "temperature"),
        (
            lambda m: StatelessConversation(m, TOKENS).interact(message(1), torch.zeros(1, 3, dtype=torch.bool)),
            ValueError,
            "all False",
        ),
        (
            lambda m: StatelessConversation(m, TOKENS, keep_cache=True).interact(message(1), use_self_attn_cache=False),
            ValueError,
            "keep_cache=False",
        ),
        (lambda m: StatelessConversation(m, TOKENS, max_history=4).interact(message(1)), ValueError, "max_history = 4"),
        (
            lambda m: StatelessConversation(m, TOKENS).stream([1], Sampler(SamplingOptions()), 0),
            ValueError,
            "budget is 0",
        ),
        (lambda m: StatelessConversation(m, TOKENS).tokenize_query("hello"), ValueError, "no tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(model, call, error, sentence) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=sentence):
        call(model)


def test_a_full_history_ends_the_answer(model: SparseQueryTransformer) -> None:
    conversation = StatelessConversation(model, TOKENS, max_history=9)
    answer = list(conversation.interact(MESSAGES[0], temperature=0.0))
    assert len(conversation.history) <= 9
    assert len(answer) <= 3
    with pytest.raises(ValueError, match="max_history = 9"):
        conversation.interact(MESSAGES[1])


def test_conversations_of_one_model_do_not_meet(model: SparseQueryTransformer, engine: str) -> None:
    """Two answers are read in turn, each behind a history of its own, from weights that are packed once."""

    def told() -> StatelessConversation:
        conversation = StatelessConversation(model, TOKENS, keep_cache=True)
        list(conversation.interact(MESSAGES[0], temperature=0.0, max_seq_len=14))
        return conversation

    def answers(first: StatelessConversation, second: StatelessConversation) -> list[list[int]]:
        streams = [
            first.interact(MESSAGES[1], temperature=0.0, max_seq_len=14),
            second.interact(MESSAGES[2], temperature=0.0, max_seq_len=14),
        ]
        found: list[list[int]] = [[], []]
        for _ in range(14):
            for tokens, stream in zip(found, streams, strict=True):
                tokens += [token for token in [next(stream, None)] if token is not None]
        return found

    one, two = told(), told()
    together = answers(one, two)
    alone = [list(told().interact(ids, temperature=0.0, max_seq_len=14)) for ids in MESSAGES[1:3]]
    assert together == alone
    if engine != "modules":
        assert one._engine is not two._engine
    if engine == "native":
        assert one._engine._decoder is two._engine._decoder  # type: ignore[union-attr]


def test_a_copy_goes_on_by_itself(model: SparseQueryTransformer, engine: str) -> None:
    conversation = StatelessConversation(model, TOKENS, keep_cache=True)
    list(conversation.interact(MESSAGES[0], temperature=0.0, max_seq_len=14))
    other = copy.deepcopy(conversation)
    expected = list(conversation.interact(MESSAGES[1], temperature=0.0, max_seq_len=14))
    assert list(other.interact(MESSAGES[1], temperature=0.0, max_seq_len=14)) == expected


@pytest.mark.usefixtures("engine")
def test_a_model_that_has_changed_reads_its_history_again(model: SparseQueryTransformer) -> None:
    own = copy.deepcopy(model)
    answers = []
    for keep_cache in (True, False):
        conversation = StatelessConversation(own, TOKENS, keep_cache=keep_cache)
        list(conversation.interact(MESSAGES[0], temperature=0.0, max_seq_len=14))
        with torch.no_grad():
            own.model.embedding.weight.mul_(2.0)
        answers.append(list(conversation.interact(MESSAGES[1], temperature=0.0, max_seq_len=14)))
        with torch.no_grad():
            own.model.embedding.weight.mul_(0.5)
    assert answers[0] == answers[1]


def test_it_says_how_it_decodes_and_why(model: SparseQueryTransformer) -> None:
    conversation = StatelessConversation(model, TOKENS)
    if native_runtime.available():
        assert conversation.explain() == ("Answers are decoded by the native engine: it can decode this model on cpu.")
        conversation.decode_weights = "int8"
        assert "with weights in int8" in conversation.explain()
        assert len(list(conversation.interact(MESSAGES[0], temperature=0.0))) > 1
        conversation.decode_weights = None
    hooked = copy.deepcopy(model)
    hooked.model.head.register_forward_hook(lambda *_: None)
    found = StatelessConversation(hooked, TOKENS).explain()
    assert found == (
        "Answers are decoded operation by operation through the modules: model.head has forward hooks, which an engine "
        "would not call."
    )
    conversation.decode_engine = "modules"
    assert conversation.explain().endswith("through the modules: it was asked for.")
    conversation.decode_engine = "fast"
    with pytest.raises(ValueError, match="decode_engine is 'fast', which is not known"):
        conversation.interact(MESSAGES[0]).__next__()
