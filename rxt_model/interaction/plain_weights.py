"""Whether weights say all that a model computes, and whether they have changed since somebody looked.

Engines know weights, not modules. They are used only where they compute what the modules would: a module of another class, a
hook, or a replaced ``forward`` is a reason to let the modules do it. Both questions are asked at every message, so they are
answered without the names that torch's own walk over modules makes: that would take as long as a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from rxt_model.decoder import DecoderNetwork, RxTDecoder
from rxt_model.encoder import EncoderNetwork, RxTEncoder
from rxt_model.layers.attention import MemoryCrossAttention, SparseQueryAttention
from rxt_model.layers.feed_forward import FeedForward, GatedLinearUnit
from rxt_model.layers.mixture_of_experts import PerExpertMixtureOfExperts, Router, StackedMixtureOfExperts
from rxt_model.layers.norms import RMSNorm
from rxt_model.layers.transformer_layer import TransformerLayer
from rxt_model.memory import ShortTermMemory
from rxt_model.stateless import SparseQueryTransformer, StatelessNetwork

__all__ = ["Look", "State", "known_to_engines", "look_at", "weights_state"]

_KNOWN: set[type[nn.Module]] = {
    RxTDecoder, DecoderNetwork, RxTEncoder, EncoderNetwork, SparseQueryTransformer, StatelessNetwork, TransformerLayer,
    SparseQueryAttention, MemoryCrossAttention, FeedForward, GatedLinearUnit, Router, PerExpertMixtureOfExperts,
    StackedMixtureOfExperts, RMSNorm, ShortTermMemory, nn.Embedding, nn.Linear, nn.LayerNorm, nn.ModuleList,
}  # fmt: skip

Known = TypeVar("Known", bound=type[nn.Module])


def known_to_engines(cls: Known) -> Known:
    """Decorates a class of which the weights, and the configuration of its network, say all that it computes."""
    _KNOWN.add(cls)
    return cls


def _modules(model: nn.Module) -> list[nn.Module]:
    """Every module once."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found.append(module)
            waiting.extend(module._modules.values())
    return found


State = tuple[tuple[int, int], ...]
"""Changes when a weight is replaced, moved, or changed in place."""


class Look(NamedTuple):
    """What a look at a model finds."""

    foreign: str | None
    """Why weights do not say all that the modules compute, in one sentence; None if they do. Dropout, of which the
    configuration tells, is for the caller to look at."""
    state: State
    """Empty where there is a reason."""


def look_at(model: nn.Module) -> Look:
    """Go once through all modules and parameters of a model."""
    modules = _modules(model)
    parameters = _parameters(modules)
    if (reason := _foreign(model, modules, parameters)) is not None:
        return Look(reason, ())
    return Look(None, _state(parameters))


def weights_state(model: nn.Module) -> State:
    """The state of the weights of any model."""
    return _state(_parameters(_modules(model)))


def _parameters(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [parameter for one in modules for parameter in one._parameters.values() if parameter is not None]


def _state(parameters: Sequence[Tensor]) -> State:
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in parameters)


def _foreign(model: nn.Module, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> str | None:
    for module in modules:
        if type(module) not in _KNOWN:
            return f"{_name(model, module)} is of the class {type(module).__name__}, which an engine does not know."
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{_name(model, module)} has forward hooks, which an engine would not call."
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"the forward method of {_name(model, module)} was replaced, and an engine would not call it."
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1:
        found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"the parameters are {found}; an engine takes one dtype on one device."
    return None


def _name(model: nn.Module, module: nn.Module) -> str:
    whole = "the encoder" if isinstance(model, RxTEncoder) else "the decoder"
    return next(name for name, one in model.named_modules() if one is module) or whole
