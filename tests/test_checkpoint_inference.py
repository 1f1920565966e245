"""Structure from tensors first: eras, missing and contradicting configurations, missing and surplus tensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rxt_model.checkpoint import CheckpointError, CheckpointWarning
from rxt_model.config import TransformerConfig
from rxt_model.decoder import RxTDecoder
from rxt_model.encoder import RxTEncoder
from rxt_model.heads import MLMHead
from rxt_model.memory_attention import RxTMemoryAttention
from rxt_model.models import RxTAlpha
from rxt_model.stateless import SparseQueryTransformer
from tests.checkpoint_cases import (
    ELEMENTWISE,
    LINEAR,
    MODELS,
    MOE,
    PER_EXPERT,
    SPLIT,
    assert_same,
    decoder,
    edit_tensors,
    encoder,
    full,
    memory_attention,
    randomise,
    stateless,
    write_as_upstream,
)

SIZES_ONLY = (
    "use_moe", "num_experts", "use_vectorized_moe", "num_shared_experts", "moe_bias_mode", "att_heads", "att_groups",
    "att_query_groups", "self_att_type", "cross_att_type", "num_layers", "vocab_size", "embed_dim", "ff_dim", "seq_len",
    "stm_size", "use_rms_norm", "use_gated", "skip_memory_cross_attention", "num_layers", "use_head_norm",
    "head_norm_type", "stateless_layers_config", "final_stateless_layers_config", "dense_layer_dim",
    "use_gated_attention", "use_attention_output_bias", "use_gated_cross_attention", "cross_att_groups",
    "cross_att_query_groups", "shared_expert_dim", "moe_shared_experts_bias_mode", "att_type", "interlayer_att_type",
    "interlayer_att_groups", "interlayer_att_query_groups", "use_gated_residual", "residual_per_slot_gate",
    "residual_gate_slot_status_type", "norm_type", "norm_per_dim_scale", "memory_attention_variant",
    "self_att_groups", "self_att_query_groups", "use_gate_for_self_attention", "use_moe_ff", "ff_num_experts",
    "att_num_query_groups",
)  # fmt: skip


def edit_config(directory: Path, *path: str, **changes: Any) -> None:
    """Changes values of `config.json`, inside of the objects named by `path`; ... removes a key."""
    file = directory / "config.json"
    content = json.loads(file.read_text())
    part = content
    for step in path:
        part = part[step]
    for key, value in changes.items():
        if value is ...:
            part.pop(key, None)
        else:
            part[key] = value
    file.write_text(json.dumps(content))


def one_of_each(model: Any) -> list[str]:
    """A name of every form, whatever the number of its layer or expert."""
    import re

    return list({re.sub(r"\d+", "0", name): name for name in model.state_dict()}.values())


# tensors first


@pytest.mark.parametrize("name", [name for name in MODELS if "nope" not in name and "cross-attention-kept" not in name])
def test_structure_without_a_configuration(name: str, tmp_path: Path) -> None:
    """Everything a tensor tells is left out of the configuration; what remains are choices without a trace."""
    model = randomise(MODELS[name]())
    parts = [getattr(model, part) for part in ("decoder", "encoder", "memory_attention") if hasattr(model, part)]
    configs = [part.config for part in parts] if len(parts) == 3 else [model.config]
    write_as_upstream(model, tmp_path, drop=SIZES_ONLY)
    options: dict[str, Any] = {}
    if hasattr(configs[0], "rope_layout"):
        options = {key: getattr(configs[0], key) for key in ("rope_layout", "rope_angle_dtype", "padding")}
    if hasattr(configs[-1], "variant"):
        options["memory_attention_variant"] = configs[-1].variant
    loaded = type(model).from_pretrained(tmp_path, **options)
    assert_same(model, loaded)


def test_a_second_era_file_is_not_read_with_third_era_defaults(tmp_path: Path) -> None:
    """Such a configuration has no word on stacking, shared experts or biases; today's defaults would be wrong."""
    model = randomise(decoder(**PER_EXPERT, **SPLIT))
    write_as_upstream(model, tmp_path, memory_batch=2)
    content = json.loads((tmp_path / "config.json").read_text())
    assert not {"use_vectorized_moe", "num_shared_experts", "moe_bias_mode", "rope_base"} & content.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        loaded = RxTDecoder.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert loaded.config.rope_layout == "split"
    assert not loaded.config.use_vectorized_moe
    assert loaded.config.num_shared_experts == 0


@pytest.mark.parametrize("stated", [True, False])
def test_the_expert_layout_follows_the_tensors(stated: bool, tmp_path: Path) -> None:
    model = randomise(decoder(**MOE, moe_bias_mode="local") if stated is False else decoder(**PER_EXPERT))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, use_vectorized_moe=stated)
    loaded = RxTDecoder.from_pretrained(tmp_path)
    assert loaded.config.use_vectorized_moe is not stated
    assert_same(model, loaded)


def test_cross_attention_groups_that_early_releases_ignored(tmp_path: Path) -> None:
    model = randomise(decoder(att_query_groups=4, att_groups=4, **SPLIT))
    write_as_upstream(model, tmp_path)
    edit_config(tmp_path, cross_att_groups=1)
    loaded = RxTDecoder.from_pretrained(tmp_path, rope_layout="split")
    assert loaded.config.cross_attention_heads == (4, 4)
    assert_same(model, loaded)


def test_head_dimension_from_the_rotary_table(tmp_path: Path) -> None:
    """Two heads of eight and four heads of four have the same projections; the table tells them apart."""
    for heads, groups in ((2, 1), (4, 2)):
        model = decoder(att_heads=heads, att_query_groups=groups, att_groups=groups, **SPLIT)
        write_as_upstream(model, tmp_path, drop=("att_heads", "att_groups", "att_query_groups"))
        loaded = RxTDecoder.from_pretrained(tmp_path, rope_layout="split")
        assert loaded.config.att_heads == heads
        assert loaded.config.self_attention_heads == (groups, groups)


def test_without_table_and_configuration_heads_are_unknown(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    edit_config(tmp_path, att_heads=...)
    with pytest.raises(CheckpointError, match=r"config\.json, key 'att_heads': this value is missing"):
        RxTDecoder.from_pretrained(tmp_path)


def test_a_longer_rotary_table_wins_over_seq_len(tmp_path: Path) -> None:
    write_as_upstream(decoder(seq_len=48), tmp_path)
    edit_config(tmp_path, seq_len=24)
    assert RxTDecoder.from_pretrained(tmp_path, rope_layout="split").config.seq_len == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [10_000, 100_000, 500])
def test_rotary_base_from_the_table(base: int, dtype: torch.dtype, tmp_path: Path) -> None:
    write_as_upstream(decoder(rope_base=base, embed_dim=32, att_heads=2), tmp_path, dtype=dtype)
    edit_config(tmp_path, rope_base=...)
    assert RxTDecoder.from_pretrained(tmp_path, rope_layout="interleaved").config.rope_base == base


def test_a_table_of_no_base(tmp_path: Path) -> None:
    write_as_upstream(decoder(embed_dim=32, att_heads=2), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["model.layers.0.attention.rope.inv_freq"].mul_(0.9))
    with pytest.raises(CheckpointError, match=r"rope\.inv_freq'.*belong to no base \(rope_base is 10000"):
        RxTDecoder.from_pretrained(tmp_path, rope_layout="split")


@pytest.mark.parametrize("final", [False, True])
def test_old_names_of_stateless_norms(final: bool, tmp_path: Path) -> None:
    name = "final_stateless_layers" if final else "stateless_layers"
    model = randomise(decoder(**{f"{name}_config": ("dense", "dense"), "dense_layer_dim": 10}))
    model.save_pretrained(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for index in range(2):
            tensors[f"model.{name}.{index}.norm2.weight"] = tensors.pop(f"model.{name}.{index}.norm3.weight")

    edit_tensors(tmp_path, rename)
    assert_same(model, RxTDecoder.from_pretrained(tmp_path))


def test_memory_buffers_are_ignored_wherever_they_are(tmp_path: Path) -> None:
    model = randomise(full(decoder=PER_EXPERT, common=SPLIT))
    model.save_pretrained(tmp_path)
    for prefix in ("decoder.", "encoder.", "memory_attention."):
        edit_tensors(
            tmp_path, lambda t, prefix=prefix: t.update({f"{prefix}model.stm.memory": torch.zeros(2, 5, 9, 16)})
        )
    assert_same(model, RxTAlpha.from_pretrained(tmp_path))


# embeddings of full models


@pytest.mark.parametrize("dropped", ["encoder", "decoder"])
def test_either_embedding_restores_the_other(dropped: str, tmp_path: Path) -> None:
    model = randomise(full())
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{dropped}.model.embedding.weight"))
    assert_same(model, RxTAlpha.from_pretrained(tmp_path))


def test_no_embedding_at_all(tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: [t.pop(f"{part}.model.embedding.weight") for part in ("encoder", "decoder")])
    with pytest.raises(CheckpointError, match=r"'decoder\.model\.embedding\.weight'.*missing, and so is 'encoder"):
        RxTAlpha.from_pretrained(tmp_path)


def test_two_different_embeddings(tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["encoder.model.embedding.weight"].fill_(3.0))
    with pytest.warns(CheckpointWarning, match="the encoder's is used"):
        loaded = RxTAlpha.from_pretrained(tmp_path)
    assert (loaded.decoder.model.embedding.weight == 3.0).all()
    edit_tensors(tmp_path, lambda tensors: tensors.update({"encoder.model.embedding.weight": torch.zeros(20, 16)}))
    with pytest.raises(CheckpointError, match=r"'encoder\.model\.embedding\.weight'.*\(20, 16\).*\(19, 16\)"):
        RxTAlpha.from_pretrained(tmp_path)


# control tokens


def test_missing_token_ids(tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    edit_config(tmp_path, "tokenizer_config", pad_token_id=...)
    assert RxTAlpha.from_pretrained(tmp_path).token_ids.pad_token_id == 0
    edit_config(tmp_path, "tokenizer_config", query_token_id=None)
    with pytest.raises(CheckpointError, match=r"config\.json.*query_token_id"):
        RxTAlpha.from_pretrained(tmp_path)


# the rotary layout of an era


def _layout(model: Any, directory: Path, *, warns: bool, **keys: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = type(model).from_pretrained(directory)
    texts = [str(warning.message) for warning in caught if warning.category is CheckpointWarning]
    assert bool(texts) == warns, texts
    if warns:
        assert "rope_layout=" in texts[0]
        assert str(directory) in texts[0]
    config = loaded.decoder.config if hasattr(loaded, "decoder") else loaded.config
    layout: str = config.rope_layout
    return layout


def test_layout_of_our_own_files_is_certain(tmp_path: Path) -> None:
    for layout in ("split", "interleaved"):
        for model in (decoder(rope_layout=layout), memory_attention(rope_layout=layout), stateless(rope_layout=layout)):
            model.save_pretrained(tmp_path)
            assert _layout(model, tmp_path, warns=False) == layout


def test_layout_by_era(tmp_path: Path) -> None:
    split_full = full(decoder=PER_EXPERT, common=SPLIT)
    write_as_upstream(split_full, tmp_path / "1", encoder_memory=True)
    assert _layout(split_full, tmp_path / "1", warns=False) == "split"
    dense = full(common=SPLIT)
    write_as_upstream(dense, tmp_path / "2", encoder_memory=True)
    assert _layout(dense, tmp_path / "2", warns=False) == "split"
    write_as_upstream(dense, tmp_path / "3")
    assert _layout(dense, tmp_path / "3", warns=True) == "interleaved"
    stacked = decoder(**MOE)
    write_as_upstream(stacked, tmp_path / "4")
    assert _layout(stacked, tmp_path / "4", warns=False) == "interleaved"
    edit_config(tmp_path / "4", rope_base=...)
    assert _layout(stacked, tmp_path / "4", warns=True) == "interleaved"
    alone = decoder(**SPLIT)
    write_as_upstream(alone, tmp_path / "5")
    assert _layout(alone, tmp_path / "5", warns=True) == "split"
    memory = memory_attention(**LINEAR)
    write_as_upstream(memory, tmp_path / "6")
    assert _layout(memory, tmp_path / "6", warns=False) == "interleaved"


def test_no_doubt_where_the_layout_does_not_matter(tmp_path: Path) -> None:
    for index, model in enumerate((encoder(**SPLIT), stateless(), decoder(use_nope=True, **SPLIT))):
        directory = tmp_path / str(index)
        write_as_upstream(model, directory)
        _layout(model, directory, warns=False)


def test_an_override_ends_the_doubt(tmp_path: Path) -> None:
    write_as_upstream(decoder(**SPLIT), tmp_path)
    for layout in ("split", "interleaved"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckpointWarning)
            assert RxTDecoder.from_pretrained(tmp_path, rope_layout=layout).config.rope_layout == layout  # type: ignore[arg-type]


def test_encoders_of_the_interleaved_era_do_not_read_memory(tmp_path: Path) -> None:
    write_as_upstream(encoder(skip_memory_cross_attention=False), tmp_path)
    assert not RxTEncoder.from_pretrained(tmp_path, rope_layout="interleaved").config.reads_memory
    assert RxTEncoder.from_pretrained(tmp_path, rope_layout="split").config.reads_memory


# memory attention variants


def test_gates_decide_against_a_stated_interlayer(tmp_path: Path) -> None:
    """Releases that were asked for 'interlayer' built the gated variant (spec 7, defect 1); its tensors say so."""
    model = randomise(full(memory=ELEMENTWISE))
    write_as_upstream(model, tmp_path)
    edit_config(tmp_path, memory_attention_variant="interlayer")
    loaded = RxTAlpha.from_pretrained(tmp_path, rope_layout="interleaved")
    assert loaded.memory_attention.config.variant == "gated-self-interlayer"


def test_ungated_variants_look_alike(tmp_path: Path) -> None:
    write_as_upstream(memory_attention(variant="gated-self-interlayer"), tmp_path)
    with pytest.warns(CheckpointWarning, match="memory_attention_variant="):
        loaded = RxTMemoryAttention.from_pretrained(tmp_path)
    assert loaded.config.variant == "interlayer"
    chosen = RxTMemoryAttention.from_pretrained(tmp_path, memory_attention_variant="self-interlayer")
    assert chosen.config.variant == "gated-self-interlayer"


def test_a_variant_the_tensors_do_not_allow(tmp_path: Path) -> None:
    full(memory=ELEMENTWISE, variant="self").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*those of memory attention self.*'simple'"):
        RxTAlpha.from_pretrained(tmp_path, memory_attention_variant="simple")
    write_as_upstream(full(memory=ELEMENTWISE, variant="self"), tmp_path)
    edit_config(tmp_path, memory_attention_variant="grouped-self-interlayer")
    with pytest.raises(CheckpointError, match="stated as 'grouped-self-interlayer'"):
        RxTAlpha.from_pretrained(tmp_path)
    edit_config(tmp_path, memory_attention_variant="telepathic")
    with pytest.raises(CheckpointError, match=r"config\.json, key 'memory_attention_variant': .*'telepathic'"):
        RxTAlpha.from_pretrained(tmp_path)


def test_grouping_is_told_by_the_argument_only_its_class_has(tmp_path: Path) -> None:
    write_as_upstream(memory_attention(**LINEAR, variant="grouped-self-interlayer", num_groups=2), tmp_path)
    loaded = RxTMemoryAttention.from_pretrained(tmp_path)
    assert (loaded.config.variant, loaded.config.num_groups) == ("grouped-self-interlayer", 2)


# contradictions

CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("decoder-plain", {"num_layers": 3}, r"'model\.layers\.1\..*num_layers = 2.*'num_layers', says 3"),
    ("decoder-plain", {"vocab_size": 20}, r"'model\.embedding\.weight'.*vocab_size = 19.*says 20"),
    ("decoder-plain", {"embed_dim": 32}, r"embed_dim = 16.*says 32"),
    ("decoder-plain", {"ff_dim": 24}, r"ff\.fc2\.weight'.*ff_dim = 12.*says 24"),
    ("decoder-plain", {"att_heads": 3}, r"'att_heads': 3 does not divide the model width 16"),
    ("decoder-plain", {"att_groups": 4}, r"q_proj\.weight'.*2 query and 2 key/value heads.*att_groups = 4"),
    ("decoder-plain", {"self_att_type": "mha"}, r"self_att_type = 'mha'"),
    ("decoder-plain", {"self_att_type": "hybrid"}, "'hybrid'"),
    ("decoder-plain", {"cross_att_type": "mqa"}, r"memory_cross_attention\.q_proj.*cross_att_type = 'mqa'"),
    ("decoder-plain", {"use_moe": True, "num_experts": 4}, r"router\.gate\.weight'.*use_moe = False.*says True"),
    ("decoder-plain", {"use_rms_norm": False}, r"norm1\.bias'.*use_rms_norm = True"),
    ("decoder-plain", {"use_head_norm": True}, r"head_norm\.weight'.*use_head_norm = False"),
    ("decoder-plain", {"use_gated_attention": True}, r"gate_proj\.weight'.*use_gated_attention = False"),
    ("decoder-plain", {"use_gated_cross_attention": True}, "use_gated_cross_attention = False"),
    ("decoder-plain", {"use_attention_output_bias": False}, r"out_proj\.bias'.*use_attention_output_bias = True"),
    ("decoder-plain", {"use_gated": False}, "use_gated = True"),
    ("decoder-plain", {"stateless_layers_config": ["dense"]}, r"stateless_layers_config = \(\)"),
    ("decoder-stateless-moe", {"stateless_layers_config": ["dense"]}, r"= \('moe',\)"),
    ("decoder-stateless-moe", {"num_experts": 5}, "num_experts = 3.*says 5"),
    ("decoder-stateless-moe", {"moe_top_k": 4}, r"'moe_top_k': 4 is not between 1 and the 3 experts"),
    ("decoder-stateless-moe", {"moe_bias_mode": "local"}, "moe_bias_mode = 'global'.*says 'local'"),
    ("decoder-stateless-moe", {"num_shared_experts": 0}, "num_shared_experts = 1.*says 0"),
    ("decoder-stacked-off-2-shared-local", {"shared_expert_dim": 9}, "shared_expert_dim = 8.*says 9"),
    ("decoder-stacked-off-2-shared-local", {"moe_shared_experts_bias_mode": "off"}, "= 'local'.*says 'off'"),
    ("decoder-head-norm", {"head_norm_type": "rms_norm"}, "head_norm_type = 'layer_norm'"),
    ("decoder-per-expert", {"num_shared_experts": 2}, "num_shared_experts = 0.*says 2"),
    ("memory-gated-self-interlayer-linear", {"stm_size": 7}, r"gate\.weight'.*stm_size = 6.*says 7"),
    ("memory-gated-self-interlayer-linear", {"residual_gate_type": "static"}, "= 'linear'.*says 'static'"),
    ("memory-gated-self-interlayer-elementwise", {"residual_gate_type": "linear"}, "static or elementwise.*'linear'"),
    ("memory-gated-self-interlayer-linear", {"use_gated_residual": False}, "use_gated_residual = True"),
    ("memory-gated-self-interlayer-linear", {"residual_per_slot_gate": False}, "residual_per_slot_gate = True"),
    ("memory-gated-self-interlayer-linear", {"norm_type": "rms"}, "norm_type = 'classic-rms'"),
    ("memory-norm-positional", {"norm_per_dim_scale": True}, "norm_per_dim_scale = False"),
    ("memory-gated-self-interlayer-linear", {"interlayer_att_groups": 4}, r"mean_attention_layers\.0.*= 4"),
    ("memory-self-linear", {"use_gate_for_self_attention": True}, "use_gate_for_self_attention = False"),
    ("mlm-head", {"vocab_size": 4}, "vocab_size = 19.*says 4"),
    ("stateless-moe", {"ff_num_experts": 4}, r"ff_num_experts = 3.*'ff_num_experts', says 4"),
    ("stateless-moe", {"ff_moe_top_k": 4}, "'ff_moe_top_k': 4 is not between"),
    ("stateless-moe", {"use_moe_ff": False}, "use_moe_ff = True.*says False"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), CONTRADICTIONS)
def test_contradictions_name_both_files(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        type(model).from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "two"}, r"'num_layers': the value is 'two', an integer is needed"),
        ({"num_layers": 2.5}, "an integer is needed"),
        ({"num_layers": True}, "an integer is needed"),
        ({"num_layers": None}, "an integer is needed"),
        ({"use_moe": 1}, "true or false is needed"),
        ({"ff_dropout": "0"}, "a number is needed"),
        ({"ff_dropout": 1.5}, "ff_dropout"),
        ({"ff_activation": "softmax"}, "'softmax'"),
        ({"self_att_type": ["sqa"]}, "a string is needed"),
        ({"stateless_layers_config": "dense"}, "a list of strings or null is needed"),
        ({"att_query_groups": "2"}, "an integer or null is needed"),
        ({"rope_layout": "split"}, "'rope_layout': this field does not belong into config.json"),
        ({"att_experts": 4}, "mixture-of-experts attention, which is not implemented"),
        ({"attn_layer_types": ["gla"]}, "hybrid linear attention, which is not implemented"),
        ({"num_layers": 10**400}, "not valid JSON|an integer is needed"),
    ],
)
def test_wrong_values_in_a_configuration(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        RxTDecoder.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("part", ["decoder_config", "memory_attention_config", "tokenizer_config"])
@pytest.mark.parametrize("value", [3, [1], "x"])
def test_parts_of_a_full_configuration_must_be_objects(part: str, value: Any, tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    edit_config(tmp_path, **{part: value})
    with pytest.raises(CheckpointError, match=rf"config\.json, key '{part}': a JSON object is needed"):
        RxTAlpha.from_pretrained(tmp_path)


def test_unknown_keys_are_named_unless_switched_off(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    edit_config(tmp_path, a_new_switch=False, another=None, att_experts=None, debug_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        RxTDecoder.from_pretrained(tmp_path)
    edit_config(tmp_path, a_new_switch=True)
    with pytest.warns(CheckpointWarning, match="unknown keys are ignored: 'a_new_switch' = True"):
        RxTDecoder.from_pretrained(tmp_path)


# missing, surplus, misshapen


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    model = MODELS["beta-3b-shape"]()
    for name in one_of_each(model):
        if "embedding" in name:
            continue
        model.save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            type(model).from_pretrained(tmp_path)


def test_missing_surplus_and_shape_messages(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors, key 'model\.extra\.weight': the model has no such"):
        RxTDecoder.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in ("model.extra.weight", "model.head.bias")])
    with pytest.raises(CheckpointError, match=r"key 'model\.head\.bias': this tensor is missing\."):
        RxTDecoder.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.head.bias": torch.zeros(20)}))
    with pytest.raises(CheckpointError, match=r"'model\.head\.bias': the shape is \(20,\), the model needs \(19,\)"):
        RxTDecoder.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.head.bias": torch.zeros(19, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"'model\.head\.bias': .*torch\.int32; weights are floating point"):
        RxTDecoder.from_pretrained(tmp_path)


def test_a_layer_in_the_middle_is_missing(tmp_path: Path) -> None:
    decoder(num_layers=3).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.1.")])
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1': there are no tensors of this number, but of 2"):
        RxTDecoder.from_pretrained(tmp_path)


def test_odd_shapes_are_errors_not_crashes(tmp_path: Path) -> None:
    """Every tensor in turn becomes a scalar, empty, or of one dimension more."""
    for name in ("decoder-stateless-moe", "decoder-per-expert", "memory-gated-self-interlayer-linear", "mlm-head"):
        model = MODELS[name]()
        write_as_upstream(model, tmp_path)
        original = (tmp_path / "model.safetensors").read_bytes()
        for key in one_of_each(model):
            for shape in ((), (0,), (3, 1, 2, 1)):
                (tmp_path / "model.safetensors").write_bytes(original)
                edit_tensors(tmp_path, lambda t, key=key, shape=shape: t.update({key: torch.zeros(shape)}))
                with pytest.raises(CheckpointError, match=r"model\.safetensors"):
                    type(model).from_pretrained(tmp_path, rope_layout="split")


KINDS = {
    "decoder-plain": RxTDecoder,
    "encoder-plain": RxTEncoder,
    "memory-self-linear": RxTMemoryAttention,
    "mlm-head": MLMHead,
    "stateless-dense": SparseQueryTransformer,
    "beta-split": RxTAlpha,
}


@pytest.mark.parametrize(
    ("name", "wanted"), [(name, other) for name, kind in KINDS.items() for other in KINDS.values() if other is not kind]
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_file_of_another_kind(wanted: Any, name: str, ours: bool, tmp_path: Path) -> None:
    if ours:
        MODELS[name]().save_pretrained(tmp_path)
    else:
        write_as_upstream(MODELS[name](), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors|config\.json"):
        wanted.from_pretrained(tmp_path)


def test_foreign_models_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(
        CheckpointError, match=r"'model\.embedding\.weight': this tensor is missing; the file holds 'bert"
    ):
        RxTDecoder.from_pretrained(tmp_path)
    full(decoder=PER_EXPERT).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds 'rxt_alpha', and 'decoder' is to be loaded"):
        RxTDecoder.from_pretrained(tmp_path)
    write_as_upstream(full(decoder=PER_EXPERT), tmp_path)
    with pytest.raises(CheckpointError, match="a full model: load it with RxTAlpha or RxTBeta"):
        RxTDecoder.from_pretrained(tmp_path)


def test_a_component_s_defaults_are_those_of_its_class(tmp_path: Path) -> None:
    """What neither tensors nor configuration tell comes from the configuration class."""
    write_as_upstream(decoder(), tmp_path, config={"att_heads": 4})
    loaded = RxTDecoder.from_pretrained(tmp_path, rope_layout="split")
    assert loaded.config.ff_activation == TransformerConfig.ff_activation
