"""Weights to start from with which a fact can already be copied on its way through memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer

__all__ = ["prepare_for_copying"]


def _matching_heads(attention: Any, basis: Tensor) -> None:
    """Let queries find what resembles them: query and key projections start as the same orthonormal map."""
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.copy_(basis[: projection.weight.shape[0]])


def _copying_heads(attention: Any, basis: Tensor, scale: float = 1.0) -> None:
    """Let values go in and come out as they were, times ``scale``, in a subspace that is the same everywhere."""
    value, output = attention.v_proj.weight, attention.out_proj.weight
    value.copy_(basis[: value.shape[0]])
    if output.shape[1] == value.shape[0]:
        output.copy_(basis[: value.shape[0]].t() * scale)
    else:  # several query heads share a key/value head: spread its value over them
        repeats = output.shape[1] // value.shape[0]
        heads = basis[: value.shape[0]].unflatten(0, (-1, value.shape[0] // attention.key_value_heads))
        output.copy_(heads.repeat_interleave(repeats, 0).flatten(0, 1).t() * (scale / repeats))


@torch.no_grad()
def prepare_for_copying(model: RxTAlpha | SparseQueryTransformer) -> None:
    """Start from weights with which a token's identity survives on its way through memory.

    Recalling a fact means copying a token: embedding, encoder, memory attention, memory, memory read, head. With random
    weights that chain must first be found by chance, with these it exists at the start and training only has to learn
    *what* to keep and *when* to read it:

    * embeddings are small (standard deviation 0.25) and the head starts as their copy;
    * all attentions that carry facts share one orthonormal value subspace, with outputs the transpose of values;
    * memory is written and read by resemblance at first: there queries and keys start as the same projection, so a new
      fact goes where something like it is, and a question finds what is like it;
    * memory gates start rather closed, some slots more than others, and depend on their own slot's status: slots keep
      what they have for shorter or longer, and are opened by what is written.
    """
    width = model.config.embed_dim if isinstance(model, SparseQueryTransformer) else model.decoder.config.embed_dim
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    network = model.model if isinstance(model, SparseQueryTransformer) else model.decoder.model
    network.embedding.weight.mul_(0.25)
    network.head.weight.copy_(network.embedding.weight)
    network.head.bias.zero_()
    # Without memory every attention is one that copies a token to itself: together they add it once.
    scale = 1.0 / len(network.layers) if isinstance(model, SparseQueryTransformer) else 1.0
    for layer in network.layers:
        _copying_heads(layer.attention, basis, scale)
        if hasattr(layer, "memory_cross_attention"):
            _copying_heads(layer.memory_cross_attention, basis)
            _matching_heads(layer.memory_cross_attention, basis)
    if isinstance(model, SparseQueryTransformer):
        return
    memory = model.memory_attention.model
    for attention in memory.attention_layers:
        _copying_heads(attention, basis)
        _matching_heads(attention, basis)
    gates = [(memory.residual_gate_layers, -1.0)]
    if hasattr(memory, "mean_residual_gate_layers"):
        gates.append((memory.mean_residual_gate_layers, -3.0))
    for layers, bias in gates:
        for gate in layers:
            if isinstance(linear := gate.gate, nn.Linear):
                linear.bias.copy_(torch.linspace(bias - 1.0, bias + 1.0, len(linear.bias)))
                linear.weight.mul_(0.3)
                linear.weight.diagonal().add_(8.0)
