"""The fixed-size state that replaces a conversation's history (spec 2.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rxt_model.background import BackgroundTask
from rxt_model.gradients import no_gradients
from rxt_model.memory.read_by_updates import ReadByUpdates

INITIALISATIONS = ("standard", "normal", "uniform", "ones", "zeros")


def _require_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")


class MemoryUpdateError(RuntimeError):
    """A memory update in the background failed; memory is as it was before, and the cause is what it failed with."""


class ShortTermMemory(ReadByUpdates):
    """Memory slots of every layer, ``memory`` of shape (L, B, S, D), held outside of the weights.

    The state is a buffer that is never saved with a model: it belongs to a conversation. It moves and casts with the
    module, keeps its contents when components are shared or the batch grows, and never carries an autograd graph.

    An update may run in the background (:meth:`update_in_background`). Whatever reads, replaces, moves or copies the memory
    waits for it, so that nobody sees the memory of before.

    Engines keep what they have read of a memory until it is replaced or changed in place; a change behind torch's back, through
    ``.data`` or a numpy view, they cannot see.

    Args:
        num_layers: layers L.
        size: slots S of each layer.
        dim: model width D.
        init_type: distribution of a reset memory: ``standard`` N(0, 1), ``normal`` N(0, 0.01^2), ``uniform``
            U(0, 0.01), ``ones`` or ``zeros``.

    Example:
        >>> stm = ShortTermMemory(num_layers=2, size=4, dim=8, init_type="zeros")
        >>> stm.memory.shape
        torch.Size([2, 1, 4, 8])
    """

    state: Tensor
    """The buffer behind :attr:`memory`."""

    def __init__(self, num_layers: int, size: int, dim: int, *, init_type: str = "standard") -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("size", size), ("dim", dim)):
            _require_count(name, value)
        if init_type not in INITIALISATIONS:
            raise ValueError(f"init_type is {init_type!r}; accepted are {', '.join(map(repr, INITIALISATIONS))}.")
        self.num_layers = num_layers
        self.size = size
        self.dim = dim
        self.init_type = init_type
        self.register_buffer("state", self._drawn(1, None, torch.get_default_dtype(), None), persistent=False)
        self._update: BackgroundTask | None = None

    @property
    def memory(self) -> Tensor:
        """The memory (L, B, S, D), after an update that is under way.

        Raises:
            MemoryUpdateError: the update failed.
        """
        self.finish_update()
        return self.state

    @property
    def batch_size(self) -> int:
        """Conversations this memory holds; an update does not change their number."""
        return self.state.shape[1]

    # -- updates in the background ------------------------------------------------------------------------------------

    def update_in_background(self, update: Callable[[], object]) -> None:
        """Begin what reads the memory and then loads the next one, in a thread of its own.

        Args:
            update: called once; only in it do :attr:`memory` and :meth:`load` not wait for its end.

        Raises:
            MemoryUpdateError: the update before this one failed; this one is not begun.
        """
        self.finish_update()
        self._update = BackgroundTask(update, self.state.device, name="memory update")

    def finish_update(self) -> None:
        """Wait for an update in the background, if there is one.

        Raises:
            MemoryUpdateError: it failed; memory is as it was before it. Raised once.
        """
        update = self._update
        if update is None or update.is_asked_by_its_work():
            return
        error = update.wait()
        if self._update is update:
            self._update = None
        if error is not None:
            raise MemoryUpdateError(
                f"the memory update of the last interaction failed in the background ({type(error).__name__}: {error}); "
                "memory is as it was before that interaction. This is said once; the next call goes on without it."
            ) from error

    def _finish_update(self) -> None:
        self.finish_update()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update": None}

    # -- contents -----------------------------------------------------------------------------------------------------

    def _drawn(
        self, batch_size: int, device: torch.device | None, dtype: torch.dtype, generator: torch.Generator | None
    ) -> Tensor:
        memory = torch.empty(self.num_layers, batch_size, self.size, self.dim, device=device, dtype=dtype)
        if self.init_type == "standard":
            return memory.normal_(generator=generator)
        if self.init_type == "normal":
            return memory.normal_(std=0.01, generator=generator)
        if self.init_type == "uniform":
            return memory.uniform_(0.0, 0.01, generator=generator)
        return memory.fill_(1.0 if self.init_type == "ones" else 0.0)

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Draw the memory anew on a device, for a module that was built on the meta device."""
        self.state = self._drawn(1, device, dtype, None)

    @no_gradients()
    def reset(self, *, batch_size: int | None = None, init_type: str | None = None, seed: int | None = None) -> None:
        """Forget everything.

        Args:
            batch_size: conversations from now on; None keeps their number.
            init_type: distribution from now on; None keeps it.
            seed: makes the draw repeatable, on whatever device the memory lives.

        Raises:
            ValueError: ``batch_size`` below 1 or an unknown ``init_type``.
        """
        if batch_size is not None:
            _require_count("batch_size", batch_size)
        if seed is not None and type(seed) is not int:
            raise TypeError(f"seed is of type {type(seed).__name__}; it must be an integer or None.")
        if init_type is not None:
            if init_type not in INITIALISATIONS:
                raise ValueError(f"init_type is {init_type!r}; accepted are {', '.join(map(repr, INITIALISATIONS))}.")
            self.init_type = init_type
        batch = self.batch_size if batch_size is None else batch_size
        if seed is None:
            self.state = self._drawn(batch, self.memory.device, self.memory.dtype, None)
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn = self._drawn(batch, torch.device("cpu"), torch.float32, generator)
            self.state = drawn.to(self.memory.device, self.memory.dtype)

    @no_gradients()
    def set_batch_size(self, batch_size: int) -> None:
        """Hold ``batch_size`` conversations, keeping what is remembered (spec 7, defect 18).

        A single conversation is copied to every row; several become one only through :meth:`average`.

        Raises:
            ValueError: the memory holds several conversations and a different number is asked for.
        """
        self.check_batch_size(batch_size)
        if batch_size != self.batch_size:
            self.state = self.memory.expand(-1, batch_size, -1, -1).contiguous()

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse what :meth:`set_batch_size` would refuse, changing nothing."""
        _require_count("batch_size", batch_size)
        if self.batch_size not in (1, batch_size):
            raise ValueError(
                f"the memory holds {self.batch_size} conversations and batch_size is {batch_size}; only a single "
                "conversation can be copied to several. Call reset(batch_size=...) to start anew, or average()."
            )

    @no_gradients()
    def average(self) -> None:
        """Become one conversation, the mean of all of them; slots and channels stay apart (spec 7, defect 19)."""
        self.state = self.memory.mean(dim=1, keepdim=True)

    @no_gradients()
    def select(self, row: int) -> None:
        """Become the one conversation ``row``."""
        if type(row) is not int or not 0 <= row < self.batch_size:
            raise ValueError(f"row is {row!r}; the memory holds rows 0 to {self.batch_size - 1}.")
        self.state = self.memory[:, row : row + 1].clone()

    @no_gradients()
    def export(self) -> Tensor:
        """A detached copy of the state, (L, B, S, D)."""
        return self.memory.detach().clone()

    @no_gradients()
    def load(self, memory: Tensor) -> None:
        """Replace the state by a detached copy, cast and moved to where the memory lives.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: not of shape (L, B, S, D) for this model, or not finite.
        """
        if not isinstance(memory, Tensor) or not memory.is_floating_point():
            kind = memory.dtype if isinstance(memory, Tensor) else type(memory).__name__
            raise TypeError(f"memory is of type {kind}; it must be a floating-point tensor of shape (L, B, S, D).")
        expected = (self.num_layers, self.size, self.dim)
        if memory.dim() != 4 or (memory.shape[0], *memory.shape[2:]) != expected or memory.shape[1] < 1:
            raise ValueError(
                f"memory has shape {tuple(memory.shape)}; this model's is ({self.num_layers}, batch, {self.size}, "
                f"{self.dim}) with a batch of at least 1."
            )
        if memory.is_meta and not self.memory.is_meta:
            raise ValueError("memory is on the meta device and has no values; give a tensor that has.")
        loaded = memory.detach().to(self.memory.device, self.memory.dtype, copy=True)
        if not loaded.is_meta and not bool(torch.isfinite(loaded).all()):
            raise ValueError(
                f"memory holds values that are NaN or infinite as {loaded.dtype}; load a state that was exported from a "
                "working model."
            )
        self.state = loaded

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, size={self.size}, dim={self.dim}, init_type={self.init_type!r}"
