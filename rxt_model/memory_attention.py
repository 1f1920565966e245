"""Memory attention as a model of its own that can be loaded and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.checks import check_attention_mask
from rxt_model.config import MemoryAttentionConfig
from rxt_model.memory import MemoryAttentionNetwork, ReadByUpdates, ShortTermMemory


class RxTMemoryAttention(ReadByUpdates, PretrainedModel):
    """The network that writes an encoded interaction into short-term memory, in any of its variants (spec 2.12).

    Args:
        config: a :class:`MemoryAttentionConfig` or a mapping of its fields; ``config.variant`` selects the variant.

    Example:
        >>> import torch
        >>> network = RxTMemoryAttention(MemoryAttentionConfig(num_layers=2, embed_dim=32, att_heads=4, att_groups=2,
        ...     att_query_groups=2, stm_size=8))
        >>> network(torch.randn(2, 1, 5, 32)).shape
        torch.Size([2, 1, 8, 32])
    """

    component: ClassVar[Component] = "memory_attention"

    def __init__(self, config: MemoryAttentionConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = MemoryAttentionConfig.of(config)
        self.model = MemoryAttentionNetwork(self.config)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], *, tokenizer: Any = None) -> RxTMemoryAttention:
        return cls(config)

    def _config(self) -> dict[str, Any]:
        return self.config.to_dict()

    @property
    def stm(self) -> ShortTermMemory:
        """The short-term memory this network updates."""
        return self.model.stm

    def _finish_update(self) -> None:
        self.model.stm.finish_update()

    def forward(self, encoded: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """The memory after an interaction; nothing is stored (see :meth:`ShortTermMemory.load`).

        Args:
            encoded: states of every encoder layer, (L, B, T, D).
            attention_mask: (B, T) bool, True at real tokens; a row without any keeps its memory.
            memory: (L, 1 or B, S, D); None takes this network's own short-term memory.

        Returns:
            (L, B, S, D).

        Raises:
            TypeError, ValueError: arguments that do not fit, named in a sentence.
        """
        if not isinstance(encoded, Tensor) or not encoded.is_floating_point():
            kind = encoded.dtype if isinstance(encoded, Tensor) else type(encoded).__name__
            raise TypeError(
                f"encoded is of type {kind}; it must be a floating-point tensor (layers, batch, time, width)."
            )
        layers, width = self.config.num_layers, self.config.embed_dim
        if encoded.dim() != 4 or (encoded.shape[0], encoded.shape[3]) != (layers, width) or 0 in encoded.shape:
            raise ValueError(
                f"encoded has shape {tuple(encoded.shape)}; it must be ({layers}, batch, time, {width}) with at least one "
                "row and one token."
            )
        if attention_mask is not None:
            check_attention_mask(attention_mask, "encoded", tuple(encoded.shape[1:3]))
        updated: Tensor = self.model(encoded, None if attention_mask is None else attention_mask.bool(), memory)
        return updated
