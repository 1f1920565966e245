"""The decode engine of CPUs: what the modules compute, in one native call per token, on every instruction set."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import messages
from small_models import MODELS, make
from torch import Tensor
from torch.utils._pytree import tree_map

from rxt_kernels.decode import (
    DecoderLayerWeights,
    ExpertWeights,
    FeedForwardWeights,
    NativeEngine,
    decode_engine,
    huge_pages,
)
from rxt_model.demo_model import load_demo_model
from rxt_model.interaction.decoding import padded
from rxt_model.interaction.engine import choose_engine
from rxt_model.interaction.weights import decoder_weights
from rxt_model.models import ReactiveTransformer

pytestmark = pytest.mark.usefixtures("every_instruction_set")


def _memory(model: ReactiveTransformer, rows: int, seed: int = 1) -> Tensor:
    layers, _, slots, width = model.stm.memory.shape
    return torch.randn(layers, rows, slots, width, generator=torch.Generator().manual_seed(seed))


def _answer(
    engine: NativeEngine,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    ends: dict[int, int] | None = None,
) -> list[Tensor]:
    """Logits after the prompts and after every step; ``ends`` says behind which step a row has ended."""
    tokens, _ = padded(prompts, torch.device("cpu"))
    found = [engine.prefill(tokens, [len(prompt) for prompt in prompts]).clone()]
    for number, step in enumerate(steps):
        active = [number < (ends or {}).get(row, len(steps)) for row in range(len(step))]
        found.append(engine.step(torch.tensor(step), None if all(active) else active).clone())
    return found


@torch.no_grad()
def _expected(model: ReactiveTransformer, memory: Tensor, prompt: Sequence[int], steps: Sequence[int]) -> Tensor:
    """The same for one row by the modules, without any cache."""
    logits: Tensor = model.decoder(torch.tensor([[*prompt, *steps]]), memory=memory)[0]
    return logits[len(prompt) - 1 :]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_modules_do(name: str, shared: bool) -> None:
    model = make(name)
    engine = NativeEngine(decoder_weights(model.decoder), 3, capacity=4)
    for seed in (0, 1):
        prompts, ends = messages([4, 1, 23], seed), {1: 1}
        steps = torch.randint(11, 200, (5, 3), generator=torch.Generator().manual_seed(seed)).tolist()
        memory = _memory(model, 1 if shared else 3, seed)
        engine.set_memory(memory)
        found = _answer(engine, prompts, steps, ends)
        for row, prompt in enumerate(prompts):
            own = memory if shared else memory[:, row : row + 1]
            until = ends.get(row, len(steps))
            true = _expected(model, own, prompt, [step[row] for step in steps[:until]])
            actual = torch.stack([logits[row] for logits in found[: until + 1]])
            torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)


def test_a_long_message_goes_in_parts() -> None:
    model = make("beta")
    memory = _memory(model, 1)
    prompt = messages([700])[0]
    engine = NativeEngine(decoder_weights(model.decoder), 1, capacity=16)
    engine.set_memory(memory)
    found = _answer(engine, [prompt], [[12], [13]])
    torch.testing.assert_close(torch.cat(found), _expected(model, memory, prompt, [12, 13]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_bits_depend_neither_on_threads_nor_on_other_rows(precision: str) -> None:
    model = make("beta")
    prompts = messages([5, 9, 2])
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):  # the last also where there are not as many cores
        torch.set_num_threads(threads)
        engine = NativeEngine(decoder_weights(model.decoder), 3, precision=precision)
        engine.set_memory(_memory(model, 1))
        found.append(torch.stack(_answer(engine, prompts, [[11, 12, 13], [14, 15, 16]])))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = NativeEngine(decoder_weights(model.decoder), 1, precision=precision)
    alone.set_memory(_memory(model, 1))
    single = torch.stack(_answer(alone, prompts[1:2], [[12], [15]]))
    torch.testing.assert_close(single[:, 0], found[0][:, 1], rtol=1e-4, atol=1e-4)


def _as_bytes(value: Any) -> Any:
    """Matrices rounded as int8 weights are."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return value
    scales = value.abs().amax(dim=1, keepdim=True) / 127
    return (value / scales).round() * scales


def test_sums_of_bytes_over_many_inputs() -> None:
    """More inputs than the sum of integers holds, and an odd number of them."""
    weights = decoder_weights(make("dense").decoder)
    random = torch.Generator().manual_seed(4)
    width, hidden = weights.embedding.shape[1], 1101

    def wide(layer: DecoderLayerWeights) -> DecoderLayerWeights:
        network = layer.feed_forward
        assert isinstance(network, FeedForwardWeights)
        network = network._replace(
            first=torch.randn(hidden, width, generator=random) / width**0.5,
            first_bias=torch.randn(hidden, generator=random),
            second=torch.randn(width, hidden, generator=random) / hidden**0.5,
        )
        return layer._replace(feed_forward=network)

    weights = weights._replace(layers=tuple(wide(layer) for layer in weights.layers))
    rounded = tree_map(_as_bytes, weights)._replace(embedding=weights.embedding)
    found = []
    for one, precision in ((weights, "int8"), (rounded, "float32")):
        engine = NativeEngine(one, 1, precision=precision)
        engine.set_memory(_memory(make("dense"), 1))
        found.append(torch.cat(_answer(engine, messages([5]), [[11], [12]])))
    error = (found[0] - found[1]).abs().max()  # keys and values are bfloat16 beside bytes
    assert error <= 1e-2 * found[1].abs().max()


def test_what_is_not_finite_stays_so_beside_bytes() -> None:
    model = make("beta")
    weights = decoder_weights(model.decoder)
    embedding = weights.embedding.detach().clone()
    embedding[12, 3] = float("nan")
    engine = NativeEngine(weights._replace(embedding=embedding), 2, precision="int8")
    engine.set_memory(_memory(model, 1))
    logits = _answer(engine, messages([3, 3]), [[12, 13]])[-1]
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_parameters_themselves(name: str) -> None:
    decoder = make(name).decoder
    own = {parameter.data_ptr() for parameter in decoder.parameters()}
    for layer in decoder_weights(decoder).layers:
        network = layer.feed_forward
        for side in network[1:3] if isinstance(network, ExpertWeights) else (network.first, network.second):
            assert all(one.data_ptr() in own for one in ([side] if isinstance(side, Tensor) else side))


def test_nothing_is_allocated_from_token_to_token() -> None:
    model = make("beta-3b")
    engine = NativeEngine(decoder_weights(model.decoder), 2, capacity=64)
    engine.set_memory(_memory(model, 1))
    _answer(engine, messages([4, 6]), [[11, 12]])
    before = engine.allocations
    for token in range(11, 41):
        engine.step(torch.tensor([token, token]))
    engine.set_memory(_memory(model, 1, seed=5))
    assert engine.allocations == before
    for token in range(11, 61):
        engine.step(torch.tensor([token, token]))  # grows once
    assert engine.capacity >= 86


def test_two_models_in_two_threads() -> None:
    models = [make("beta"), make("alpha")]
    prompts = [messages([6], seed)[0] for seed in (0, 1)]
    alone: list[Tensor] = []
    engines = []
    for model, prompt in zip(models, prompts, strict=True):
        engine = NativeEngine(decoder_weights(model.decoder), 1)
        engine.set_memory(_memory(model, 1))
        alone.append(torch.stack(_answer(engine, [prompt], [[token] for token in range(11, 31)])))
        engines.append(engine)
    together: list[Tensor | None] = [None, None]

    def work(index: int) -> None:
        for _ in range(3):
            together[index] = torch.stack(
                _answer(engines[index], [prompts[index]], [[token] for token in range(11, 31)])
            )

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, actual in zip(alone, together, strict=True):
        assert actual is not None
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_modules(name: str) -> None:
    model = make(name)

    def talk(engine: str) -> list[list[int]]:
        model.decode_engine = engine
        model.reset_stm(seed=3)
        answers = []
        for seed in range(3):
            torch.manual_seed(seed)
            prompt = torch.tensor(messages([5 + seed], seed))
            answers.append(list(model.interact(prompt, max_seq_len=40, temperature=0.0)))
        return answers

    assert choose_engine(model.decoder).engine == "native"
    assert talk("native") == talk("modules")


def test_weights_are_packed_as_the_model_is_told() -> None:
    model = make("beta")
    model.decode_weights = "int8"
    assert model.explain() == (
        "Answers are decoded by the native engine with weights in int8: it can decode this model on cpu. "
        "Interactions are encoded by the native encoder."
    )
    assert len(list(model.interact(torch.tensor(messages([4])), max_seq_len=20, temperature=0.0))) > 2
    model.decode_engine = "modules"
    with pytest.raises(ValueError, match="decode_weights is 'int8', which takes the native engine"):
        model.explain()
    model.decode_weights = "int2"
    with pytest.raises(
        ValueError, match="decode_weights is 'int2'; it is one of 'float32', 'bfloat16', 'int8', or None"
    ):
        model.explain()


def _text_ids(model: ReactiveTransformer) -> list[list[int]]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts = [
        "Hello, my name is Anna and I live in Lisbon.", "What is my name?", "I have a dog called Rex.",
        "Where do I live?", "I work as a nurse and my favourite colour is green.", "How are you today?",
    ]  # fmt: skip
    return [list(model.tokenize_query(text, max_seq_len=64)["input_ids"][0].tolist()) for text in texts]


@pytest.mark.parametrize(
    ("precision", "divergence", "agreement"),
    [("float32", 1e-6, 1.0), ("bfloat16", 5e-3, 0.9), ("int8", 2e-2, 0.9)],
)
def test_precisions_stay_within_their_bounds_on_the_shipped_model(
    precision: str, divergence: float, agreement: float
) -> None:
    """Mean Kullback-Leibler divergence (nats) from the modules in fp32, and how often the likeliest token is the same."""
    model = load_demo_model()
    memory = model.stm.memory.detach().clone()
    engine = NativeEngine(decoder_weights(model.decoder), 1, precision=precision)
    engine.set_memory(memory)
    found, true = [], []
    for ids in _text_ids(model):
        found += _answer(engine, [ids[:3]], [[token] for token in ids[3:]])
        true.append(_expected(model, memory, ids[:3], ids[3:]))
    actual, expected = torch.cat(found).log_softmax(-1), torch.cat(true).log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    same = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert kl <= divergence
    assert same >= agreement


def test_refusals() -> None:
    model = make("beta")
    weights = decoder_weights(model.decoder)
    with pytest.raises(ValueError, match="precision is 'int4'"):
        NativeEngine(weights, 1, precision="int4")
    with pytest.raises(ValueError, match="rows is 0"):
        NativeEngine(weights, 0)
    with pytest.raises(ValueError, match="computes with the weights as they are"):
        decode_engine(weights, 1, engine="eager", precision="int8")
    engine = NativeEngine(weights, 2, capacity=4, limit=6)
    with pytest.raises(ValueError, match="given no memory"):
        engine.prefill(torch.full((2, 3), 11), [3, 3])
    with pytest.raises(TypeError, match="memory"):
        engine.set_memory(_memory(model, 1).double())
    with pytest.raises(ValueError, match="memory has shape"):
        engine.set_memory(_memory(model, 3))
    engine.set_memory(_memory(model, 1))
    with pytest.raises(ValueError, match="step was called without a message"):
        engine.step(torch.tensor([11, 11]))
    with pytest.raises(ValueError, match="tokens has -1; accepted are 0 to"):
        engine.prefill(torch.full((2, 3), -1), [3, 3])
    with pytest.raises(TypeError, match="tokens"):
        engine.prefill(torch.full((2, 3), 11, dtype=torch.int32), [3, 3])
    with pytest.raises(ValueError, match="the limit of this engine is 6"):
        engine.prefill(torch.full((2, 7), 11), [7, 7])
    engine.prefill(torch.full((2, 3), 11), [3, 2])
    with pytest.raises(ValueError, match="active has 1 entries"):
        engine.step(torch.tensor([11, 11]), [True])


def test_a_system_without_large_pages_has_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", 12345, raising=False)  # advice that no kernel takes
    taken = huge_pages.Arena().take(1000, torch.float32)
    assert torch.equal(taken.fill_(2.0), torch.full((1000,), 2.0))
