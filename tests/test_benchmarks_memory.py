"""Recall as a benchmark: its file follows the schema of all others, continues after an interruption, and is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rxt_benchmarks import memory
from rxt_benchmarks.results import read_results

from rxt_model.demo_model import load_demo_model
from rxt_model.tokenizer import train_tokenizer
from rxt_model.training.recipe import STATELESS_SHAPE
from rxt_model.training.stateless_control import stateless_model

pytest.importorskip("chitchat_dataset")


def _run(path: Path, *more: str, distances: tuple[int, ...] = (1, 2), conversations: int = 2) -> int:
    arguments = ["--json", str(path), "--conversations", str(conversations), "--distances", *map(str, distances)]
    return memory.main([*arguments, *more])


def test_points_are_rows_of_the_common_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.json"
    assert _run(path, "--plot", str(tmp_path / "memory.png")) == 0
    found = read_results(path, name="memory")
    assert found.complete
    assert found.settings["model"].keys() == {"fingerprint", "parameters"}, "no path of this machine"
    curves = {(row["name"], row["shape"]["changed"]) for row in found.rows}
    assert curves == {("memory", False), ("memory", True), ("reference", False), ("reset", False)}
    for row in found.rows:
        low, high = row["wilson_95"]
        assert row["recall"] == row["right"] / 2
        assert low <= row["recall"] <= high
        assert sum(asked for _, asked in row["by_attribute"].values()) == 2
    assert {file.name for file in tmp_path.glob("*.png")} == {"memory.png", "memory-dark.png"}
    assert "| 2 | " in capsys.readouterr().out


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measure, calls = tmp_path / "memory.json", memory.measure_recall, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(memory, "measure_recall", interrupted)
    assert _run(path) == 130
    assert len(read_results(path).rows) == 2
    assert not read_results(path).complete
    assert _run(path, "--resume") == 0
    assert len(calls) == 3 + 6, "four curves of two points, two of which were there"
    assert len(read_results(path).rows) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversations": 0}, "conversations is 0; it must be at least 1"),
        ({"distances": (0,)}, "distances is 0; it must be at least 1"),
        ({"conversations": 3}, "measured with other settings"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "memory.json"
    assert _run(path, distances=(1,), conversations=1) == 0
    assert _run(path, "--resume", **{"distances": (1,), "conversations": 1, **change}) == 2
    assert words in capsys.readouterr().err


def test_a_control_that_reads_the_history_is_measured_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, shape = tmp_path / "memory.json", replace(STATELESS_SHAPE, embed_dim=32, num_layers=1, expert_ff=8)
    tokenizer = load_demo_model().tokenizer
    assert tokenizer is not None
    stateless_model(tokenizer, shape).save_pretrained(tmp_path / "control")
    assert _run(path, "--history", str(tmp_path / "control"), distances=(1,)) == 0
    curves = {(row["name"], row["shape"]["changed"]) for row in read_results(path).rows}
    assert {("history", False), ("history", True)} < curves
    stateless_model(train_tokenizer(["a b c"], 300), shape).save_pretrained(tmp_path / "other")
    assert _run(path, "--history", str(tmp_path / "other"), distances=(1,)) == 2
    assert "has a vocabulary of" in capsys.readouterr().err
