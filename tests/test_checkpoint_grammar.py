"""The file grammar reproduces published file sizes to the byte (spec section 3.4)."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rxt_model.checkpoint import upstream_grammar
from rxt_model.presets import PRESETS, build
from tests.checkpoint_cases import MODELS

#: preset part, saved type, whether its encoder keeps a memory, bytes, tensors (None where not published)
EXACT = [
    ("rxt-beta-3b/encoder", torch.bfloat16, False, 194_208_488, 234),
    ("rxt-beta-3b/decoder", torch.bfloat16, False, 5_772_284_720, 504),
    ("rxt-beta-micro-0.6b-encoder", torch.bfloat16, False, 64_205_688, None),
    ("rxt-beta-mini-1.2b-encoder", torch.bfloat16, False, 114_818_464, None),
]
#: preset part, whether its encoder keeps a memory, megabytes as published
ROUNDED = [
    ("rxt-alpha-micro/decoder", False, "38.67"),
    ("rxt-alpha-micro/encoder", True, "9.00"),
    ("rxt-alpha-micro-plus/encoder", True, "12.43"),
    ("rxt-alpha-mini-s/decoder", False, "349.6"),
    ("rxt-alpha-mini-s/encoder", True, "41.82"),
]


@pytest.mark.parametrize(("name", "dtype", "encoder_memory", "size", "tensors"), EXACT)
def test_published_sizes_to_the_byte(
    name: str, dtype: torch.dtype, encoder_memory: bool, size: int, tensors: int | None
) -> None:
    grammar = upstream_grammar(build(name, device="meta"), dtype=dtype, encoder_memory=encoder_memory)
    assert grammar.file_size == size
    if tensors is not None:
        assert len(grammar.shapes) == tensors


@pytest.mark.parametrize(("name", "encoder_memory", "megabytes"), ROUNDED)
def test_published_sizes_to_the_digits_shown(name: str, encoder_memory: bool, megabytes: str) -> None:
    grammar = upstream_grammar(build(name, device="meta"), encoder_memory=encoder_memory)
    decimals = len(megabytes.partition(".")[2])
    assert f"{grammar.file_size / 1e6:.{decimals}f}" == megabytes


@pytest.mark.parametrize("name", MODELS)
def test_the_size_is_what_the_format_s_own_writer_makes_of_it(name: str, tmp_path: Path) -> None:
    grammar = upstream_grammar(MODELS[name]())
    path = tmp_path / "model.safetensors"
    save_file(
        {key: torch.zeros(shape) for key, shape in grammar.shapes.items()}, path, metadata=grammar.metadata or None
    )
    assert path.stat().st_size == grammar.file_size
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == list(grammar.shapes)


@pytest.mark.parametrize("name", PRESETS)
def test_header_of_every_preset(name: str) -> None:
    grammar = upstream_grammar(build(name, device="meta"), dtype=torch.bfloat16)
    assert len(grammar.header()) % 8 == 0
    assert grammar.file_size == 8 + len(grammar.header()) + grammar.data_size
    assert list(grammar.shapes) == sorted(grammar.shapes)


def _grammar(name: str) -> Any:
    return upstream_grammar(MODELS[name]())


def test_rotary_tables_are_stored_once_under_the_first_name() -> None:
    grammar = _grammar("decoder-stateless-moe")
    tables = [key for key in grammar.shapes if "rope" in key]
    kept = "model.final_stateless_layers.0.attention.rope"
    assert tables == [f"{kept}.cache", f"{kept}.inv_freq"]
    assert grammar.metadata["model.layers.1.memory_cross_attention.rope.cache"] == f"{kept}.cache"
    assert grammar.metadata["model.stateless_layers.0.attention.rope.inv_freq"] == f"{kept}.inv_freq"


def test_a_full_model_shares_embedding_and_memory() -> None:
    grammar = _grammar("alpha-encoder-reads-memory")
    assert grammar.metadata["encoder.model.embedding.weight"] == "decoder.model.embedding.weight"
    assert grammar.shapes["encoder.model.stm.memory"] == (2, 1, 6, 16), "upstream gives an encoder a memory of its own"
    assert grammar.metadata["memory_attention.model.stm.memory"] == "decoder.model.stm.memory"
    assert grammar.shapes["decoder.model.stm.memory"] == (2, 1, 6, 16)


def test_models_without_positions_have_no_tables() -> None:
    assert not any("rope" in key for key in _grammar("decoder-nope").shapes)
    assert _grammar("mlm-head").metadata == {}


def test_second_attentions_rotate_nothing() -> None:
    tables = [key for key in _grammar("memory-gated-self-interlayer-linear").shapes if "rope" in key]
    assert tables == ["model.attention_layers.0.rope.cache", "model.attention_layers.0.rope.inv_freq"]


@pytest.mark.parametrize(
    "name",
    ["presets", *(f"checkpoint.{part}" for part in (
        "convert", "era", "errors", "fields", "grammar", "hub", "inference", "loading", "reader", "saving", "writer"
    ))],
)  # fmt: skip
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"rxt_model.{name}")).failed == 0
