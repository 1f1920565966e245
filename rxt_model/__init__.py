"""Reactive Transformer models: components, full systems, tokenizer, checkpoints, presets and training.

Names are imported when they are first used, so that ``rxt --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, StatelessConfig, TokenIds, TransformerConfig
    from rxt_model.decoder import RxTDecoder
    from rxt_model.encoder import RxTEncoder
    from rxt_model.heads import MLMHead
    from rxt_model.memory import MemoryUpdateError
    from rxt_model.memory_attention import RxTMemoryAttention
    from rxt_model.models import RxTAlpha, RxTBeta
    from rxt_model.stateless import SparseQueryTransformer
    from rxt_model.tokenizer import Tokenizer, load_tokenizer_from_hf_hub, train_tokenizer

__all__ = [
    "MLMHead",
    "MLMHeadConfig",
    "MemoryAttentionConfig",
    "MemoryUpdateError",
    "RxTAlpha",
    "RxTBeta",
    "RxTDecoder",
    "RxTEncoder",
    "RxTMemoryAttention",
    "SparseQueryTransformer",
    "StatelessConfig",
    "TokenIds",
    "Tokenizer",
    "TransformerConfig",
    "load_tokenizer_from_hf_hub",
    "train_tokenizer",
]

_MODULES = {
    "MLMHead": "heads",
    "MLMHeadConfig": "config",
    "MemoryAttentionConfig": "config",
    "MemoryUpdateError": "memory",
    "RxTAlpha": "models",
    "RxTBeta": "models",
    "RxTDecoder": "decoder",
    "RxTEncoder": "encoder",
    "RxTMemoryAttention": "memory_attention",
    "SparseQueryTransformer": "stateless",
    "StatelessConfig": "config",
    "TokenIds": "config",
    "Tokenizer": "tokenizer",
    "TransformerConfig": "config",
    "load_tokenizer_from_hf_hub": "tokenizer",
    "train_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
