"""Memory update, the definition (specification 2.10 to 2.12): the memory write after an interaction.

Every layer i reads the old memory m and the encoded interaction ED_i; the new layers are committed together.

    main(z)      e = input_norm_i(ED_i);   g_i(z, Attn_i(query = norm_i(z), key = value = e, rotated keys, key mask))

    simple                     main(m_i)
    self                       p = context_norm_i(m_i);   main(h_i(m_i, ContextAttn_i(p, p, p)))
    interlayer                 p as above, mu = mean_norm(mean over layers of m);
                               main(h_i(m_i, ContextAttn_i(p, mu, mu)))
    gated-self-interlayer      p, mu as above, c = interlayer_gate_i(old = p, new = mu);
                               main(h_i(m_i, ContextAttn_i(p, c, c)))
    grouped-self-interlayer    the same, with mu of the L / groups neighbouring layers of i's group

g, h and interlayer_gate are residual gates; only the keys of the main step are rotated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_kernels.memory_update.parameters import (
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
)
from rxt_kernels.rms_norm.reference import rms_norm_reference
from rxt_kernels.sparse_query_attention.reference import sparse_query_attention_reference

NORM_EPSILON = 1e-6
LAYER_NORM_EPSILON = 1e-5


def residual_gate_reference(old: Tensor, new: Tensor, gate: ResidualGateParameters) -> Tensor:
    """old, new (B, S, D) -> (B, S, D).

    add: old + new.  replace: new.  Else, with u = old + new and the slot status s(u), mean over D or Linear(D -> 1):

        static         G = act(w)
        elementwise    G = act(w * s(u)), s(u) (B, S, 1); not per slot: the mean over S and D, (B, 1, 1)
        linear         G = act(s(u) W^T + b), s(u) (B, S): one value per slot out of all slots; not per slot: one value

        sigmoid:  G * new + (1 - G) * old            tanh:  (1 + G) * new + (1 - G) * old
    """
    if gate.kind == "replace":
        return new.to(old.dtype)
    total = old + new
    if gate.kind == "add":
        return total.to(old.dtype)
    assert gate.weight is not None
    if gate.kind == "static":
        before = gate.weight
    else:
        if gate.status_weight is not None:
            status = F.linear(total, gate.status_weight, gate.status_bias)
        elif gate.kind == "elementwise" and not gate.per_slot:
            status = total.mean(dim=(1, 2), keepdim=True)
        else:
            status = total.mean(dim=2, keepdim=True)
        if gate.kind == "elementwise":
            before = gate.weight * status
        else:
            before = F.linear(status.squeeze(2), gate.weight, gate.bias).unsqueeze(2)
    if gate.activation == "sigmoid":
        opening = torch.sigmoid(before)
        return (opening * new + (1 - opening) * old).to(old.dtype)
    opening = torch.tanh(before)
    return ((1 + opening) * new + (1 - opening) * old).to(old.dtype)


def memory_norm_reference(x: Tensor, norm: MemoryNormParameters, training: bool = False) -> Tensor:
    """x (B, S, D) -> (B, S, D).

    classic-rms: RMSNorm.  Otherwise ``sigmoid(gate) * y + (1 - sigmoid(gate)) * x``, with r = sqrt(mean over D of x^2):

        rms          y = x * rsqrt(r + 1e-6) * scale; it divides by the root of r, as the published checkpoints expect
        adaptive     as rms; in training r is the running mean of sqrt(mean of all x^2), one number
        positional   as rms; r is the running mean of r per slot, also outside of training
        layer        y = LayerNorm(x) * scale

    Running means are updated in place, in training only, before they are used: ema = decay * ema + (1 - decay) * now.
    """
    if norm.kind == "classic-rms":
        assert norm.weight is not None
        return rms_norm_reference(x, norm.weight)
    assert norm.scale is not None
    assert norm.gate is not None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.kind == "layer":
        normed = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, LAYER_NORM_EPSILON) * norm.scale
    else:
        rms = wide.square().mean(dim=-1, keepdim=True).sqrt()
        if training and norm.ema_rms is not None:
            now = wide.square().mean().sqrt() if norm.kind == "adaptive" else rms.mean(dim=0)
            with torch.no_grad():
                norm.ema_rms.mul_(norm.decay).add_(now.detach() * (1 - norm.decay))
        if norm.ema_rms is not None and (norm.kind == "positional" or training):
            rms = norm.ema_rms.to(wide.dtype).clone()
        normed = wide * torch.rsqrt(rms + NORM_EPSILON) * norm.scale
    mix = torch.sigmoid(norm.gate)
    return (mix * normed + (1 - mix) * x).to(x.dtype)


def attention_reference(
    weights: AttentionWeights,
    query_input: Tensor,
    key_input: Tensor,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    dropout: float = 0.0,
) -> Tensor:
    """Projections around sparse query attention: query_input (B, S, D), key_input (B, T, D) -> (B, S, D)."""
    heads = sparse_query_attention_reference(
        F.linear(query_input, weights.query).unflatten(-1, (weights.query_heads, weights.head_dim)),
        F.linear(key_input, weights.key).unflatten(-1, (weights.key_value_heads, weights.head_dim)),
        F.linear(key_input, weights.value).unflatten(-1, (weights.key_value_heads, weights.head_dim)),
        key_mask=key_mask,
        key_angles=key_angles,
        rotary_layout=rotary_layout,
        dropout=dropout,
    ).flatten(-2)
    if weights.gate is not None:
        heads = heads * torch.sigmoid(F.linear(query_input, weights.gate))
    return F.linear(heads, weights.output, weights.output_bias)


def memory_update_reference(
    memory: Tensor,
    encoded: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    variant: str,
    mean_norm: MemoryNormParameters | None = None,
    groups: int = 1,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    padding: str = "mask",
    attention_dropout: float = 0.0,
    context_attention_dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """memory (L, 1 | B, S, D), encoded (L, B, T, D) -> new memory (L, B, S, D).

    padding "mask" hides padded positions from the softmax; "dilute" zeroes the encoded rows there and lets the softmax
    see them (specification 2.5). A row of the batch with nothing but padding keeps its old memory.
    """
    number_of_layers, batch = encoded.shape[0], encoded.shape[1]
    memory = memory.expand(-1, batch, -1, -1)
    dropout = attention_dropout if training else 0.0
    context_dropout = context_attention_dropout if training else 0.0
    attention_mask = key_mask
    if key_mask is not None and padding == "dilute":
        # where and not a product: whatever the padded rows hold, also NaN, is gone.
        encoded = torch.where(
            key_mask[None, :, :, None], encoded, torch.zeros((), dtype=encoded.dtype, device=encoded.device)
        )
        attention_mask = None

    means: list[Tensor] = []
    if mean_norm is not None:
        groups = groups if variant == "grouped-self-interlayer" else 1
        means = [
            memory_norm_reference(group.mean(dim=0), mean_norm, training)
            for group in memory.split(number_of_layers // groups)
        ]

    updated = []
    for index, layer in enumerate(layers):
        state = memory[index]
        if variant != "simple":
            assert layer.context_norm is not None
            assert layer.context_attention is not None
            assert layer.context_gate is not None
            own = memory_norm_reference(state, layer.context_norm, training)
            context = own
            if variant != "self":
                context = means[index * len(means) // number_of_layers]
                if variant != "interlayer":
                    assert layer.interlayer_gate is not None
                    context = residual_gate_reference(own, context, layer.interlayer_gate)
            read = attention_reference(layer.context_attention, own, context, dropout=context_dropout)
            state = residual_gate_reference(state, read, layer.context_gate)
        written = attention_reference(
            layer.attention,
            memory_norm_reference(state, layer.memory_norm, training),
            rms_norm_reference(encoded[index], layer.input_norm_weight),
            attention_mask,
            key_angles,
            rotary_layout,
            dropout,
        )
        updated.append(residual_gate_reference(state, written, layer.residual_gate))
    new_memory = torch.stack(updated)
    if key_mask is not None:
        new_memory = torch.where(key_mask.any(dim=1)[None, :, None, None], new_memory, memory)
    return new_memory
