"""Weights that a memory update reads, perhaps in the background, while somebody wants to change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Reader = TypeVar("Reader", bound="ReadByUpdates")


class ReadByUpdates(nn.Module):
    """A module that memory updates read: what moves, copies, saves, loads or begins to train it waits for them first.

    Otherwise one update could compute with weights of before and after a step, or of two devices.
    """

    def _finish_update(self) -> None:
        """Wait for the update that may be reading this module; subclasses know of which memory."""
        raise NotImplementedError

    def _apply(self: Reader, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reader:
        self._finish_update()
        applied: Reader = super()._apply(fn, recurse)
        return applied

    def train(self: Reader, mode: bool = True) -> Reader:
        """As :meth:`torch.nn.Module.train`, after the update."""
        self._finish_update()
        trained: Reader = super().train(mode)
        return trained

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`torch.nn.Module.state_dict`, which has several signatures, after the update."""
        self._finish_update()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`, after the update."""
        self._finish_update()
        return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_update()
        return self.__dict__.copy()
