"""Ctrl-C during a conversation: it stops an answer, and touches neither a memory update nor a file being saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Literal

__all__ = ["Interrupts"]


class Interrupts:
    """Decides what Ctrl-C means at every moment of a conversation.

    * waiting for a message: ``KeyboardInterrupt``, as anywhere else;
    * while an answer comes (:meth:`answering`): the first sets :attr:`requested`, which is looked at after every token;
      a second one raises ``KeyboardInterrupt``, for models whose next token is a long time coming;
    * while memory or a file is written (:meth:`shielded`): it waits until that is done, and is then :attr:`requested`.

    Use as a context manager in the main thread; in any other thread, and where Ctrl-C is ignored, it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._moment: Literal["waiting", "answering", "shielded"] = "waiting"
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous if self._previous is not None else signal.SIG_DFL)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._moment == "waiting" or (self._moment == "answering" and self.requested):
            self._moment = "waiting"  # the exception may hit the very code that would restore it
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While tokens of an answer are computed and shown."""
        self.requested = False
        with self._during("answering"):
            yield

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """While something is written that must be whole."""
        with self._during("shielded"):
            yield

    @contextlib.contextmanager
    def _during(self, moment: Literal["answering", "shielded"]) -> Iterator[None]:
        before, self._moment = self._moment, moment
        try:
            yield
        finally:
            self._moment = before
