"""Reactive Transformer models: components, full systems, tokenizer, checkpoints, presets and training."""

from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, StatelessConfig, TokenIds, TransformerConfig
from rxt_model.decoder import RxTDecoder
from rxt_model.encoder import RxTEncoder
from rxt_model.heads import MLMHead
from rxt_model.memory_attention import RxTMemoryAttention
from rxt_model.models import RxTAlpha, RxTBeta
from rxt_model.stateless import SparseQueryTransformer
from rxt_model.tokenizer import Tokenizer, load_tokenizer_from_hf_hub, train_tokenizer

__all__ = [
    "MLMHead",
    "MLMHeadConfig",
    "MemoryAttentionConfig",
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
