"""Work in a thread of its own, computed as the thread that asked for it would have computed it."""

from __future__ import annotations

import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from rxt_kernels.dispatch import preferred_backend, use_backend

__all__ = ["BackgroundTask"]

_logger = logging.getLogger("rxt_model")


class _Surroundings:
    """What torch and this package remember per thread and what decides how, and where, something is computed."""

    def __init__(self, device: torch.device) -> None:
        self._backend = preferred_backend()
        self._inference = torch.is_inference_mode_enabled()
        self._gradients = torch.is_grad_enabled()
        self._autocast: torch.autocast | None = None
        if torch.amp.is_autocast_available(device.type):
            self._autocast = torch.autocast(
                device.type,
                torch.get_autocast_dtype(device.type),
                torch.is_autocast_enabled(device.type),
                torch.is_autocast_cache_enabled(),
            )
        # On one stream, what is computed here comes after what the caller has begun, and before what it will begin.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same surroundings in another thread."""
        torch.get_num_threads()  # gives OpenMP, which counts per thread, the number that torch was told
        with ExitStack() as stack:
            stack.enter_context(use_backend(self._backend))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            if self._autocast is not None:
                stack.enter_context(self._autocast)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield


class BackgroundTask:
    """A function that runs once, in a thread of its own; whoever needs what it does waits for it.

    It runs under the caller's gradient mode, inference mode, autocast, CUDA stream, number of threads and
    :func:`rxt_kernels.use_backend`. The thread is no daemon: an interpreter that exits finishes the work first. A failure that
    nobody waited for is logged, at the latest at the exit.

    The thread ends with its work and is not kept for the next: OpenMP gives every thread that computes helpers of its own,
    and where all of them are more than the processors, libgomp puts them to sleep between two operations, which slows both.

    Args:
        work: what to do.
        device: where it computes.
        name: of the thread, and of what failed where that is logged.

    Example:
        >>> done = []
        >>> task = BackgroundTask(lambda: done.append("work"), torch.device("cpu"), name="example")
        >>> task.wait() is None, done
        (True, ['work'])
    """

    def __init__(self, work: Callable[[], object], device: torch.device, *, name: str) -> None:
        self._work: Callable[[], object] | None = work
        self._surroundings = _Surroundings(device)
        self._worker: int | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._untold: list[str] = []  # apart from the error, whose traceback would keep this task alive
        weakref.finalize(self, _tell, name, self._untold)
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        # Only the main thread runs and is not alive: when the interpreter exits, and no longer waits for new threads.
        if not threading.current_thread().is_alive():
            self._run()
            return
        try:
            self._thread.start()
        except RuntimeError:  # there are too many threads
            self._run()

    def _run(self) -> None:
        assert self._work is not None
        self._worker = threading.get_ident()
        try:
            with self._surroundings.entered():
                self._work()
        except BaseException as error:
            self._untold.append("".join(traceback.format_exception(error)))
            self._error = error
        finally:
            self._work = self._worker = None

    def is_asked_by_its_work(self) -> bool:
        """Whether the caller is the work itself, which cannot wait for its own end."""
        return self._worker == threading.get_ident()

    def wait(self) -> BaseException | None:
        """Return when the work is done: with what it failed with, to the first that asks, or None."""
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            if self._work is not None:  # a forked process has the task and not the thread
                self._run()
            error, self._error = self._error, None
            self._untold.clear()
        return error


def _tell(name: str, untold: list[str]) -> None:
    for text in untold:
        _logger.error("The %s failed in the background, and nobody waited for it:\n%s", name, text)
