"""The one place where a backend is chosen, explained, or refused.

Every public operation owns one :class:`Operation`. It always has the eager reference, which is the definition; faster
backends register themselves with :meth:`Operation.register` together with a ``supports`` function, which is called with
the arguments of the operation and answers None (supported) or a sentence (the reason why not).

A room gains a backend without anything being moved: its ``triton.py`` or ``native.py`` defines a function with the
arguments of the reference, in the same order, and ``supports`` with those arguments; its ``op.py`` calls
``register("triton", function, supports)`` on the operation it owns. The arguments have been checked before either is called.

A backend names the devices that ``auto`` may choose it for. On other devices ``auto`` passes it over without a word; asked
for by name, it answers with its reason. :func:`use_backend` makes ``auto`` prefer one backend inside a block, wherever the
tensors are: that is how a whole model is run on a backend of one's choice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from rxt_kernels import native_runtime, triton_runtime

__all__ = [
    "BACKENDS",
    "Backend",
    "Operation",
    "available_backends",
    "explain",
    "operations",
    "preferred_backend",
    "use_backend",
]

BACKENDS: tuple[str, ...] = ("reference", "triton", "native")
"""Every backend name that is known; the order says nothing about preference."""

_logger = logging.getLogger("rxt_kernels")
_operations: dict[str, Operation] = {}


class _Preference(threading.local):
    """What `auto` prefers in this thread.

    A ``contextvars.ContextVar`` would say the same, but torch.compile cannot read one, while it guards what it reads here:
    a compiled function is compiled again, once, for another preference.
    """

    def __init__(self) -> None:
        # Set per thread and not on the class, whose attributes torch.compile takes for constants.
        self.backend: str = "auto"


_preference = _Preference()


class Backend(NamedTuple):
    """One fast implementation of an operation: same arguments and result as the reference."""

    name: str
    function: Callable[..., Any]
    supports: Callable[..., str | None]
    devices: frozenset[str]


class Operation:
    """The implementations of one public operation, in order of preference, with the reference last.

    Example:
        >>> from rxt_kernels.dispatch import operations
        >>> operations()["rms_norm"].select("reference").__name__
        'rms_norm_reference'
    """

    __slots__ = ("_told", "accelerated", "name", "reference")

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        if name in _operations:
            raise ValueError(f"The operation {name!r} is already registered; every operation has one reference.")
        self.name = name
        self.reference = reference
        self.accelerated: tuple[Backend, ...] = ()
        self._told: set[str] = set()
        _operations[name] = self

    def register(
        self,
        backend: str,
        function: Callable[..., Any],
        supports: Callable[..., str | None],
        devices: Iterable[str] = ("cpu", "cuda"),
    ) -> None:
        """Add a fast backend; of several that support a call, `auto` takes the one registered first.

        Args:
            backend: its name.
            function: takes the arguments of the reference.
            supports: takes the same arguments; None, or the reason why the call is not for this backend.
            devices: device types of first arguments for which `auto` considers it.

        Raises:
            ValueError: the name is unknown, or the operation has this backend already.
        """
        if backend not in BACKENDS or backend == "reference":
            raise ValueError(f"backend is {backend!r}; a fast backend is one of {', '.join(BACKENDS[1:])}.")
        if any(known.name == backend for known in self.accelerated):
            raise ValueError(f"{self.name} already has a {backend} backend; it can be registered once.")
        self.accelerated = (*self.accelerated, Backend(backend, function, supports, frozenset(devices)))

    def select(self, backend: str, *arguments: Any) -> Callable[..., Any]:
        """The implementation that answers to `backend` for these (already checked) arguments.

        Raises:
            ValueError: the name is unknown, or the backend cannot take this call; the message is its reason.
        """
        if backend == "reference":
            return self.reference
        if backend != "auto":
            return self._requested(backend, arguments)
        if _preference.backend != "auto":
            preferred = self._preferred(_preference.backend, arguments)
            if preferred is not None:
                return preferred
        for candidate in self.accelerated:
            if arguments[0].device.type not in candidate.devices:
                continue
            reason = candidate.supports(*arguments)
            if reason is None:
                return candidate.function
            self._tell_once(candidate.name, reason)
        return self.reference

    def _requested(self, backend: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend is {backend!r}, which is not known; it is one of 'auto', "
                + ", ".join(repr(name) for name in BACKENDS)
                + "."
            )
        for candidate in self.accelerated:
            if candidate.name == backend:
                reason = candidate.supports(*arguments)
                if reason is not None:
                    raise ValueError(f"backend={backend!r} cannot run this call of {self.name}: {reason}")
                return candidate.function
        raise ValueError(_absent(self.name, backend))

    def _preferred(self, backend: str, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The implementation that a block prefers, on whatever device; None, said once, if it cannot take this call."""
        if backend == "reference":
            return self.reference
        for candidate in self.accelerated:
            if candidate.name == backend:
                reason = candidate.supports(*arguments)
                if reason is None:
                    return candidate.function
                self._tell_once(backend, reason)
                return None
        self._tell_once(backend, explain(self.name, backend))
        return None

    def _tell_once(self, backend: str, reason: str) -> None:
        if torch.compiler.is_compiling() or backend in self._told:
            return
        self._told.add(backend)
        _logger.warning("%s runs on another backend than %s: %s (said once)", self.name, backend, reason)


def _absent(operation: str, backend: str) -> str:
    if backend == "triton" and (reason := triton_runtime.unavailable()) is not None:
        return f"backend='triton' was asked for {operation}, but cannot run here: {reason}"
    if backend == "native" and (reason := native_runtime.unavailable()) is not None:
        return f"backend='native' was asked for {operation}, but cannot run here: {reason}"
    return (
        f"backend={backend!r} was asked for, but this build has no {backend} backend for {operation}; use "
        "backend='auto' or 'reference', and see why it is missing with `python -m rxt_kernels.info`."
    )


def preferred_backend() -> str:
    """What ``backend="auto"`` prefers here: the name that the block around gave to :func:`use_backend`, or "auto".

    Example:
        >>> with use_backend("reference"):
        ...     preferred_backend()
        'reference'
    """
    return _preference.backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make every operation that is called with ``backend="auto"``, as models do, prefer one backend inside the block.

    Unlike `auto` alone it does so on every device that the backend can run on: on the CPU, Triton's kernels run in the
    interpreter. A call that the backend cannot take runs as it would without the block, and says why once. The preference
    holds in this thread only. torch.compile takes it into account, whether the block is around or inside of a compiled
    function.

    Args:
        backend: "reference", "triton" or "native"; "auto" takes back the preference of a block around this one.

    Raises:
        ValueError: there is no backend of this name.

    Example:
        >>> import torch, rxt_kernels
        >>> with rxt_kernels.use_backend("reference"):
        ...     rxt_kernels.rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2))
        tensor([0.8485, 1.1314])
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}, which is not known; it is one of 'auto', {', '.join(map(repr, BACKENDS))}."
        )
    before = _preference.backend
    _preference.backend = backend
    try:
        yield
    finally:
        _preference.backend = before


def operations() -> dict[str, Operation]:
    """Every registered operation by name."""
    return dict(_operations)


def available_backends(operation: str) -> tuple[str, ...]:
    """Names of the backends that this build has for `operation`, fastest first.

    Raises:
        ValueError: there is no such operation.

    Example:
        >>> import rxt_kernels
        >>> "reference" in available_backends("rms_norm")
        True
    """
    return (*(backend.name for backend in _find(operation).accelerated), "reference")


def explain(operation: str, backend: str) -> str:
    """One sentence: why this build has or has not `backend` for `operation`.

    Raises:
        ValueError: the operation or the backend name is unknown.

    Example:
        >>> import rxt_kernels
        >>> explain("rms_norm", "reference")
        'The eager definition, on every device.'
    """
    found = _find(operation)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, which is not known; it is one of {', '.join(BACKENDS)}.")
    if backend == "reference":
        return "The eager definition, on every device."
    if backend in available_backends(found.name):
        return "Registered; a call that it cannot take is refused with the reason."
    if backend == "triton" and (reason := triton_runtime.unavailable()) is not None:
        return reason
    if backend == "native" and (reason := native_runtime.unavailable()) is not None:
        return reason
    return f"This build has no {backend} backend here: nothing was registered when the package was imported."


def _find(operation: str) -> Operation:
    if operation not in _operations:
        raise ValueError(f"operation is {operation!r}, which is not known; it is one of {', '.join(_operations)}.")
    return _operations[operation]
