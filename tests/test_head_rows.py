"""The vocabulary head is computed where a token is chosen, and nowhere else; scoring still gets every position.

The head is a sixth (RxT-Alpha Micro Plus) to a quarter (RxT-Beta Micro) of the weights that a token is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ANSWER, BETA_TOKENS, THINK, alpha, beta, decoder_config, favour_end, messages, right_padded
from small_models import MODELS, make
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rxt_kernels.decode import ENGINES, EagerEngine, decode_engine, supports
from rxt_model import RxTAlpha, RxTBeta, SparseQueryTransformer, StatelessConfig
from rxt_model.interaction.stateless_conversation import StatelessConversation
from rxt_model.interaction.weights import decoder_weights

PROMPT = messages([9])[0]


class HeadRows(TorchFunctionMode):
    """Counts the rows of every product with one matrix, whoever computes it: a module, or a function of its weights."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.head = head
        self.rows: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1].data_ptr() == self.head.data_ptr():
            self.rows.append(args[0].numel() // args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def answer(model: RxTAlpha | RxTBeta, **options: Any) -> tuple[list[int], list[int]]:
    """The tokens of an answer, and the rows that went through the head for them."""
    with HeadRows(model.decoder.model.head.weight) as head:
        tokens = list(model.interact(torch.tensor([PROMPT]), **{"temperature": 0.0, "max_seq_len": 20, **options}))
    return tokens[:-2], head.rows


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("engine", ["modules", "eager"])
@pytest.mark.parametrize("async_memory", [False, True])
def test_one_row_per_token(engine: str, use_cache: bool, async_memory: bool) -> None:
    model = alpha()
    model.decode_engine = engine
    for _ in range(2):
        tokens, rows = answer(model, use_self_attn_cache=use_cache, async_memory=async_memory)
        assert rows == [1] * len(tokens)
        assert len(tokens) > 3


@pytest.mark.parametrize("engine", ["modules", "eager"])
def test_one_row_per_message_of_a_batch(engine: str) -> None:
    """However long the messages are, and however far they are padded."""
    model = alpha()
    favour_end(model, 4.0)
    model.decode_engine = engine
    model.set_batch_mode(True, batch_size=3)
    prompts = right_padded([*messages([1, 12, 5]), PROMPT * 3])
    batch = {name: value[:3] for name, value in prompts.items()}
    with HeadRows(model.decoder.model.head.weight) as head:
        steps = list(model.batch_interact(**batch, seed=1, max_seq_len=24))[:-2]
    assert head.rows == [3] * len(steps)
    with HeadRows(model.decoder.model.head.weight) as head:
        model.batch_interactions(**batch, seed=2, max_seq_len=24)
    assert set(head.rows) == {3}


@pytest.mark.parametrize("engine", ["modules", "eager"])
@pytest.mark.parametrize(("mode", "given"), [("auto", None), ("fast", ANSWER), ("extended", THINK)])
def test_no_row_for_an_opening_that_is_given(mode: str, given: int | None, engine: str) -> None:
    """The token is read together with the message; only a choice between openings needs logits of its own."""
    model = beta()
    model.decode_engine = engine
    tokens, rows = answer(model, thinking_mode=mode)
    assert rows == [1] * (len(tokens) - (given is not None))
    assert len(tokens) == 20 - len(PROMPT)
    assert given in (None, tokens[0])


@pytest.mark.parametrize("mode", ["fast", "extended"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_given_opening_gives_what_reading_it_alone_gave(mode: str, use_cache: bool) -> None:
    model = beta()
    given = ANSWER if mode == "fast" else THINK
    ids = [*PROMPT, given]
    with torch.no_grad():
        for _ in range(20 - len(ids)):
            ids.append(int(model.decoder(torch.tensor([ids]))[0, -1].argmax()))
    assert answer(model, thinking_mode=mode, use_self_attn_cache=use_cache)[0] == ids[len(PROMPT) :]
    # The smallest budget: the opening and one more token.
    shortest = beta().interact(torch.tensor([PROMPT]), temperature=0.0, thinking_mode=mode, max_seq_len=len(PROMPT) + 2)
    assert len(list(shortest)) == 2 + 2


def test_a_model_without_a_thinking_token_opens_with_the_answer() -> None:
    model = RxTBeta(
        decoder_config(),
        alpha().encoder.config,
        alpha().memory_attention.config,
        BETA_TOKENS.replace(think_token_id=None),
    ).eval()
    model.decode_engine = "modules"
    tokens, rows = answer(model)
    assert tokens[0] == ANSWER
    assert rows == [1] * (len(tokens) - 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_head_behind_the_last_token_only(name: str, engine: str) -> None:
    model = make(name)
    weights = decoder_weights(model.decoder)
    with torch.no_grad():
        if (reason := supports(engine, weights)) is not None:
            pytest.skip(reason)
        made = decode_engine(weights, 3, engine=engine)
        if not isinstance(made, EagerEngine):
            pytest.skip("what native code multiplies cannot be counted from here.")
        made.set_memory(model.stm.memory)
        batch = right_padded(messages([4, 11, 7]))
        with HeadRows(weights.head) as head:
            made.prefill(batch["input_ids"], batch["attention_mask"].sum(1).tolist())
            assert head.rows == [3]
            made.step(torch.tensor([20, 21, 22]))
            assert head.rows == [3, 3]


@pytest.mark.parametrize("engine", ["modules", "eager"])
@pytest.mark.parametrize(("keep_cache", "use_cache"), [(True, True), (False, True), (False, False)])
def test_conversations_without_memory(engine: str, keep_cache: bool, use_cache: bool) -> None:
    """Also where a turn begins by reading the whole history again."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 1, "vocab_size": 300, "embed_dim": 32, "ff_dim": 32}
    config = StatelessConfig(**sizes, att_heads=4, att_groups=2, att_num_query_groups=2)
    model = SparseQueryTransformer(config).eval()
    conversation = StatelessConversation(model, alpha().token_ids, keep_cache=keep_cache)
    conversation.decode_engine = engine
    for _ in range(3):
        with HeadRows(model.model.head.weight) as head:
            tokens = list(
                conversation.interact(
                    torch.tensor([PROMPT]), temperature=0.0, max_seq_len=18, use_self_attn_cache=use_cache
                )
            )
        assert head.rows == [1] * len(tokens)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(ids),
        lambda model, ids: model.decoder(ids),
        lambda model, ids: model.decoder.logits(model.decoder.hidden_states(ids).hidden),
        lambda model, ids: model.decoder(ids, cache=model.decoder.new_cache(1)),
    ],
)
def test_scoring_gets_every_position(call: Callable[[RxTAlpha, Tensor], Tensor]) -> None:
    model = alpha()
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), HeadRows(model.decoder.model.head.weight) as head:
        logits = call(model, ids)
    assert logits.shape == (1, len(PROMPT), 300)
    assert head.rows == [len(PROMPT)]
    with torch.no_grad():
        one_by_one = torch.stack([model(ids[:, : end + 1])[0, -1] for end in range(len(PROMPT))])
    torch.testing.assert_close(logits[0].log_softmax(-1), one_by_one.log_softmax(-1), atol=1e-5, rtol=1e-5)
