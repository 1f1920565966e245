"""One pre-norm transformer layer, with or without a memory read between attention and feed-forward (spec 2.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rxt_model.cache import LayerCache, MemoryKeyValue
from rxt_model.config import TransformerConfig
from rxt_model.layers.attention import MemoryCrossAttention, SparseQueryAttention
from rxt_model.layers.feed_forward import FeedForward
from rxt_model.layers.mixture_of_experts import make_mixture_of_experts
from rxt_model.layers.norms import make_norm


class LayerOutput(NamedTuple):
    """The residual stream after a layer, and the layer's load-balance loss if it has experts."""

    hidden: Tensor
    load_balance_loss: Tensor | None


class TransformerLayer(nn.Module):
    """``x += SelfAttention(norm1(x))``, ``x += MemoryRead(norm2(x))`` if it reads memory, ``x += FF(norm3(x))``.

    Args:
        config: the component this layer belongs to.
        reads_memory: whether it has memory cross-attention (``norm2``, ``stm_norm``, ``memory_cross_attention``).
        use_moe: whether its feed-forward is a mixture of experts.
        feed_forward_dim: hidden width of a dense feed-forward.
        feed_forward_norm: attribute name of the last norm; decoder-only models call it ``norm2``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        reads_memory: bool,
        use_moe: bool,
        feed_forward_dim: int,
        feed_forward_norm: str = "norm3",
    ) -> None:
        super().__init__()
        self.reads_memory = reads_memory
        self.padding: str = config.padding
        """As configured, or one of the two in :meth:`_read`, for the parity of whoever sets it."""
        self.attention = SparseQueryAttention(
            config.embed_dim,
            config.head_dim,
            config.self_attention_heads,
            output_bias=config.use_attention_output_bias,
            gated=config.use_gated_attention,
            gate_activation=config.gated_attention_activation,
            rotary_layout=config.rope_layout,
            dropout=config.att_dropout,
        )
        self.norm1 = make_norm(config.embed_dim, use_rms_norm=config.use_rms_norm)
        if reads_memory:
            self.memory_cross_attention = MemoryCrossAttention(
                config.embed_dim,
                config.head_dim,
                config.cross_attention_heads,
                output_bias=config.use_attention_output_bias,
                gated=config.has_gated_cross_attention,
                gate_activation=config.gated_attention_activation,
                rotary_layout=config.rope_layout,
                dropout=config.att_dropout,
            )
            self.norm2 = make_norm(config.embed_dim, use_rms_norm=config.use_rms_norm)
            self.stm_norm = make_norm(config.embed_dim, use_rms_norm=config.use_rms_norm)
        self._feed_forward_norm = feed_forward_norm
        self.add_module(feed_forward_norm, make_norm(config.embed_dim, use_rms_norm=config.use_rms_norm))
        self.ff: nn.Module = (
            make_mixture_of_experts(config)
            if use_moe
            else FeedForward(
                config.embed_dim,
                feed_forward_dim,
                gated=config.use_gated,
                activation_name=config.ff_activation,
                dropout=config.ff_dropout,
            )
        )

    def project_memory(self, memory: Tensor) -> MemoryKeyValue:
        """Keys and values of this layer's memory (1 or B, S, D), to be used until the memory changes."""
        return MemoryKeyValue(*self.memory_cross_attention.project_memory(self.stm_norm(memory)))

    def _read(self, query: Tensor, memory: MemoryKeyValue, angles: Tensor | None, kept: Tensor | None) -> Tensor:
        """The memory read. Upstream's decoders show padded tokens to those behind them, and so what padded tokens read counts:

        * padding "rows_of_zeros", since 0.3.32: their queries are zero;
        * padding "nothing_read", before: they read nothing, and get the bias of the output projection.
        """
        if kept is not None and self.padding == "rows_of_zeros":
            query = query * kept.to(query.dtype)
        read: Tensor = self.memory_cross_attention(query, memory.key, memory.value, angles)
        if kept is None or self.padding != "nothing_read":
            return read
        bias = self.memory_cross_attention.out_proj.bias
        return torch.where(kept, read, torch.zeros_like(read) if bias is None else bias.to(read.dtype))

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None,
        *,
        causal: bool,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        memory: MemoryKeyValue | None = None,
    ) -> LayerOutput:
        """Run the layer on (B, T, D).

        Args:
            x: residual stream, (B, T, D).
            angles: rotary angles at the positions of ``x``, or None.
            causal: whether self-attention is causal.
            attention_mask: (B, T) bool, True at real tokens.
            cache: this layer's key/value cache.
            memory: projected memory; None skips the read.
        """
        attended = self.norm1(x)
        key_mask = attention_mask if self.padding == "mask" else None
        kept = None if attention_mask is None else attention_mask[..., None]
        if kept is not None and self.padding == "dilute":
            # What flash attention upstream sees: padded keys stay visible, as rows of zeros (spec 2.5).
            attended = attended * kept.to(attended.dtype)
        x = x + self.attention(attended, angles, causal=causal, key_mask=key_mask, cache=cache)
        if memory is not None:
            x = x + self._read(self.norm2(x), memory, angles, kept)
        transformed = self.ff(getattr(self, self._feed_forward_norm)(x))
        if isinstance(transformed, Tensor):
            return LayerOutput(x + transformed, None)
        return LayerOutput(x + transformed.output, transformed.load_balance_loss)
