"""The native encoder: what the modules of an encoder compute, in one call, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import VOCABULARY, messages
from small_models import MODELS, make
from torch import Tensor, nn

from rxt_kernels.decode import NativeEncoder
from rxt_kernels.dispatch import use_backend
from rxt_model.config import TransformerConfig
from rxt_model.encoder import RxTEncoder
from rxt_model.interaction.encoding import encode, explain_encoding
from rxt_model.interaction.weights import encoder_weights

pytestmark = pytest.mark.usefixtures("every_instruction_set")


def _tokens(rows: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def _mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@torch.no_grad()
def _expected(encoder: RxTEncoder, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with use_backend("reference"):
        states: Tensor = encoder(tokens, mask)
    return states if mask is None else states * mask[None, :, :, None]


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_modules(name: str) -> None:
    encoder = make(name).encoder
    native = NativeEncoder(encoder_weights(encoder))
    for rows, time in ((1, 1), (1, 7), (3, 40), (2, 301)):  # more tokens than go through the layers at once
        tokens = _tokens(rows, time)
        torch.testing.assert_close(native.encode(tokens), _expected(encoder, tokens), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_unequal_length_are_encoded_as_they_would_be_alone(name: str) -> None:
    encoder = make(name).encoder
    native = NativeEncoder(encoder_weights(encoder))
    tokens, mask = _tokens(4, 130), _mask(130, 3, 0, 77)
    states = native.encode(tokens, mask)
    torch.testing.assert_close(states[:, 0], _expected(encoder, tokens[:1])[:, 0], rtol=2e-5, atol=2e-5)
    for row, length in ((1, 3), (3, 77)):
        alone = NativeEncoder(encoder_weights(encoder)).encode(tokens[row : row + 1, :length])
        torch.testing.assert_close(states[:, row, :length], alone[:, 0], rtol=2e-5, atol=2e-5)
    assert not states[:, 2].any()
    assert not states[:, 1, 3:].any()


def test_bits_do_not_depend_on_threads_or_on_what_was_encoded_before() -> None:
    native = NativeEncoder(encoder_weights(make("beta").encoder))
    tokens = _tokens(1, 50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = native.encode(tokens)
        torch.set_num_threads(3)
        native.encode(_tokens(2, 90, seed=1))
        assert torch.equal(native.encode(tokens), expected)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_closer_to_float32_than_its_own_modules() -> None:
    encoder = make("beta").encoder
    tokens = _tokens(2, 20)
    half = make("beta").encoder.to(torch.bfloat16)
    exact = _expected(encoder, tokens)
    states = NativeEncoder(encoder_weights(half)).encode(tokens)
    assert states.dtype is torch.bfloat16
    error, eager = ((one.float() - exact).abs().mean() for one in (states, _expected(half, tokens)))
    assert error <= 1.2 * eager


def test_a_model_writes_the_same_memory_with_it() -> None:
    model, own = make("beta"), make("beta")
    tokens = torch.tensor(messages([8]))
    own.decode_engine = "modules"
    assert "encoded by the native encoder" in model.explain()
    assert "encoded operation by operation through the modules: it was asked for" in own.explain()
    for one in (model, own):
        one.init_stm_state(tokens)
    torch.testing.assert_close(model.stm.memory, own.stm.memory, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    encoder = make("alpha").encoder
    tokens = _tokens(1, 9)
    encode(encoder, tokens)
    encoder.model.layers[0].norm1.weight.mul_(1.5)
    torch.testing.assert_close(encode(encoder, tokens), _expected(encoder, tokens), rtol=2e-5, atol=2e-5)
    encoder.model.embedding.weight = nn.Parameter(encoder.model.embedding.weight * 2)
    torch.testing.assert_close(encode(encoder, tokens), _expected(encoder, tokens), rtol=2e-5, atol=2e-5)


def _with_hook(encoder: RxTEncoder) -> RxTEncoder:
    encoder.model.layers[1].register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
    return encoder


def _with_another_class(encoder: RxTEncoder) -> RxTEncoder:
    class Doubled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    encoder.model.embedding = Doubled(*encoder.model.embedding.weight.shape)
    return encoder


def _reading_memory(encoder: RxTEncoder) -> RxTEncoder:
    config = {**encoder.config.to_dict(), "skip_memory_cross_attention": False}
    return RxTEncoder(TransformerConfig.of(config)).eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_hook, "hooks"),
        (_with_another_class, "Doubled"),
        (_reading_memory, "memory cross-attention"),
        (lambda encoder: encoder.double(), "float64"),
    ],
)
@torch.no_grad()
def test_modules_encode_what_the_native_encoder_would_not(
    change: Callable[[RxTEncoder], RxTEncoder], reason: str
) -> None:
    encoder = change(make("alpha").encoder)
    tokens = _tokens(2, 6)
    assert reason in explain_encoding(encoder)
    torch.testing.assert_close(encode(encoder, tokens), encoder(tokens))


def test_gradients_flow_through_the_modules() -> None:
    encoder = make("alpha").encoder
    assert "gradients" in explain_encoding(encoder)
    assert encode(encoder, _tokens(1, 4)).requires_grad


@torch.no_grad()
def test_ids_and_masks_of_other_integers_are_ids_and_masks() -> None:
    encoder, tokens, mask = make("alpha").encoder, _tokens(2, 6), _mask(6, 4)
    expected = encode(encoder, tokens, mask)
    assert torch.equal(encode(encoder, tokens.int(), mask.int()), expected)
    nothing = torch.zeros_like(mask)
    nothing[1] = True
    states = encode(encoder, tokens, nothing)
    assert not states[:, 0].any()
    torch.testing.assert_close(states[:, 1], _expected(encoder, tokens[1:])[:, 0], rtol=2e-5, atol=2e-5)


def test_threads_share_an_encoder() -> None:
    native = NativeEncoder(encoder_weights(make("beta").encoder))
    inputs = [_tokens(rows, 9, seed=rows) for rows in (1, 2, 3)]
    expected = [native.encode(tokens) for tokens in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(native.encode, inputs * 20))
    assert all(torch.equal(one, expected[index % 3]) for index, one in enumerate(found))


@torch.no_grad()
def test_padding_in_the_middle_goes_to_the_modules() -> None:
    encoder, tokens = make("alpha").encoder, _tokens(1, 4)
    mask = torch.tensor([[True, False, True, True]])
    torch.testing.assert_close(encode(encoder, tokens, mask), encoder(tokens, mask))


def test_refusals_are_sentences() -> None:
    encoder = make("alpha").encoder
    native = NativeEncoder(encoder_weights(encoder))
    with pytest.raises(TypeError, match="int64 tensor of token ids"):
        native.encode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="tokens has shape"):
        native.encode(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens has 9999"):
        native.encode(torch.full((1, 2), 9999))
    with pytest.raises(ValueError, match="mask has shape"):
        native.encode(_tokens(1, 3), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="behind padding"):
        native.encode(_tokens(1, 3), torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match="cannot encode here"):
        NativeEncoder(encoder_weights(make("alpha").encoder.double()))
