"""The memory write: modules that own the weights of memory attention, in the key grammar of checkpoints (spec 3.3).

What is computed stands in :func:`rxt_kernels.memory_update` (spec 2.10 to 2.12); here are only the parameters.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rxt_kernels import (
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
    memory_update,
)
from rxt_model.config import MemoryAttentionConfig
from rxt_model.layers.attention import SparseQueryAttention
from rxt_model.layers.norms import RMSNorm
from rxt_model.layers.rotary import RotaryPositions
from rxt_model.memory.short_term_memory import ShortTermMemory


class MemoryNorm(nn.Module):
    """Norm of memory states, of one of five kinds (spec 2.11); only ``classic-rms`` is used by published models."""

    weight: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    ema_rms: Tensor | None

    def __init__(self, config: MemoryAttentionConfig) -> None:
        super().__init__()
        self.kind = config.norm_type
        self.decay = config.norm_decay
        dim, slots = config.embed_dim, config.stm_size
        for name in ("weight", "scale", "gate"):
            self.register_parameter(name, None)
        self.register_buffer("ema_rms", None)
        if self.kind == "classic-rms":
            self.weight = nn.Parameter(torch.ones(dim))
            return
        if self.kind == "positional":
            shape = (dim,) if config.norm_per_dim_scale else (slots, 1)
            self.scale = nn.Parameter(torch.empty(shape).normal_(1.0, 0.1))
            self.gate = nn.Parameter(torch.full((slots, 1), config.norm_init_gate))
            self.ema_rms = torch.ones(slots, 1)
        else:
            self.scale = nn.Parameter(torch.ones(dim))
            self.gate = nn.Parameter(torch.full((1,), config.norm_init_gate))
            if self.kind == "adaptive":
                self.ema_rms = torch.ones(1)
            elif self.kind == "layer":
                self.norm = nn.LayerNorm(dim)

    def parameters_for_update(self) -> MemoryNormParameters:
        """The same parameters as plain tensors."""
        layer_norm = self.norm if self.kind == "layer" else None
        return MemoryNormParameters(
            kind=self.kind,
            weight=self.weight if layer_norm is None else layer_norm.weight,
            bias=None if layer_norm is None else layer_norm.bias,
            scale=self.scale,
            gate=self.gate,
            ema_rms=self.ema_rms,
            decay=self.decay,
        )


class ResidualGate(nn.Module):
    """Parameters of a gate between old and new memory (spec 2.10); without ``gated`` it has none and adds."""

    def __init__(self, config: MemoryAttentionConfig, *, gated: bool, replaces: bool = False) -> None:
        super().__init__()
        self.kind = "replace" if replaces else config.residual_gate_type if gated else "add"
        self.per_slot = config.residual_per_slot_gate
        self.activation = "tanh" if config.use_tanh_residual_gate else "sigmoid"
        self.slot_status: nn.Linear | None = None
        if self.kind in ("add", "replace"):
            return
        slots = config.stm_size
        if self.kind == "linear":
            self.gate: nn.Module | nn.Parameter = nn.Linear(slots, slots if self.per_slot else 1)
        else:
            shape = (slots, 1) if self.per_slot else (1,)
            self.gate = nn.Parameter(torch.full(shape, config.residual_gate_init))
        if config.residual_gate_slot_status_type == "linear":
            # A static gate owns these weights in checkpoints although it never uses them.
            self.slot_status = nn.Linear(config.embed_dim, 1)

    def parameters_for_update(self) -> ResidualGateParameters:
        """The same parameters as plain tensors."""
        if self.kind in ("add", "replace"):
            return ResidualGateParameters(kind=self.kind, per_slot=self.per_slot, activation=self.activation)
        status = None if self.kind == "static" else self.slot_status
        linear = self.gate if isinstance(self.gate, nn.Linear) else None
        return ResidualGateParameters(
            kind=self.kind,
            weight=cast(Tensor, self.gate) if linear is None else linear.weight,
            bias=None if linear is None else linear.bias,
            status_weight=None if status is None else status.weight,
            status_bias=None if status is None else status.bias,
            per_slot=self.per_slot,
            activation=self.activation,
        )


class MemoryAttentionNetwork(nn.Module):
    """All layers of memory attention of one variant, and the short-term memory they write to."""

    def __init__(self, config: MemoryAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.variant = config.variant
        layers = config.num_layers

        def attention(heads: tuple[int, int]) -> nn.ModuleList:
            return nn.ModuleList(SparseQueryAttention(config.embed_dim, config.head_dim, heads) for _ in range(layers))

        def norms() -> nn.ModuleList:
            return nn.ModuleList(MemoryNorm(config) for _ in range(layers))

        def gates(*, gated: bool, replaces: bool = False) -> nn.ModuleList:
            return nn.ModuleList(ResidualGate(config, gated=gated, replaces=replaces) for _ in range(layers))

        self.stm = ShortTermMemory(layers, config.stm_size, config.embed_dim)
        self.attention_layers = attention(config.attention_heads)
        self.memory_norm_layers = norms()
        self.memory_input_norm_layers = nn.ModuleList(RMSNorm(config.embed_dim) for _ in range(layers))
        self.residual_gate_layers = gates(gated=config.use_gated_residual, replaces=config.disable_residual)
        if self.variant == "self":
            self.self_attention_layers = attention(config.context_attention_heads)
            self.self_memory_norm_layers = norms()
            self.self_residual_gate_layers = gates(gated=config.use_gate_for_self_attention)
        elif self.variant != "simple":
            self.mean_attention_layers = attention(config.context_attention_heads)
            self.mean_memory_norm_layers = norms()
            self.mean_residual_gate_layers = gates(gated=config.use_gated_residual)
            self.mean_stm_norm = MemoryNorm(config)
            if self.variant != "interlayer":
                self.interlayer_gate_layers = gates(gated=config.use_gated_residual)
        self.rotary = RotaryPositions(config.head_dim, config.rope_base, config.rope_angle_dtype)

    def _context_modules(self) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList] | None:
        if self.variant == "simple":
            return None
        if self.variant == "self":
            return self.self_memory_norm_layers, self.self_attention_layers, self.self_residual_gate_layers
        return self.mean_memory_norm_layers, self.mean_attention_layers, self.mean_residual_gate_layers

    def update_layers(self) -> list[MemoryUpdateLayer]:
        """The weights of every layer as plain tensors, in the form :func:`rxt_kernels.memory_update` takes."""
        context_norms, context_attentions, context_gates = self._context_modules() or (None, None, None)
        count = self.config.num_layers
        fields = (
            _states(self.memory_norm_layers, count),
            [cast(RMSNorm, norm).weight for norm in self.memory_input_norm_layers],
            _weights(self.attention_layers, count),
            _states(self.residual_gate_layers, count),
            _states(context_norms, count),
            _weights(context_attentions, count),
            _states(context_gates, count),
            _states(getattr(self, "interlayer_gate_layers", None), count),
        )
        return [MemoryUpdateLayer(*layer) for layer in zip(*fields, strict=True)]

    def forward(self, encoded: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """The memory after an interaction; nothing is stored (see :meth:`ShortTermMemory.load`).

        Args:
            encoded: states of every encoder layer, (L, B, T, D).
            attention_mask: (B, T) bool, True at real tokens.
            memory: (L, 1 or B, S, D); None takes this network's own short-term memory.

        Returns:
            (L, B, S, D).
        """
        angles = self.rotary.angles(torch.arange(encoded.shape[2], device=encoded.device), encoded.dtype)
        mean_norm = self.mean_stm_norm.parameters_for_update() if hasattr(self, "mean_stm_norm") else None
        return memory_update(
            self.stm.memory if memory is None else memory,
            encoded,
            self.update_layers(),
            variant=self.variant,
            mean_norm=mean_norm,
            groups=self.config.num_groups if self.variant == "grouped-self-interlayer" else 1,
            key_mask=attention_mask,
            key_angles=angles,
            rotary_layout=self.config.rope_layout,
            padding=self.config.padding,
            attention_dropout=self.config.att_dropout,
            context_attention_dropout=self.config.context_att_dropout,
            training=self.training,
        )


def _states(modules: nn.ModuleList | None, count: int) -> list[Any]:
    """The parameters of norms or gates of all layers; None for each where the variant has none."""
    return [None] * count if modules is None else [cast(Any, module).parameters_for_update() for module in modules]


def _weights(modules: nn.ModuleList | None, count: int) -> list[Any]:
    """Likewise of attentions."""
    return [None] * count if modules is None else [cast(Any, module).weights() for module in modules]
