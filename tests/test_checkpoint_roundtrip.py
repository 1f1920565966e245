"""Every structure survives saving and loading without loss, here and in the form upstream writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rxt_model.checkpoint import CheckpointError, CheckpointWarning, PretrainedModel, SafetensorsFile
from rxt_model.config import OWN_FIELDS
from rxt_model.decoder import RxTDecoder
from rxt_model.models import RxTAlpha, RxTBeta
from tests.checkpoint_cases import MODELS, assert_same, decoder, full, randomise, write_as_upstream

FULL = [name for name in MODELS if name.startswith(("alpha", "beta"))]


def configurations(model: Any) -> list[Any]:
    parts = [getattr(model, name, None) for name in ("decoder", "encoder", "memory_attention")]
    parts = [part for part in parts if isinstance(part, PretrainedModel)]
    return [part.config for part in parts] or [model.config]


@pytest.mark.parametrize("name", MODELS)
def test_our_own_files(name: str, tmp_path: Path) -> None:
    model = randomise(MODELS[name]())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        loaded = type(model).from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert not loaded.training
    for ours, theirs in zip(configurations(model), configurations(loaded), strict=True):
        assert ours.to_dict() | _ignorable(theirs) == theirs.to_dict()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def _ignorable(config: Any) -> dict[str, Any]:
    """Fields that say how heads are spelled or what a layout ignores; the heads themselves are compared."""
    names = (
        "interlayer_att_type", "interlayer_att_groups", "interlayer_att_query_groups", "interlayer_att_dropout",
        "self_att_type", "self_att_groups", "self_att_query_groups", "self_att_dropout", "num_shared_experts",
        "moe_shared_experts_bias_mode", "moe_bias_mode", "use_vectorized_moe", "dense_layer_dim",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


@pytest.mark.parametrize("name", MODELS)
def test_files_as_upstream_writes_them(name: str, tmp_path: Path) -> None:
    """No metadata of ours, rotary tables, a memory of another batch size: layout and variant are said by the caller."""
    model = randomise(MODELS[name]())
    write_as_upstream(model, tmp_path, encoder_memory=True, memory_batch=3)
    options: dict[str, Any] = {}
    for config in configurations(model):
        if hasattr(config, "rope_layout"):
            options["rope_layout"] = config.rope_layout
            options["rope_angle_dtype"] = config.rope_angle_dtype
            options["padding"] = config.padding
        if hasattr(config, "variant"):
            options["memory_attention_variant"] = config.variant
    loaded = type(model).from_pretrained(tmp_path, **options)
    assert_same(model, loaded)


@pytest.mark.parametrize("name", MODELS)
def test_config_json_holds_upstream_keys_only(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    parts = [content, *(value for value in content.values() if isinstance(value, dict))]
    assert not [key for part in parts for key in part if key in OWN_FIELDS]


@pytest.mark.parametrize("name", MODELS)
def test_no_memory_and_no_tables_are_written(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "stm." in key or "rope." in key]  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomise(decoder().to(dtype))
    model.save_pretrained(tmp_path)
    loaded = RxTDecoder.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    assert loaded.stm.memory.dtype == dtype
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    converted = RxTDecoder.from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {torch.float32}
    assert converted.stm.memory.dtype == torch.float32


def test_mixed_types_stay_mixed(tmp_path: Path) -> None:
    model = randomise(decoder()).to(torch.bfloat16)
    model.model.head.to(torch.float32)
    model.save_pretrained(tmp_path)
    loaded = RxTDecoder.from_pretrained(tmp_path)
    assert loaded.model.head.weight.dtype == torch.float32
    assert loaded.model.embedding.weight.dtype == torch.bfloat16


def test_meta_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder().save_pretrained(tmp_path)
    loaded = RxTDecoder.from_pretrained(tmp_path, device="meta")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    monkeypatch.setattr(SafetensorsFile, "read", None)
    assert RxTDecoder.from_pretrained(tmp_path, device="meta").config == loaded.config, "no weights are read for that"
    with pytest.raises(CheckpointError, match=r"'model\.embedding\.weight'.*meta device"):
        loaded.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_loaded_weights_are_independent_of_the_file(tmp_path: Path) -> None:
    model = randomise(decoder())
    model.save_pretrained(tmp_path)
    loaded = RxTDecoder.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(model, loaded)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


@pytest.mark.parametrize("name", FULL)
def test_embedding_is_stored_under_both_names_and_shared_again(name: str, tmp_path: Path) -> None:
    model = randomise(MODELS[name]())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        first, second = (file.get_tensor(f"{part}.model.embedding.weight") for part in ("decoder", "encoder"))
    assert torch.equal(first, second)
    loaded: Any = type(model).from_pretrained(tmp_path)
    assert loaded.encoder.model.embedding.weight is loaded.decoder.model.embedding.weight
    assert loaded.memory_attention.stm is loaded.decoder.stm


def test_embedding_once_is_smaller_and_loads(tmp_path: Path) -> None:
    model = randomise(full())
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "once", embedding="once")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("both", "once")]
    assert sizes[0] - sizes[1] > 19 * 16 * 4
    assert_same(model, RxTAlpha.from_pretrained(tmp_path / "once"))


def test_memory_is_not_part_of_a_checkpoint(tmp_path: Path) -> None:
    model = full()
    model.stm.load(torch.full((2, 3, 6, 16), 7.0))
    model.save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path)
    assert loaded.stm.memory.shape == (2, 1, 6, 16)
    assert not (loaded.stm.memory == 7.0).any()


def test_beta_keeps_its_title(tmp_path: Path) -> None:
    model = MODELS["beta-3b-shape"]()
    model.system_prompt_title = "RULES"  # type: ignore[assignment]
    model.save_pretrained(tmp_path)
    assert RxTBeta.from_pretrained(tmp_path).system_prompt_title == "RULES"


def test_alpha_and_beta_read_each_other_s_files(tmp_path: Path) -> None:
    model = randomise(MODELS["beta-3b-shape"]())
    model.save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path)
    assert isinstance(loaded, RxTAlpha)
    assert torch.equal(loaded.decoder.model.head.weight, model.decoder.model.head.weight)  # type: ignore[union-attr]
