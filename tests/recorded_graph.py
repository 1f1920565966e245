"""A CUDA graph without a GPU: records the operations of a step with their tensors and repeats them on the same tensors.

As on a GPU, Python is not run again: what it decided while recording is frozen, and so is every number it took from the
host. A result that is not written in place goes to the address that it had while recording. What would wait for the
device is refused, as capturing refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal", "aten::is_nonzero")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function.name().startswith(_WAITING):
            raise RuntimeError(f"{function} waits for the device while a graph is being captured.")
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result


def record(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """As :func:`rxt_kernels.decode.cuda_graph.capture_cuda_graph`."""
    function()  # warming up, which changes whatever the function changes
    recorder = _Recorder()
    with recorder:
        result = function()

    @torch.no_grad()
    def replay() -> None:
        for call, arguments, options, before in recorder.calls:
            now = call(*arguments, **options)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    return replay, result
