"""Asking upstream's own forward pass and ours the same question, before one takes the place of the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig
from rxt_model.gradients import no_gradients

if TYPE_CHECKING:
    from rxt_model.drop_in.accelerated import AcceleratedNetwork

__all__ = ["Comparison", "compare"]

_ROWS, _TIME = 2, 9


class Comparison(NamedTuple):
    """How far our answer is from upstream's: a difference, or the reason why there is none to tell."""

    difference: float | None
    note: str


def compare(accelerated: AcceleratedNetwork[Any]) -> Comparison:
    """Ask both, and see whether more than rounding is between them.

    Raises:
        ValueError: it is.
    """
    try:
        difference = _difference(accelerated)
    except (ImportError, RuntimeError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        return Comparison(None, f"not compared, since upstream's own forward pass fails here ({reason})")
    limit = _tolerance(next(accelerated.network.parameters()).dtype)
    if not difference <= limit:
        raise ValueError(
            f"it computes something else than this package: on random input they differ by {difference:.1e} of the norm, "
            f"and rounding explains {limit:.0e}."
        )
    return Comparison(difference, "")


def _tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains.

    In half precision a router near a tie sends a token to another expert, which is no error and changes that token.
    """
    return 0.2 if dtype in (torch.bfloat16, torch.float16) else 1e-4


@no_gradients()
def _difference(accelerated: AcceleratedNetwork[Any]) -> float:
    """Norm of the difference between our output and upstream's, over the norm of upstream's, in evaluation mode.

    The input is random and has no padding. Memory, modes and the state of random numbers are as before afterwards.
    """
    arguments = _arguments(accelerated)
    answers = []
    device = next(accelerated.network.parameters()).device.type
    with _evaluating(accelerated.network), torch.autocast(device, enabled=False):
        for forward in (accelerated.original("forward"), cast(Any, accelerated).forward):
            with _memory_kept(accelerated.network):
                found = forward(*arguments)
            answers.append((found if isinstance(found, Tensor) else found[-1]).double())
    theirs, ours = answers
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def _arguments(accelerated: AcceleratedNetwork[Any]) -> tuple[Tensor, ...]:
    config = accelerated.ours().config
    weight = next(accelerated.network.parameters())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    if isinstance(config, MLMHeadConfig):
        return (normal(_ROWS, _TIME, config.embed_dim),)
    memory = getattr(getattr(accelerated.network, "stm", None), "memory", None)
    stored = 1 if memory is None else memory.shape[1]
    time = min(_TIME, config.seq_len)
    if isinstance(config, MemoryAttentionConfig):  # upstream's wants as many rows as the memory has
        encoded = normal(config.num_layers, stored, time, config.embed_dim)
        return encoded, torch.ones(stored, time, dtype=torch.bool, device=weight.device)
    rows = _ROWS if stored == 1 else stored
    ids = torch.randint(config.vocab_size, (rows, time), generator=generator).to(weight.device)
    return ids, torch.ones_like(ids, dtype=torch.bool)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """In evaluation mode, with the mode of every module restored, since they may differ."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _memory_kept(network: nn.Module) -> Iterator[None]:
    """Whatever is committed to the memory inside of the block is undone behind it."""
    store: Any = getattr(network, "stm", None)
    before: Any = getattr(store, "memory", None)
    values = None if before is None else before.detach().clone()
    try:
        yield
    finally:
        if before is not None:
            before.data.copy_(values)
            store.memory = before
