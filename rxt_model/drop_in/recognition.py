"""Finding the components of the upstream library inside of any module, by what can be seen from outside.

Upstream is never imported here: its classes are known by name, its configurations by the attribute that the hub's mixin
keeps them in, and everything else by the names and shapes of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["KINDS", "PACKAGE", "VARIANTS", "Component", "components", "is_upstream"]

PACKAGE = "rxlm"

#: The memory attention variant that a network of this class computes, whatever its configuration says (spec 7, defect 1).
VARIANTS: Mapping[str, str] = {
    "StmMemoryAttention": "simple",
    "SelfStmMemoryAttention": "self",
    "InterlayerStmMemoryAttention": "interlayer",
    "SelfInterlayerStmMemoryAttention": "gated-self-interlayer",
    "GroupedSelfInterlayerStmMemoryAttention": "grouped-self-interlayer",
}

#: The kind of component that a network of this class is (`rxt_model.checkpoint.Component`).
KINDS: Mapping[str, str] = {
    "ReactiveTransformerDecoder": "decoder",
    "ReactiveTransformerEncoder": "encoder",
    **dict.fromkeys(VARIANTS, "memory_attention"),
    "ClassicTransformerDecoder": "stateless",
    "MLMHead": "mlm_head",
}


@dataclass(frozen=True)
class Component:
    """One upstream component.

    Attributes:
        path: of the network in the model; networks of components are called ``model``, a head is its own network.
        kind: a value of :data:`KINDS`.
        network: the module whose forward pass is replaced.
        config: what the component was built with, or None where the model does not tell.
    """

    path: str
    kind: str
    network: nn.Module
    config: Mapping[str, Any] | None

    @property
    def upstream_class(self) -> type[nn.Module]:
        """The class of upstream's that the network is, or is derived from."""
        found = _upstream_base(self.network)
        assert found is not None
        return found

    @property
    def key_prefix(self) -> str:
        """How names of its tensors begin in the checkpoint of a single component."""
        return "" if self.kind == "mlm_head" else "model."


def is_upstream(module: nn.Module) -> bool:
    """Whether a module's class, or one that it is derived from, is upstream's."""
    return any(_is_of_package(base) for base in type(module).__mro__)


def components(model: nn.Module) -> Iterator[Component]:
    """Every component in a model, the model itself included; one that stands at several places is found once."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        base = _upstream_base(module)
        if base is not None:
            kind = KINDS[base.__name__]
            yield Component(path, kind, module, _config(modules, path, kind))


def _upstream_base(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if _is_of_package(base) and base.__name__ in KINDS), None)


def _is_of_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE


def _config(modules: Mapping[str, nn.Module], path: str, kind: str) -> Mapping[str, Any] | None:
    """The configuration of the network at `path`: its component's own, or its part of the full model's."""
    if kind == "mlm_head":
        return _own_config(modules[path])
    holder, _, _ = path.rpartition(".")
    if holder == path or holder not in modules:
        return None
    own = _own_config(modules[holder])
    if own is not None:
        return own
    above, _, name = holder.rpartition(".")
    whole = _own_config(modules[above]) if holder and above in modules else None
    part = None if whole is None else whole.get(f"{name}_config")
    return part if isinstance(part, Mapping) else None


def _own_config(module: nn.Module) -> Mapping[str, Any] | None:
    config = getattr(module, "_hub_mixin_config", None)
    return config if isinstance(config, Mapping) else None
