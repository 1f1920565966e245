"""Arithmetic of a conversation, counted from configurations: multiply-adds of matrix products and of attention.

Two operations per multiply-add. Counted is what has to be computed: attention over the keys a query may see, the chosen
experts, the vocabulary head at the positions whose logits are used. Norms, activations and softmax are left out. The
terms are those of spec 2.4 to 2.12; tests hold them to what torch's own counter sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rxt_model.config import MemoryAttentionConfig, TransformerConfig

__all__ = ["RxTCosts", "StatelessCosts", "Work", "causal_pairs", "mixture_of_experts_work"]


class Work(NamedTuple):
    """What a piece of work cannot do without: bytes that have to be read from memory, and operations."""

    bytes: int
    flops: int


def causal_pairs(new: int, before: int = 0) -> int:
    """Query and key pairs that causal attention of ``new`` tokens behind ``before`` others looks at.

    Example:
        >>> causal_pairs(3), causal_pairs(1, before=10)
        (6, 11)
    """
    return new * before + new * (new + 1) // 2


@dataclass(frozen=True)
class _Attention:
    """One attention: projections per token, and work per pair of query and key."""

    dim: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    gated: bool = False

    @property
    def _width(self) -> int:
        return max(self.query_heads, self.key_value_heads) * self.head_dim

    @property
    def per_query(self) -> int:
        """Query and output projection, and the gate if there is one."""
        return 2 * self.dim * (self.query_heads * self.head_dim + self._width * (2 if self.gated else 1))

    @property
    def per_key(self) -> int:
        """Key and value projection."""
        return 2 * self.dim * 2 * self.key_value_heads * self.head_dim

    @property
    def per_pair(self) -> int:
        """Score and weighted sum."""
        return 2 * 2 * self._width

    def cost(self, queries: int, keys: int, pairs: int) -> int:
        return queries * self.per_query + keys * self.per_key + pairs * self.per_pair


def _dense(config: TransformerConfig, hidden: int) -> int:
    return 2 * config.embed_dim * hidden * (3 if config.use_gated else 2)


def _feed_forward(config: TransformerConfig, kind: str, hidden: int) -> int:
    """Feed-forward of one token; ``kind`` is ``dense`` or ``moe``."""
    if kind == "dense":
        return _dense(config, hidden)
    cost = 2 * config.embed_dim * config.num_experts + config.moe_top_k * _dense(config, config.ff_dim)
    if config.num_shared_experts:
        cost += config.num_shared_experts * _dense(config, config.shared_expert_dim or config.ff_dim)
        cost += 2 * config.embed_dim * config.num_shared_experts if config.num_shared_experts > 1 else 0
    return cost


def mixture_of_experts_work(config: TransformerConfig, tokens: int, experts_read: int, element_size: int) -> Work:
    """One layer of experts for ``tokens`` tokens that choose ``experts_read`` different ones of them.

    Read are the router and each chosen expert once; the tokens themselves are left out.
    """
    router = config.embed_dim * config.num_experts
    weights = router + experts_read * _dense(config, config.ff_dim) // 2
    return Work(weights * element_size, tokens * _feed_forward(config, "moe", config.ff_dim))


class _Transformer:
    """The parts of a decoder or encoder that repeat per token."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        query, key_value = config.self_attention_heads
        self.attention = _Attention(config.embed_dim, query, key_value, config.head_dim, config.use_gated_attention)
        query, key_value = config.cross_attention_heads
        self.memory_read = _Attention(
            config.embed_dim, query, key_value, config.head_dim, config.has_gated_cross_attention
        )
        stateless = (*(config.stateless_layers_config or ()), *(config.final_stateless_layers_config or ()))
        self.depth = config.num_layers + len(stateless)
        self.memory_layers = 0 if config.skip_memory_cross_attention else config.num_layers
        own = _feed_forward(config, "moe" if config.use_moe else "dense", config.ff_dim)
        self.feed_forward = config.num_layers * own + sum(
            _feed_forward(config, kind, config.dense_layer_dim) for kind in stateless
        )

    @property
    def expert_layers(self) -> int:
        """Layers with a mixture of experts."""
        config = self.config
        stateless = (*(config.stateless_layers_config or ()), *(config.final_stateless_layers_config or ()))
        return (config.num_layers if config.use_moe else 0) + stateless.count("moe")

    def weights(self, experts_read: int) -> int:
        """Weights of matrices that are read when each is read once, of ``experts_read`` experts over all layers."""
        one_token = self.tokens(1, 0) - self.memory_layers * self.memory_read.cost(0, 0, self.config.stm_size)
        chosen = self.expert_layers * self.config.moe_top_k
        experts = (experts_read - chosen) * _dense(self.config, self.config.ff_dim)
        return (one_token + experts + self.head(1)) // 2

    def tokens(self, new: int, pairs: int) -> int:
        """All layers for ``new`` tokens whose self-attention looks at ``pairs`` pairs; memory reads included."""
        cost = self.depth * self.attention.cost(new, new, pairs) + new * self.feed_forward
        return cost + self.memory_layers * self.memory_read.cost(new, 0, new * self.config.stm_size)

    def head(self, positions: int) -> int:
        return positions * 2 * self.config.embed_dim * self.config.vocab_size

    def key_value_bytes(self, tokens: int, element_size: int) -> int:
        """Self-attention keys and values of ``tokens`` tokens."""
        return tokens * self.depth * 2 * self.attention.key_value_heads * self.attention.head_dim * element_size


@dataclass(frozen=True)
class StatelessCosts:
    """A decoder-only model; ``config`` as :meth:`StatelessConfig.transformer_config` gives it."""

    config: TransformerConfig

    def answer(self, unread: int, cached: int, answer: int) -> int:
        """Read ``unread`` tokens behind ``cached`` others, then generate ``answer`` tokens."""
        parts = _Transformer(self.config)
        read = unread + answer - 1  # the last token of an answer is chosen, but not read
        return parts.tokens(read, causal_pairs(read, cached)) + parts.head(answer)

    def key_value_bytes(self, tokens: int, element_size: int) -> int:
        """Cache of ``tokens`` tokens."""
        return _Transformer(self.config).key_value_bytes(tokens, element_size)

    def bytes_per_step(self, context: int, element_size: int) -> int:
        """Weights and cache that one more token behind ``context`` others has to read."""
        parts = _Transformer(self.config)
        weights = (parts.tokens(1, 0) + parts.head(1)) // 2
        return weights * element_size + parts.key_value_bytes(context, element_size)


@dataclass(frozen=True)
class RxTCosts:
    """A full Reactive Transformer."""

    decoder: TransformerConfig
    encoder: TransformerConfig
    memory_attention: MemoryAttentionConfig

    def answer(self, prompt: int, answer: int) -> int:
        """Project the memory once, read the message, generate ``answer`` tokens."""
        parts = _Transformer(self.decoder)
        read = prompt + answer - 1
        return self._projected_memory(parts) + parts.tokens(read, causal_pairs(read)) + parts.head(answer)

    @staticmethod
    def _projected_memory(parts: _Transformer) -> int:
        return parts.memory_layers * parts.memory_read.cost(0, parts.config.stm_size, 0)

    def memory_update(self, tokens: int) -> int:
        """Encode an interaction of ``tokens`` tokens and write it into memory."""
        encoder = _Transformer(self.encoder)
        cost = encoder.tokens(tokens, tokens * tokens)
        if encoder.memory_layers and self.encoder.reads_memory:
            cost += self._projected_memory(encoder)
        elif encoder.memory_layers:
            cost -= encoder.memory_layers * encoder.memory_read.cost(tokens, 0, tokens * self.encoder.stm_size)
        return cost + self.memory_attention.num_layers * self._write(tokens)

    def _write(self, tokens: int) -> int:
        """One layer of memory attention (spec 2.12)."""
        config = self.memory_attention
        slots = config.stm_size
        main = _Attention(config.embed_dim, *config.attention_heads, config.head_dim)
        cost = main.cost(slots, tokens, slots * tokens)
        gates = 1 if config.use_gated_residual else 0
        if config.variant != "simple":
            context = _Attention(config.embed_dim, *config.context_attention_heads, config.head_dim)
            cost += context.cost(slots, slots, slots * slots)
            gates *= 2
            if config.variant == "self":
                gates = (1 if config.use_gated_residual else 0) + (1 if config.use_gate_for_self_attention else 0)
            elif config.variant != "interlayer":
                gates = 3 if config.use_gated_residual else 0
        return cost + gates * self._gate(slots)

    def _gate(self, slots: int) -> int:
        config = self.memory_attention
        cost = 0
        if config.residual_gate_type == "linear":
            cost += 2 * slots * (slots if config.residual_per_slot_gate else 1)
        if config.residual_gate_slot_status_type == "linear" and config.residual_gate_type != "static":
            cost += 2 * slots * config.embed_dim
        return cost

    def decode_step(
        self, rows: int, context: int, slots: int, experts_read: int, weight_bytes: int, state_bytes: int
    ) -> Work:
        """One more token for each of ``rows`` conversations.

        Args:
            rows: conversations, each with its own memory.
            context: tokens in front of the new one.
            slots: of short-term memory, whose keys and values are projected already.
            experts_read: different experts that the rows choose together, over all layers.
            weight_bytes: bytes of one weight.
            state_bytes: bytes of one value of the keys and values.
        """
        parts = _Transformer(self.decoder)
        state = self._memory_values(parts, slots) * state_bytes + parts.key_value_bytes(context, state_bytes)
        flops = self._tokens(parts, 1, context + 1, slots) + parts.head(1)
        return Work(parts.weights(experts_read) * weight_bytes + rows * state, rows * flops)

    def prefill(self, tokens: int, slots: int, experts_read: int, weight_bytes: int, state_bytes: int) -> Work:
        """Read a message up to the logits behind its last token; arguments as in :meth:`decode_step`."""
        parts = _Transformer(self.decoder)
        state = self._memory_values(parts, slots) * state_bytes
        flops = self._tokens(parts, tokens, causal_pairs(tokens), slots) + parts.head(1)
        return Work(parts.weights(experts_read) * weight_bytes + state, flops)

    @staticmethod
    def _memory_values(parts: _Transformer, slots: int) -> int:
        """Values in the projected keys and values of a memory."""
        read = parts.memory_read
        return parts.memory_layers * 2 * slots * read.key_value_heads * read.head_dim

    @staticmethod
    def _tokens(parts: _Transformer, new: int, pairs: int, slots: int) -> int:
        """As :meth:`_Transformer.tokens`, with a memory of another size than the configuration's."""
        more = slots - parts.config.stm_size
        return parts.tokens(new, pairs) + new * more * parts.memory_layers * parts.memory_read.per_pair

    def decode_weights(self, experts_read: int | None = None) -> int:
        """Weights of matrices that one step of decoding reads; by default of one row, whose experts all differ."""
        parts = _Transformer(self.decoder)
        return parts.weights(parts.expert_layers * parts.config.moe_top_k if experts_read is None else experts_read)

    def training_step(self, rows: int, tokens: int) -> int:
        """Forward and backward of the decoder; a product forward is two backward, the optimizer is left out."""
        parts = _Transformer(self.decoder)
        forward = rows * (parts.tokens(tokens, causal_pairs(tokens)) + parts.head(tokens))
        return 3 * (forward + self._projected_memory(parts))

    def memory_bytes(self, element_size: int) -> int:
        """Short-term memory, the same at every turn."""
        return self.decoder.num_layers * self.decoder.stm_size * self.decoder.embed_dim * element_size

    def bytes_per_step(self, context: int, element_size: int) -> int:
        """Weights, memory keys and values, and cache that one more token behind ``context`` of its message has to read."""
        parts = _Transformer(self.decoder)
        pairs = parts.memory_layers * parts.memory_read.cost(0, 0, parts.config.stm_size)
        weights = (parts.tokens(1, 0) - pairs + parts.head(1)) // 2
        read = parts.memory_read
        memory = parts.memory_layers * 2 * parts.config.stm_size * read.key_value_heads * read.head_dim
        return (weights + memory) * element_size + parts.key_value_bytes(context, element_size)
