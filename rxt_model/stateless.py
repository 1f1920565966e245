"""A decoder-only language model of the same family without memory: what people would use instead of an RxT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rxt_model.cache import SelfAttentionCache
from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.checks import check_device, check_token_ids
from rxt_model.config import StatelessConfig
from rxt_model.decoder import CausalNetwork, HiddenStates
from rxt_model.layers.rotary import rotary_positions
from rxt_model.layers.transformer_layer import TransformerLayer


class StatelessNetwork(CausalNetwork):
    """Embedding, causal layers without memory reads, head; ``model.`` in checkpoints."""

    head: nn.Linear

    def __init__(self, config: StatelessConfig) -> None:
        super().__init__()
        layer_config = self.config = config.transformer_config()
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(
            TransformerLayer(
                layer_config,
                reads_memory=False,
                use_moe=config.use_moe_ff,
                feed_forward_dim=config.ff_dim,
                feed_forward_norm="norm2",
            )
            for _ in range(config.num_layers)
        )
        self.head_norm = None
        self.head = nn.Linear(config.embed_dim, config.vocab_size)
        self.rotary = rotary_positions(layer_config)

    def layers_in_order(self) -> Iterator[tuple[TransformerLayer, int | None]]:
        for layer in self.layers:
            yield cast(TransformerLayer, layer), None


class SparseQueryTransformer(PretrainedModel):
    """Decoder-only transformer with sparse query attention and, if configured, experts (spec section 4, SQAT).

    Args:
        config: a :class:`StatelessConfig` or a mapping of its fields.

    Example:
        >>> model = SparseQueryTransformer(StatelessConfig(num_layers=1, vocab_size=50, embed_dim=32, ff_dim=64,
        ...     att_heads=4, att_groups=2, att_num_query_groups=2))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 50])
    """

    component: ClassVar[Component] = "stateless"

    def __init__(self, config: StatelessConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = StatelessConfig.of(config)
        self.model = StatelessNetwork(self.config)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], *, tokenizer: Any = None) -> SparseQueryTransformer:
        return cls(config)

    def _config(self) -> dict[str, Any]:
        return self.config.to_dict()

    def new_cache(self, batch_size: int, *, limit: int | None = None, capacity: int = 64) -> SelfAttentionCache:
        """An empty key/value cache for ``batch_size`` conversations; it may be kept between turns."""
        device: torch.device = self.model.embedding.weight.device
        return SelfAttentionCache(self.model.depth, batch_size, capacity=capacity, limit=limit, device=device)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> HiddenStates:
        """The residual stream (B, T, D) in front of the head.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool, True at real tokens.
            cache: keys and values of the tokens in front of these; the caller calls ``cache.advance`` afterwards.
        """
        check_token_ids(input_ids, attention_mask, self.config.vocab_size)
        check_device("input_ids", input_ids, self.model.embedding.weight)
        check_device("attention_mask", attention_mask, self.model.embedding.weight)
        if cache is not None:
            cache.check(self.model.depth, input_ids.shape[0], attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        return self.model.hidden_states(input_ids, attention_mask=mask, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary head: (..., D) to (..., V)."""
        return self.model.logits(hidden)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); arguments as in :meth:`hidden_states`."""
        return self.logits(self.hidden_states(input_ids, attention_mask, cache).hidden)
