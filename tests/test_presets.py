"""Presets reproduce the published parameter counts to the last unit (spec section 4)."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rxt_model.checkpoint import PretrainedModel
from rxt_model.presets import PRESETS, build, parameter_counts, preset

#: name: (total, active); active None where nothing is routed.
COUNTS = {
    "rxt-alpha-micro/decoder": (9_458_508, 3_521_868),
    "rxt-alpha-micro/encoder": (2_049_024, None),
    "rxt-alpha-micro/memory_attention": (1_186_688, None),
    "rxt-alpha-micro-plus": (26_855_628, None),
    "rxt-alpha-micro-plus/decoder": (22_404_940, 6_573_900),
    "rxt-alpha-micro-plus/encoder": (2_775_040, None),
    "rxt-alpha-micro-plus/memory_attention": (2_635_648, None),
    "rxt-alpha-mini/decoder": (57_767_696, 13_584_144),
    "rxt-alpha-mini/encoder": (9_140_224, None),
    "rxt-alpha-mini-s": (98_560_016, None),
    "rxt-beta-micro": (265_163_776, None),
    "rxt-beta-micro/decoder": (251_304_192, 41_432_320),
    "rxt-beta-micro/encoder": (18_320_384, None),
    "rxt-beta-micro/memory_attention": (3_731_200, None),
    "rxt-beta-3b/decoder": (2_841_937_920, 194_807_808),
    "rxt-beta-3b/encoder": (96_958_976, None),
    "rxt-beta-3b/memory_attention": (22_332_416, None),
    "mlm-alpha-micro": (984_268, None),
    "mlm-alpha-mini": (2_636_304, None),
    "mlm-beta-3b": (33_883_648, None),
    "sqat-m-mha": (11_966_224, None),
    "sqat-m-gqa": (11_179_792, None),
    "sqat-m-mqa": (10_983_184, None),
    "sqat-m-sqa": (10_655_504, None),
    "sqat-m-ssqa": (10_917_648, None),
    "sqat-m-xsqa": (10_393_360, None),
    "sqat-m-xsmqa": (10_196_752, None),
    "sqat-mm-gqa": (8_666_248, 2_729_608),
    "sqat-mm-mqa": (8_641_672, 2_705_032),
    "sqat-mm-sqa": (8_567_944, 2_631_304),
    "sqat-mm-ssqa": (8_617_096, 2_680_456),
    "sqat-mm-xsqa": (8_518_792, 2_582_152),
}

#: What the cards of the sparse query attention study state, in millions.
STATED = {
    "sqat-m-mha": "12", "sqat-m-gqa": "11.2", "sqat-m-mqa": "11", "sqat-m-sqa": "10.7", "sqat-m-ssqa": "10.9",
    "sqat-m-xsqa": "10.4", "sqat-m-xsmqa": "10.2", "sqat-mm-gqa": "8.67", "sqat-mm-mqa": "8.64",
    "sqat-mm-sqa": "8.57", "sqat-mm-ssqa": "8.62", "sqat-mm-xsqa": "8.52",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    total, active = COUNTS[name]
    counts = parameter_counts(build(name, device="meta"))
    assert counts.total == total
    if active is not None:
        assert counts.active == active
    elif not counts.parts:
        assert counts.active == total


@pytest.mark.parametrize("name", STATED)
def test_the_study_s_own_figures(name: str) -> None:
    decimals = len(STATED[name].partition(".")[2])
    assert f"{COUNTS[name][0] / 1e6:.{decimals}f}" == STATED[name]


def test_a_full_model_counts_its_embedding_once() -> None:
    counts = parameter_counts(build("rxt-alpha-micro-plus", device="meta"))
    assert counts.total == sum(part.total for part in counts.parts.values()) - 7500 * 128
    assert counts.active == sum(part.active for part in counts.parts.values()) - 7500 * 128


def test_active_parameters_do_not_depend_on_the_expert_layout() -> None:
    config = preset("rxt-alpha-micro/decoder").config()
    with torch.device("meta"):
        stacked = type(build("rxt-alpha-micro/decoder"))(
            {**config, "use_vectorized_moe": True, "moe_bias_mode": "local"}
        )
    assert parameter_counts(stacked) == parameter_counts(build("rxt-alpha-micro/decoder", device="meta"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_its_configuration_is_json(name: str) -> None:
    chosen = preset(name)
    assert chosen.name == name
    assert chosen.description
    json.dumps(chosen.config())
    model = build(name, device="meta")
    assert isinstance(model, PretrainedModel)
    assert model.component == chosen.component
    assert json.loads(json.dumps(model._config())).items() >= json.loads(json.dumps(chosen.config())).items()


@pytest.mark.parametrize("kind", ["decoder", "encoder", "memory_attention"])
def test_parts_are_presets(kind: str) -> None:
    part = preset(f"rxt-beta-micro/{kind}")
    assert part.component == kind
    assert part.config() == preset("rxt-beta-micro").config()[f"{kind}_config"]
    assert preset("rxt-beta-micro").part(kind) == part


def test_what_is_not_published_is_said() -> None:
    for name in ("rxt-alpha-mini", "rxt-alpha-mini-s", "rxt-beta-3b", "rxt-beta-mini-1.2b-encoder"):
        assert preset(name).unpublished
    assert not preset("rxt-beta-micro").unpublished


def test_layouts_follow_the_era() -> None:
    assert preset("rxt-beta-micro").configs["decoder"].rope_layout == "split"
    assert not preset("rxt-beta-micro").configs["decoder"].use_vectorized_moe
    assert preset("rxt-beta-3b").configs["decoder"].rope_layout == "interleaved"
    assert preset("rxt-beta-3b").configs["decoder"].use_vectorized_moe


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'rxt-alpha-mikro'; known presets are .*sqat-m-gqa.*mean 'rxt-alpha-micro'"):
        preset("rxt-alpha-mikro")
    with pytest.raises(ValueError, match="has stateless"):
        preset("sqat-m-gqa/decoder")
    with pytest.raises(ValueError, match="decoder, encoder, memory_attention"):
        preset("rxt-beta-3b/head")
    with pytest.raises(TypeError, match="NoneType"):
        preset(None)  # type: ignore[arg-type]


def test_a_component_takes_no_tokenizer() -> None:
    with pytest.raises(TypeError, match="leave it out"):
        build("mlm-alpha-micro", device="meta", tokenizer=object())


def test_dtype_and_device_are_honoured_and_defaults_restored() -> None:
    model = build("mlm-alpha-micro", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("rxt-beta-3b").name = "mine"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset("rxt-beta-3b")  # type: ignore[index]
