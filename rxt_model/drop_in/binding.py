"""A component of this package on the very parameters of an upstream component.

Nothing is copied: both hold the same `Parameter` objects, so optimizers, `state_dict` and gradients do not see a difference.
Upstream's modules can be exchanged afterwards (sharing an embedding does so), and parameters and buffers with them; a
binding knows what it saw and says when that is no longer there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rxt_model.drop_in.recognition import PACKAGE, Component
from rxt_model.drop_in.structure import OurComponent, same_structure

__all__ = ["Binding"]


class Binding:
    """Our component with upstream's weights.

    Args:
        component: upstream's.
        parity: "exact" or "upstream".

    Raises:
        ValueError: the component is something this package does not build; the message says what.
    """

    def __init__(self, component: Component, parity: str) -> None:
        self.ours: OurComponent = same_structure(component, parity)
        network = component.network
        for path, module in network.named_modules():
            if module is not network and not _is_known(type(module)):
                raise ValueError(f"its {path} is a {type(module).__name__}, whose forward pass would not be called.")
        self._inner = [module for module in network.modules() if module is not network]
        self._seen: list[tuple[dict[str, Any], str, Any]] = []
        self._share(component)

    def _share(self, component: Component) -> None:
        theirs = dict(component.network.named_modules(remove_duplicate=False))
        for module in theirs.values():
            self._seen += [(module._modules, name, child) for name, child in module._modules.items()]
        prefix = component.key_prefix.rstrip(".")
        for path, module in self.ours.named_modules(remove_duplicate=False):
            inside = path == prefix or not prefix or path.startswith(f"{prefix}.")
            source = theirs.get(path[len(prefix) :].lstrip(".")) if inside else None
            if source is None or type(source).__name__ == "ShortTermMemory":
                continue  # the memory is read at every call: it is a state and no weight
            self._take(module._parameters, source._parameters)
            self._take(module._buffers, source._buffers)
        for module in theirs.values():
            if isinstance(module._buffers.get("inv_freq"), Tensor):
                self._seen.append((module._buffers, "inv_freq", module._buffers["inv_freq"]))

    def _take(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        for name, tensor in ours.items():
            if tensor is not None:
                ours[name] = theirs[name]
                self._seen.append((theirs, name, theirs[name]))

    def is_current(self) -> bool:
        """Whether upstream's component still consists of the modules, parameters and buffers that were bound."""
        return all(holder.get(name) is value for holder, name, value in self._seen)

    def hook(self) -> str | None:
        """The class of an inner module that has a hook or a forward pass of somebody else's, which we would not call."""
        for module in self._inner:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in module.__dict__
            ):
                return type(module).__name__
        return None


def _is_known(cls: type[nn.Module]) -> bool:
    """Whether a class is torch's or upstream's own, and nobody's subclass with another forward pass."""
    return cls.__module__.startswith("torch.nn.modules.") or cls.__module__.partition(".")[0] == PACKAGE
