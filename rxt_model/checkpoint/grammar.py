"""What an upstream checkpoint of a model holds: names, shapes, types and the size of the file, without its data.

The grammar is not written down a second time: it is the model's own state dict (build it on the meta device, it costs
nothing) plus the three things upstream stores and this package does not: rotary tables, the memory state, and the map
of shared tensors (spec sections 3.3 and 3.4). Published file sizes are reproduced to the byte, which is how the tests
know that names, shapes and counts are right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rxt_model.checkpoint.protocol import LoadableModule
from rxt_model.checkpoint.reader import DTYPES

__all__ = ["FileGrammar", "upstream_grammar"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Attention modules that hold the component's rotary table; the second attentions of memory attention rotate nothing.
_ROTATING = ("attention", "memory_cross_attention")


@dataclass(frozen=True)
class FileGrammar:
    """Names and shapes of a safetensors file in file order, its element type, and its map of shared tensors.

    Attributes:
        shapes: name to shape, in the order in which the format stores them.
        dtype: the type of every tensor.
        metadata: {name that was dropped: name under which the same tensor is stored}.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    metadata: dict[str, str]

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def header(self) -> bytes:
        """The JSON header, padded with spaces to a multiple of eight bytes, without the length in front of it."""
        content: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        offset = 0
        for name, shape in self.shapes.items():
            end = offset + math.prod(shape) * self.dtype.itemsize
            content[name] = {"dtype": _DTYPE_NAMES[self.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        return raw + b" " * (-len(raw) % 8)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file: header length, header, data."""
        return 8 + len(self.header()) + self.data_size


def upstream_grammar(
    model: LoadableModule, *, dtype: torch.dtype = torch.float32, encoder_memory: bool = False
) -> FileGrammar:
    """The file that upstream's `save_pretrained` would write for a model of this structure.

    Args:
        model: a component or a full model, on any device; only its structure is read. For the state of a published
            file build it on the meta device.
        dtype: the type the model was saved in; rotary tables and memory are cast with the model, so it is the type of
            every tensor.
        encoder_memory: whether the encoder holds a memory buffer although it does not read it, as encoders of eras
            E1 and E2 do. Encoders with memory cross-attention always hold one.

    Returns:
        A `FileGrammar`; a full model's is that of a file saved after its components were shared.

    Example:
        >>> from rxt_model.config import MLMHeadConfig
        >>> from rxt_model.heads import MLMHead
        >>> with torch.device("meta"):
        ...     head = MLMHead(MLMHeadConfig(embed_dim=2, vocab_size=3))
        >>> upstream_grammar(head).shapes["decoder.weight"]
        (3, 2)
    """
    stored: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, list[str]] = {}
    full = model.component in ("rxt_alpha", "rxt_beta")
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored[name] = tuple(tensor.shape)
        if full and name in ("decoder.model.embedding.weight", "encoder.model.embedding.weight"):
            aliases.setdefault("embedding", []).append(name)
    components = ("decoder", "encoder", "memory_attention") if full else (None,)
    for child in components:
        component = model if child is None else getattr(model, child)
        prefix = "" if child is None else f"{child}."
        for name, shape in _buffers(component, encoder_memory):
            stored[prefix + name] = shape
            # Upstream's sharing joins the memory of decoder and memory attention; an encoder's buffer stays its own.
            shared = name == "model.stm.memory" and child != "encoder"
            group = "memory" if shared else f"{prefix}{name.rsplit('.', 1)[-1]}"
            aliases.setdefault(group, []).append(prefix + name)
    metadata: dict[str, str] = {}
    for names in aliases.values():
        kept, *dropped = sorted(names)
        metadata.update(dict.fromkeys(dropped, kept))
    for name in metadata:
        del stored[name]
    return FileGrammar({name: stored[name] for name in sorted(stored)}, dtype, metadata)


def _buffers(component: LoadableModule, encoder_memory: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Rotary tables and memory of one component, under every name at which upstream registers them."""
    config = getattr(component, "config", None)
    if config is None or component.component == "mlm_head":
        return
    if not getattr(config, "use_nope", False):
        half = config.embed_dim // config.att_heads // 2
        for name in _rotating_modules(component):
            yield f"{name}.rope.inv_freq", (half,)
            yield f"{name}.rope.cache", (config.seq_len, half)
    if component.component == "stateless":
        return
    holds_memory = component.component in ("decoder", "memory_attention") or not config.skip_memory_cross_attention
    if holds_memory or encoder_memory:
        yield "model.stm.memory", (config.num_layers, 1, config.stm_size, config.embed_dim)


def _rotating_modules(component: nn.Module) -> Iterator[str]:
    for name, module in component.named_modules():
        leaf, parent = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2:]
        if hasattr(module, "q_proj") and (leaf in _ROTATING or parent[0] == "attention_layers"):
            yield name
