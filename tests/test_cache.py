"""Key/value caches: cached decoding is uncached decoding, at the same positions, for any lengths (spec 1 and 2.2)."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import SIZES, alpha, beta, decoder_config, left_padded, messages, refusal, right_padded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxt_model import RxTDecoder, SparseQueryTransformer, StatelessConfig
from rxt_model.cache import SelfAttentionCache
from rxt_model.layers.rotary import RotaryPositions

Network = RxTDecoder | SparseQueryTransformer


def stateless(**changes: Any) -> SparseQueryTransformer:
    torch.manual_seed(3)
    fields = {
        name: SIZES[name] for name in ("num_layers", "vocab_size", "embed_dim", "ff_dim", "att_heads", "att_groups")
    }
    return SparseQueryTransformer(StatelessConfig(**{**fields, "att_num_query_groups": 4, **changes})).eval()


def run(model: Network, ids: Tensor, mask: Tensor | None = None, cache: SelfAttentionCache | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, mask, cache=cache)


MODELS = {
    "alpha": lambda: alpha().decoder,
    "beta with experts": lambda: beta().decoder,
    "reversed heads": lambda: alpha(decoder={"att_groups": 4, "att_query_groups": 2}).decoder,
    "mqa, split": lambda: alpha(decoder={"self_att_type": "mqa", "rope_layout": "split"}).decoder,
    "no positions": lambda: alpha(decoder={"use_nope": True}).decoder,
    "gated, head norm": lambda: alpha(decoder={"use_gated_attention": True, "use_head_norm": True}).decoder,
    "stateless layers": lambda: (
        beta(stateless_layers_config=("dense", "moe"), final_stateless_layers_config=("moe",)).decoder
    ),
    "stateless model": stateless,
    "angles in the model's dtype": lambda: alpha(decoder={"rope_angle_dtype": "match"}).decoder,
    "no memory": lambda: RxTDecoder(decoder_config(skip_memory_cross_attention=True)).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_uncached_logits_token_by_token_and_in_pieces(name: str) -> None:
    model = MODELS[name]()
    ids = torch.tensor([messages([18], seed=4)[0]])
    expected = run(model, ids)
    for pieces in ([1] * 20, [7, 1, 1, 5, 6], [20]):
        cache = model.new_cache(1, capacity=2)
        got, start = [], 0
        for piece in pieces:
            got.append(run(model, ids[:, start : start + piece], cache=cache))
            cache.advance(piece)
            start += piece
        torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=2e-5, rtol=1e-5)
        assert cache.longest == 20
        assert cache.lengths.tolist() == [20]


def test_the_newest_of_n_tokens_is_at_position_n_minus_1(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = RotaryPositions.angles

    def spy(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(positions.flatten().tolist())
        return original(self, positions, dtype)

    monkeypatch.setattr(RotaryPositions, "angles", spy)
    model = alpha()
    model.decode_engine = "modules"
    prompt = messages([4])[0]
    answer = list(model.interact(torch.tensor([prompt]), temperature=0.0, max_seq_len=12))[:-2]
    assert len(answer) == 12 - 6 - 1
    # [A] is the last token of the prefill; the last token of the answer is never decoded.
    assert seen[: len(answer)] == [list(range(7)), *([position] for position in range(7, 7 + len(answer) - 1))]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=15)
def test_rows_of_different_lengths_see_only_themselves(lengths: list[int], seed: int) -> None:
    model = alpha().decoder
    prompts, later = messages(lengths, seed), messages([6] * len(lengths), seed + 1)
    batch = right_padded(prompts, filler=seed % 300)
    cache = model.new_cache(len(lengths), capacity=3)
    valid = batch["attention_mask"].sum(dim=1)
    hidden = run(model, batch["input_ids"], batch["attention_mask"], cache)
    cache.advance(batch["input_ids"].shape[1], valid)
    steps = []
    # Row 0 pauses at steps 2 and 3, as a row that has ended does.
    written = [list(prompt) for prompt in prompts]
    for step in range(6):
        goes_on = torch.tensor([row > 0 or step not in (2, 3) for row in range(len(lengths))])
        column = torch.tensor([[row[step]] for row in later])
        steps.append(run(model, column, cache=cache))
        cache.advance(1, goes_on.long())
        for row, tokens in enumerate(written):
            tokens.append(int(column[row, 0]))
            alone = run(model, torch.tensor([tokens]))[0, -1]
            torch.testing.assert_close(steps[-1][row, -1], alone, atol=3e-5, rtol=1e-4)
            if not goes_on[row]:
                tokens.pop()
    assert cache.lengths.tolist() == [len(row) for row in written]
    for row, prompt in enumerate(prompts):
        alone = run(model, torch.tensor([prompt]))[0]
        torch.testing.assert_close(hidden[row, : len(prompt)], alone, atol=3e-5, rtol=1e-4)


def test_capacity_doubles_and_keeps_what_is_stored() -> None:
    model = stateless()
    cache = model.new_cache(1, capacity=3)
    ids = torch.tensor([messages([20])[0]])
    run(model, ids[:, :2], cache=cache)
    cache.advance(2)
    stored = cache.layers[0].key
    assert stored is not None
    first = stored[:, :2].clone()
    capacities = [cache.capacity]
    for start in range(2, 14):
        run(model, ids[:, start : start + 1], cache=cache)
        cache.advance(1)
        capacities.append(cache.capacity)
    assert capacities == [3, 3, *[6] * 3, *[12] * 6, *[24] * 2]
    grown = cache.layers[0].key
    assert grown is not None
    assert grown.shape[1] == 24
    assert torch.equal(grown[:, :2], first)


def test_growth_stops_at_the_limit_with_a_sentence_and_nothing_lost() -> None:
    model = stateless()
    ids = torch.tensor([messages([20])[0]])
    cache = model.new_cache(1, capacity=4, limit=6)
    run(model, ids[:, :5], cache=cache)
    cache.advance(5)
    assert cache.capacity == 6
    with refusal(ValueError, "cache", "limit", "6"):
        run(model, ids[:, 5:7], cache=cache)
    assert cache.longest == 5
    got = run(model, ids[:, 5:6], cache=cache)
    torch.testing.assert_close(got[:, -1], run(model, ids[:, :6])[:, -1], atol=2e-5, rtol=1e-5)
    assert model.new_cache(1, capacity=64, limit=8).capacity == 8


def test_state_bytes_counts_what_is_used() -> None:
    model = stateless()
    cache = model.new_cache(3, capacity=16)
    assert cache.state_bytes() == 0
    run(model, torch.tensor(messages([5] * 3)), cache=cache)
    cache.advance(7)
    layers, key_value_heads, head_dim = 2, 2, 8
    assert cache.state_bytes() == layers * 2 * 3 * 7 * key_value_heads * head_dim * 4


def test_a_cache_is_freed_when_it_is_dropped() -> None:
    """A cycle of references would keep gigabytes until the garbage collector runs."""
    model = stateless()
    gc.disable()
    try:
        cache = model.new_cache(1)
        run(model, torch.tensor([[2, 5]]), cache=cache)
        stored = cache.layers[0].key
        assert stored is not None
        reference = weakref.ref(stored)
        del stored, cache
        assert reference() is None
    finally:
        gc.enable()


def test_a_mask_with_a_cache_is_right_padded_and_comes_first() -> None:
    model = alpha().decoder
    batch = left_padded(messages([3, 5]))
    with refusal(ValueError, "attention_mask", "right"):
        run(model, ids=batch["input_ids"], mask=batch["attention_mask"], cache=model.new_cache(2))
    cache = model.new_cache(2)
    run(model, batch["input_ids"], cache=cache)
    cache.advance(7)
    with refusal(ValueError, "attention_mask", "cache"):
        run(model, batch["input_ids"][:, :1], torch.ones(2, 1, dtype=torch.bool), cache)
    assert cache.longest == 7


def test_several_tokens_after_a_ragged_prefill_are_refused() -> None:
    model = stateless()
    batch = right_padded(messages([3, 5]))
    cache = model.new_cache(2)
    run(model, batch["input_ids"], batch["attention_mask"], cache)
    cache.advance(7, batch["attention_mask"].sum(dim=1))
    assert not cache.is_uniform
    with refusal(ValueError, "different lengths", "2 tokens"):
        run(model, batch["input_ids"][:, :2], cache=cache)
    # Once the shorter row has caught up, pieces are welcome again.
    for _ in range(2):
        run(model, batch["input_ids"][:, :1], cache=cache)
        cache.advance(1, torch.tensor([1, 0]))
    assert cache.is_uniform
    run(model, batch["input_ids"][:, :2], cache=cache)


def test_caches_of_another_model_or_batch_are_refused() -> None:
    model = stateless()
    with refusal(ValueError, "cache", "3 rows"):
        run(model, torch.tensor([[2, 5]]), cache=model.new_cache(3))
    with refusal(ValueError, "cache", "layers"):
        run(model, torch.tensor([[2, 5]]), cache=stateless(num_layers=1).new_cache(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 0), ("batch_size", 0), ("batch_size", 2.0), ("capacity", 0), ("limit", 0), ("limit", -3)],
)
def test_sizes_out_of_range(name: str, value: object) -> None:
    with refusal(ValueError, name):
        SelfAttentionCache(**{"num_layers": 1, "batch_size": 1, name: value})  # type: ignore[arg-type]


def test_counts_out_of_range_change_nothing() -> None:
    cache = SelfAttentionCache(1, 2, capacity=8)
    with refusal(ValueError, "new"):
        cache.begin(0)
    cache.begin(4)
    for valid in (torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.tensor([-1, 2]), torch.tensor([0, 5])):
        with refusal(ValueError, "valid"):
            cache.advance(4, valid)
    with refusal(ValueError, "begin"):
        cache.advance(9)
    assert cache.longest == 0
    assert cache.lengths.tolist() == [0, 0]
    assert cache.is_prefill
