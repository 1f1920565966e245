"""From the modules of a decoder, an encoder or a language model to the weights that an engine takes."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from rxt_kernels.decode import (
    DecoderLayerWeights,
    DecoderWeights,
    EncoderWeights,
    ExpertWeights,
    FeedForwardWeights,
    MemoryReadWeights,
    NormWeights,
)
from rxt_kernels.mixture_of_experts.reference import ExpertTensors
from rxt_model.decoder import CausalModel
from rxt_model.encoder import RxTEncoder
from rxt_model.gradients import no_gradients
from rxt_model.layers.feed_forward import FeedForward
from rxt_model.layers.mixture_of_experts import PerExpertMixtureOfExperts, StackedMixtureOfExperts
from rxt_model.layers.transformer_layer import TransformerLayer

__all__ = ["decoder_weights", "encoder_weights"]


def _norm(module: nn.Module) -> NormWeights:
    return NormWeights(cast(Tensor, module.weight), module.bias if isinstance(module, nn.LayerNorm) else None)


def _feed_forward(module: nn.Module) -> FeedForwardWeights | ExpertWeights:
    if isinstance(module, FeedForward):
        first, second = module.first_linear, module.fc2
        return FeedForwardWeights(first.weight, first.bias, second.weight, second.bias, module.gated, module.activation)
    assert isinstance(module, (PerExpertMixtureOfExperts, StackedMixtureOfExperts))
    options = module.options
    experts: tuple[ExpertTensors, ExpertTensors, ExpertTensors | None, ExpertTensors | None, Tensor | None]
    if isinstance(module, StackedMixtureOfExperts):
        experts = (module.w1, module.w2, module.b1, module.b2, module.global_bias)
    else:
        own = module._weights(module.experts)
        experts = (own.w1, own.w2, own.b1, own.b2, None)
    w1, w2, b1, b2, global_bias = experts
    return ExpertWeights(
        module.router.gate.weight, w1, w2, b1, b2, global_bias, module._shared(),
        top_k=options.top_k, gated=options.gated, activation=options.activation, router_dtype=options.router_dtype,
    )  # fmt: skip


def _layer(layer: TransformerLayer, memory_index: int | None) -> DecoderLayerWeights:
    read = None
    if memory_index is not None:
        read = MemoryReadWeights(
            _norm(layer.stm_norm), _norm(layer.norm2), layer.memory_cross_attention.weights(), memory_index
        )
    return DecoderLayerWeights(
        _norm(layer.norm1),
        layer.attention.weights(),
        read,
        _norm(getattr(layer, layer._feed_forward_norm)),
        _feed_forward(layer.ff),
    )


@no_gradients()
def decoder_weights(decoder: CausalModel) -> DecoderWeights:
    """The weights of a decoder as an engine takes them: its parameters themselves."""
    network, config = decoder.model, decoder.model.config
    rotary, head = network.rotary, network.head
    device = network.embedding.weight.device
    return DecoderWeights(
        embedding=network.embedding.weight,
        layers=tuple(_layer(layer, index) for layer, index in network.layers_in_order()),
        head_norm=None if network.head_norm is None else _norm(network.head_norm),
        head=network.embedding.weight if head is None else head.weight,
        head_bias=None if head is None else head.bias,
        inverse_frequencies=None if rotary is None else rotary._frequencies(device),
        rotary_layout=config.rope_layout,
        rounds_angles=config.rope_angle_dtype == "match",
        gate_activation=config.gated_attention_activation,
    )


@no_gradients()
def encoder_weights(encoder: RxTEncoder) -> EncoderWeights:
    """The weights of an encoder that reads no memory, as an engine takes them."""
    network, config = encoder.model, encoder.config
    rotary = network.rotary
    return EncoderWeights(
        embedding=network.embedding.weight,
        layers=tuple(_layer(cast(TransformerLayer, layer), None) for layer in network.layers),
        inverse_frequencies=None if rotary is None else rotary._frequencies(network.embedding.weight.device),
        rotary_layout=config.rope_layout,
        rounds_angles=config.rope_angle_dtype == "match",
        gate_activation=config.gated_attention_activation,
    )
