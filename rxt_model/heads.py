"""The masked-language-modelling head used while an encoder is pre-trained (spec 2.13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rxt_model.checkpoint.hub import Component, PretrainedModel
from rxt_model.config import MLMHeadConfig


class MLMHead(PretrainedModel):
    """``decoder(layer_norm(gelu(dense(x))))``: (..., D) to vocabulary logits (..., V).

    Args:
        config: an :class:`MLMHeadConfig` or a mapping of its fields.

    Example:
        >>> import torch
        >>> MLMHead(MLMHeadConfig(embed_dim=16, vocab_size=50))(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 50])
    """

    component: ClassVar[Component] = "mlm_head"

    def __init__(self, config: MLMHeadConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = MLMHeadConfig.of(config)
        self.dense = nn.Linear(self.config.embed_dim, self.config.embed_dim)
        self.layer_norm = nn.LayerNorm(self.config.embed_dim)
        self.decoder = nn.Linear(self.config.embed_dim, self.config.vocab_size)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], *, tokenizer: Any = None) -> MLMHead:
        return cls(config)

    def _config(self) -> dict[str, Any]:
        return self.config.to_dict()

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the last encoder state."""
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            kind = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
            raise TypeError(f"hidden is of type {kind}; it must be a floating-point tensor (..., embed_dim).")
        if not hidden.dim() or hidden.shape[-1] != self.config.embed_dim:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}; its last dimension must be embed_dim = {self.config.embed_dim}."
            )
        logits: Tensor = self.decoder(self.layer_norm(F.gelu(self.dense(hidden))))
        return logits
