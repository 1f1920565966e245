"""Small models of every kind of structure a checkpoint can have, and what the checkpoint tests ask of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxt_model.checkpoint import PretrainedModel, upstream_grammar
from rxt_model.checkpoint.saving import upstream_config
from rxt_model.config import MemoryAttentionConfig, MLMHeadConfig, StatelessConfig, TransformerConfig
from rxt_model.decoder import RxTDecoder
from rxt_model.encoder import RxTEncoder
from rxt_model.heads import MLMHead
from rxt_model.memory_attention import RxTMemoryAttention
from rxt_model.models import RxTAlpha, RxTBeta
from rxt_model.stateless import SparseQueryTransformer

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 19,
    "embed_dim": 16,
    "ff_dim": 12,
    "att_heads": 4,
    "seq_len": 24,
    "stm_size": 6,
    "att_groups": 2,
    "att_query_groups": 2,
}
MEMORY_SIZES = {name: value for name, value in SIZES.items() if name not in ("vocab_size", "ff_dim")}
MOE = {"use_moe": True, "num_experts": 3, "moe_top_k": 2}
PER_EXPERT = {**MOE, "use_vectorized_moe": False, "num_shared_experts": 0, "moe_bias_mode": "local"}
SPLIT = {"rope_layout": "split"}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "query_token_id": 5, "answer_token_id": 6, "pad_token_id": 0}
LINEAR = {"use_gated_residual": True, "residual_gate_type": "linear", "use_tanh_residual_gate": False}
ELEMENTWISE = {**LINEAR, "residual_gate_type": "elementwise"}

Make = Callable[[], PretrainedModel]


def decoder(**changes: Any) -> RxTDecoder:
    return RxTDecoder(TransformerConfig(**{**SIZES, **changes}))


def encoder(**changes: Any) -> RxTEncoder:
    return RxTEncoder(TransformerConfig(**{**SIZES, "skip_memory_cross_attention": True, **changes}))


def memory_attention(**changes: Any) -> RxTMemoryAttention:
    return RxTMemoryAttention(MemoryAttentionConfig(**{**MEMORY_SIZES, **changes}))


def stateless(**changes: Any) -> SparseQueryTransformer:
    sizes = {name: value for name, value in SIZES.items() if name not in ("stm_size", "att_query_groups")}
    return SparseQueryTransformer(StatelessConfig(**{**sizes, "att_num_query_groups": 2, **changes}))


def full(
    model_class: type[Any] = RxTAlpha,
    *,
    decoder: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    variant: str = "gated-self-interlayer",
    common: dict[str, Any] | None = None,
) -> Any:
    shared = common or {}
    return model_class(
        {**SIZES, **shared, **(decoder or {})},
        {**SIZES, "skip_memory_cross_attention": True, **shared, **(encoder or {})},
        {**MEMORY_SIZES, **shared, **(LINEAR if memory is None else memory)},
        TOKENS,
        variant,
    )


def beta_3b_shape() -> Any:
    gated = {"use_gated_attention": True, "use_attention_output_bias": False, "rope_base": 100000}
    return full(
        RxTBeta,
        decoder={
            **MOE, **gated, "att_query_groups": 4, "cross_att_query_groups": 4, "use_gated_cross_attention": False,
            "num_shared_experts": 2, "shared_expert_dim": 8, "moe_bias_mode": "global",
            "moe_shared_experts_bias_mode": "global", "use_head_norm": True, "head_norm_type": "rms_norm",
            "stateless_layers_config": ("dense", "moe"), "final_stateless_layers_config": ("moe", "moe"),
            "dense_layer_dim": 20, "moe_use_weighted_shared_experts": True,
        },
        encoder={**gated, "ff_dim": 14},
        memory={**ELEMENTWISE, "num_groups": 2, "rope_base": 100000},
        variant="grouped-self-interlayer",
    )  # fmt: skip


def _decoders() -> Iterator[tuple[str, Make]]:
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "split": SPLIT,
        "mha": {"self_att_type": "mha", "cross_att_type": "mha"},
        "gqa-mqa": {"self_att_type": "gqa", "cross_att_type": "mqa"},
        "more-queries": {"att_query_groups": 4, "cross_att_query_groups": 2, "cross_att_groups": 1},
        "reversed": {"att_query_groups": 1, "att_groups": 4},
        "layer-norm": {"use_rms_norm": False},
        "plain-relu": {"use_gated": False, "ff_activation": "relu"},
        "head-norm": {"use_head_norm": True},
        "rms-head-norm": {"use_head_norm": True, "head_norm_type": "rms_norm"},
        "nope": {"use_nope": True},
        "gated": {"use_gated_attention": True, "gated_attention_activation": "silu"},
        "gated-cross-only": {"use_gated_cross_attention": True, "use_attention_output_bias": False},
        "dilute-match": {"padding": "dilute", "rope_angle_dtype": "match"},
        "stateless": {"stateless_layers_config": ("dense",), "dense_layer_dim": 10},
        "stateless-moe": {**MOE, "stateless_layers_config": ("moe",), "final_stateless_layers_config": ("dense",)},
        "per-expert": PER_EXPERT,
        "per-expert-split": {**PER_EXPERT, **SPLIT},
        "per-expert-1-shared": {**PER_EXPERT, "num_shared_experts": 1},
        "per-expert-2-shared-plain": {**PER_EXPERT, "num_shared_experts": 2, "use_gated": False},
        "stacked-split": {**MOE, **SPLIT},
        "stacked-plain": {**MOE, "use_gated": False, "num_shared_experts": 2},
    }
    for bias, shared_bias, count in itertools.product(
        ("local", "global", "off"), ("local", "global", "off"), (0, 1, 2)
    ):
        if count or shared_bias == "local":
            variants[f"stacked-{bias}-{count}-shared-{shared_bias}"] = {
                **MOE, "num_layers": 1, "moe_bias_mode": bias, "moe_shared_experts_bias_mode": shared_bias,
                "num_shared_experts": count, "shared_expert_dim": 8 if count == 2 else None,
            }  # fmt: skip
    for name, changes in variants.items():
        yield f"decoder-{name}", lambda changes=changes: decoder(**changes)


def _encoders() -> Iterator[tuple[str, Make]]:
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "split": SPLIT,
        "moe": {**MOE, "moe_bias_mode": "local"},
        "gated": {"use_gated_attention": True, "use_attention_output_bias": False},
        "cross-attention-read": {**SPLIT, "skip_memory_cross_attention": False, "cross_att_groups": 1},
        "cross-attention-kept": {"skip_memory_cross_attention": False, "reads_memory": False},
    }
    for name, changes in variants.items():
        yield f"encoder-{name}", lambda changes=changes: encoder(**changes)


def _memory_attentions() -> Iterator[tuple[str, Make]]:
    variants = ("simple", "self", "interlayer", "gated-self-interlayer", "grouped-self-interlayer")
    gates: dict[str, dict[str, Any]] = {
        "none": {},
        "linear": LINEAR,
        "elementwise": ELEMENTWISE,
        "static-shared": {"use_gated_residual": True, "residual_per_slot_gate": False},
        "linear-shared-status": {
            **LINEAR, "residual_per_slot_gate": False, "residual_gate_slot_status_type": "linear",
        },
    }  # fmt: skip
    for variant, (name, gate) in itertools.product(variants, gates.items()):
        groups = {"num_groups": 2} if variant == "grouped-self-interlayer" else {}
        changes = {"variant": variant, **gate, **groups}
        yield f"memory-{variant}-{name}", lambda changes=changes: memory_attention(**changes)
    others: dict[str, dict[str, Any]] = {
        "split": {**LINEAR, **SPLIT, "variant": "gated-self-interlayer"},
        "replace": {"variant": "simple", "disable_residual": True},
        "gate-for-self": {"variant": "self", "use_gate_for_self_attention": True, "residual_gate_type": "linear"},
        "second-attention": {"interlayer_att_type": "mha", "interlayer_att_groups": 1, "interlayer_att_dropout": 0.1},
        "status": {**ELEMENTWISE, "residual_gate_slot_status_type": "linear"},
        "per-dim": {**LINEAR, "norm_type": "positional", "norm_per_dim_scale": True},
    }
    for norm in ("rms", "adaptive", "positional", "layer"):
        others[f"norm-{norm}"] = {**LINEAR, "norm_type": norm, "norm_decay": 0.8}
    for name, changes in others.items():
        yield f"memory-{name}", lambda changes=changes: memory_attention(**changes)


def _others() -> Iterator[tuple[str, Make]]:
    yield "mlm-head", lambda: MLMHead(MLMHeadConfig(embed_dim=8, vocab_size=19))
    yield "stateless-dense", stateless
    yield "stateless-mqa-interleaved", lambda: stateless(att_type="mqa", rope_layout="interleaved")
    yield "stateless-moe", lambda: stateless(use_moe_ff=True, ff_num_experts=3, ff_moe_top_k=2)
    yield "stateless-stacked", lambda: stateless(use_moe_ff=True, ff_num_experts=3, use_vectorized_moe=True)
    yield "alpha-split-per-expert", lambda: full(decoder=PER_EXPERT, common=SPLIT)
    yield "alpha-interleaved-stacked", lambda: full(decoder=MOE)
    yield "alpha-dense-ungated", lambda: full(memory={}, variant="interlayer")
    yield "alpha-interlayer", lambda: full(memory=ELEMENTWISE, variant="interlayer", common=SPLIT)
    yield "alpha-self", lambda: full(memory=ELEMENTWISE, variant="self")
    yield (
        "alpha-encoder-reads-memory",
        lambda: full(encoder={"skip_memory_cross_attention": False}, common=SPLIT),
    )
    yield "beta-3b-shape", beta_3b_shape
    yield "beta-split", lambda: full(RxTBeta, decoder=PER_EXPERT, memory=ELEMENTWISE, common=SPLIT)


#: Name to a function that makes the model.
MODELS: dict[str, Make] = dict(itertools.chain(_decoders(), _encoders(), _memory_attentions(), _others()))


def randomise(model: PretrainedModel, seed: int = 1) -> PretrainedModel:
    """Every parameter and persistent buffer gets values of its own, biases and gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.3 * noise + (1.0 if "norm" in name or "ema_rms" in name else 0.0))
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> dict[str, Tensor]:
    """What a model computes from fixed inputs and a fixed memory."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if isinstance(model, MLMHead):
        return {"logits": model(normal(2, 3, model.config.embed_dim))}
    ids = torch.randint(0, 19, (2, 7), generator=generator)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    if isinstance(model, SparseQueryTransformer):
        return {"logits": model(ids, mask)}
    parts = model if isinstance(model, (RxTAlpha, RxTBeta)) else None
    config = model.decoder.config if parts is not None else model.config
    memory = normal(config.num_layers, 1, config.stm_size, config.embed_dim)
    result: dict[str, Tensor] = {}
    if parts is not None or isinstance(model, RxTDecoder):
        result["logits"] = (model.decoder if parts is not None else model)(ids, mask, memory)
    if parts is not None or isinstance(model, RxTEncoder):
        part = model.encoder if parts is not None else model
        if part.model.stm is not None:
            part.model.stm.load(memory)
        result["encoded"] = part(ids, mask)
    if parts is not None or isinstance(model, RxTMemoryAttention):
        part = model.memory_attention if parts is not None else model
        encoded = result.get("encoded", normal(config.num_layers, 2, 7, config.embed_dim))
        result["memory"] = part(encoded, mask, memory)
    return result


def assert_same(first: PretrainedModel, second: PretrainedModel) -> None:
    """The same weights, bit by bit, and the same answers."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    left, right = outputs(first), outputs(second)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def write_as_upstream(
    model: PretrainedModel,
    directory: Path,
    *,
    drop: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    encoder_memory: bool = False,
    memory_batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A directory as upstream would have saved it: its buffers, its map of shared tensors, none of our metadata.

    Args:
        model: whose weights are written.
        directory: where to.
        drop: configuration keys that the author of the model did not pass.
        config: replaces the configuration.
        encoder_memory: see `upstream_grammar`.
        memory_batch: conversations the saved memory holds.
        dtype: everything is saved in.
    """
    import json

    grammar = upstream_grammar(model, encoder_memory=encoder_memory)
    weights = dict(model.state_dict())
    tensors: dict[str, Tensor] = {}
    for name, shape in grammar.shapes.items():
        if name in weights:
            tensors[name] = weights[name].detach().to(dtype).clone().contiguous()
        elif name.endswith("stm.memory"):
            tensors[name] = torch.zeros(shape[0], memory_batch, *shape[2:], dtype=dtype)
        else:
            part: Any = model
            for step in name.split("model.")[0].strip(".").split("."):
                part = getattr(part, step) if step else part
            half = shape[-1]
            frequencies = 1.0 / part.config.rope_base ** (torch.arange(half, dtype=torch.float32) / half)
            if name.endswith("cache"):
                frequencies = torch.arange(shape[0])[:, None] * frequencies
            tensors[name] = frequencies.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata=grammar.metadata)
    content = upstream_config(model.component, model._config()) if config is None else config
    for part_name in ("decoder_config", "encoder_config", "memory_attention_config"):
        if part_name in content:
            content[part_name] = {key: value for key, value in content[part_name].items() if key not in drop}
    content = {key: value for key, value in content.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(content))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites the weights of a directory after `change` has worked on them; metadata stays."""
    from safetensors import safe_open

    path = directory / "model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
