"""`accelerate` and `restore`: which parts of a model are replaced, and by what."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from rxt_model.config import MemoryAttentionConfig, TransformerConfig
from rxt_model.drop_in.accelerated import ACCELERATED, AcceleratedNetwork, accelerated_by
from rxt_model.drop_in.conversation import AcceleratedConversation
from rxt_model.drop_in.generation import AcceleratedGeneration
from rxt_model.drop_in.recognition import PACKAGE, Component, components, is_upstream
from rxt_model.drop_in.report import NothingAcceleratedError, Replaced, Report, Skipped
from rxt_model.drop_in.shadow import shadows
from rxt_model.interaction.engine import MODULES

__all__ = ["accelerate", "restore"]

PARITIES = ("exact", "upstream")


def accelerate(model: nn.Module, *, parity: Literal["exact", "upstream"] = "exact") -> Report:
    """Let this package compute an `rxlm` model, in place and for this instance alone.

    Complete models (RxTAlpha, RxTBeta), single decoders, encoders, memory attentions, masked-language-modelling heads and
    stateless language models are recognised, also inside of another module such as a trainer's. What they compute stays
    the same, for inference and for training; the weights are shared and not copied.

    Before a component is replaced, its own forward pass and ours answer to the same random input; if they differ by more
    than rounding, it is left as it was and the report says so. Parameters, `state_dict` and its keys, `save_pretrained`,
    `to`, `train` and `eval` are untouched. A deep copy of an accelerated model is accelerated, on its own parameters.
    Modules that are exchanged later are seen at the next call and compared again: a shared embedding is computed here, and
    what this package does not know (an adapter, a hook inside of a component) makes upstream's own code run, with a warning.

    Args:
        model: the model, or a module that contains one.
        parity: "exact" computes what the paper says, "upstream" what upstream's checkpoints were trained with:

            ==================  ==========================  ========================================================
            what                "exact"                     "upstream"
            ==================  ==========================  ========================================================
            angles of RoPE      float32                     rounded to the type of queries and keys (autocast's too)
            padding, with       padded keys are masked      padded keys count as rows of zeros (dilution) in every
            flash attention                                 component
            padding in causal   padded keys are masked      padded keys are seen by what comes behind them, and read
            models, without                                 no memory; changes logits of left-padded rows and at
                                                            padded positions
            load-balance loss   mean over all MoE layers    without final stateless layers; padded positions count
                                                            as in the row above
            ==================  ==========================  ========================================================

            In float32, on batches without padding, only the last differs. The same under both, because weights depend on
            it: rotary layout, gates with tanh or sigmoid and memory norms as configured, and encoders with memory
            cross-attention as the installed release treats them.

    Returns:
        What was replaced and what was not, with reasons. It is also printed.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `parity` is unknown, or the model is accelerated already.
        NothingAcceleratedError: nothing could be replaced; the message has every reason. It is a ValueError.

    Example:
        >>> accelerate(nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        rxt_model.drop_in.report.NothingAcceleratedError: model is a Linear of torch; nothing in it is a component of ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch module of the library {PACKAGE}.")
    if parity not in PARITIES:
        raise ValueError(f"parity is {parity!r}; accepted are {', '.join(map(repr, PARITIES))}.")
    found = list(components(model))
    if not found:
        raise NothingAcceleratedError(_nothing(model))
    if any(accelerated_by(component.network) is not None for component in found):
        raise ValueError("model is accelerated already; call restore(model) before accelerating it in another way.")
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    for component in found:
        name = component.upstream_class.__name__
        try:
            accelerated = _accelerated(component, parity)
        except ValueError as error:
            skipped.append(Skipped(component.path, name, str(error)))
            continue
        replaced.append(Replaced(component.path, name, _parts(accelerated), *accelerated.comparison))
        accelerated.install()
    for path, module in model.named_modules():
        _accelerate_talking(path, module, replaced, skipped)
    report = Report(type(model).__name__, parity, tuple(replaced), tuple(skipped))
    if not replaced:
        reasons = " ".join(map(str, skipped))
        raise NothingAcceleratedError(f"nothing in this {type(model).__name__} could be replaced. {reasons}")
    print(report)
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every method of the model is upstream's own again.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing in it is accelerated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch module that was accelerated.")
    found = [shadow for module in model.modules() for shadow in shadows(module)]
    if not found:
        raise ValueError(f"nothing in this {type(model).__name__} is accelerated, so there is nothing to restore.")
    for shadow in found:
        shadow.remove()


def _nothing(model: nn.Module) -> str:
    name, origin = type(model).__name__, type(model).__module__.partition(".")[0]
    if origin == "rxt_model":
        return f"model is a {name} of this package, which is fast as it is; accelerate takes models of {PACKAGE}."
    of = f"{PACKAGE} that has no component that is known here" if is_upstream(model) else origin
    return f"model is a {name} of {of}; nothing in it is a component of {PACKAGE}, so there is nothing to accelerate."


def _accelerated(component: Component, parity: str) -> AcceleratedNetwork[Any]:
    network, base = component.network, component.upstream_class
    for name in ACCELERATED[component.kind].names:
        if getattr(type(network), name, None) is not getattr(base, name, None):
            raise ValueError(f"its class {type(network).__name__} has a method {name} of its own.")
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("it is on the meta device and has no weights; load them first.")
    accelerated = ACCELERATED[component.kind](component, parity)
    accelerated.refuse_other_replacements()
    return accelerated


def _parts(accelerated: AcceleratedNetwork[Any]) -> tuple[str, ...]:
    """What a component consists of, in the words of its architecture."""
    config = accelerated.ours().config
    if isinstance(config, MemoryAttentionConfig):
        gate = config.residual_gate_type if config.use_gated_residual or config.use_gate_for_self_attention else "no"
        return (f"memory update '{config.variant}'", f"{config.norm_type} norms", f"{gate} gates")
    if not isinstance(config, TransformerConfig):
        return ("dense layer, norm and vocabulary head",)
    reads = accelerated.component.kind == "decoder" or (not config.skip_memory_cross_attention and config.reads_memory)
    experts = f"mixture of {config.num_experts} experts"
    layout = "stacked" if config.use_vectorized_moe else "per expert"
    return (
        f"{config.num_layers} layers of self-attention",
        *(("memory cross-attention",) if reads else ()),
        f"{experts} ({layout})" if config.use_moe else "feed-forward",
        "norms",
    )


def _accelerate_talking(path: str, module: nn.Module, replaced: list[Replaced], skipped: list[Skipped]) -> None:
    """Conversations of complete models and generation of language models, where their networks are accelerated."""
    talking = _talking_networks(module)
    if not talking:
        return
    talker: AcceleratedConversation | AcceleratedGeneration
    try:
        for name, network in talking.items():
            if accelerated_by(network) is None:
                raise ValueError(f"its {name} was not replaced, and all of them are needed to answer.")
        is_full = "memory_attention" in talking
        talker = AcceleratedConversation(module) if is_full else AcceleratedGeneration(module, talking["network"])
        talker.refuse_other_replacements()
    except ValueError as error:
        skipped.append(Skipped(path, f"conversations of {type(module).__name__}", str(error)))
        return
    talker.install()
    choice = talker.decoding()
    by_modules = choice.engine == MODULES
    engine = "decoded operation by operation" if by_modules else f"decoded by the {choice.engine} engine"
    note = f"no decode engine: {choice.reason}" if by_modules else ""
    replaced.append(Replaced(path, type(module).__name__, (*talker.methods(), engine), note=note))


def _talking_networks(module: nn.Module) -> dict[str, nn.Module]:
    """The networks that a module needs to answer, by name; none if it is nothing that answers."""
    if not is_upstream(module):
        return {}
    names = ("decoder", "encoder", "memory_attention")
    if hasattr(type(module), "interact") and all(hasattr(getattr(module, name, None), "model") for name in names):
        return {name: getattr(module, name).model for name in names}
    network = getattr(module, "model", None)
    return {"network": network} if hasattr(type(module), "generate") and isinstance(network, nn.Module) else {}
