"""Configurations of every model in the family, as frozen dataclasses that refuse what cannot work.

Field names are the ones that published ``config.json`` files use (spec 3.2), so a configuration reads the same in a
checkpoint and in code. Four fields are this project's own and never written into ``config.json``: ``rope_layout``,
``rope_angle_dtype``, ``padding`` and ``reads_memory`` (spec 2.2, 2.5, 3.2); checkpoints carry them as metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

RopeLayout = Literal["split", "interleaved"]
RopeAngleDtype = Literal["float32", "match"]
Padding = Literal["mask", "dilute"]

ATTENTION_TYPES = ("mha", "gqa", "mqa", "sqa")
ACTIVATIONS = ("swish", "silu", "relu", "gelu", "sigmoid", "linear")
ATTENTION_GATE_ACTIVATIONS = (*ACTIVATIONS, "tanh")
GATE_TYPES = ("static", "elementwise", "linear")
SLOT_STATUS_TYPES = ("mean", "linear")
MEMORY_NORM_TYPES = ("classic-rms", "rms", "adaptive", "positional", "layer")
BIAS_MODES = ("local", "global", "off")
STATELESS_LAYER_KINDS = ("dense", "moe")

#: Memory-attention variants, and the spelling upstream configurations use for the gated ones.
MEMORY_ATTENTION_VARIANTS = ("simple", "self", "interlayer", "gated-self-interlayer", "grouped-self-interlayer")
UPSTREAM_VARIANT_SPELLINGS = {"self-interlayer": "gated-self-interlayer", "gated": "gated-self-interlayer"}

#: Fields that belong to this project and that upstream constructors would refuse.
OWN_FIELDS = ("rope_layout", "rope_angle_dtype", "padding", "reads_memory", "variant")

ConfigType = TypeVar("ConfigType", bound="_Config")


def canonical_variant(name: str) -> str:
    """The one spelling this package uses for a memory-attention variant.

    Raises:
        ValueError: the name is not a known variant (spec 2.12); nothing is guessed (spec 7, defect 1).

    Example:
        >>> canonical_variant("self-interlayer")
        'gated-self-interlayer'
    """
    variant = UPSTREAM_VARIANT_SPELLINGS.get(name, name)
    if variant not in MEMORY_ATTENTION_VARIANTS:
        known = ", ".join((*MEMORY_ATTENTION_VARIANTS, *UPSTREAM_VARIANT_SPELLINGS))
        raise ValueError(f"memory_attention_variant is {name!r}; known variants are {known}.")
    return variant


@dataclass(frozen=True)
class _Config:
    """What all configurations share: building from a plain mapping, and checks that answer in sentences."""

    @classmethod
    def from_dict(cls: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
        """Build from a mapping of field names to values.

        Raises:
            ValueError: a key is not a field of this configuration, a field without default is missing, or a value is out
                of range.
        """
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        unknown = sorted(set(map(str, values)) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(sorted(known))}."
            )
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
        if missing:
            raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}; give a value for each.")
        return cls(**values)

    @classmethod
    def of(cls: type[ConfigType], value: ConfigType | Mapping[str, Any]) -> ConfigType:
        """A configuration as it is, or one built from a mapping.

        Raises:
            TypeError: neither of the two.
            ValueError: see :meth:`from_dict`.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise TypeError(
            f"config is of type {type(value).__name__}; it must be a {cls.__name__} or a mapping of its fields."
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, defaults included, as JSON-able values."""
        return dataclasses.asdict(self)

    def replace(self: ConfigType, **changes: Any) -> ConfigType:
        """A copy with some fields changed; the copy is checked like a new configuration."""
        return dataclasses.replace(self, **changes)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {value!r}; it must be an integer of at least 1.")

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__}.{name} is {value!r}; accepted are {', '.join(map(repr, choices))}."
            )

    def _require_probability(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < 1.0:
                raise ValueError(f"{type(self).__name__}.{name} is {value!r}; it must be a number in [0, 1).")

    def _require_positive_or_none(self, *names: str) -> None:
        self._require_positive(*(name for name in names if getattr(self, name) is not None))

    def _require_switches(self) -> None:
        """Every field whose default is True or False holds True or False; the string "false" would count as True."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{type(self).__name__}.{field.name} is {value!r}; it must be True or False.")


def head_counts(
    att_type: str, heads: int, groups: int, query_groups: int | None, *, where: str = "attention"
) -> tuple[int, int]:
    """Query heads and key/value heads of one attention (spec 2.4).

    Args:
        att_type: ``mha`` (all heads), ``gqa`` (all query heads), ``mqa`` (one key/value head) or ``sqa``.
        heads: heads the model width is split into; ``head_dim = embed_dim / heads``.
        groups: key/value heads of ``gqa`` and ``sqa``.
        query_groups: query heads of ``sqa``.
        where: what the error message calls this attention.

    Raises:
        ValueError: unknown type, ``sqa`` without ``query_groups``, or counts of which neither divides the other.

    Example:
        >>> head_counts("sqa", 16, 4, 8)
        (8, 4)
    """
    if att_type == "mha":
        counts = heads, heads
    elif att_type == "gqa":
        counts = heads, groups
    elif att_type == "mqa":
        counts = heads, 1
    elif att_type == "sqa":
        if query_groups is None:
            raise ValueError(f"{where} of type 'sqa' needs its number of query heads; query groups is None.")
        counts = query_groups, groups
    else:
        raise ValueError(f"{where} has type {att_type!r}; accepted are {', '.join(map(repr, ATTENTION_TYPES))}.")
    query_heads, key_value_heads = counts
    if type(query_heads) is not int or type(key_value_heads) is not int:
        raise ValueError(f"{where} has head counts {query_heads!r} and {key_value_heads!r}; they must be integers.")
    for name, count in (("query", query_heads), ("key/value", key_value_heads)):
        if not 1 <= count <= heads:
            raise ValueError(f"{where} has {count} {name} heads; it must have between 1 and att_heads = {heads}.")
    if max(counts) % min(counts):
        raise ValueError(
            f"{where} has {query_heads} query heads and {key_value_heads} key/value heads; one must divide the other."
        )
    return counts


@dataclass(frozen=True)
class TransformerConfig(_Config):
    """Decoder or encoder of a Reactive Transformer (spec 3.2).

    ``use_flash_attention``, ``moe_grouped_gemm``, ``moe_use_cutlass_grouped_gemm``, ``init_identity_norm``,
    ``vectorized_moe_from_legacy`` and ``legacy_stm_in_encoder`` say how upstream builds or runs the model and change no
    result here; they are carried so that a saved configuration stays complete. What flash attention does to padded
    batches is the explicit switch ``padding="dilute"``.

    Example:
        >>> config = TransformerConfig(num_layers=2, embed_dim=64, att_heads=4, att_groups=2, att_query_groups=2)
        >>> config.head_dim, config.self_attention_heads
        (16, (2, 2))
    """

    num_layers: int = 12
    vocab_size: int = 20000
    embed_dim: int = 512
    ff_dim: int = 1536
    att_heads: int = 16
    seq_len: int = 1024
    stm_size: int = 1024
    self_att_type: str = "sqa"
    cross_att_type: str = "sqa"
    att_groups: int = 1
    att_query_groups: int | None = None
    cross_att_groups: int | None = None
    cross_att_query_groups: int | None = None
    use_flash_attention: bool = False
    use_gated: bool = True
    ff_activation: str = "swish"
    ff_dropout: float = 0.0
    att_dropout: float = 0.0
    use_rms_norm: bool = True
    use_moe: bool = False
    num_experts: int = 1
    moe_top_k: int = 1
    num_shared_experts: int = 1
    shared_expert_dim: int | None = None
    use_vectorized_moe: bool = True
    vectorized_moe_from_legacy: bool = False
    moe_bias_mode: str = "global"
    moe_shared_experts_bias_mode: str = "local"
    moe_use_weighted_shared_experts: bool = False
    moe_grouped_gemm: bool = True
    moe_use_cutlass_grouped_gemm: bool = True
    router_amp: bool = False
    router_dtype: str = "float32"
    use_head_norm: bool = False
    head_norm_type: str = "layer_norm"
    init_identity_norm: bool = False
    skip_memory_cross_attention: bool = False
    stateless_layers_config: tuple[str, ...] | None = None
    final_stateless_layers_config: tuple[str, ...] | None = None
    dense_layer_dim: int = 1536
    use_nope: bool = False
    rope_base: int = 10000
    use_gated_attention: bool = False
    gated_attention_activation: str = "sigmoid"
    use_gated_cross_attention: bool | None = None
    use_attention_output_bias: bool = True
    legacy_stm_in_encoder: bool = False
    rope_layout: RopeLayout = "interleaved"
    rope_angle_dtype: RopeAngleDtype = "float32"
    padding: Padding = "mask"
    reads_memory: bool = True

    def __post_init__(self) -> None:
        self._require_positive(
            "num_layers", "vocab_size", "embed_dim", "ff_dim", "att_heads", "seq_len", "stm_size", "att_groups",
            "num_experts", "moe_top_k", "dense_layer_dim", "rope_base",
        )  # fmt: skip
        self._require_positive_or_none(
            "att_query_groups", "cross_att_groups", "cross_att_query_groups", "shared_expert_dim"
        )
        self._require_switches()
        if self.use_gated_cross_attention not in (None, True, False):
            raise ValueError(
                f"use_gated_cross_attention is {self.use_gated_cross_attention!r}; it must be True, False or None."
            )
        self._require_choice("ff_activation", ACTIVATIONS)
        self._require_choice("gated_attention_activation", ATTENTION_GATE_ACTIVATIONS)
        self._require_choice("moe_bias_mode", BIAS_MODES)
        self._require_choice("moe_shared_experts_bias_mode", BIAS_MODES)
        self._require_choice("router_dtype", ("float32", "bfloat16", "float16"))
        self._require_choice("head_norm_type", ("layer_norm", "rms_norm"))
        self._require_choice("rope_layout", ("split", "interleaved"))
        self._require_choice("rope_angle_dtype", ("float32", "match"))
        self._require_choice("padding", ("mask", "dilute"))
        self._require_probability("ff_dropout", "att_dropout")
        if self.embed_dim % self.att_heads:
            raise ValueError(
                f"embed_dim is {self.embed_dim} and att_heads is {self.att_heads}; att_heads must divide embed_dim."
            )
        if not self.use_nope and self.head_dim % 2:
            raise ValueError(
                f"embed_dim / att_heads is {self.head_dim}; rotary embeddings need an even head dimension."
            )
        if type(self.num_shared_experts) is not int or self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts is {self.num_shared_experts!r}; it must be an integer of at least 0.")
        for name in ("stateless_layers_config", "final_stateless_layers_config"):
            kinds = getattr(self, name)
            if kinds is None:
                continue
            if not isinstance(kinds, (list, tuple)):
                raise ValueError(f"{name} is {kinds!r}; it must be a list of 'dense' and 'moe', or None.")
            object.__setattr__(self, name, tuple(kinds))  # JSON gives lists
            for kind in kinds:
                if kind not in STATELESS_LAYER_KINDS:
                    raise ValueError(f"{name} holds {kind!r}; accepted are 'dense' and 'moe'.")
        has_experts = self.use_moe or "moe" in (
            *(self.stateless_layers_config or ()), *(self.final_stateless_layers_config or ())
        )  # fmt: skip
        if has_experts and self.moe_top_k > self.num_experts:
            raise ValueError(
                f"moe_top_k is {self.moe_top_k} and num_experts is {self.num_experts}; a token cannot use more experts "
                "than there are."
            )
        _ = self.self_attention_heads, self.cross_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, ``embed_dim / att_heads``, whatever the number of query heads (spec 2.4)."""
        return self.embed_dim // self.att_heads

    @property
    def self_attention_heads(self) -> tuple[int, int]:
        """Query and key/value heads of self-attention."""
        return head_counts(
            self.self_att_type, self.att_heads, self.att_groups, self.att_query_groups, where="self-attention"
        )

    @property
    def cross_attention_heads(self) -> tuple[int, int]:
        """Query and key/value heads of memory cross-attention; unset values fall back to self-attention's."""
        groups = self.att_groups if self.cross_att_groups is None else self.cross_att_groups
        query_groups = self.att_query_groups if self.cross_att_query_groups is None else self.cross_att_query_groups
        return head_counts(self.cross_att_type, self.att_heads, groups, query_groups, where="memory cross-attention")

    @property
    def has_gated_cross_attention(self) -> bool:
        """Whether memory cross-attention is gated; None means the same as self-attention (spec 2.4)."""
        return self.use_gated_attention if self.use_gated_cross_attention is None else self.use_gated_cross_attention


@dataclass(frozen=True)
class MemoryAttentionConfig(_Config):
    """The network that writes an interaction into short-term memory (spec 2.10 to 2.12 and 3.2).

    ``interlayer_att_*`` describe the second attention of the interlayer variants and ``self_att_*`` that of the ``self``
    variant; values left at None are those of the main attention.
    """

    num_layers: int = 12
    embed_dim: int = 512
    att_heads: int = 16
    seq_len: int = 1024
    stm_size: int = 1024
    use_flash_attention: bool = False
    att_dropout: float = 0.0
    att_groups: int = 1
    att_type: str = "sqa"
    att_query_groups: int | None = None
    interlayer_att_dropout: float | None = None
    interlayer_att_groups: int | None = None
    interlayer_att_type: str | None = None
    interlayer_att_query_groups: int | None = None
    self_att_dropout: float | None = None
    self_att_groups: int | None = None
    self_att_type: str | None = None
    self_att_query_groups: int | None = None
    norm_type: str = "classic-rms"
    norm_init_gate: float = -2.0
    norm_per_dim_scale: bool = False
    norm_decay: float = 0.9
    use_gated_residual: bool = False
    residual_per_slot_gate: bool = True
    residual_gate_init: float = 3.0
    residual_gate_type: str = "static"
    residual_gate_slot_status_type: str = "mean"
    use_tanh_residual_gate: bool = True
    disable_residual: bool = False
    use_gate_for_self_attention: bool = False
    num_groups: int = 1
    rope_base: int = 10000
    variant: str = "interlayer"
    rope_layout: RopeLayout = "interleaved"
    rope_angle_dtype: RopeAngleDtype = "float32"
    padding: Padding = "mask"

    def __post_init__(self) -> None:
        self._require_positive(
            "num_layers", "embed_dim", "att_heads", "seq_len", "stm_size", "att_groups", "num_groups", "rope_base"
        )
        self._require_positive_or_none(
            "att_query_groups", "interlayer_att_groups", "interlayer_att_query_groups", "self_att_groups",
            "self_att_query_groups",
        )  # fmt: skip
        self._require_switches()
        object.__setattr__(self, "variant", canonical_variant(self.variant))
        self._require_choice("norm_type", MEMORY_NORM_TYPES)
        self._require_choice("residual_gate_type", GATE_TYPES)
        self._require_choice("residual_gate_slot_status_type", SLOT_STATUS_TYPES)
        self._require_choice("rope_layout", ("split", "interleaved"))
        self._require_choice("rope_angle_dtype", ("float32", "match"))
        self._require_choice("padding", ("mask", "dilute"))
        self._require_probability("att_dropout", "context_att_dropout")
        self._require_probability(
            *(n for n in ("interlayer_att_dropout", "self_att_dropout") if getattr(self, n) is not None)
        )
        if not 0.0 <= self.norm_decay <= 1.0:
            raise ValueError(f"norm_decay is {self.norm_decay!r}; it must lie in [0, 1].")
        if self.embed_dim % self.att_heads or (self.embed_dim // self.att_heads) % 2:
            raise ValueError(
                f"embed_dim is {self.embed_dim} and att_heads is {self.att_heads}; embed_dim / att_heads must be an even "
                "integer."
            )
        if (
            self.use_gated_residual
            and self.residual_gate_slot_status_type == "linear"
            and not self.residual_per_slot_gate
            and self.residual_gate_type != "linear"
        ):
            raise ValueError(
                f"residual_gate_slot_status_type is 'linear' with residual_per_slot_gate=False and residual_gate_type "
                f"{self.residual_gate_type!r}; a learned slot status needs one gate per slot unless the gate is 'linear'."
            )
        if self.variant == "grouped-self-interlayer" and self.num_layers % self.num_groups:
            raise ValueError(
                f"num_layers is {self.num_layers} and num_groups is {self.num_groups}; groups of the grouped variant must "
                "hold the same number of layers."
            )
        _ = self.attention_heads, self.context_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, ``embed_dim / att_heads``."""
        return self.embed_dim // self.att_heads

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Query and key/value heads of the main attention, from memory slots to encoded tokens."""
        return head_counts(
            self.att_type, self.att_heads, self.att_groups, self.att_query_groups, where="memory attention"
        )

    @property
    def _context_prefix(self) -> str:
        return "self_att" if self.variant == "self" else "interlayer_att"

    def _context(self, name: str) -> Any:
        value = getattr(self, f"{self._context_prefix}_{name}")
        return getattr(self, f"att_{name}") if value is None else value

    @property
    def context_attention_heads(self) -> tuple[int, int]:
        """Query and key/value heads of the second attention (among slots, or to the mean of layers)."""
        return head_counts(
            self._context("type"),
            self.att_heads,
            self._context("groups"),
            self._context("query_groups"),
            where="the second attention of memory attention",
        )

    @property
    def context_att_dropout(self) -> float:
        """Dropout of the second attention."""
        return float(self._context("dropout"))


@dataclass(frozen=True)
class MLMHeadConfig(_Config):
    """Masked-language-modelling head of encoder pre-training (spec 2.13)."""

    embed_dim: int = 512
    vocab_size: int = 20000

    def __post_init__(self) -> None:
        self._require_positive("embed_dim", "vocab_size")


@dataclass(frozen=True)
class StatelessConfig(_Config):
    """A decoder-only language model of the same family without memory (the SQAT models, spec section 4).

    It re-reads its history, or keeps its key/value cache between turns: what people would use instead of an RxT.
    """

    num_layers: int = 8
    vocab_size: int = 10000
    embed_dim: int = 256
    ff_dim: int = 768
    att_heads: int = 16
    seq_len: int = 1024
    att_type: str = "sqa"
    att_groups: int = 1
    att_num_query_groups: int | None = None
    use_flash_attention: bool = False
    use_gated: bool = True
    ff_activation: str = "swish"
    ff_dropout: float = 0.0
    att_dropout: float = 0.0
    use_rms_norm: bool = True
    use_moe_ff: bool = False
    ff_num_experts: int = 1
    ff_moe_top_k: int = 1
    use_vectorized_moe: bool = False
    rope_base: int = 10000
    rope_layout: RopeLayout = "split"
    rope_angle_dtype: RopeAngleDtype = "float32"
    padding: Padding = "mask"

    def __post_init__(self) -> None:
        _ = self.transformer_config()

    def transformer_config(self) -> TransformerConfig:
        """The same layers, described as a decoder without memory; every check of that class applies."""
        return TransformerConfig(
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            ff_dim=self.ff_dim,
            att_heads=self.att_heads,
            seq_len=self.seq_len,
            self_att_type=self.att_type,
            cross_att_type="mha",
            att_groups=self.att_groups,
            att_query_groups=self.att_num_query_groups,
            use_flash_attention=self.use_flash_attention,
            use_gated=self.use_gated,
            ff_activation=self.ff_activation,
            ff_dropout=self.ff_dropout,
            att_dropout=self.att_dropout,
            use_rms_norm=self.use_rms_norm,
            use_moe=self.use_moe_ff,
            num_experts=self.ff_num_experts,
            moe_top_k=self.ff_moe_top_k,
            num_shared_experts=0,
            use_vectorized_moe=self.use_vectorized_moe,
            moe_bias_mode="local",
            skip_memory_cross_attention=True,
            rope_base=self.rope_base,
            rope_layout=self.rope_layout,
            rope_angle_dtype=self.rope_angle_dtype,
            padding=self.padding,
        )

    @classmethod
    def like(cls, decoder: TransformerConfig, *, seq_len: int | None = None) -> StatelessConfig:
        """The stateless model that matches a decoder in width, depth, experts and heads, without its memory.

        Experts have biases of their own, also where the decoder's share one or have none.

        Raises:
            ValueError: the decoder has something that this model cannot have, so that the two would not match.
        """
        if decoder.num_shared_experts and decoder.use_moe:
            raise ValueError(
                f"num_shared_experts is {decoder.num_shared_experts}; the stateless model has routed experts only."
            )
        plain: dict[str, object] = {
            "use_gated_attention": False, "use_attention_output_bias": True, "use_nope": False, "use_head_norm": False,
            "stateless_layers_config": None, "final_stateless_layers_config": None, "router_amp": False,
        }  # fmt: skip
        for name, value in plain.items():
            if getattr(decoder, name) != value and getattr(decoder, name) != ():
                raise ValueError(f"{name} is {getattr(decoder, name)!r}; the stateless model has {value!r} only.")
        query_heads, key_value_heads = decoder.self_attention_heads
        return cls(
            num_layers=decoder.num_layers,
            vocab_size=decoder.vocab_size,
            embed_dim=decoder.embed_dim,
            ff_dim=decoder.ff_dim,
            att_heads=decoder.att_heads,
            seq_len=decoder.seq_len if seq_len is None else seq_len,
            att_type="sqa",
            att_groups=key_value_heads,
            att_num_query_groups=query_heads,
            use_gated=decoder.use_gated,
            ff_activation=decoder.ff_activation,
            ff_dropout=decoder.ff_dropout,
            att_dropout=decoder.att_dropout,
            use_rms_norm=decoder.use_rms_norm,
            use_moe_ff=decoder.use_moe,
            ff_num_experts=decoder.num_experts,
            ff_moe_top_k=decoder.moe_top_k,
            use_vectorized_moe=decoder.use_vectorized_moe,
            rope_base=decoder.rope_base,
            rope_layout=decoder.rope_layout,
            rope_angle_dtype=decoder.rope_angle_dtype,
            padding=decoder.padding,
        )


@dataclass(frozen=True)
class TokenIds(_Config):
    """Ids of the control tokens a model was trained with (``tokenizer_config`` of a checkpoint, spec 3.1).

    Ids that a family does not use are None; a missing pad id is 0.
    """

    bos_token_id: int
    eos_token_id: int
    query_token_id: int
    answer_token_id: int
    pad_token_id: int = 0
    think_token_id: int | None = None
    tool_call_token_id: int | None = None
    tool_use_token_id: int | None = None
    internal_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"tokenizer_config.{field.name} is {value!r}; it must be an integer of at least 0.")
