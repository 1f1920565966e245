"""Methods of one module that are answered by an object of ours, without its class or another instance noticing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["Shadow", "shadows"]


class Shadow:
    """Something whose bound methods stand in a module's own `__dict__`, where they hide those of the class.

    Since they are bound methods, a deep copy of the module has those of a copy of this object, which belongs to the copied
    module.

    Args:
        target: the module.
    """

    #: Methods that are hidden, where the target's class has them.
    names: tuple[str, ...] = ()

    def __init__(self, target: nn.Module) -> None:
        self.target = target

    def methods(self) -> tuple[str, ...]:
        """The methods that are hidden in this target."""
        return tuple(name for name in self.names if hasattr(type(self.target), name))

    def install(self) -> None:
        """Hide them."""
        for name in self.methods():
            self.target.__dict__[name] = getattr(self, name)

    def remove(self) -> None:
        """Show them again."""
        for name in self.methods():
            self.target.__dict__.pop(name, None)

    def original(self, name: str) -> Callable[..., Any]:
        """The method of the target's class."""
        method: Callable[..., Any] = getattr(type(self.target), name).__get__(self.target)
        return method

    def refuse_other_replacements(self) -> None:
        """Leave alone what somebody else has replaced.

        Raises:
            ValueError: a method is hidden by something else already.
        """
        for name in self.methods():
            if name in vars(self.target):
                raise ValueError(f"its method {name} was replaced by something else; undo that first.")


def shadows(module: nn.Module) -> Iterator[Shadow]:
    """Every shadow over this module."""
    seen: set[int] = set()
    for value in list(vars(module).values()):
        owner = getattr(value, "__self__", None)
        if isinstance(owner, Shadow) and id(owner) not in seen:
            seen.add(id(owner))
            yield owner
