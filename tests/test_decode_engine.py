"""Decode engines: what the modules compute, in static buffers, with a step that can be recorded and repeated."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from helpers import EOS, favour_end, messages, refusal, right_padded
from recorded_graph import record
from small_models import MODELS, make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from triton_cases import DEVICE, needs_triton

from rxt_kernels import native_runtime, use_backend
from rxt_kernels.decode import (
    ENGINES,
    CudaGraphEngine,
    DecoderWeights,
    EagerEngine,
    NativeEngine,
    decode_engine,
    supports,
)
from rxt_kernels.decode.cuda_graph import capture_cuda_graph
from rxt_kernels.dispatch import operations
from rxt_model.interaction.decoding import padded
from rxt_model.interaction.engine import MODULES, choose_engine
from rxt_model.interaction.weights import decoder_weights
from rxt_model.models import ReactiveTransformer

Maker = Callable[..., EagerEngine]


class RecordedEngine(CudaGraphEngine):
    """The engine of GPUs, counting its recordings; where there is no GPU, with the graph of these tests.

    It is used with Triton's kernels: on the CPU the eager attention reads the lengths, and a recording would freeze them.
    """

    devices: ClassVar[frozenset[str]] = frozenset({DEVICE})
    recordings = 0

    def __init__(self, weights: DecoderWeights, rows: int, *, capacity: int = 256, limit: int | None = None) -> None:
        def counted(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
            self.recordings += 1
            return capture_cuda_graph(function, device) if DEVICE == "cuda" else record(function, device)

        super().__init__(weights, rows, capacity=capacity, limit=limit, capture=counted)

    def step(self, tokens: Tensor, active: Sequence[bool] | None = None) -> Tensor:
        with use_backend("triton"):
            return super().step(tokens, active)

    @staticmethod
    def supports(weights: DecoderWeights) -> str | None:
        return None


def memory_of(model: ReactiveTransformer, rows: int, seed: int = 1) -> Tensor:
    layers, _, slots, width = model.stm.memory.shape
    return torch.randn(layers, rows, slots, width, generator=torch.Generator().manual_seed(seed)).to(model.device)


def answer(
    engine: EagerEngine | NativeEngine,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    ends: dict[int, int] | None = None,
) -> list[Tensor]:
    """Logits after the prompts and after every step; ``ends`` says behind which step a row has ended."""
    tokens, _ = padded(prompts, torch.device(DEVICE))
    found = [engine.prefill(tokens, [len(prompt) for prompt in prompts]).clone()]
    for number, step in enumerate(steps):
        active = [number < (ends or {}).get(row, len(steps)) for row in range(len(step))]
        found.append(engine.step(torch.tensor(step, device=DEVICE), None if all(active) else active).clone())
    return found


@torch.no_grad()
def expected(model: ReactiveTransformer, memory: Tensor, prompt: Sequence[int], steps: Sequence[int]) -> list[Tensor]:
    """The same for one row by the modules, without any cache."""
    logits = model.decoder(torch.tensor([[*prompt, *steps]], device=DEVICE), memory=memory)[0]
    return list(logits[len(prompt) - 1 :])


def check(model: ReactiveTransformer, engine: EagerEngine, *, shared: bool, seed: int = 0, count: int = 4) -> None:
    """Three messages of different lengths, of which one ends early, against the modules."""
    prompts, ends = messages([4, 1, 7], seed), {1: 1}
    steps = torch.randint(11, 200, (count, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    memory = memory_of(model, 1 if shared else 3, seed)
    engine.set_memory(memory)
    found = answer(engine, prompts, steps, ends)
    for row, prompt in enumerate(prompts):
        own = memory if shared else memory[:, row : row + 1]
        until = ends.get(row, len(steps))
        for logits, true in zip(
            found[: until + 1], expected(model, own, prompt, [step[row] for step in steps[:until]]), strict=True
        ):
            torch.testing.assert_close(logits[row], true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_engine_computes_what_the_modules_do(name: str, shared: bool) -> None:
    model = make(name, DEVICE)
    check(model, EagerEngine(decoder_weights(model.decoder), 3, capacity=4), shared=shared)


@needs_triton
@pytest.mark.parametrize("name", ["alpha", "beta-3b"])
def test_a_recorded_step_computes_what_the_modules_do(name: str) -> None:
    """Recorded on Triton's kernels once, repeated at every position, for a second message, and for another memory."""
    model = make(name, DEVICE)
    engine = RecordedEngine(decoder_weights(model.decoder), 3, capacity=16)
    check(model, engine, shared=False, count=3)
    check(model, engine, shared=False, seed=1, count=2)
    assert engine.recordings == 1


@needs_triton
def test_a_recorded_step_lives_in_the_same_buffers() -> None:
    model = make("dense", DEVICE)
    engine = RecordedEngine(decoder_weights(model.decoder), 3, capacity=16)
    check(model, engine, shared=True)

    def places() -> list[int]:
        memory = [side for one in engine._memory for side in one]
        return [t.data_ptr() for t in (*engine._keys, *engine._values, *memory, engine._tokens, engine._lengths)]

    before = places()
    first = engine.step(torch.tensor([20, 21, 22], device=DEVICE))
    kept = first.clone()
    second = engine.step(torch.tensor([30, 31, 32], device=DEVICE))
    assert second is first
    assert not torch.equal(kept, second)
    check(model, engine, shared=True, seed=2)
    assert places() == before
    assert engine.recordings == 1


@needs_triton
def test_buffers_that_move_are_recorded_again() -> None:
    model = make("dense", DEVICE)
    engine = RecordedEngine(decoder_weights(model.decoder), 3, capacity=2)
    check(model, engine, shared=True)
    assert (engine.capacity, engine.recordings) == (16, 1)
    engine.set_memory(memory_of(model, 3))
    check(model, engine, shared=False)
    assert engine.recordings == 2
    # The longest of these rows holds 13 tokens now: three more fit, and the next does not.
    for _ in range(3):
        engine.step(torch.tensor([9, 9, 9], device=DEVICE))
    assert (engine.capacity, engine.recordings) == (16, 2)
    engine.step(torch.tensor([9, 9, 9], device=DEVICE))
    assert (engine.capacity, engine.recordings) == (32, 3)


@needs_triton
@pytest.mark.parametrize("kind", [EagerEngine, RecordedEngine])
def test_growing_keeps_what_is_stored(kind: Maker) -> None:
    model = make("dense", DEVICE)
    memory, prompt, steps = memory_of(model, 1), messages([3])[0], list(range(20, 29))
    engine = kind(decoder_weights(model.decoder), 1, capacity=2)
    engine.set_memory(memory)
    found = answer(engine, [prompt], [[step] for step in steps])
    for logits, true in zip(found, expected(model, memory, prompt, steps), strict=True):
        torch.testing.assert_close(logits[0], true, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("kind", [EagerEngine, RecordedEngine])
def test_a_full_row_that_has_ended_does_not_disturb_the_others(kind: Maker) -> None:
    model = make("dense", DEVICE)
    memory, prompts = memory_of(model, 2), messages([6, 1])
    engine = kind(decoder_weights(model.decoder), 2, capacity=8, limit=8)
    engine.set_memory(memory)
    steps = [[20 + number, 40 + number] for number in range(5)]
    found = answer(engine, prompts, steps, ends={0: 0})
    true = expected(model, memory[:, 1:], prompts[1], [step[1] for step in steps])
    for logits, one in zip(found, true, strict=True):
        torch.testing.assert_close(logits[1], one, rtol=1e-4, atol=1e-4)
    with refusal(ValueError, "9 tokens", "limit of this engine is 8"):
        engine.step(torch.tensor([9, 9], device=DEVICE))


ENGINES_HERE = [EagerEngine, *([NativeEngine] if native_runtime.available() and DEVICE == "cpu" else [])]


@pytest.mark.parametrize("held", [(5, 5, 5), (5, 2, 9)])
@pytest.mark.parametrize("kind", ENGINES_HERE)
def test_rows_go_on_behind_what_they_hold(kind: type[EagerEngine] | type[NativeEngine], held: tuple[int, ...]) -> None:
    """Messages, a step, further messages of other lengths, a step; as if every row had been read at once."""
    model = make("beta-3b", DEVICE)
    engine = kind(decoder_weights(model.decoder), 1).another(3, capacity=4)
    memory = memory_of(model, 3)
    engine.set_memory(memory)
    before, behind = messages(held), messages([7, 3, 1], seed=1)
    answer(engine, before, [[20, 21, 22]])
    assert engine.lengths == tuple(count + 1 for count in map(len, before))
    tokens, _ = padded(behind, torch.device(DEVICE))
    found = [
        engine.extend(tokens, list(map(len, behind))).clone(),
        engine.step(torch.tensor([30, 31, 32], device=DEVICE)),
    ]
    assert engine.lengths == tuple(len(a) + len(b) + 2 for a, b in zip(before, behind, strict=True))
    attentions = [layer.attention for layer in decoder_weights(model.decoder).layers]
    per_token = sum(2 * one.key_value_heads * one.head_dim * 4 for one in attentions)
    assert engine.state_bytes() == per_token * sum(engine.lengths)
    for row in range(3):
        whole = [*before[row], 20 + row, *behind[row]]
        true = expected(model, memory[:, row : row + 1], whole, [30 + row])
        torch.testing.assert_close(
            torch.stack([logits[row] for logits in found]), torch.stack(true), rtol=1e-4, atol=1e-4
        )
    with refusal(ValueError, "lengths", "[99, 3, 1]"):
        engine.extend(tokens, [99, 3, 1])
    assert engine.another(3).lengths == (0, 0, 0)


def test_reset_keeps_the_memory_and_forgets_the_message() -> None:
    model = make("dense", DEVICE)
    engine = EagerEngine(decoder_weights(model.decoder), 1)
    engine.set_memory(memory_of(model, 1))
    first = answer(engine, messages([3]), [[20], [21]])
    engine.reset()
    with refusal(ValueError, "step", "prefill"):
        engine.step(torch.tensor([20], device=DEVICE))
    for one, two in zip(first, answer(engine, messages([3]), [[20], [21]]), strict=True):
        assert torch.equal(one, two)


def test_an_engine_made_in_inference_mode_works_outside_of_it() -> None:
    model = make("dense", DEVICE)
    with torch.inference_mode():
        engine = EagerEngine(decoder_weights(model.decoder), 3, capacity=4)
        engine.set_memory(memory_of(model, 3))
    check(model, engine, shared=False)


def test_arguments_are_refused_in_a_sentence() -> None:
    model = make("dense", DEVICE)
    weights = decoder_weights(model.decoder)
    with refusal(ValueError, "rows", "0"):
        EagerEngine(weights, 0)
    with refusal(ValueError, "limit", "0"):
        EagerEngine(weights, 1, limit=0)
    engine = EagerEngine(weights, 2)
    tokens = torch.tensor([[2, 5, 9], [2, 5, 0]], device=DEVICE)
    with refusal(ValueError, "set_memory"):
        engine.prefill(tokens, [3, 2])
    with refusal(TypeError, "memory", "float64"):
        engine.set_memory(memory_of(model, 2).double())
    with refusal(ValueError, "memory", "(2, 3, 3, 16)"):
        engine.set_memory(memory_of(model, 3))
    engine.set_memory(memory_of(model, 2))
    with refusal(ValueError, "tokens", "(1, 3)"):
        engine.prefill(tokens[:1], [3])
    with refusal(ValueError, "lengths", "[3, 4]"):
        engine.prefill(tokens, [3, 4])
    with refusal(TypeError, "tokens", "int32"):
        engine.prefill(tokens.int(), [3, 2])
    with refusal(TypeError, "tokens", "int64"):
        engine.prefill([[1, 2, 3], [1, 2, 3]], [3, 2])  # type: ignore[arg-type]
    engine.prefill(tokens, [3, 2])
    with refusal(ValueError, "tokens", "(3,)"):
        engine.step(torch.tensor([1, 2, 3], device=DEVICE))
    with refusal(ValueError, "active", "1 entries"):
        engine.step(torch.tensor([1, 2], device=DEVICE), [True])


# -- a step waits for nothing -----------------------------------------------------------------------------------------


def run_without_values(name: str) -> Tensor:
    """Message and step on the meta device, where shapes are followed and reading a value raises."""

    def convert(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    weights: DecoderWeights = tree_map(convert, decoder_weights(make(name).decoder))
    engine = CudaGraphEngine(weights, 2, capacity=8, capture=lambda function, _: (lambda: None, function()))
    engine.set_memory(torch.empty(2, 1, 4, weights.embedding.shape[1], device="meta"))
    engine.prefill(torch.ones(2, 5, dtype=torch.int64, device="meta"), [5, 3])
    return engine.step(torch.ones(2, dtype=torch.int64, device="meta"), [True, False])


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels are chosen on the meta device too, as they would be on a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no meta device
    for operation in operations().values():
        backends = tuple(backend._replace(supports=lambda *_: None) for backend in operation.accelerated)
        monkeypatch.setattr(operation, "accelerated", backends)
    with use_backend("triton"):
        yield


@needs_triton
@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    assert run_without_values(name).shape == (2, 300)


def test_a_step_that_waits_would_be_noticed() -> None:
    """The eager mixture of experts reads on the host how many tokens each expert has."""
    with use_backend("reference"), pytest.raises(NotImplementedError, match="bincount"):
        run_without_values("beta")


# -- which engine, and why --------------------------------------------------------------------------------------------


def test_reasons() -> None:
    weights = decoder_weights(make("dense").decoder)
    assert supports("eager", weights) is None
    reason = supports("cuda_graph", weights)
    assert reason == "the weights are on cpu; CUDA graphs run on a GPU."
    assert decode_engine(weights, 1).name == ("native" if native_runtime.available() else "eager")
    with refusal(ValueError, "cuda_graph", "on cpu"):
        decode_engine(weights, 1, engine="cuda_graph")
    with refusal(ValueError, "on cpu"):
        CudaGraphEngine(weights, 1)
    with refusal(ValueError, "'fast'", "'cuda_graph', 'native', 'eager'"):
        supports("fast", weights)


def on_fake_gpu(weights: DecoderWeights, mode: FakeTensorMode) -> DecoderWeights:
    """The same weights, without values, on a GPU that need not exist."""

    def convert(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value

    with mode:
        return tree_map(convert, weights)  # type: ignore[no-any-return]


@needs_triton
def test_reasons_on_a_gpu() -> None:
    mode, model = FakeTensorMode(), make("beta")
    weights = on_fake_gpu(decoder_weights(model.decoder), mode)
    assert supports("cuda_graph", weights) is None
    with use_backend("reference"):
        assert "'reference' is preferred in this block" in str(supports("cuda_graph", weights))
    with use_backend("triton"):
        assert supports("cuda_graph", weights) is None
    with mode:
        learning = weights._replace(embedding=torch.empty_like(weights.embedding).requires_grad_())
        assert "gradients are being recorded" in str(supports("cuda_graph", learning))
        with torch.no_grad():
            assert supports("cuda_graph", learning) is None
    wide = on_fake_gpu(decoder_weights(model.double().decoder), mode)
    assert "waits for the host, and Triton's cannot be used" in str(supports("cuda_graph", wide))


def test_a_model_on_the_cpu_is_decoded_natively() -> None:
    model = make("dense")
    if native_runtime.available():
        assert choose_engine(model.decoder).engine == "native"
        assert model.explain() == (
            "Answers are decoded by the native engine: it can decode this model on cpu. Interactions are encoded by the "
            "native encoder."
        )
        assert choose_engine(model.double().decoder) == (
            MODULES, "a tensor is torch.float64; native kernels take float32 and bfloat16.",
        )  # fmt: skip
        model.float()
    else:
        assert choose_engine(model.decoder) == (MODULES, native_runtime.unavailable())
    model.decode_engine = "eager"
    assert model.explain().startswith("Answers are decoded by the eager engine: it was asked for. Interactions are ")
    model.decode_engine = "cuda_graph"
    with refusal(ValueError, "decode_engine='cuda_graph'", "on cpu"):
        model.explain()
    model.decode_engine = "fast"
    with refusal(ValueError, "'fast'", "'auto', 'modules', 'cuda_graph', 'native', 'eager'"):
        next(model.interact(torch.tensor(messages([3]))))


class Louder(nn.Linear):
    pass


def _another_class(model: ReactiveTransformer) -> None:
    model.decoder.model.head = Louder(16, 300)


def _a_hook(model: ReactiveTransformer) -> None:
    model.decoder.model.layers[1].register_forward_hook(lambda *_: None)


def _a_replaced_forward(model: ReactiveTransformer) -> None:
    model.decoder.model.layers[0].forward = lambda *_: None  # type: ignore[method-assign]


def _a_compiled_module(model: ReactiveTransformer) -> None:
    model.decoder.model.head.compile(backend="eager")


def _two_dtypes(model: ReactiveTransformer) -> None:
    model.decoder.model.head.double()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_another_class, "model.head is of the class Louder"),
        (_a_hook, "model.layers.1 has forward hooks"),
        (_a_replaced_forward, "forward method of model.layers.0"),
        (_a_compiled_module, "forward method of model.head"),
        (_two_dtypes, "torch.float32 on cpu and torch.float64 on cpu"),
    ],
)
def test_modules_that_weights_do_not_describe(change: Callable[[ReactiveTransformer], None], named: str) -> None:
    model = make("dense")
    change(model)
    with refusal(ValueError, "decode_engine='eager'", named):
        choose_engine(model.decoder, "eager")


def test_a_model_that_drops_activations_is_left_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("dense", DEVICE)
    model.decoder.model.config = model.decoder.config.replace(att_dropout=0.5)
    monkeypatch.setitem(ENGINES, "cuda_graph", RecordedEngine)
    assert choose_engine(model.decoder).engine == "cuda_graph"
    model.train()
    assert choose_engine(model.decoder).engine == MODULES
    assert "training mode" in choose_engine(model.decoder).reason


# -- conversations ----------------------------------------------------------------------------------------------------


def talk(model: ReactiveTransformer, engine: str, turns: int = 3) -> list[list[int]]:
    model.reset_stm(seed=3)
    model.decode_engine = engine
    return [
        list(model.interact(torch.tensor(messages([3], turn)), temperature=0.0, max_seq_len=12))
        for turn in range(turns)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_answers_of_the_plain_engine_are_those_of_the_modules(name: str) -> None:
    model = make(name, DEVICE)
    assert talk(model, "eager") == talk(model, MODULES)


@needs_triton
def test_answers_of_recorded_steps_are_those_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the choice that a model on a GPU makes by itself."""
    monkeypatch.setitem(ENGINES, "cuda_graph", RecordedEngine)
    model = make("alpha", DEVICE)
    true = talk(model, MODULES, turns=2)
    model.decode_engine = "auto"
    assert model.explain().startswith(
        f"Answers are decoded by the cuda_graph engine: it can decode this model on {model.device}. Interactions are "
    )
    assert talk(model, "auto", turns=2) == true


def test_a_model_that_could_be_trained_is_decoded_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careful(RecordedEngine):
        @staticmethod
        def supports(weights: DecoderWeights) -> str | None:
            return "gradients are being recorded." if torch.is_grad_enabled() else None

    monkeypatch.setitem(ENGINES, "cuda_graph", Careful)
    model = make("dense", DEVICE)
    assert torch.is_grad_enabled()
    assert model.decoder.model.embedding.weight.requires_grad
    assert choose_engine(model.decoder).engine == "cuda_graph"


@needs_triton
def test_batched_answers_with_rows_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "cuda_graph", RecordedEngine)
    model = make("dense", DEVICE)
    favour_end(model, 3.0)  # type: ignore[arg-type]
    model.set_batch_mode(True, batch_size=3)
    batch = right_padded(messages([5, 1, 3]))
    found = {}
    for engine in (MODULES, "eager", "auto"):
        model.reset_stm(seed=3)
        model.decode_engine = engine
        found[engine] = [
            model.batch_interactions(**batch, temperature=1.0, seed=[7, 8, 9], max_seq_len=14)[0] for _ in range(2)
        ]
    lengths = {int((row == EOS).nonzero()[0]) if EOS in row else None for row in found[MODULES][0]}
    assert len(lengths) > 1, "rows should end at different steps"
    for engine in ("eager", "auto"):
        assert all(torch.equal(one, two) for one, two in zip(found[engine], found[MODULES], strict=True))


def test_changed_weights_are_noticed() -> None:
    model = make("alpha", DEVICE)
    first = talk(model, "eager")
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(-0.7)
    second = talk(model, "eager")
    assert second == talk(model, MODULES)
    assert second != first


def test_an_answer_that_was_overtaken_does_not_disturb_the_next() -> None:
    model = make("dense", DEVICE)
    model.decode_engine = MODULES
    prompt = torch.tensor(messages([3]))

    def second_of_two() -> list[int]:
        model.reset_stm(seed=3)
        first = model.interact(prompt, temperature=0.0, max_seq_len=14)
        next(first)
        second = model.interact(prompt, temperature=0.0, max_seq_len=14)
        found = [next(second)]
        with pytest.raises(RuntimeError, match="another interaction began"):
            next(first)
        return found + list(second)

    true = second_of_two()
    model.decode_engine = "eager"
    assert second_of_two() == true


def test_an_engine_dies_with_its_model_and_is_not_copied() -> None:
    model = make("dense", DEVICE)
    first = talk(model, "eager", turns=1)
    twin = copy.deepcopy(model)
    assert talk(twin, "eager", turns=1) == first
    gone = weakref.ref(model.decoder.model.head.weight)
    del model
    gc.collect()
    assert gone() is None
