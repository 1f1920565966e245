"""Tables of block sizes: what they refuse, which row is taken, the user's own table, and tuning with a clock of paper."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_kernels.configs import (
    ConfigError,
    autotune,
    block_config,
    for_architecture,
    kernel_names,
    load_table,
    observe_configs,
    override_config,
    rows_of,
    save_table,
    tables,
)

PACKAGE = Path(tables.__file__).parent
ROW = {"up_to": 64, "BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2, "num_stages": 2}
HALF, FULL = torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.float32)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def a_table(*rows: dict[str, int], architecture: str = "sm_90", kernel: str = "sqa_fwd") -> dict[str, Any]:
    return {"architecture": architecture, "kernels": {kernel: list(rows)}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no table of block sizes: Expecting"),
        ([], "names no architecture; a table is an object"),
        ({"architecture": "sm_90"}, "has no kernels; a table is an object"),
        ({"architecture": "sm_90", "kernels": {"sqa_fwd": []}}, "sqa_fwd has no rows"),
        (a_table(ROW | {"BLOCK_M": 48}), "row 0 has BLOCK_M 48; accepted is a power of two of at most 1024."),
        (a_table(ROW | {"BLOCK_M": 2048}), "BLOCK_M 2048; accepted is a power of two of at most 1024."),
        (a_table(ROW | {"num_warps": 64}), "num_warps 64; accepted is a power of two of at most 32."),
        (a_table(ROW | {"num_stages": 0}), "num_stages 0; accepted is 1 to 8."),
        (a_table(ROW | {"up_to": 0}), "up_to 0; accepted is the largest width of the row, at least 1."),
        (a_table(ROW | {"BLOCK_M": True}), "a row maps names to integers."),
        (a_table(ROW | {"BLOK_M": 32}), "has BLOK_M, which is not known; it takes BLOCK_M,"),
        (a_table({"up_to": 64, "num_warps": 4, "num_stages": 2}), "lacks BLOCK_M, BLOCK_N; it needs"),
        (a_table({"up_to": 64, "BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}), "has no num_warps; a row has"),
        (a_table(ROW, ROW | {"up_to": 32}), "has rows up to 64, 32; they must grow."),
        (a_table(ROW, kernel="sqa_fwt"), "has sqa_fwt, which is no kernel; kernels are "),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    path = write(tmp_path / "own.json", content)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as refused:
        load_table(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_table(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["default", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_tables_of_the_package_load_and_stand_as_they_would_be_written(name: str, tmp_path: Path) -> None:
    path = PACKAGE / f"{name}.json"
    architecture, table = load_table(path)
    assert architecture == name
    save_table(tmp_path / "again.json", architecture, table)
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_every_kernel_that_asks_has_defaults() -> None:
    """Launchers name their kernel in a literal; a name without rows would fail on a GPU only."""
    asked = set()
    for path in PACKAGE.parent.glob("*/triton*.py"):
        asked |= set(re.findall(r'block_config\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    assert asked
    assert asked <= set(kernel_names())


def test_the_row_follows_the_width_in_half_precision_elements() -> None:
    rows = rows_of("sqa_fwd", "default")
    edge = rows[0]["up_to"]
    first, second = ({k: v for k, v in row.items() if k != "up_to"} for row in rows[:2])
    assert block_config("sqa_fwd", HALF, edge) == first
    assert block_config("sqa_fwd", HALF, edge + 1) == second
    assert block_config("sqa_fwd", FULL, edge // 2) == first
    assert block_config("sqa_fwd", FULL, edge // 2 + 1) == second


def test_a_width_beyond_the_last_row_and_an_unknown_kernel_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no table has a row for kernel 'sqa_fwd' at width 100000; default\.json"):
        block_config("sqa_fwd", HALF, 100_000)
    with pytest.raises(ConfigError, match="'sqa_fwt' is no kernel with block sizes; they are "):
        rows_of("sqa_fwt", "default")


def test_what_is_returned_can_be_changed_without_harm() -> None:
    config = block_config("sqa_fwd", HALF, 16)
    config["BLOCK_M"] = -1
    assert block_config("sqa_fwd", HALF, 16)["BLOCK_M"] != -1


def test_an_own_table_lies_over_that_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "own.json", a_table(ROW))
    monkeypatch.setenv("RXT_KERNELS_CONFIGS", str(path))
    own = {name: value for name, value in ROW.items() if name != "up_to"}
    with for_architecture("sm_90"):
        assert block_config("sqa_fwd", HALF, 64) == own
        assert block_config("sqa_fwd", HALF, 65) != own
        assert block_config("rotary", HALF, 16) == block_config("rotary", HALF, 16)
    with for_architecture("sm_80"):
        assert block_config("sqa_fwd", HALF, 64) != own
        block_config("sqa_fwd", HALF, 63)
    assert caplog.text.count("is for sm_90 and this is sm_80: its block sizes are not used (said once)") == 1
    everywhere = write(tmp_path / "everywhere.json", a_table(ROW, architecture="default"))
    monkeypatch.setenv("RXT_KERNELS_CONFIGS", str(everywhere))
    with for_architecture("sm_80"):
        assert block_config("sqa_fwd", HALF, 64) == own


def test_a_broken_own_table_is_refused_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_KERNELS_CONFIGS", str(write(tmp_path / "broken.json", "{")))
    with pytest.raises(ConfigError, match=r"broken\.json is no table"):
        block_config("sqa_fwd", HALF, 16)


def test_overrides_hold_inside_their_block_and_the_inner_one_wins() -> None:
    standing = block_config("sqa_fwd", HALF, 16)
    with override_config("sqa_fwd", ROW), override_config("sqa_fwd", ROW | {"BLOCK_M": 16}):
        assert block_config("sqa_fwd", HALF, 16)["BLOCK_M"] == 16
        assert "up_to" not in block_config("sqa_fwd", HALF, 16)
    assert block_config("sqa_fwd", HALF, 16) == standing


class PaperCase:
    """A case whose outputs and time are functions of the block sizes that it is given."""

    name = "paper"

    def __init__(self, wrong_at: int = 0, fails_at: int = 0) -> None:
        self.wrong_at, self.fails_at = wrong_at, fails_at
        self.config: dict[str, int] = {}

    def call(self, device: str, seed: int | None) -> list[Tensor]:
        self.config = block_config("sqa_fwd", torch.empty(0, dtype=torch.bfloat16), 16)
        if self.config["BLOCK_M"] == self.fails_at:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((3,), 2.0 if self.config["BLOCK_M"] == self.wrong_at else 1.0)]

    def seconds(self, call: Any) -> float:
        call()
        return 1.0 / (self.config["BLOCK_M"] * self.config["num_stages"])


def tuned(case: PaperCase) -> dict[str, int]:
    rows = [ROW, ROW | {"up_to": 512}]
    with override_config("sqa_fwd", ROW):
        widths = autotune.widths_of([case], "cpu")
    assert list(widths["sqa_fwd"]) == [16]
    found = autotune.tune_kernel("sqa_fwd", rows, widths["sqa_fwd"], case.seconds, "cpu")
    assert found[1] == rows[1]
    assert found[0]["up_to"] == 64
    return dict(found[0])


def test_the_fastest_candidate_is_taken() -> None:
    assert (tuned(PaperCase())["BLOCK_M"], tuned(PaperCase())["num_stages"]) == (64, 3)


def test_a_candidate_with_other_results_or_none_is_passed_over() -> None:
    assert tuned(PaperCase(wrong_at=64))["BLOCK_M"] == 32
    assert tuned(PaperCase(fails_at=64))["BLOCK_M"] == 32


def test_a_gain_that_may_be_noise_changes_nothing() -> None:
    case = PaperCase()
    rows = autotune.tune_kernel("sqa_fwd", [ROW], {16: [case]}, lambda call: 1.0 + 0.0 * len(str(call())), "cpu")
    assert rows == [ROW]


def test_candidates_are_rows_of_a_table(tmp_path: Path) -> None:
    for kernel in kernel_names():
        for row in rows_of(kernel, "default"):
            found = autotune.candidates(row)
            assert found[0] == row
            assert len({tuple(one.items()) for one in found}) == len(found)
            for one in found:
                assert tables._check_row("candidate", one)


def test_results_agree_within_rounding_and_not_beyond() -> None:
    expected = torch.randn(100)
    assert autotune.agree([expected + 1e-6], [expected])
    assert not autotune.agree([expected + 1e-2], [expected])
    assert not autotune.agree([expected.half()], [expected])
    assert not autotune.agree([expected], [expected, expected])
    holes = expected.masked_fill(expected > 1, float("nan"))
    assert autotune.agree([holes], [holes])
    assert not autotune.agree([holes], [expected])
    assert autotune.agree([expected[:0]], [expected[:0]])
    assert not autotune.agree([torch.tensor([1, 2])], [torch.tensor([1, 3])])


def test_without_a_gpu_tuning_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "tuned.json"
    assert autotune.main(["--kernel", "all", "--output", str(output)]) == 2
    assert "Block sizes can only be measured on a GPU, and " in capsys.readouterr().err
    assert not output.exists()


def test_tuning_refuses_unknown_kernels_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--kernel", "sqa_fwt", "--output", str(tmp_path / "t.json")], "invalid choice: 'sqa_fwt'"),
        (["--kernel", "all", "--output", str(tmp_path / "none" / "t.json")], "there is no directory"),
    ):
        with pytest.raises(SystemExit):
            autotune.main(arguments)
        assert sentence in capsys.readouterr().err


def test_asking_is_observed_inside_the_block_only() -> None:
    with observe_configs() as asked:
        block_config("sqa_fwd", FULL, 16)
    block_config("sqa_fwd", HALF, 16)
    assert asked == [("sqa_fwd", 32)]
