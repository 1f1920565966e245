"""Upstream's decoder-only language model, with everything that it can have and `SparseQueryTransformer` has not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rxt_model.cache import SelfAttentionCache
from rxt_model.checkpoint.inference import ComponentFile
from rxt_model.checks import check_token_ids
from rxt_model.config import TransformerConfig
from rxt_model.decoder import CausalNetwork, HiddenStates
from rxt_model.interaction.plain_weights import known_to_engines
from rxt_model.layers.norms import RMSNorm
from rxt_model.layers.rotary import rotary_positions
from rxt_model.layers.transformer_layer import TransformerLayer

__all__ = ["LanguageModel", "LanguageModelConfig", "language_model_config"]

#: Fields of layers, by the names they have in a decoder's configuration and in a language model's.
_RENAMED: Mapping[str, str] = {
    "self_att_type": "att_type",
    "att_query_groups": "att_num_query_groups",
    "use_moe": "use_moe_ff",
    "num_experts": "ff_num_experts",
    "moe_top_k": "ff_moe_top_k",
    "num_shared_experts": "ff_num_shared_experts",
    "dense_layer_dim": "dense_ff_dim",
}
_SAME_NAME = (
    "num_layers", "vocab_size", "embed_dim", "ff_dim", "att_heads", "seq_len", "att_groups", "use_flash_attention",
    "use_gated", "ff_activation", "ff_dropout", "att_dropout", "use_rms_norm", "use_vectorized_moe", "moe_bias_mode",
    "moe_shared_experts_bias_mode", "moe_use_weighted_shared_experts", "router_amp", "router_dtype", "use_gated_attention",
    "gated_attention_activation", "use_attention_output_bias", "use_head_norm", "head_norm_type", "rope_base",
)  # fmt: skip


@dataclass(frozen=True)
class LanguageModelConfig:
    """The layers, described as a decoder's, and what a decoder does not have."""

    layers: TransformerConfig
    initial_dense_layers: int
    tied: bool


def language_model_config(file: ComponentFile, own: Mapping[str, Any]) -> LanguageModelConfig:
    """The configuration of an inferred language model.

    Args:
        file: after :func:`rxt_model.checkpoint.inference.infer_component`.
        own: this package's own fields.

    Raises:
        ValueError: values that cannot work together.
    """
    known = {**file.config, **file.fields}
    renamed = {name: known[upstream] for name, upstream in _RENAMED.items() if known.get(upstream) is not None}
    fields = {name: known[name] for name in _SAME_NAME if known.get(name) is not None}
    layers = TransformerConfig.from_dict(
        {**fields, **renamed, "cross_att_type": "mha", "skip_memory_cross_attention": True, **own}
    )
    return LanguageModelConfig(
        layers, known.get("num_initial_dense_layers") or 0, bool(known.get("tie_embeddings", False))
    )


@known_to_engines
class LanguageNetwork(CausalNetwork):
    """Embedding, layers, head norm if any, head; ``model.`` in checkpoints."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        layers = self.config = config.layers
        self.embedding = nn.Embedding(layers.vocab_size, layers.embed_dim)
        self.layers = nn.ModuleList(
            TransformerLayer(
                layers,
                reads_memory=False,
                use_moe=layers.use_moe and index >= config.initial_dense_layers,
                feed_forward_dim=layers.dense_layer_dim if index < config.initial_dense_layers else layers.ff_dim,
                feed_forward_norm="norm2",
            )
            for index in range(layers.num_layers)
        )
        self.head_norm = None
        if layers.use_head_norm:
            is_rms = layers.head_norm_type == "rms_norm"
            self.head_norm = RMSNorm(layers.embed_dim) if is_rms else nn.LayerNorm(layers.embed_dim)
        self.head = None if config.tied else nn.Linear(layers.embed_dim, layers.vocab_size)
        self.rotary = rotary_positions(layers)

    def layers_in_order(self) -> Iterator[tuple[TransformerLayer, int | None]]:
        for layer in self.layers:
            yield cast(TransformerLayer, layer), None


@known_to_engines
class LanguageModel(nn.Module):
    """What is computed in the place of upstream's decoder-only language model."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config.layers
        self.model = LanguageNetwork(config)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: SelfAttentionCache | None = None
    ) -> HiddenStates:
        """The residual stream (B, T, D) in front of head norm and head; arguments as in `SparseQueryTransformer`."""
        check_token_ids(input_ids, attention_mask, self.config.vocab_size)
        return self.model.hidden_states(input_ids, attention_mask=attention_mask, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary head: (..., D) to (..., V)."""
        return self.model.logits(hidden)
