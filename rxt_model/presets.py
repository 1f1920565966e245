"""Every configuration of spec section 4 by name, and how many parameters it has.

A preset is data: which class, which configuration, and which of its values are not published. Names of sizes follow the
models' own (`rxt-alpha-micro`, `sqat-m-gqa`); a component of a full preset is reached through `Preset.part`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from rxt_model.checkpoint.hub import PretrainedModel
from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, StatelessConfig, TokenIds, TransformerConfig
from rxt_model.layers.mixture_of_experts import PerExpertMixtureOfExperts, StackedMixtureOfExperts

__all__ = ["PRESETS", "ParameterCounts", "Preset", "build", "parameter_counts", "preset"]

_PARTS = ("decoder", "encoder", "memory_attention")


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        name: how it is asked for.
        component: what it builds (`PretrainedModel.component`).
        description: one line.
        configs: component kind to configuration; one entry for single components, three for full models.
        variant: memory attention variant of a full model.
        unpublished: which values are inferred or assumed, and from what; empty if every value is published.
    """

    name: str
    component: str
    description: str
    configs: Mapping[str, Any]
    variant: str | None = None
    unpublished: str = ""

    def config(self, *, with_token_ids: bool = True) -> dict[str, Any]:
        """The dictionary a model class is built from, complete (see `rxt_model.checkpoint.protocol`).

        Args:
            with_token_ids: for full models, include control-token ids; without them a tokenizer has to name them.

        Example:
            >>> preset("mlm-alpha-micro").config()
            {'embed_dim': 128, 'vocab_size': 7500}
        """
        if self.component in self.configs:
            single: dict[str, Any] = self.configs[self.component].to_dict()
            return single
        result: dict[str, Any] = {f"{part}_config": self.configs[part].to_dict() for part in _PARTS}
        result["memory_attention_variant"] = self.variant
        if with_token_ids:
            result["tokenizer_config"] = _TOKENS.to_dict()
        return result

    def part(self, kind: str) -> Preset:
        """A component of a full preset as a preset of its own.

        Raises:
            ValueError: the preset has no such component.

        Example:
            >>> preset("rxt-alpha-micro").part("encoder").name
            'rxt-alpha-micro/encoder'
        """
        if kind not in self.configs:
            raise ValueError(f"kind is {kind!r}; the preset {self.name!r} has {', '.join(self.configs)}.")
        if kind == self.component:
            return self
        return Preset(
            f"{self.name}/{kind}",
            kind,
            f"{kind.replace('_', ' ')} of {self.name}",
            MappingProxyType({kind: self.configs[kind]}),
            unpublished=self.unpublished,
        )


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has, each shared one counted once.

    Attributes:
        total: all of them.
        active: those a single token uses: of every mixture of experts only top-k experts (spec section 4).
        parts: the same for the components of a full model; the shared embedding counts in decoder and encoder.
    """

    total: int
    active: int
    parts: Mapping[str, ParameterCounts]


def preset(name: str) -> Preset:
    """The preset of this name; `name/decoder`, `name/encoder` and `name/memory_attention` are components of full ones.

    Raises:
        ValueError: there is none; the message lists the names.

    Example:
        >>> preset("sqat-mm-xsqa").configs["stateless"].att_num_query_groups
        2
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; the name of a preset is needed.")
    base, _, kind = name.partition("/")
    found = PRESETS.get(base)
    if found is None:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name is {name!r}; known presets are {', '.join(PRESETS)}.{hint}")
    return found.part(kind) if kind else found


def build(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> PretrainedModel:
    """A model of this preset with freshly drawn weights (`from_pretrained` loads trained ones).

    Args:
        name: of a preset.
        device: where to draw them; "meta" makes a model without memory, for counting; None is torch's default device.
        dtype: floating point type; None is torch's default.
        tokenizer: for full models; its control-token ids take the place of the preset's, which are inferred.

    Raises:
        ValueError: no such preset, or a tokenizer that does not fit it.
        TypeError: a tokenizer for a component.

    Example:
        >>> parameter_counts(build("mlm-alpha-mini", device="meta")).total
        2636304
    """
    chosen = preset(name)
    model_class = _model_class(chosen.component)
    is_full = chosen.component not in chosen.configs
    if tokenizer is not None and not is_full:
        raise TypeError(f"tokenizer is given, and {name!r} is a component, which has none: leave it out.")
    previous = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with torch.device(torch.get_default_device() if device is None else device):
            config = chosen.config(with_token_ids=tokenizer is None)
            return model_class._from_config(config, tokenizer=tokenizer)
    finally:
        torch.set_default_dtype(previous)


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Total and active parameters from shapes alone (spec section 7, defect 25), on any device, meta included.

    Example:
        >>> counts = parameter_counts(build("rxt-beta-micro/decoder", device="meta"))
        >>> counts.total, counts.active
        (251304192, 41432320)
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, PerExpertMixtureOfExperts):
            experts = [sum(parameter.numel() for parameter in expert.parameters()) for expert in module.experts]
        elif isinstance(module, StackedMixtureOfExperts):
            stacked = (module.w1, module.w2, module.b1, module.b2)
            one = sum(tensor[0].numel() for tensor in stacked if tensor is not None)
            experts = [one] * module.options.num_experts
        else:
            continue
        idle += sum(experts[module.options.top_k :])
    children = {name: getattr(model, name, None) for name in _PARTS}
    is_full = all(isinstance(child, PretrainedModel) for child in children.values())
    parts = {name: parameter_counts(child) for name, child in children.items() if child is not None} if is_full else {}
    return ParameterCounts(total, total - idle, parts)


def _model_class(component: str) -> type[PretrainedModel]:
    from rxt_model.decoder import RxTDecoder
    from rxt_model.encoder import RxTEncoder
    from rxt_model.heads import MLMHead
    from rxt_model.memory_attention import RxTMemoryAttention
    from rxt_model.models import RxTAlpha, RxTBeta
    from rxt_model.stateless import SparseQueryTransformer

    classes: tuple[type[PretrainedModel], ...] = (
        RxTDecoder, RxTEncoder, RxTMemoryAttention, MLMHead, SparseQueryTransformer, RxTAlpha, RxTBeta,
    )  # fmt: skip
    return {model_class.component: model_class for model_class in classes}[component]  # type: ignore[index]


# the table of spec section 4

#: Ids of control tokens are not published; the trainer's defaults are pad 0, EOS 3, [A] 6, hence [Q] 5 (spec 2.15).
_TOKENS = TokenIds(pad_token_id=0, bos_token_id=2, eos_token_id=3, query_token_id=5, answer_token_id=6)


def _full(
    name: str,
    component: str,
    description: str,
    *,
    width: int,
    layers: int,
    heads: int,
    vocabulary: int,
    length: int,
    slots: int,
    decoder: Mapping[str, Any],
    encoder: Mapping[str, Any],
    memory: Mapping[str, Any],
    variant: str,
    rope_layout: str = "split",
    rope_base: int = 10000,
    unpublished: str = "",
) -> Preset:
    common: dict[str, Any] = {
        "num_layers": layers,
        "embed_dim": width,
        "att_heads": heads,
        "seq_len": length,
        "stm_size": slots,
        "rope_layout": rope_layout,
        "rope_base": rope_base,
    }
    legacy = {"use_vectorized_moe": False, "num_shared_experts": 0, "moe_bias_mode": "local"}
    configs = {
        "decoder": TransformerConfig(**{**common, "vocab_size": vocabulary, "use_moe": True, **legacy, **decoder}),
        "encoder": TransformerConfig(
            **{**common, "vocab_size": vocabulary, "skip_memory_cross_attention": True, **legacy, **encoder}
        ),
        "memory_attention": MemoryAttentionConfig(
            **{**common, "use_gated_residual": True, "use_tanh_residual_gate": False, "variant": variant, **memory}
        ),
    }
    return Preset(name, component, description, MappingProxyType(configs), variant, unpublished)


def _heads(query: int, key_value: int) -> dict[str, Any]:
    return {"att_query_groups": query, "att_groups": key_value}


def _cross_heads(query: int, key_value: int) -> dict[str, Any]:
    return {"cross_att_query_groups": query, "cross_att_groups": key_value}


def _experts(hidden: int, count: int, top_k: int) -> dict[str, Any]:
    return {"ff_dim": hidden, "num_experts": count, "moe_top_k": top_k}


_LINEAR = {"residual_gate_type": "linear"}
_ELEMENTWISE = {"residual_gate_type": "elementwise"}


def _alpha() -> list[Preset]:
    return [
        _full(
            "rxt-alpha-micro", "rxt_alpha", "RxT-Alpha Micro, called Nano in the paper, 12M",
            width=128, layers=6, heads=8, vocabulary=7500, length=256, slots=256,
            decoder={**_heads(4, 4), **_experts(256, 12, 2)}, encoder={**_heads(4, 4), "ff_dim": 384},
            memory={**_heads(4, 4), **_LINEAR}, variant="interlayer",
        ),
        _full(
            "rxt-alpha-micro-plus", "rxt_alpha", "RxT-Alpha Micro Plus, called Micro in the paper, 27M",
            width=128, layers=10, heads=8, vocabulary=7500, length=256, slots=256,
            decoder={**_heads(4, 4), **_experts(256, 20, 4)}, encoder={**_heads(4, 4), "ff_dim": 384},
            memory={**_heads(4, 4), **_LINEAR}, variant="gated-self-interlayer",
        ),
        _full(
            "rxt-alpha-mini", "rxt_alpha", "RxT-Alpha Mini, base decoder (60M) and base encoder (11M)",
            width=256, layers=8, heads=16, vocabulary=10000, length=1024, slots=1024,
            decoder={**_heads(8, 8), **_experts(512, 16, 2)},
            encoder={**_heads(8, 8), **_cross_heads(8, 4), "ff_dim": 768, "skip_memory_cross_attention": False},
            memory={**_heads(8, 8), **_ELEMENTWISE}, variant="gated-self-interlayer",
            unpublished="There is no published memory attention of this size: gated self/interlayer is assumed from the "
            "rest of the family, with elementwise gates as in the other model of 1024 slots. The encoder's cross-attention is "
            "read as 8 query and 4 key/value heads, as its card says; releases of that time ignored the 4 and would have "
            "built 8.",
        ),
        _full(
            "rxt-alpha-mini-s", "rxt_alpha", "RxT-Alpha Mini-S, called Mini in the paper, 100M",
            width=256, layers=10, heads=16, vocabulary=10000, length=256, slots=256,
            decoder={**_heads(8, 8), **_experts(512, 20, 4)}, encoder={**_heads(8, 8), "ff_dim": 768},
            memory={**_heads(8, 8), **_LINEAR}, variant="gated-self-interlayer",
            unpublished="Sizes are inferred from published file sizes, which they reproduce. The number of active experts "
            "is unknown (4 of 20 is assumed, as in Micro Plus), and so is the gate type (linear gates give 98.6M of a "
            "stated 100M).",
        ),
    ]  # fmt: skip


def _beta() -> list[Preset]:
    gated = {"use_gated_attention": True, "use_attention_output_bias": False}
    big_router = {"router_amp": True, "router_dtype": "bfloat16"}
    return [
        _full(
            "rxt-beta-micro", "rxt_beta", "RxT-Beta Micro Supervised (and its -AI release), 270M",
            width=256, layers=14, heads=16, vocabulary=32000, length=1024, slots=1024,
            decoder={**_heads(8, 4), **_experts(512, 42, 4)}, encoder={**_heads(8, 8), "ff_dim": 768},
            memory={**_heads(8, 8), **_ELEMENTWISE}, variant="gated-self-interlayer",
        ),
        _full(
            "rxt-beta-3b", "rxt_beta", "RxT-Beta, 3B with 190M active",
            width=512, layers=21, heads=16, vocabulary=65536, length=8192, slots=4096,
            decoder={
                **_heads(8, 4), **_experts(192, 384, 10), **gated, **big_router, "use_gated_cross_attention": False,
                "use_vectorized_moe": True, "num_shared_experts": 2, "shared_expert_dim": 384, "moe_bias_mode": "global",
                "moe_shared_experts_bias_mode": "global", "use_head_norm": True, "head_norm_type": "rms_norm",
                "stateless_layers_config": ("dense", "moe"), "final_stateless_layers_config": ("moe", "moe"),
                "dense_layer_dim": 1536,
            },
            encoder={**_heads(8, 8), **gated, "ff_dim": 1536},
            memory={**_heads(8, 8), **_ELEMENTWISE, "num_groups": 3}, variant="grouped-self-interlayer",
            rope_layout="interleaved", rope_base=100000,
            unpublished="The interleaved rotary layout is inferred from configuration keys newer than the switch. The "
            "memory attention has 22.33M parameters against a stated 22.2M.",
        ),
    ]  # fmt: skip


def _beta_encoders() -> list[Preset]:
    """Encoders of newer Beta models, whose decoders are not described anywhere."""
    result = []
    for name, size, width, layers, hidden in (
        ("rxt-beta-micro-0.6b-encoder", "Micro 0.6B", 256, 16, 1024),
        ("rxt-beta-mini-1.2b-encoder", "Mini 1.2B", 384, 15, 1536),
    ):
        config = TransformerConfig(
            num_layers=layers, vocab_size=65536, embed_dim=width, ff_dim=hidden, att_heads=16, seq_len=8192,
            att_query_groups=8, att_groups=8, use_gated_attention=True, use_attention_output_bias=False,
            skip_memory_cross_attention=True, rope_base=100000,
        )  # fmt: skip
        result.append(
            Preset(
                name,
                "encoder",
                f"base encoder of RxT-Beta {size}",
                MappingProxyType({"encoder": config}),
                unpublished="Every size is inferred from the published file's size, which it reproduces to the byte; the "
                "rotary base, which leaves no trace there, is that of RxT-Beta 3B.",
            )
        )
    return result


def _sparse_query_family() -> list[Preset]:
    result = []
    dense = {
        "mha": (16, 16), "gqa": (16, 4), "mqa": (16, 1), "sqa": (8, 4), "ssqa": (8, 8), "xsqa": (4, 4), "xsmqa": (4, 1),
    }  # fmt: skip
    for kind, (query, key_value) in dense.items():
        config = StatelessConfig(
            num_layers=8, vocab_size=10000, embed_dim=256, ff_dim=768, att_heads=16, seq_len=1024,
            att_num_query_groups=query, att_groups=key_value,
        )  # fmt: skip
        description = (
            f"dense decoder-only model of the sparse query attention study, {query} query, {key_value} kv heads"
        )
        result.append(Preset(f"sqat-m-{kind}", "stateless", description, MappingProxyType({"stateless": config})))
    moe = {"gqa": (8, 2), "mqa": (8, 1), "sqa": (4, 2), "ssqa": (4, 4), "xsqa": (2, 2)}
    for kind, (query, key_value) in moe.items():
        config = StatelessConfig(
            num_layers=6, vocab_size=5000, embed_dim=128, ff_dim=256, att_heads=8, seq_len=256,
            att_num_query_groups=query, att_groups=key_value, use_moe_ff=True, ff_num_experts=12, ff_moe_top_k=2,
        )  # fmt: skip
        description = f"decoder-only model with 12 experts of the same study, {query} query, {key_value} kv heads"
        result.append(Preset(f"sqat-mm-{kind}", "stateless", description, MappingProxyType({"stateless": config})))
    return result


def _mlm_heads() -> list[Preset]:
    return [
        Preset(
            name,
            "mlm_head",
            f"masked-language-modelling head of {of}",
            MappingProxyType({"mlm_head": MLMHeadConfig(embed_dim=width, vocab_size=vocabulary)}),
        )
        for name, of, width, vocabulary in (
            ("mlm-alpha-micro", "RxT-Alpha Micro and Micro Plus", 128, 7500),
            ("mlm-alpha-mini", "RxT-Alpha Mini", 256, 10000),
            ("mlm-beta-3b", "RxT-Beta 3B", 512, 65536),
        )
    ]


#: Every preset by name.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {item.name: item for item in (*_alpha(), *_beta(), *_beta_encoders(), *_sparse_query_family(), *_mlm_heads())}
)
