"""A conversation in a file: memory, turn count and the fingerprint of the model it belongs to.

One safetensors file with the tensor ``memory`` (L, B, S, D) and string metadata. Nothing in it can run code, and a state
is refused by every model but the one that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rxt_model.files import atomic_path

FORMAT = "rxt-conversation-state"
FORMAT_VERSION = 1
_SAMPLES_PER_TENSOR = 64
_COMPONENTS = ("decoder", "encoder", "memory_attention")
#: Fields that no shape of a weight shows. How positions are rounded and pads are treated is left out: a memory that was
#: written with the one can be read with the other.
_BEHAVIOUR = (
    "att_heads", "rope_base", "rope_layout", "use_nope", "ff_activation", "use_gated", "moe_top_k",
    "moe_use_weighted_shared_experts", "gated_attention_activation", "reads_memory", "variant", "num_groups", "norm_type",
    "disable_residual", "use_tanh_residual_gate",
)  # fmt: skip


class StateError(ValueError):
    """A saved conversation that cannot be used; the message says which file and why."""


@dataclass(frozen=True)
class ConversationState:
    """What a conversation is between two messages.

    Args:
        memory: (L, B, S, D) floating point.
        turns: interactions written into the memory so far.
        fingerprint: :func:`model_fingerprint` of the model.
        notes: free text kept with the state, for instance a transcript.
    """

    memory: Tensor
    turns: int
    fingerprint: str
    notes: Mapping[str, str] = field(default_factory=dict)


def model_fingerprint(model: nn.Module) -> str:
    """A hash over all weights and what is computed with them, equal on another device and for a bfloat16 copy.

    Names and shapes are hashed, and the fields of the configuration that change a result although they change no weight.

    Values are sampled (64 per tensor and more, after rounding to bfloat16), so that fingerprinting a large model takes
    milliseconds. A float16 copy is another model: its values were rounded in another way.
    """
    digest = hashlib.sha256()
    for component in _COMPONENTS:
        config = getattr(getattr(model, component, None), "config", None)
        behaviour = {name: getattr(config, name) for name in _BEHAVIOUR if hasattr(config, name)}
        digest.update(json.dumps([component, behaviour]).encode())
    for name, parameter in model.named_parameters(remove_duplicate=True):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        sample = flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def save_state(state: ConversationState, path: str | os.PathLike[str]) -> Path:
    """Write a state to one safetensors file, whole or not at all.

    Raises:
        TypeError: notes that are not strings.
        OSError: the directory does not exist or cannot be written.
    """
    for key, value in state.notes.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"notes holds {key!r}: {value!r}; keys and values must be strings.")
    memory = state.memory.detach().to("cpu").contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint": state.fingerprint,
        "turns": str(state.turns),
        "notes": json.dumps(dict(state.notes)),
        "checksum": _checksum(memory),
    }
    with atomic_path(path) as temporary:
        save_file({"memory": memory}, temporary, metadata)
    return Path(path)


def _checksum(memory: Tensor) -> str:
    """CRC-32 of the bytes: safetensors itself notices a file that is too short, not one whose numbers have changed."""
    return f"{zlib.crc32(memory.reshape(-1).view(torch.uint8).numpy().data):08x}"


def load_state(path: str | os.PathLike[str]) -> ConversationState:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        StateError: the file is damaged, of another kind, or of a newer format.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no saved conversation at {file}; give the path of a file that was saved.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            memory = opened.get_tensor("memory") if names == ["memory"] else None
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(
            f"{file} is damaged or not a safetensors file ({error}); save the conversation again."
        ) from None
    if metadata.get("format") != FORMAT:
        raise StateError(f"{file} is a safetensors file but not a saved conversation; it holds {names[:3]}.")
    try:
        version = int(metadata["format_version"])
        if version > FORMAT_VERSION:  # before anything that a newer format may have changed
            raise StateError(
                f"{file} has format version {version}; this release reads up to {FORMAT_VERSION}. Update rxt-kernels."
            )
        turns, notes = int(metadata["turns"]), json.loads(metadata["notes"])
        fingerprint, checksum = metadata["fingerprint"], metadata["checksum"]
    except StateError:
        raise
    except (KeyError, ValueError) as error:
        raise StateError(f"{file} has damaged metadata ({error}); save the conversation again.") from None
    if turns < 0 or not isinstance(notes, dict):
        raise StateError(f"{file} has damaged metadata (turns {turns}); save the conversation again.")
    if memory is None or not memory.is_floating_point() or _checksum(memory) != checksum:
        raise StateError(
            f"{file} holds no memory, or one that was changed after it was saved; save the conversation again."
        )
    return ConversationState(memory, turns, fingerprint, {str(key): str(value) for key, value in notes.items()})
