"""The encoder: turns a finished interaction into one state per layer, for memory attention to write (spec 1, step 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.checks import check_device, check_token_ids
from rxt_model.config import TransformerConfig
from rxt_model.decoder import HiddenStates, mean_of_losses
from rxt_model.layers.rotary import rotary_positions
from rxt_model.layers.transformer_layer import TransformerLayer
from rxt_model.memory import ReadByUpdates, ShortTermMemory


class EncoderNetwork(nn.Module):
    """Embedding and bidirectional layers; ``model.`` in checkpoints.

    The base encoders of the first era carried memory cross-attention (``skip_memory_cross_attention=False``); whether it
    is computed is ``reads_memory``, because later upstream versions kept its weights and skipped it (spec 3.2).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        for name in ("stateless_layers_config", "final_stateless_layers_config", "use_head_norm"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)!r} in an encoder's configuration; only decoders have stateless layers "
                    "and a vocabulary head. Leave it out."
                )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.has_cross_attention = not config.skip_memory_cross_attention
        self.stm = (
            ShortTermMemory(config.num_layers, config.stm_size, config.embed_dim) if self.has_cross_attention else None
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                reads_memory=self.has_cross_attention,
                use_moe=config.use_moe,
                feed_forward_dim=config.ff_dim,
            )
            for _ in range(config.num_layers)
        )
        self.rotary = rotary_positions(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> HiddenStates:
        """The residual stream after every layer, (L, B, T, D), and the load-balance loss of layers with experts."""
        x = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = None if self.rotary is None else self.rotary.angles(positions, x.dtype)
        states, losses = [], []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, TransformerLayer)
            memory = None
            if self.stm is not None and self.config.reads_memory:
                memory = layer.project_memory(self.stm.memory[index])
            x, loss = layer(x, angles, causal=False, attention_mask=attention_mask, memory=memory)
            states.append(x)
            losses.append(loss)
        return HiddenStates(torch.stack(states), mean_of_losses(losses))


class RxTEncoder(ReadByUpdates, PretrainedModel):
    """Encoder of a Reactive Transformer.

    Args:
        config: a :class:`TransformerConfig` or a mapping of its fields; plain encoders set
            ``skip_memory_cross_attention=True``.

    Example:
        >>> encoder = RxTEncoder(TransformerConfig(num_layers=2, vocab_size=50, embed_dim=32, ff_dim=64, att_heads=4,
        ...     att_groups=2, att_query_groups=2, skip_memory_cross_attention=True))
        >>> encoder(torch.tensor([[1, 2, 3]])).shape
        torch.Size([2, 1, 3, 32])
    """

    component: ClassVar[Component] = "encoder"

    def __init__(self, config: TransformerConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = TransformerConfig.of(config)
        self.model = EncoderNetwork(self.config)
        self._memory: tuple[ShortTermMemory, ...] = ()

    def writes_to(self, memory: ShortTermMemory) -> None:
        """Name the memory whose updates use this encoder, which waits for them before its weights are changed."""
        self._memory = (memory,)  # in a tuple, so that it does not become a part of this module

    def _finish_update(self) -> None:
        for memory in self._memory:
            memory.finish_update()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": ()}  # a copy of an encoder holds no conversation

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], *, tokenizer: Any = None) -> RxTEncoder:
        return cls(config)

    def _config(self) -> dict[str, Any]:
        return self.config.to_dict()

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> HiddenStates:
        """Encode an interaction.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool, True at real tokens.

        Returns:
            ``hidden`` (L, B, T, D): the residual stream after every layer, without a final norm; ``load_balance_loss``, a
            scalar, or None for an encoder without experts.

        Raises:
            TypeError, ValueError: ids or mask that do not fit, named in a sentence.
        """
        check_token_ids(input_ids, attention_mask, self.config.vocab_size)
        check_device("input_ids", input_ids, self.model.embedding.weight)
        check_device("attention_mask", attention_mask, self.model.embedding.weight)
        states: HiddenStates = self.model(input_ids, None if attention_mask is None else attention_mask.bool())
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The states (L, B, T, D) of every layer; arguments as in :meth:`hidden_states`."""
        return self.hidden_states(input_ids, attention_mask).hidden
