"""What a module must offer to be loaded and saved.

A model becomes loadable by subclassing `rxt_model.checkpoint.PretrainedModel` and providing three things:

* `component` (class attribute): which key grammar of spec section 3.3 its state dict follows.
* `_from_config(config, tokenizer=...)`: builds the module from the dictionary that `_config()` returns. Loading calls
  it under `torch.device("meta")`, so it must only create modules, never compute with tensor values.
* `_config()`: the JSON-able constructor arguments, complete (no argument left out because it equals a default).

Modules anywhere in the tree that own **non-persistent buffers** (short-term memory) implement
`reset_buffers(device, dtype)`, which creates them anew on a real device: loading calls it once per module after the
weights have been assigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

__all__ = ["Component", "LoadableModule", "OwnsBuffers"]

Component = Literal["decoder", "encoder", "memory_attention", "mlm_head", "stateless", "rxt_alpha", "rxt_beta"]

Model = TypeVar("Model", bound="LoadableModule")


@runtime_checkable
class OwnsBuffers(Protocol):
    """A module with non-persistent buffers, which a state dict cannot restore."""

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Creates the module's own non-persistent buffers anew on `device`.

        `dtype` is the floating point type of the loaded weights; buffers with a fixed type ignore it. Children are not
        touched: each of them is asked itself.
        """


class LoadableModule(nn.Module):
    """The part of a model class that its author writes; `PretrainedModel` adds loading and saving."""

    component: ClassVar[Component]

    @classmethod
    def _from_config(cls: type[Model], config: Mapping[str, Any], *, tokenizer: Any = None) -> Model:
        """Builds the module from what `_config()` returned.

        Components get their own field dictionary (the fields of `rxt_model.config`, upstream names plus this
        package's own). `rxt_alpha` and `rxt_beta` get the dictionary of spec section 3.1: `decoder_config`,
        `encoder_config`, `memory_attention_config`, `tokenizer_config`, `memory_attention_variant` (and
        `system_prompt_title` for Beta), each component dictionary complete. `tokenizer` is only given to full models.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement _from_config.")

    def _config(self) -> dict[str, Any]:
        """The complete, JSON-able dictionary from which `_from_config` rebuilds this module."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _config.")

    def _after_load(self) -> None:
        """Called once when every weight and buffer is in place; full models share their components again here."""
