"""The decoder: answers one message while reading short-term memory (spec 1 and 2.6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from rxt_model.cache import MemoryKeyValue, SelfAttentionCache
from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.checks import check_device, check_token_ids
from rxt_model.config import TransformerConfig
from rxt_model.layers.norms import RMSNorm
from rxt_model.layers.rotary import RotaryPositions, rotary_positions
from rxt_model.layers.transformer_layer import TransformerLayer
from rxt_model.memory import ReadByUpdates, ShortTermMemory


class HiddenStates(NamedTuple):
    """What the layers of a component return.

    ``hidden`` is (B, T, D) in front of the vocabulary head; ``load_balance_loss`` is a scalar, the mean over every
    mixture-of-experts layer (spec 7, defect 40), or None for a dense model. ``layer_losses`` of a causal model are those
    of its layers in the order in which they run, None for a dense one.
    """

    hidden: Tensor
    load_balance_loss: Tensor | None
    layer_losses: tuple[Tensor | None, ...] = ()


def mean_of_losses(losses: Sequence[Tensor | None]) -> Tensor | None:
    """Mean of the load-balance losses that exist."""
    existing = [loss for loss in losses if loss is not None]
    return torch.stack(existing).mean() if existing else None


class CausalNetwork(nn.Module):
    """What every causal model of the family does between token ids and logits.

    A subclass owns what is annotated here, and says in which order its layers run.
    """

    config: TransformerConfig
    """What the layers were built from."""
    embedding: nn.Embedding
    rotary: RotaryPositions | None
    head_norm: nn.Module | None
    head: nn.Linear | None
    """None where the embedding is the head too."""

    def layers_in_order(self) -> Iterator[tuple[TransformerLayer, int | None]]:
        """Every layer, with the index of the memory layer it reads, or None."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Layers with self-attention, stateless ones included."""
        return sum(1 for _ in self.layers_in_order())

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        memory: Sequence[MemoryKeyValue] = (),
        cache: SelfAttentionCache | None = None,
    ) -> HiddenStates:
        """Token ids (B, T) to the residual stream (B, T, D); the caller advances the cache."""
        x = self.embedding(input_ids)
        tokens = input_ids.shape[1]
        if cache is None:
            positions = torch.arange(tokens, device=input_ids.device)
        else:
            cache.begin(tokens)
            positions = cache.positions(tokens)
        angles = None if self.rotary is None else self.rotary.angles(positions, x.dtype)
        losses: list[Tensor | None] = []
        for depth, (layer, memory_index) in enumerate(self.layers_in_order()):
            x, loss = layer(
                x,
                angles,
                causal=True,
                attention_mask=attention_mask,
                cache=None if cache is None else cache.layers[depth],
                memory=None if memory_index is None else memory[memory_index],
            )
            losses.append(loss)
        return HiddenStates(x, mean_of_losses(losses), tuple(losses))

    def logits(self, hidden: Tensor) -> Tensor:
        """Head norm, if any, and head: (..., D) to (..., V)."""
        if self.head_norm is not None:
            hidden = self.head_norm(hidden)
        logits: Tensor = nn.functional.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return logits


class CausalModel(Protocol):
    """A module around a causal network: a decoder, a language model."""

    @property
    def model(self) -> CausalNetwork:
        """The network."""


class DecoderNetwork(CausalNetwork):
    """Embedding, stateless layers, stateful layers, final stateless layers, head; ``model.`` in checkpoints."""

    head: nn.Linear

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not config.reads_memory:
            raise ValueError(
                "reads_memory is False; it is an encoder's switch. A decoder that reads no memory has "
                "skip_memory_cross_attention=True."
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.stm = ShortTermMemory(config.num_layers, config.stm_size, config.embed_dim)
        self.stateless_layers = self._stateless(config.stateless_layers_config)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                reads_memory=not config.skip_memory_cross_attention,
                use_moe=config.use_moe,
                feed_forward_dim=config.ff_dim,
            )
            for _ in range(config.num_layers)
        )
        self.final_stateless_layers = self._stateless(config.final_stateless_layers_config)
        self.head_norm = None
        if config.use_head_norm:
            is_rms = config.head_norm_type == "rms_norm"
            self.head_norm = RMSNorm(config.embed_dim) if is_rms else nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.vocab_size)
        self.rotary = rotary_positions(config)

    def _stateless(self, kinds: tuple[str, ...] | None) -> nn.ModuleList | None:
        if not kinds:
            return None
        return nn.ModuleList(
            TransformerLayer(
                self.config,
                reads_memory=False,
                use_moe=kind == "moe",
                feed_forward_dim=self.config.dense_layer_dim,
            )
            for kind in kinds
        )

    def layers_in_order(self) -> Iterator[tuple[TransformerLayer, int | None]]:
        for layer in self.stateless_layers or ():
            yield cast(TransformerLayer, layer), None
        for index, layer in enumerate(self.layers):
            layer = cast(TransformerLayer, layer)
            yield layer, index if layer.reads_memory else None
        for layer in self.final_stateless_layers or ():
            yield cast(TransformerLayer, layer), None

    def project_memory(self, memory: Tensor) -> list[MemoryKeyValue]:
        """Keys and values of every stateful layer for a memory (L, 1 or B, S, D); valid until the memory changes."""
        return [layer.project_memory(memory[index]) for layer, index in self.layers_in_order() if index is not None]


class RxTDecoder(ReadByUpdates, PretrainedModel):
    """Decoder of a Reactive Transformer.

    Args:
        config: a :class:`TransformerConfig` or a mapping of its fields.

    Example:
        >>> decoder = RxTDecoder(TransformerConfig(num_layers=1, vocab_size=50, embed_dim=32, ff_dim=64, att_heads=4,
        ...     att_groups=2, att_query_groups=2, stm_size=8))
        >>> decoder(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 50])
    """

    component: ClassVar[Component] = "decoder"

    def __init__(self, config: TransformerConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = TransformerConfig.of(config)
        self.model = DecoderNetwork(self.config)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], *, tokenizer: Any = None) -> RxTDecoder:
        return cls(config)

    def _config(self) -> dict[str, Any]:
        return self.config.to_dict()

    @property
    def stm(self) -> ShortTermMemory:
        """The short-term memory this decoder reads when none is given."""
        return self.model.stm

    def _finish_update(self) -> None:
        self.model.stm.finish_update()

    def new_cache(self, batch_size: int, *, limit: int | None = None, capacity: int = 64) -> SelfAttentionCache:
        """An empty key/value cache for ``batch_size`` messages."""
        return SelfAttentionCache(
            self.model.depth, batch_size, capacity=capacity, limit=limit, device=self.model.embedding.weight.device
        )

    def project_memory(self, memory: Tensor | None = None) -> list[MemoryKeyValue]:
        """Keys and values of every stateful layer, to be computed once per memory update and used for a whole answer.

        Args:
            memory: (L, 1 or B, S, D); None takes the decoder's own short-term memory.
        """
        return self.model.project_memory(self._checked_memory(memory))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Tensor | Sequence[MemoryKeyValue] | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> HiddenStates:
        """The residual stream in front of the head norm and head.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool, True at real tokens; None means that all are real.
            memory: (L, 1 or B, S, D), or what :meth:`project_memory` made of it; None takes the own short-term memory.
            cache: keys and values of the tokens in front of these; the caller calls ``cache.advance`` afterwards. With
                an empty cache the mask must be right-padded, later there must be none.

        Raises:
            TypeError, ValueError: ids, mask, memory or cache that do not fit, named in a sentence.
        """
        weights = self.model.embedding.weight
        if torch.is_grad_enabled():
            self._finish_update()  # which reads weights that a train step changes
        check_token_ids(input_ids, attention_mask, self.config.vocab_size)
        check_device("input_ids", input_ids, weights)
        check_device("attention_mask", attention_mask, weights)
        batch = input_ids.shape[0]
        if cache is not None:
            cache.check(self.model.depth, batch, attention_mask)
        if memory is None or isinstance(memory, Tensor):
            memory = self.model.project_memory(self._checked_memory(memory, batch))
        elif len(memory) != sum(index is not None for _, index in self.model.layers_in_order()):
            raise ValueError(f"memory holds {len(memory)} projected layers; give what project_memory returned.")
        mask = None if attention_mask is None else attention_mask.bool()
        return self.model.hidden_states(input_ids, attention_mask=mask, memory=memory, cache=cache)

    def _checked_memory(self, memory: Tensor | None, batch: int | None = None) -> Tensor:
        memory = self.model.stm.memory if memory is None else memory
        if not isinstance(memory, Tensor) or not memory.is_floating_point():
            kind = memory.dtype if isinstance(memory, Tensor) else type(memory).__name__
            raise TypeError(
                f"memory is of type {kind}; it must be a floating-point tensor (layers, batch, slots, width)."
            )
        config = self.config
        layers, rows, *rest = memory.shape if memory.dim() == 4 else (0, 0)
        if layers != config.num_layers or rest[1:] != [config.embed_dim] or rest[0] < 1 or rows < 1:
            raise ValueError(
                f"memory has shape {tuple(memory.shape)}; it must be ({config.num_layers}, batch, slots, "
                f"{config.embed_dim})."
            )
        if batch is not None and rows not in (1, batch):
            raise ValueError(f"memory has {rows} rows and input_ids {batch}; it must have as many, or 1 for all.")
        check_device("memory", memory, self.model.embedding.weight)
        return memory

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Tensor | Sequence[MemoryKeyValue] | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); arguments as in :meth:`hidden_states`."""
        return self.logits(self.hidden_states(input_ids, attention_mask, memory, cache).hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary head on hidden states: (..., D) to (..., V); prefill asks for the last position only."""
        return self.model.logits(hidden)
