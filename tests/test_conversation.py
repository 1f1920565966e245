"""Talking: streams, memory updates that happen once, batches that equal solo conversations (spec 1, 2.15, 2.16)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Generator
from contextlib import suppress
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
    MEMORY_SIZES,
    QUERY,
    SIZES,
    THINK,
    VOCABULARY,
    alpha,
    beta,
    count_updates,
    decoder_config,
    encoder_config,
    fails_when_called,
    favour_end,
    left_padded,
    memory_config,
    messages,
    refusal,
    right_padded,
    tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxt_model import RxTAlpha, RxTBeta
from rxt_model.interaction.sampling import Sampler

Model = RxTAlpha | RxTBeta
PROMPT = messages([5])[0]


def ids_of(*prompts: list[int]) -> Tensor:
    return torch.tensor(prompts)


def start(model: Model, **options: Any) -> Generator[int, None, None]:
    return model.interact(ids_of(PROMPT), **{"temperature": 0.0, "max_seq_len": 16, **options})


def memory_after(model: Model, memory: Tensor, *rows: list[int]) -> Tensor:
    """What one update with these interactions makes of a memory, computed from the parts."""
    batch = right_padded(rows)
    with torch.no_grad():
        encoded = model.encoder(batch["input_ids"], batch["attention_mask"])
        return model.memory_attention(encoded, batch["attention_mask"], memory)


# -- one conversation -----------------------------------------------------------------------------------------------------


def test_ids_then_update_then_done() -> None:
    model = alpha()
    before = model.export_stm_state()
    yielded = []
    for token in start(model):
        yielded.append(token)
        if token == -1:
            assert torch.equal(model.stm.memory, before), "the update must come after -1"
            assert model.turns == 0
        if token == -2:
            assert not torch.equal(model.stm.memory, before)
            assert model.turns == 1
    assert yielded[-2:] == [-1, -2]
    answer = yielded[:-2]
    assert len(answer) == 16 - len(PROMPT) - 1, "the budget is what message and [A] leave"
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in answer)
    torch.testing.assert_close(
        model.export_stm_state(), memory_after(model, before, [*PROMPT, ANSWER, *answer]), atol=1e-6, rtol=1e-5
    )


def test_the_end_token_is_yielded_written_and_last() -> None:
    model = alpha()
    favour_end(model, 50.0)
    before = model.export_stm_state()
    assert list(start(model)) == [EOS, -1, -2]
    expected = memory_after(model, before, [*PROMPT, ANSWER, EOS])
    torch.testing.assert_close(model.export_stm_state(), expected, atol=1e-6, rtol=1e-5)


def test_turns_count_interactions() -> None:
    model = alpha()
    for turn in range(1, 4):
        list(start(model))
        assert model.turns == turn
    model.reset_stm(seed=1)
    assert model.turns == 0
    list(start(model))
    model.init_stm_state(ids_of(PROMPT))
    assert model.turns == 0


def read_all(stream: Generator[int, None, None], model: Model) -> None:
    list(stream)


def break_at_end_token(stream: Generator[int, None, None], model: Model) -> None:
    for token in stream:
        if token == EOS:
            break


def break_early(stream: Generator[int, None, None], model: Model) -> None:
    for number, _ in enumerate(stream):
        if number == 2:
            break


def break_at_update(stream: Generator[int, None, None], model: Model) -> None:
    for token in stream:
        if token == -1:
            break


def close(stream: Generator[int, None, None], model: Model) -> None:
    next(stream)
    stream.close()


def throw(error: BaseException) -> Callable[[Generator[int, None, None], Model], None]:
    def interrupt(stream: Generator[int, None, None], model: Model) -> None:
        next(stream)
        with pytest.raises(type(error)):
            stream.throw(error)

    return interrupt


def body_raises(stream: Generator[int, None, None], model: Model) -> None:
    with suppress(KeyboardInterrupt):
        for _ in stream:
            raise KeyboardInterrupt


def export_while_open(stream: Generator[int, None, None], model: Model) -> None:
    next(stream)
    model.export_stm_state()
    assert model.turns == 1


def switch_batch_while_open(stream: Generator[int, None, None], model: Model) -> None:
    next(stream)
    model.set_batch_mode(True, batch_size=1)
    assert model.turns == 1


@pytest.mark.parametrize(
    "stop",
    [
        read_all,
        break_at_end_token,
        break_early,
        break_at_update,
        close,
        throw(KeyboardInterrupt()),
        throw(ValueError("caller")),
        body_raises,
        export_while_open,
        switch_batch_while_open,
    ],
)
@pytest.mark.parametrize("end_bias", [0.0, 50.0])
def test_memory_is_updated_exactly_once_however_reading_ends(
    stop: Callable[[Generator[int, None, None], Model], None], end_bias: float
) -> None:
    model = alpha()
    favour_end(model, end_bias)
    before = model.export_stm_state()
    updates = count_updates(model)
    stream = start(model)
    stop(stream, model)
    del stream
    model.export_stm_state()
    assert len(updates) == 1
    assert model.turns == 1
    written = updates[0][0].tolist()
    assert written[: len(PROMPT) + 1] == [*PROMPT, ANSWER]
    torch.testing.assert_close(model.stm.memory, memory_after(model, before, written), atol=1e-6, rtol=1e-5)
    assert len(list(start(model))) > 2
    assert len(updates) == 3  # the recomputation above, and the second interaction
    assert model.turns == 2


def test_a_dropped_stream_is_committed_without_the_garbage_collector() -> None:
    model = alpha()
    updates = count_updates(model)
    gc.disable()
    try:
        stream = start(model)
        read = [next(stream), next(stream)]
        del stream
        assert [ids[0].tolist() for ids in updates] == [[*PROMPT, ANSWER, *read]]
    finally:
        gc.enable()


def test_a_stream_that_never_starts_changes_nothing() -> None:
    model = alpha()
    before = model.export_stm_state()
    updates = count_updates(model)
    stream = start(model)
    stream.close()
    del stream
    start(model)
    gc.collect()
    assert torch.equal(model.export_stm_state(), before)
    assert not updates
    assert model.turns == 0


def test_the_next_interaction_settles_an_open_one_first() -> None:
    model = alpha()
    before = model.export_stm_state()
    updates = count_updates(model)
    first = start(model)
    read = [next(first), next(first)]
    second = start(model, seed=1)
    assert model.turns == 0, "nothing happens before the second one is read"
    next(second)
    assert model.turns == 1
    with refusal(RuntimeError, "another interaction"):
        next(first)
    with pytest.raises(StopIteration):
        next(first)
    rest = list(second)
    assert rest[-2:] == [-1, -2]
    assert model.turns == 2
    assert len(updates) == 2
    assert updates[0][0].tolist() == [*PROMPT, ANSWER, *read]

    fresh = alpha()
    fresh.load_stm_state(memory_after(fresh, before, updates[0][0].tolist()))
    list(start(fresh, seed=1))
    torch.testing.assert_close(model.stm.memory, fresh.stm.memory, atol=1e-6, rtol=1e-5)


def test_an_answer_that_was_complete_ends_quietly_after_another_began() -> None:
    model = alpha()
    favour_end(model, 50.0)
    first = start(model)
    assert next(first) == EOS
    list(start(model))
    assert list(first) == [-1, -2]
    assert model.turns == 2


@pytest.mark.parametrize("replace", ["reset", "load", "load_conversation"])
def test_replacing_the_memory_drops_an_open_interaction(replace: str, tmp_path: Any) -> None:
    model = alpha()
    state = torch.zeros_like(model.stm.memory)
    model.load_stm_state(state)
    file = model.save_conversation(tmp_path / "state.safetensors")
    updates = count_updates(model)
    stream = start(model)
    next(stream)
    if replace == "reset":
        model.reset_stm("zeros")
    elif replace == "load":
        model.load_stm_state(state)
    else:
        model.load_conversation(file)
    with refusal(RuntimeError, "replaced"):
        next(stream)
    assert not updates
    assert torch.equal(model.export_stm_state(), state)
    assert model.turns == 0


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()])
def test_an_error_while_decoding_leaves_memory_as_it_was(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = alpha()
    before = model.export_stm_state()
    updates = count_updates(model)
    stream = start(model)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", fails_when_called(error))
        with pytest.raises(type(error)):
            next(stream)
    assert not updates
    assert torch.equal(model.export_stm_state(), before)
    assert model.turns == 0
    assert list(start(model))[-1] == -2
    assert model.turns == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("how", ["read", "close", "next"])
def test_an_error_while_updating_is_raised_once_and_leaves_memory_as_it_was(
    error: BaseException, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = alpha()
    before = model.export_stm_state()
    stream = start(model)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(model.memory_attention, "forward", fails_when_called(error))
        ways = {"read": lambda: list(stream), "close": stream.close, "next": lambda: next(start(model))}
        with pytest.raises(type(error)):
            ways[how]()
    assert torch.equal(model.export_stm_state(), before)
    assert model.turns == 0
    with suppress(RuntimeError, StopIteration):
        next(stream)
    assert list(start(model))[-1] == -2
    assert model.turns == 1


def test_weights_that_make_the_memory_infinite_are_reported_and_change_nothing() -> None:
    model = alpha()
    before = model.export_stm_state()
    with torch.no_grad():
        model.memory_attention.model.attention_layers[0].out_proj.bias.fill_(float("inf"))
    with refusal(ValueError, "memory", "NaN or infinite"):
        list(start(model))
    assert torch.equal(model.export_stm_state(), before)
    assert model.turns == 0


# -- gradients ------------------------------------------------------------------------------------------------------------


def test_gradient_mode_belongs_to_the_caller() -> None:
    model = alpha()
    for number, _ in enumerate(start(model)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        if number == 3:
            break
    assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in start(model):
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_memory_has_no_history_and_can_be_trained_through_after_inference_mode() -> None:
    model = alpha()
    with torch.inference_mode():
        tokens = list(start(model))
        model.init_stm_state(ids_of(PROMPT))
        list(start(model))
        model.set_batch_mode(True, batch_size=2)
        model.set_batch_mode(False)
        exported = model.export_stm_state()
        model.load_stm_state(exported + 0.0)
    assert tokens == list(start(alpha()))
    memory = model.stm.memory
    assert memory.grad_fn is None
    assert not memory.requires_grad
    assert not memory.is_inference()
    model.decoder(ids_of(PROMPT)).sum().backward()
    gradient = model.decoder.model.layers[0].memory_cross_attention.k_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_stream_may_cross_the_border_of_inference_mode() -> None:
    model = alpha()
    with torch.inference_mode():
        stream = start(model)
        tokens = [next(stream), next(stream)]
    tokens += [next(stream), next(stream)]
    with torch.inference_mode():
        tokens += list(stream)
    assert tokens == list(start(alpha()))


def test_loading_a_memory_with_history_detaches_it() -> None:
    model = alpha()
    state = torch.randn_like(model.stm.memory, requires_grad=True) * 2
    model.load_stm_state(state)
    assert model.stm.memory.grad_fn is None
    before = model.export_stm_state()
    with torch.no_grad():
        state.add_(1.0)
    assert torch.equal(model.export_stm_state(), before), "the model keeps its own copy"
    model.export_stm_state().zero_()
    assert torch.equal(model.export_stm_state(), before), "and gives copies away"


# -- caches, batches, padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [alpha, beta])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_uncached_decoding_give_the_same_tokens(make: Callable[[], Model], temperature: float) -> None:
    cached, uncached = make(), make()
    for turn in range(2):
        options = {"temperature": temperature, "seed": turn, "max_seq_len": 30}
        expected = list(start(uncached, use_self_attn_cache=False, **options))
        assert list(start(cached, **options)) == expected
    torch.testing.assert_close(cached.stm.memory, uncached.stm.memory, atol=1e-5, rtol=1e-5)


def answers_of(stream: Generator[Tensor, None, None], rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each row's answer up to its end, by its end token or the budget that the caller knows; and the markers."""
    steps = [tokens.tolist() for tokens in stream]
    return [[step[row] for step in steps[:-2]] for row in range(rows)], steps[-2:]


@pytest.mark.parametrize("family", ["alpha", "beta"])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_k=st.none() | st.sampled_from([1, 7, 300]),
    top_p=st.none() | st.sampled_from([0.3, 0.9]),
    end_bias=st.sampled_from([0.0, 3.0, 5.0]),
    thinking_mode=st.sampled_from([None, "auto", "fast", "extended"]),
)
@settings(max_examples=25)
def test_a_batched_conversation_is_the_conversation_alone(
    family: str,
    lengths: list[int],
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    end_bias: float,
    thinking_mode: str | None,
) -> None:
    model = alpha(seed) if family == "alpha" else beta(seed)
    mode = {} if family == "alpha" else {"thinking_mode": thinking_mode}
    favour_end(model, end_bias)
    rows, limit = len(lengths), 22
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(2, rows, 8, 32, generator=generator)
    prompts = messages(lengths, seed)
    options: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_seq_len": limit, **mode,
    }  # fmt: skip
    solo, solo_memory = [], []
    for row, prompt in enumerate(prompts):
        model.load_stm_state(memory[:, row : row + 1])
        solo.append(list(model.interact(ids_of(prompt), seed=seed + row, **options))[:-2])
        solo_memory.append(model.export_stm_state())
    model.load_stm_state(memory)
    model.turns = 0
    together, markers = answers_of(model.batch_interact(**right_padded(prompts), seed=seed, **options), rows)
    assert markers == [[-1] * rows, [-2] * rows]
    for row in range(rows):
        own = len(solo[row])
        assert together[row][:own] == solo[row]
        assert together[row][own:] == [solo[row][-1]] * (len(together[row]) - own), "ended rows repeat their last token"
    torch.testing.assert_close(model.stm.memory, torch.cat(solo_memory, dim=1), atol=1e-5, rtol=1e-4)
    assert model.turns == 1


def test_rows_end_by_token_and_by_budget_at_different_times() -> None:
    """The memory holds what each row said, without the repetitions that fill the stream."""
    model = alpha()
    favour_end(model, 4.5)
    prompts = messages([1, 4, 9, 12])
    model.set_batch_mode(True, batch_size=4)
    before = model.export_stm_state()
    updates = count_updates(model)
    budgets = [18 - len(prompt) - 1 for prompt in prompts]
    rows, _ = answers_of(model.batch_interact(**right_padded(prompts), seed=4, max_seq_len=18), 4)
    lengths = [row.index(EOS) + 1 if EOS in row[:budget] else budget for row, budget in zip(rows, budgets, strict=True)]
    by_token = [EOS in row[:budget] for row, budget in zip(rows, budgets, strict=True)]
    assert True in by_token
    assert False in by_token
    assert len(set(lengths)) > 2, "choose another seed: this batch ends too evenly to show anything"
    written = [[*p, ANSWER, *row[:n]] for p, row, n in zip(prompts, rows, lengths, strict=True)]
    assert len(updates) == 1
    torch.testing.assert_close(model.stm.memory, memory_after(model, before, *written), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded_by", [left_padded, right_padded])
def test_padding_anywhere_is_left_out(padded_by: Callable[..., dict[str, Tensor]]) -> None:
    prompts = messages([3, 8])
    clean, padded = alpha(), alpha()
    for model in (clean, padded):
        model.set_batch_mode(True, batch_size=2)
    expected, _ = answers_of(clean.batch_interact(**right_padded(prompts), temperature=0.0, max_seq_len=16), 2)
    batch = padded_by(prompts, filler=77)
    wide = {name: torch.cat([value, torch.zeros_like(value)], dim=1) for name, value in batch.items()}
    wide["attention_mask"] = wide["attention_mask"].long()  # an integer mask of 0 and 1 is a mask as well
    got, _ = answers_of(padded.batch_interact(**wide, temperature=0.0, max_seq_len=16), 2)
    assert got == expected
    assert torch.equal(clean.stm.memory, padded.stm.memory)


def test_a_mask_with_holes_is_the_message_without_them() -> None:
    ids = [BOS, QUERY, 20, 99, 21, 99, 22]
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    expected = list(alpha().interact(ids_of([BOS, QUERY, 20, 21, 22]), temperature=0.0, max_seq_len=14))
    assert list(alpha().interact(ids_of(ids), mask, temperature=0.0, max_seq_len=14)) == expected


def test_inputs_are_not_changed() -> None:
    model = alpha()
    model.set_batch_mode(True, batch_size=2)
    batch = right_padded(messages([3, 8]))
    copies = {name: value.clone() for name, value in batch.items()}
    list(model.batch_interact(**batch, max_seq_len=14))
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("make", [alpha, beta])
def test_batch_interactions_returns_what_streaming_gives(make: Callable[[], Model], answers_only: bool) -> None:
    prompts = messages([2, 7])
    options: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_seq_len": 20}
    streamed, whole = make(), make()
    for model in (streamed, whole):
        favour_end(model, 3.0)
        model.set_batch_mode(True, batch_size=2)
    rows, _ = answers_of(streamed.batch_interact(**right_padded(prompts), **options), 2)
    ids, mask = whole.batch_interactions(
        **right_padded(prompts), **options, return_interactions_with_queries=not answers_only
    )
    assert ids.shape == mask.shape == (2, 20)
    assert ids.dtype is torch.long
    assert mask.dtype is torch.bool
    assert torch.equal(streamed.stm.memory, whole.stm.memory)
    assert whole.turns == 1
    opening = [ANSWER] if make is alpha else []
    for row, prompt in enumerate(prompts):
        budget = 20 - len(prompt) - len(opening)
        answer = rows[row][:budget]
        answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
        expected = [*([] if answers_only else prompt), *opening, *answer]
        assert ids[row].tolist() == expected + [0] * (20 - len(expected))
        assert mask[row].tolist() == [True] * len(expected) + [False] * (20 - len(expected))


def test_seeds_repeat_an_answer_and_none_varies_it() -> None:
    def answer(seed: int | None) -> list[int]:
        return list(start(alpha(), temperature=1.0, max_seq_len=40, seed=seed))

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
    first = answer(None)
    torch.manual_seed(99)
    model = alpha()
    torch.manual_seed(100)
    assert list(start(model, temperature=1.0, max_seq_len=40)) != first


# -- thinking modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "opening"), [("fast", ANSWER), ("extended", THINK)])
def test_thinking_modes_open_the_answer(mode: str, opening: int) -> None:
    tokens = list(start(beta(), thinking_mode=mode))
    assert tokens[0] == opening
    assert len(tokens) - 2 == 16 - len(PROMPT)


@pytest.mark.parametrize("mode", ["auto", None])
@pytest.mark.parametrize("favoured", [ANSWER, THINK])
def test_auto_thinking_takes_the_likelier_token_at_the_first_position_only(mode: str | None, favoured: int) -> None:
    model = beta()
    with torch.no_grad():
        model.decoder.model.head.bias[favoured] += 3.0
        logits = model.decoder(ids_of(PROMPT))[0, -1]
        model.decoder.model.head.bias[50] += 20.0
    assert logits[favoured] > logits[ANSWER + THINK - favoured]
    tokens = list(start(model, thinking_mode=mode))[:-2]
    assert tokens[0] == favoured
    assert set(tokens[1:]) == {50}


def test_auto_thinking_per_row() -> None:
    model = beta()
    prompts = messages([3, 4, 5, 6, 7, 8])
    with torch.no_grad():
        logits = torch.stack([model.decoder(ids_of(prompt))[0, -1] for prompt in prompts])
    expected = [ANSWER if row[ANSWER] >= row[THINK] else THINK for row in logits]
    model.set_batch_mode(True, batch_size=6)
    assert next(model.batch_interact(**right_padded(prompts), max_seq_len=16)).tolist() == expected


def test_models_without_a_thinking_token_answer_fast_unless_asked() -> None:
    model = RxTBeta(decoder_config(), encoder_config(), memory_config(), ALPHA_TOKENS).eval()
    assert next(start(model)) == ANSWER
    for mode in ("auto", "extended"):
        with refusal(ValueError, "think"):
            start(model, thinking_mode=mode)
    with refusal(ValueError, "thinking_mode", "RxTAlpha"):
        start(alpha(), thinking_mode="fast")
    with refusal(ValueError, "thinking_mode", "'slow'", "'extended'"):
        start(beta(), thinking_mode="slow")


# -- memory from text ---------------------------------------------------------------------------------------------------------


def test_init_stm_state_is_one_update() -> None:
    model = alpha()
    before = model.export_stm_state()
    state = model.tokenize_full_interaction("who are you", "a cat")
    model.init_stm_state(**state)
    expected = memory_after(model, before, state["input_ids"][0].tolist())
    torch.testing.assert_close(model.stm.memory, expected, atol=1e-6, rtol=1e-5)
    assert model.stm.memory.grad_fn is None


@pytest.mark.parametrize("padded_by", [left_padded, right_padded])
def test_init_stm_state_does_not_depend_on_padding(padded_by: Callable[..., dict[str, Tensor]]) -> None:
    rows = messages([3, 8])
    model = alpha()
    model.set_batch_mode(True, batch_size=2)
    before = model.export_stm_state()
    model.init_stm_state(**padded_by(rows, filler=40))
    for index, row in enumerate(rows):
        alone = memory_after(model, before[:, index : index + 1], row)
        torch.testing.assert_close(model.stm.memory[:, index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_init_stm_state_keeps_the_memory_of_rows_without_tokens() -> None:
    model = alpha()
    model.set_batch_mode(True, batch_size=2)
    model.load_stm_state(torch.randn_like(model.stm.memory))
    before = model.export_stm_state()
    ids = torch.randint(11, 99, (2, 8))
    mask = torch.tensor([[True] * 8, [False] * 8])
    for force in (False, True):
        model.load_stm_state(before)
        model.init_stm_state(ids, mask, force=force)
        assert torch.equal(model.stm.memory[:, 1], before[:, 1])
        assert not torch.equal(model.stm.memory[:, 0], before[:, 0])


def test_force_stores_the_encoded_states() -> None:
    model = alpha()
    ids = ids_of(messages([6])[0])
    model.init_stm_state(ids, force=True)
    with torch.no_grad():
        torch.testing.assert_close(model.stm.memory, model.encoder(ids))
    with refusal(ValueError, "force", "7 tokens", "8 slots"):
        model.init_stm_state(ids[:, :7], force=True)


def test_noise_changes_what_is_written_and_follows_the_seed() -> None:
    states = []
    for seed, noise in ((1, 0.0), (1, 0.5), (1, 0.5), (2, 0.5)):
        model = alpha()
        torch.manual_seed(seed)
        model.init_stm_state(ids_of(PROMPT), add_noise=noise)
        states.append(model.export_stm_state())
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[3])


@pytest.mark.parametrize("make", [alpha, beta])
def test_a_system_prompt_is_written_into_memory(make: Callable[[], Model]) -> None:
    model = make()
    before = model.export_stm_state()
    model.init_model("the cat", max_seq_len=64, device="cpu")
    encode = tokenizer().encode_ordinary
    if make is beta:
        ids = [BOS, INTERNAL, *encode("SYSTEM INSTRUCTIONS\n\nthe cat"), EOS]
    else:
        ids = [BOS, QUERY, *encode("SYSTEM INSTRUCTIONS"), ANSWER, *encode("the cat"), EOS]
    torch.testing.assert_close(model.stm.memory, memory_after(model, before, ids), atol=1e-6, rtol=1e-5)
    model = make()
    model.init_model()
    assert torch.equal(model.export_stm_state(), before)


def test_the_title_of_a_system_prompt_is_the_models() -> None:
    model = RxTBeta(
        decoder_config(),
        encoder_config(),
        memory_config(),
        BETA_TOKENS,
        tokenizer=tokenizer(),
        system_prompt_title="cat",
    ).eval()
    updates = count_updates(model)
    model.init_model("mat")
    assert updates[0][0].tolist() == [BOS, INTERNAL, *tokenizer().encode_ordinary("cat\n\nmat"), EOS]


def test_batch_mode_starts_from_what_is_remembered() -> None:
    model = alpha()
    list(start(model))
    single = model.export_stm_state()
    model.set_batch_mode(True, batch_size=3)
    assert model.stm.memory.shape[1] == 3
    for row in range(3):
        assert torch.equal(model.stm.memory[:, row : row + 1], single)
    list(model.batch_interact(torch.tensor(messages([4] * 3)), max_seq_len=12, seed=1))
    kept = model.export_stm_state()
    assert not torch.equal(kept[:, 0], kept[:, 1]), "rows are conversations of their own"
    with refusal(ValueError, "batch_size", "3", "2"):
        model.set_batch_mode(True, batch_size=2)
    model.set_batch_mode(True, batch_size=3)
    assert torch.equal(model.stm.memory, kept)
    model.set_batch_mode(False)
    assert torch.equal(model.stm.memory, kept[:, :1])
    assert model.turns == 2


def test_a_copy_of_a_model_talks_on_its_own() -> None:
    model = alpha()
    list(start(model))
    twin = copy.deepcopy(model)
    assert twin.turns == 1
    before = model.export_stm_state()
    assert list(start(twin)) == list(start(copy.deepcopy(model)))
    assert torch.equal(model.export_stm_state(), before)
    assert twin.turns == 2
    assert model.turns == 1
    assert twin.encoder.model.embedding is twin.decoder.model.embedding
    assert twin.memory_attention.model.stm is twin.decoder.model.stm
    assert twin.decoder.model.stm is not model.decoder.model.stm


# -- text ---------------------------------------------------------------------------------------------------------------------


def test_characters_that_span_tokens_come_out_whole() -> None:
    model = alpha()
    text = "né 漢字 🙂!"
    ids = tokenizer().encode_ordinary(text)
    pieces = [model.stringify_token(token) for token in [*ids, EOS, -1]]
    assert "".join(pieces).strip() == text
    assert any(piece == "" for piece in pieces[: len(ids)])
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_an_unfinished_character_is_reported_at_the_end_and_does_not_leak_into_the_next_answer() -> None:
    model = alpha()
    first_byte = tokenizer().encode_ordinary("é")[-2]
    assert model.stringify_token(first_byte) == ""
    assert model.stringify_token(-1) == "\N{REPLACEMENT CHARACTER}"
    assert model.stringify_token(-2) == ""
    assert model.stringify_token(first_byte) == ""
    next(start(model))  # a new answer begins
    assert model.stringify_token(tokenizer().encode_ordinary("a")[-1]) == "a"


def test_update_notices_are_optional() -> None:
    model = alpha()
    assert [model.stringify_token(token) for token in (-1, -2)] == ["", ""]
    notices = [model.stringify_token(token, show_memory_update=True) for token in (-1, -2)]
    assert all("emory" in notice for notice in notices)
    batch = [model.stringify_tokens(torch.full((2,), token), show_memory_update=True) for token in (-1, -2)]
    assert batch == [[notice] * 2 for notice in notices]
    assert model.stringify_tokens(torch.tensor([-1, -1])) == ["", ""]


def texts_of_a_batch(seed: int, *, collected: bool) -> tuple[list[str], list[str]]:
    """Joined pieces of a streamed batch, and each row's answer decoded at once."""
    model = alpha()
    favour_end(model, 4.5)
    prompts = messages([1, 4, 9, 12])
    model.set_batch_mode(True, batch_size=4)
    updates = count_updates(model)
    stream = model.batch_interact(**right_padded(prompts), seed=seed, max_seq_len=18)
    pieces = [""] * 4
    for tokens in list(stream) if collected else stream:
        pieces = [a + b for a, b in zip(pieces, model.stringify_tokens(tokens), strict=True)]
    budgets = [18 - len(prompt) - 1 for prompt in prompts]
    answers = []
    for row, prompt, budget in zip(updates[0].tolist(), prompts, budgets, strict=True):
        answer = row[len(prompt) + 1 :][:budget]
        answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
        known = [token for token in answer if token < tokenizer().vocab_size]
        if known == answer:
            answers.append(tokenizer().decode(answer, skip_special_tokens=True))
        else:
            answers.append("")
    return pieces, answers


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_batched_text_ends_where_each_row_ends(seed: int, collected: bool) -> None:
    """Also when all steps were collected before they are printed."""
    pieces, answers = texts_of_a_batch(seed, collected=collected)
    compared = [(piece, answer) for piece, answer in zip(pieces, answers, strict=True) if answer]
    assert compared
    for piece, answer in compared:
        assert piece == answer


def test_an_id_beyond_the_tokenizer_shows_and_ends_nothing() -> None:
    model = alpha()
    a, unknown = tokenizer().encode_ordinary("a")[-1], VOCABULARY - 1
    assert tokenizer().vocab_size <= unknown
    assert [model.stringify_token(token) for token in (a, unknown, a)] == ["a", "\N{REPLACEMENT CHARACTER}", "a"]
    steps = torch.tensor([[a, unknown], [unknown, a], [a, EOS], [a, unknown]])
    assert [model.stringify_tokens(step) for step in steps] == [
        ["a", "\N{REPLACEMENT CHARACTER}"],
        ["\N{REPLACEMENT CHARACTER}", "a"],
        ["a", ""],
        ["a", ""],
    ]


def test_stringify_batch_decodes_what_batch_interactions_returns() -> None:
    model = alpha()
    batch = right_padded([tokenizer().encode_ordinary(text) for text in ("the cat 漢", "né")])
    assert [text.strip() for text in model.stringify_batch(**batch)] == ["the cat 漢", "né"]


# -- refusals -----------------------------------------------------------------------------------------------------------------

OK = ids_of(PROMPT)
TWO = torch.tensor(messages([5, 5]))


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda m: m.interact([PROMPT]), TypeError, ["input_ids", "list"]),
        (lambda m: m.interact(OK.float()), TypeError, ["input_ids", "float32"]),
        (lambda m: m.interact(OK[0]), ValueError, ["input_ids", "(7,)"]),
        (lambda m: m.interact(OK[:, :0]), ValueError, ["input_ids", "(1, 0)"]),
        (lambda m: m.interact(OK.to("meta")), ValueError, ["input_ids", "meta"]),
        (lambda m: m.interact(OK, torch.ones(1, 7).bool().to("meta")), ValueError, ["attention_mask", "meta"]),
        (lambda m: m.interact(OK + 300), ValueError, ["input_ids", "299"]),
        (lambda m: m.interact(-OK), ValueError, ["input_ids", "-"]),
        (lambda m: m.interact(TWO), ValueError, ["interact", "2 rows", "batch_interact"]),
        (lambda m: m.interact(OK, torch.ones(1, 6).bool()), ValueError, ["attention_mask", "(1, 6)"]),
        (lambda m: m.interact(OK, torch.ones(1, 7)), TypeError, ["attention_mask", "float32"]),
        (lambda m: m.interact(OK, [1] * 7), TypeError, ["attention_mask", "list"]),
        (lambda m: m.interact(OK, torch.zeros(1, 7).bool()), ValueError, ["row 0", "attention_mask"]),
        (lambda m: m.interact(OK, temperature=-1.0), ValueError, ["temperature"]),
        (lambda m: m.interact(OK, top_k=0), ValueError, ["top_k"]),
        (lambda m: m.interact(OK, top_k=301), ValueError, ["top_k", "300"]),
        (lambda m: m.interact(OK, top_p=1.5), ValueError, ["top_p"]),
        (lambda m: m.interact(OK, max_seq_len=0), ValueError, ["max_seq_len"]),
        (lambda m: m.interact(OK, max_seq_len=20.0), ValueError, ["max_seq_len"]),
        (lambda m: m.interact(OK, max_seq_len=8), ValueError, ["7 tokens", "max_seq_len", "8"]),
        (lambda m: m.interact(OK, use_self_attn_cache="no"), TypeError, ["use_self_attn_cache"]),
        (lambda m: m.interact(OK, seed="one"), ValueError, ["seed"]),
        (lambda m: m.interact(OK, seed=[1, 2]), ValueError, ["seed"]),
        (lambda m: m.interact(OK, thinking_mode="fast"), ValueError, ["thinking_mode"]),
        (lambda m: m.batch_interact(TWO), ValueError, ["2 rows", "set_batch_mode"]),
        (lambda m: m.batch_interactions(TWO), ValueError, ["2 rows", "set_batch_mode"]),
        (lambda m: m.batch_interactions(OK, max_seq_len=0), ValueError, ["max_seq_len"]),
        (lambda m: m.init_stm_state(PROMPT), TypeError, ["input_ids", "list"]),
        (lambda m: m.init_stm_state(OK[0]), ValueError, ["input_ids"]),
        (lambda m: m.init_stm_state(TWO), ValueError, ["2 rows"]),
        (lambda m: m.init_stm_state(OK.to("meta")), ValueError, ["input_ids", "meta"]),
        (lambda m: m.init_stm_state(OK, add_noise=-1.0), ValueError, ["add_noise"]),
        (lambda m: m.init_stm_state(OK, add_noise=float("nan")), ValueError, ["add_noise"]),
        (lambda m: m.init_stm_state(OK, add_noise="0.1"), ValueError, ["add_noise"]),
        (lambda m: m.init_stm_state(OK, force=True), ValueError, ["force", "7 tokens"]),
        (lambda m: m.init_model(""), ValueError, ["system prompt"]),
        (lambda m: m.init_model(5), TypeError, ["system prompt", "int"]),
        (lambda m: m.init_model("the cat " * 50, max_seq_len=20), ValueError, ["system prompt", "max_seq_len"]),
        (lambda m: m.load_stm_state(torch.zeros(2, 1, 8, 31)), ValueError, ["memory", "(2, 1, 8, 31)"]),
        (lambda m: m.load_stm_state(torch.zeros(2, 0, 8, 32)), ValueError, ["memory", "(2, 0, 8, 32)"]),
        (lambda m: m.load_stm_state(torch.zeros(2, 1, 8, 32).long()), TypeError, ["memory", "int64"]),
        (lambda m: m.load_stm_state(None), TypeError, ["memory", "NoneType"]),
        (lambda m: m.load_stm_state(torch.full((2, 1, 8, 32), float("nan"))), ValueError, ["memory", "NaN"]),
        (lambda m: m.load_stm_state(torch.zeros(2, 1, 8, 32).to("meta")), ValueError, ["memory", "meta"]),
        (lambda m: m.reset_stm("random"), ValueError, ["init_type", "'random'"]),
        (lambda m: m.reset_stm(seed=1.5), TypeError, ["seed"]),
        (lambda m: m.set_batch_mode(True), ValueError, ["batch_size"]),
        (lambda m: m.set_batch_mode(True, 0), ValueError, ["batch_size", "0"]),
        (lambda m: m.set_batch_mode(True, 2.5), ValueError, ["batch_size", "2.5"]),
        (lambda m: m.set_batch_mode(False, 4), ValueError, ["batch_size", "4"]),
        (lambda m: m.load_conversation("/no/such/state"), FileNotFoundError, ["/no/such/state"]),
        (lambda m: m.stringify_token("a"), TypeError, ["token_id", "str"]),
        (lambda m: m.stringify_token(-5), ValueError, ["-5"]),
        (lambda m: m.stringify_tokens([1, 2]), TypeError, ["token_ids", "list"]),
        (lambda m: m.stringify_tokens(torch.zeros(2)), TypeError, ["token_ids", "float32"]),
        (lambda m: m.stringify_tokens(torch.zeros(2, 2).long()), ValueError, ["token_ids", "(2, 2)"]),
        (lambda m: m.stringify_tokens(torch.zeros(0).long()), ValueError, ["token_ids"]),
        (lambda m: m.stringify_batch([1], [1]), TypeError, ["input_ids"]),
        (lambda m: m.stringify_batch(TWO, torch.ones(2, 3).bool()), ValueError, ["attention_mask", "(2, 3)"]),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(
    call: Callable[[Any], Any], kind: type[Exception], named: list[str]
) -> None:
    model = alpha()
    before, turns = model.export_stm_state(), model.turns
    opened = start(model, max_seq_len=24)
    next(opened)
    with refusal(kind, *named):
        call(model)
    assert model.turns == turns
    assert torch.equal(model.stm.memory, before)
    # The open interaction goes on, and the batch is still one conversation.
    assert list(opened)[-2:] == [-1, -2]
    assert model.turns == turns + 1


def test_a_stream_whose_batch_has_changed_says_so() -> None:
    model = alpha()
    stream = start(model)
    model.set_batch_mode(True, batch_size=2)
    with refusal(ValueError, "1 rows", "2 conversations"):
        next(stream)
    with refusal(ValueError, "interact", "2 conversations"):
        start(model)


def test_without_a_tokenizer_ids_work_and_text_is_refused() -> None:
    model = alpha(with_tokenizer=False)
    assert list(start(model))[-1] == -2
    for call in (
        lambda: model.tokenize_query("x"),
        lambda: model.stringify_token(20),
        lambda: model.init_model("x"),
        lambda: model.stringify_tokens(torch.tensor([20])),
    ):
        with refusal(ValueError, "tokenizer"):
            call()


def test_components_that_do_not_fit_are_refused() -> None:
    parts: dict[str, Any] = {"decoder_config": SIZES, "encoder_config": {**SIZES, "skip_memory_cross_attention": True}}
    parts |= {"memory_attention_config": MEMORY_SIZES, "tokenizer_config": ALPHA_TOKENS}
    RxTAlpha(**parts)
    for name, changes, named in (
        ("encoder_config", {"num_layers": 3}, "num_layers"),
        ("encoder_config", {"vocab_size": 299}, "vocab_size"),
        ("memory_attention_config", {"stm_size": 4}, "stm_size"),
        ("memory_attention_config", {"embed_dim": 64}, "embed_dim"),
    ):
        with refusal(ValueError, named):
            RxTAlpha(**{**parts, name: {**parts[name], **changes}})
    with refusal(ValueError, "memory_attention_variant", "'gated self'", "interlayer"):
        RxTAlpha(**parts, memory_attention_variant="gated self")
    with refusal(ValueError, "memory_attention_variant", "'simple'"):
        RxTAlpha(**{**parts, "memory_attention_config": {**MEMORY_SIZES, "variant": "simple"}})
    with refusal(ValueError, "tokenizer_config", "300"):
        RxTAlpha(**{**parts, "tokenizer_config": ALPHA_TOKENS.replace(eos_token_id=300)})
    with refusal(ValueError, "tokenizer_config", "answer_token_id"):
        RxTAlpha(**{**parts, "tokenizer_config": {"bos_token_id": 2, "eos_token_id": 3, "query_token_id": 5}})
    with refusal(ValueError, "tokenizer", "vocabulary"):
        small = {name: {**parts[name], "vocab_size": 200} for name in ("decoder_config", "encoder_config")}
        RxTAlpha(**{**parts, **small}, tokenizer=tokenizer())
    with refusal(TypeError, "tokenizer"):
        RxTAlpha(**parts, tokenizer="a name")


def test_token_ids_come_from_the_tokenizer_where_the_checkpoint_names_none() -> None:
    model = RxTBeta(decoder_config(), encoder_config(), memory_config(), None, tokenizer=tokenizer())
    assert model.token_ids == BETA_TOKENS
    partial = {"bos_token_id": 2, "eos_token_id": 3, "query_token_id": 5, "answer_token_id": 6, "think_token_id": None}
    model = RxTBeta(decoder_config(), encoder_config(), memory_config(), partial, tokenizer=tokenizer())
    assert model.token_ids == BETA_TOKENS
