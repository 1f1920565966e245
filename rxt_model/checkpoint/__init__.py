"""Checkpoints: reading, checking, inferring, converting and writing model files (spec section 3)."""

from rxt_model.checkpoint.convert import convert_experts, convert_rope_layout
from rxt_model.checkpoint.errors import CheckpointError, CheckpointWarning
from rxt_model.checkpoint.grammar import FileGrammar, upstream_grammar
from rxt_model.checkpoint.hub import OwnsBuffers, PretrainedModel
from rxt_model.checkpoint.reader import SafetensorsFile, TensorEntry, read_json_object

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "FileGrammar",
    "OwnsBuffers",
    "PretrainedModel",
    "SafetensorsFile",
    "TensorEntry",
    "convert_experts",
    "convert_rope_layout",
    "read_json_object",
    "upstream_grammar",
]
