"""Public memory update, residual gate and memory norm: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_kernels import native_runtime, triton_runtime
from rxt_kernels.checks import alike, floating, probability, refuse_device, refuse_shape, refuse_type, refuse_value
from rxt_kernels.dispatch import Operation
from rxt_kernels.memory_update.parameters import (
    GATE_ACTIVATIONS,
    GATE_KINDS,
    NORM_KINDS,
    PADDINGS,
    VARIANTS,
    AttentionWeights,
    MemoryNormParameters,
    MemoryUpdateLayer,
    ResidualGateParameters,
)
from rxt_kernels.memory_update.reference import (
    memory_norm_reference,
    memory_update_reference,
    residual_gate_reference,
)
from rxt_kernels.rotary.op import check_layout

_RESIDUAL_GATE = Operation("residual_gate", residual_gate_reference)
_MEMORY_NORM = Operation("memory_norm", memory_norm_reference)
_MEMORY_UPDATE = Operation("memory_update", memory_update_reference)

if triton_runtime.available():
    from rxt_kernels.memory_update import triton

    _RESIDUAL_GATE.register("triton", triton.residual_gate_triton, triton.supports_gate, devices=("cuda",))
    _MEMORY_NORM.register("triton", triton.memory_norm_triton, triton.supports_norm, devices=("cuda",))
    _MEMORY_UPDATE.register("triton", triton.memory_update_triton, triton.supports, devices=("cuda",))

if native_runtime.available():
    from rxt_kernels.memory_update import native, native_gate, native_norm

    _RESIDUAL_GATE.register("native", native_gate.residual_gate_native, native_gate.supports_gate, devices=("cpu",))
    _MEMORY_NORM.register("native", native_norm.memory_norm_native, native_norm.supports_norm, devices=("cpu",))
    _MEMORY_UPDATE.register("native", native.memory_update_native, native.supports, devices=("cpu",))


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _tensor(name: str, value: Tensor | None, like: Tensor, *shapes: tuple[int, ...]) -> None:
    """Require a tensor like `like` with one of the shapes."""
    if value is None:
        raise ValueError(f"{name} is None; accepted is a tensor of shape {' or '.join(map(str, shapes))}.")
    alike(name, value, "the memory", like)
    for shape in shapes:
        if value.shape == shape:
            return
    refuse_shape(name, value, " or ".join(map(str, shapes)))


def _absent(name: str, value: Tensor | None, kind: str) -> None:
    if value is not None:
        raise ValueError(f"{name} is given, but kind {kind!r} has no such parameter; accepted is None.")


def _check_gate(name: str, gate: ResidualGateParameters, x: Tensor) -> None:
    if not isinstance(gate, ResidualGateParameters):
        refuse_type(name, gate, "rxt_kernels.ResidualGateParameters")
    slots, dim = x.shape[-2], x.shape[-1]
    kind = gate.kind
    if kind not in GATE_KINDS:
        refuse_value(f"{name}.kind", kind, _names(GATE_KINDS))
    if gate.activation not in GATE_ACTIVATIONS:
        refuse_value(f"{name}.activation", gate.activation, _names(GATE_ACTIVATIONS))
    if kind in ("add", "replace"):
        for field in ("weight", "bias", "status_weight", "status_bias"):
            _absent(f"{name}.{field}", getattr(gate, field), kind)
        return
    if kind == "linear":
        _tensor(f"{name}.weight", gate.weight, x, (slots, slots) if gate.per_slot else (1, slots))
        _tensor(f"{name}.bias", gate.bias, x, (slots,) if gate.per_slot else (1,))
    else:
        _tensor(f"{name}.weight", gate.weight, x, (slots, 1) if gate.per_slot else (1,))
        _absent(f"{name}.bias", gate.bias, kind)
        if gate.status_weight is not None and not gate.per_slot:
            raise ValueError(
                f"{name}.status_weight is given with per_slot=False; for kind {kind!r} a learned slot status is "
                "accepted with per_slot=True only."
            )
    if gate.status_weight is not None:
        _tensor(f"{name}.status_weight", gate.status_weight, x, (1, dim))
        _tensor(f"{name}.status_bias", gate.status_bias, x, (1,))
    elif gate.status_bias is not None:
        raise ValueError(f"{name}.status_bias is given without {name}.status_weight; accepted is both or neither.")


def _check_norm(name: str, norm: MemoryNormParameters, x: Tensor) -> None:
    if not isinstance(norm, MemoryNormParameters):
        refuse_type(name, norm, "rxt_kernels.MemoryNormParameters")
    slots, dim = x.shape[-2], x.shape[-1]
    kind = norm.kind
    if kind not in NORM_KINDS:
        refuse_value(f"{name}.kind", kind, _names(NORM_KINDS))
    if not 0.0 <= norm.decay <= 1.0:
        refuse_value(f"{name}.decay", norm.decay, "a number from 0 to 1")
    if kind in ("classic-rms", "layer"):
        _tensor(f"{name}.weight", norm.weight, x, (dim,))
    else:
        _absent(f"{name}.weight", norm.weight, kind)
    if kind == "layer":
        _tensor(f"{name}.bias", norm.bias, x, (dim,))
    else:
        _absent(f"{name}.bias", norm.bias, kind)
    if kind == "classic-rms":
        _absent(f"{name}.scale", norm.scale, kind)
        _absent(f"{name}.gate", norm.gate, kind)
    elif kind == "positional":
        _tensor(f"{name}.scale", norm.scale, x, (slots, 1), (dim,))
        _tensor(f"{name}.gate", norm.gate, x, (slots, 1))
    else:
        _tensor(f"{name}.scale", norm.scale, x, (dim,))
        _tensor(f"{name}.gate", norm.gate, x, (), (1,))
    if kind == "positional":
        _tensor(f"{name}.ema_rms", norm.ema_rms, x, (slots, 1))
    elif kind == "adaptive":
        _tensor(f"{name}.ema_rms", norm.ema_rms, x, (), (1,))
    else:
        _absent(f"{name}.ema_rms", norm.ema_rms, kind)


def _check_attention(name: str, weights: AttentionWeights, x: Tensor) -> None:
    if not isinstance(weights, AttentionWeights):
        refuse_type(name, weights, "rxt_kernels.AttentionWeights")
    dim = x.shape[-1]
    query_heads, key_heads, head_dim = weights.query_heads, weights.key_value_heads, weights.head_dim
    if min(query_heads, key_heads, head_dim) < 1 or (query_heads % key_heads and key_heads % query_heads):
        raise ValueError(
            f"{name} has {query_heads} query heads and {key_heads} key/value heads of width {head_dim}; accepted are "
            "positive numbers, and head counts of which one divides the other."
        )
    width = max(query_heads, key_heads) * head_dim
    _tensor(f"{name}.query", weights.query, x, (query_heads * head_dim, dim))
    _tensor(f"{name}.key", weights.key, x, (key_heads * head_dim, dim))
    _tensor(f"{name}.value", weights.value, x, (key_heads * head_dim, dim))
    _tensor(f"{name}.output", weights.output, x, (dim, width))
    if weights.output_bias is not None:
        _tensor(f"{name}.output_bias", weights.output_bias, x, (dim,))
    if weights.gate is not None:
        _tensor(f"{name}.gate", weights.gate, x, (width, dim))


def residual_gate(old: Tensor, new: Tensor, gate: ResidualGateParameters, *, backend: str = "auto") -> Tensor:
    """Combine old and new memory, with or without a gate (specification 2.10).

    Args:
        old, new: (B, S, D).
        gate: kind and parameters.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (B, S, D) with the dtype of old.

    Raises:
        TypeError, ValueError: a type, shape, dtype, device or name is not accepted, or a parameter is missing or
            superfluous.

    Example:
        >>> import torch
        >>> gate = ResidualGateParameters("static", weight=torch.zeros(3, 1))
        >>> residual_gate(torch.zeros(1, 3, 2), torch.ones(1, 3, 2), gate)[0, 0]
        tensor([0.5000, 0.5000])
    """
    floating("old", old)
    if old.dim() != 3:
        refuse_shape("old", old, "(batch, slots, D)")
    alike("new", new, "old", old)
    if new.shape != old.shape:
        refuse_shape("new", new, f"the shape of old, {tuple(old.shape)}")
    _check_gate("gate", gate, old)
    return _RESIDUAL_GATE.select(backend, old, new, gate)(old, new, gate)


def memory_norm(x: Tensor, norm: MemoryNormParameters, *, training: bool = False, backend: str = "auto") -> Tensor:
    """Norm over memory slots (specification 2.11).

    Args:
        x: (B, S, D).
        norm: kind and parameters; `norm.ema_rms` is updated in place in training, as batch norm does with its mean.
        training: whether running means are updated.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        (B, S, D) with the dtype of x.

    Raises:
        TypeError, ValueError: a type, shape, dtype, device or name is not accepted, or a parameter is missing or
            superfluous.

    Example:
        >>> import torch
        >>> memory_norm(torch.tensor([[[3.0, 4.0]]]), MemoryNormParameters("classic-rms", weight=torch.ones(2)))
        tensor([[[0.8485, 1.1314]]])
    """
    floating("x", x)
    if x.dim() != 3:
        refuse_shape("x", x, "(batch, slots, D)")
    _check_norm("norm", norm, x)
    return _MEMORY_NORM.select(backend, x, norm, training)(x, norm, training)


def memory_update(
    memory: Tensor,
    encoded: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    *,
    variant: str,
    mean_norm: MemoryNormParameters | None = None,
    groups: int = 1,
    key_mask: Tensor | None = None,
    key_angles: Tensor | None = None,
    rotary_layout: str = "interleaved",
    padding: str = "mask",
    attention_dropout: float = 0.0,
    context_attention_dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Write an encoded interaction into the short-term memory, all layers at once (specification 2.12).

    Args:
        memory: (L, B or 1, S, D), the old memory; batch 1 is shared by all rows. It is not changed.
        encoded: (L, B, T, D), the residual stream after each encoder layer.
        layers: L layers of parameters.
        variant: "simple", "self", "interlayer", "gated-self-interlayer" or "grouped-self-interlayer".
        mean_norm: norm of the mean memory; exactly for the three interlayer variants.
        groups: number of groups of neighbouring layers; other than 1 for "grouped-self-interlayer" only, divides L.
        key_mask: (B, T) bool, True = a token, False = padding. A row without any token keeps its old memory.
        key_angles: (T, head_dim/2) or (B, T, head_dim/2), positions of the encoded tokens; None: not rotated.
        rotary_layout: "interleaved" or "split"; it matters, because only the keys are rotated.
        padding: "mask" hides padded positions from the softmax; "dilute" zeroes them but lets them take their share, as
            the upstream library does with flash attention (specification 2.5).
        attention_dropout: probability of dropping an attention weight of the main step in training.
        context_attention_dropout: the same for the context attention.
        training: apply dropout, update running means.
        backend: "auto", "reference", "triton" or "native".

    Returns:
        The new memory (L, B, S, D).

    Raises:
        TypeError, ValueError: a type, shape, dtype, device, range or name is not accepted, a parameter is missing or
            superfluous for the variant.

    Example:
        >>> import torch
        >>> norm = MemoryNormParameters("classic-rms", weight=torch.ones(8))
        >>> eye = torch.eye(8)
        >>> attention = AttentionWeights(eye, eye, eye, eye, None, None, query_heads=2, key_value_heads=2, head_dim=4)
        >>> layer = MemoryUpdateLayer(norm, torch.ones(8), attention, ResidualGateParameters("add"))
        >>> memory_update(torch.randn(2, 1, 4, 8), torch.randn(2, 3, 5, 8), [layer, layer], variant="simple").shape
        torch.Size([2, 3, 4, 8])
    """
    floating("memory", memory)
    alike("encoded", encoded, "memory", memory)
    if encoded.dim() != 4:
        refuse_shape("encoded", encoded, "(layers, batch, time, D)")
    number_of_layers, batch, time, dim = encoded.shape
    if (
        memory.dim() != 4
        or memory.shape[0] != number_of_layers
        or (memory.shape[1] != batch and memory.shape[1] != 1)
        or memory.shape[3] != dim
    ):
        refuse_shape(
            "memory", memory, f"(layers, batch or 1, slots, D), here ({number_of_layers}, {batch} or 1, S, {dim})"
        )
    if variant not in VARIANTS:
        refuse_value("variant", variant, _names(VARIANTS))
    if len(layers) != number_of_layers or not number_of_layers:
        raise ValueError(
            f"layers has {len(layers)} entries; accepted is one per layer of encoded, here {number_of_layers}."
        )
    _check_variant(memory, layers, variant, mean_norm, groups)
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype is not torch.bool:
            refuse_type("key_mask", key_mask, "a bool tensor, True = keep; convert a 0/1 mask with .bool()")
        if key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] != time:
            refuse_shape("key_mask", key_mask, f"(batch, time), here ({batch}, {time})")
        if key_mask.device != memory.device:
            refuse_device("key_mask", key_mask, "memory", memory)
    if key_angles is not None:
        _check_key_angles(key_angles, batch, time, layers, memory)
    check_layout("rotary_layout", rotary_layout)
    if padding not in PADDINGS:
        refuse_value("padding", padding, _names(PADDINGS))
    probability("attention_dropout", attention_dropout)
    probability("context_attention_dropout", context_attention_dropout)
    arguments = (
        memory, encoded, layers, variant, mean_norm, groups, key_mask, key_angles, rotary_layout, padding,
        attention_dropout, context_attention_dropout, training,
    )  # fmt: skip
    return _MEMORY_UPDATE.select(backend, *arguments)(*arguments)


def _check_key_angles(
    key_angles: Tensor, batch: int, time: int, layers: Sequence[MemoryUpdateLayer], memory: Tensor
) -> None:
    floating("key_angles", key_angles)
    for layer in layers:
        head_dim = layer.attention.head_dim
        one, each = (time, head_dim // 2), (batch, time, head_dim // 2)
        if head_dim % 2 or (key_angles.shape != one and key_angles.shape != each):
            refuse_shape("key_angles", key_angles, f"{one} or {each} for an even head_dim, here {head_dim}")
    if key_angles.device != memory.device:
        refuse_device("key_angles", key_angles, "memory", memory)


def _check_variant(
    memory: Tensor,
    layers: Sequence[MemoryUpdateLayer],
    variant: str,
    mean_norm: MemoryNormParameters | None,
    groups: int,
) -> None:
    """Require exactly the parameters that the variant reads."""
    gated = variant in ("gated-self-interlayer", "grouped-self-interlayer")
    if (mean_norm is not None) is not (gated or variant == "interlayer"):
        state = "None" if mean_norm is None else "given"
        raise ValueError(
            f"mean_norm is {state} for variant {variant!r}; accepted is one exactly for the interlayer variants."
        )
    if mean_norm is not None:
        _check_norm("mean_norm", mean_norm, memory)
    if groups != 1 and variant != "grouped-self-interlayer":
        refuse_value("groups", groups, f"1 for variant {variant!r}")
    if groups < 1 or len(layers) % groups:
        refuse_value("groups", groups, f"a divisor of the number of layers, {len(layers)}")
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        if not isinstance(layer, MemoryUpdateLayer):
            refuse_type(name, layer, "rxt_kernels.MemoryUpdateLayer")
        _check_norm(f"{name}.memory_norm", layer.memory_norm, memory)
        _tensor(f"{name}.input_norm_weight", layer.input_norm_weight, memory, (memory.shape[-1],))
        _check_attention(f"{name}.attention", layer.attention, memory)
        _check_gate(f"{name}.residual_gate", layer.residual_gate, memory)
        for field, wanted in (
            ("context_norm", variant != "simple"),
            ("context_attention", variant != "simple"),
            ("context_gate", variant != "simple"),
            ("interlayer_gate", gated),
        ):
            if (getattr(layer, field) is not None) is not wanted:
                raise ValueError(
                    f"{name}.{field} is {'missing' if wanted else 'given'} for variant {variant!r}; accepted is "
                    f"{'its parameters' if wanted else 'None'}."
                )
        if layer.context_norm is not None:
            _check_norm(f"{name}.context_norm", layer.context_norm, memory)
        if layer.context_attention is not None:
            _check_attention(f"{name}.context_attention", layer.context_attention, memory)
        if layer.context_gate is not None:
            _check_gate(f"{name}.context_gate", layer.context_gate, memory)
        if layer.interlayer_gate is not None:
            _check_gate(f"{name}.interlayer_gate", layer.interlayer_gate, memory)
