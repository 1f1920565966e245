"""Text and token ids: byte-level BPE, training it, decoding it as it is generated (spec 2.15)."""

from .adapters import as_tokenizer, load_tokenizer_from_hf_hub
from .special_tokens import DEFAULT_SPECIAL_TOKENS, SpecialTokens
from .streaming import BatchTokenStream, TokenStream
from .tokenizer import Tokenizer
from .trainer import train_tokenizer

__all__ = [
    "DEFAULT_SPECIAL_TOKENS",
    "BatchTokenStream",
    "SpecialTokens",
    "TokenStream",
    "Tokenizer",
    "as_tokenizer",
    "load_tokenizer_from_hf_hub",
    "train_tokenizer",
]
