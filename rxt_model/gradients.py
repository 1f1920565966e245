"""Computing without gradients, in a way that leaves ordinary tensors behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_gradients() -> Iterator[None]:
    """As ``torch.no_grad``, also where the caller is in ``torch.inference_mode``.

    Tensors made in inference mode can neither be trained through nor be changed in place once it has ended, and a
    memory or a key/value cache outlives the block in which it was made. Usable as a decorator too.

    Example:
        >>> with torch.inference_mode(), no_gradients():
        ...     state = torch.zeros(2)
        >>> state.is_inference(), state.requires_grad
        (False, False)
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
