"""Which known defects of upstream `rxt doctor MODEL_DIR` finds in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    MOE,
    PER_EXPERT,
    SPLIT,
    beta_3b_shape,
    decoder,
    encoder,
    full,
    memory_attention,
    stateless,
    write_as_upstream,
)

from rxt_model.checkpoint.defects import DEFECTS
from rxt_model.cli import main

Examine = Callable[..., dict[str, dict[str, Any]]]

#: What affects every complete model, and every complete model without stateless layers.
EVERY_FULL = {
    "batches crash", "interrupted answers", "missing mask", "long answers", "rotary layout", "lost embedding", "wiped memory",
    "samplers",
}  # fmt: skip
PLAIN = {*EVERY_FULL, "generation crashes"}


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """`rxt doctor` on a model that upstream saved: defects by name."""

    def run(model: Any, **options: Any) -> dict[str, dict[str, Any]]:
        write_as_upstream(model, tmp_path, **options)
        capsys.readouterr()
        assert main(["doctor", str(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["defects"]
        return {defect["name"]: defect for defect in found}

    return run


def test_an_alpha_of_today(examine: Examine) -> None:
    assert set(examine(full(decoder=MOE))) == PLAIN


def test_an_alpha_of_the_first_eras(examine: Examine) -> None:
    found = examine(
        full(decoder=PER_EXPERT, common=SPLIT), drop=("use_vectorized_moe", "pad_token_id"), encoder_memory=True
    )
    assert set(found) == {*PLAIN, "position of answers", "lost experts"}
    assert found["lost experts"]["state"] == "repaired"
    assert "read as split" in found["rotary layout"]["here"]


def test_a_beta_with_final_stateless_layers(examine: Examine) -> None:
    found = examine(beta_3b_shape())
    assert set(found) == {*EVERY_FULL, "caches are kept", "load-balance loss", "missing token ids"}
    assert found["load-balance loss"]["number"] == 40


def test_a_model_that_asks_for_the_interlayer_variant(examine: Examine) -> None:
    assert "interlayer variant" in examine(full(variant="interlayer"))


def test_half_precision_and_flash_attention(examine: Examine) -> None:
    flash = {"use_flash_attention": True}
    assert set(examine(encoder(**flash), dtype=torch.bfloat16)) == {"coarse angles", "diluted padding"}
    split = examine(encoder(**flash, **PER_EXPERT, **SPLIT), drop=("use_vectorized_moe",))
    assert set(split) == {"diluted padding", "heads for tokens", "lost experts"}
    assert split["diluted padding"]["state"] == "choice"


def test_single_components(examine: Examine) -> None:
    assert set(examine(decoder())) == {"long answers", "rotary layout"}
    assert set(examine(decoder(**SPLIT))) == {"long answers", "rotary layout", "position of answers"}
    assert set(examine(memory_attention(norm_type="rms"))) == {"rotary layout", "norms of memory"}
    assert set(examine(stateless())) == {"long answers", "cached generation"}
    assert examine(memory_attention(norm_type="rms"))["norms of memory"]["state"] == "kept"


def test_a_stored_memory_of_several_conversations(examine: Examine) -> None:
    assert "memory of a batch" in examine(full(), memory_batch=3)


def test_the_report_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_as_upstream(decoder(**SPLIT), tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}: an RxT decoder\nKnown defects of the upstream library that affect it: 3\n" in text
    assert "  long answers (defect 10 of the specification): repaired\n    upstream  decoding beyond seq_len" in text
    assert "Assumed, since its files do not tell" in text
    assert "rope_layout=" in text


def test_a_checkpoint_without_defects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_as_upstream(encoder(), tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    assert "affect it: none" in capsys.readouterr().out


def test_names_are_told_apart() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
