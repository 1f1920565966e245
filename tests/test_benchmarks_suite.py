"""Benchmarks of single claims (sqa, drift, gpu_static), and commands on results (compare, all), on sizes that take no time."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rxt_benchmarks import (
    BENCHMARKS,
    compare,
    comparing,
    dialogues,
    drift,
    environment,
    gpu_static,
    plotting,
    results,
    running,
    sqa,
)
from rxt_benchmarks import all as everything
from rxt_benchmarks.costs import Work
from rxt_benchmarks.limits import Limits, Machine
from torch import Tensor

from rxt_kernels import native_runtime
from rxt_model.config import MemoryAttentionConfig
from rxt_model.memory_attention import RxTMemoryAttention

LIMITS = Limits(3.2e10, 2.32e11, 4.67e11, "native")
BACKENDS = 1 + native_runtime.available()


class KnownMachine(Machine):
    """A machine whose limits are known."""

    def __init__(self, threads: int) -> None:
        pass

    def sample(self) -> Limits:
        return LIMITS

    @property
    def limits(self) -> Limits:
        return LIMITS


@pytest.fixture(autouse=True)
def _known_machine_with_one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(running, "Machine", KnownMachine)
    monkeypatch.setattr(running, "cores", lambda: 1)
    monkeypatch.setattr(environment, "cores", lambda: 1)
    monkeypatch.setattr(dialogues, "_from_package", dialogues._own)  # which are read in no time
    yield
    torch.set_num_threads(before)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# sqa


def test_heads_are_those_of_the_published_models() -> None:
    heads = {name: (variant.query_heads, variant.key_heads) for name, variant in sqa.VARIANTS.items()}
    assert heads == {"MHA": (16, 16), "GQA": (16, 4), "SQA": (8, 4), "sSQA": (8, 8), "xSQA": (4, 4)}
    assert {variant.head_dim for variant in sqa.VARIANTS.values()} == {16}


def test_published_speed_is_that_of_the_paper() -> None:
    ratios = [round(sqa.PUBLISHED["GQA"][at] / sqa.PUBLISHED["xSQA"][at], 2) for at in (32768, 131072, 200000)]
    assert ratios == [2.70, 3.34, 3.49]


def test_arithmetic_goes_with_query_heads() -> None:
    flops = {name: sqa.attention_work(variant, 100, True).flops for name, variant in sqa.VARIANTS.items()}
    assert flops["GQA"] == flops["MHA"] == 2 * flops["SQA"] == 2 * flops["sSQA"] == 4 * flops["xSQA"]
    assert sqa.attention_work(sqa.VARIANTS["MHA"], 2, False) == Work(4 * 2 * 2 * 2 * 256, 4 * 3 * 256)


def test_sqa_measures_saves_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sqa.json"
    arguments = ["--lengths", "9", "130", "--repeats", "3", "--json", str(path), "--plot", str(tmp_path / "sqa.png")]
    assert sqa.main(arguments) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "by arithmetic (Hq)" in printed
    found = results.read_results(path, name="sqa")
    assert found.complete
    assert not found.summary["refused"]
    assert len(found.rows) == 2 * 2 * 5 * BACKENDS
    compared = found.summary["speedup_over_gqa"]
    assert len(compared) == len(found.rows)
    assert {(one["variant"], one["arithmetic"]) for one in compared} >= {("xSQA", 4.0), ("SQA", 2.0), ("MHA", 1.0)}
    assert all(one["speedup"] == 1 for one in compared if one["variant"] == "GQA")
    assert is_png(tmp_path / "sqa.png")
    assert is_png(tmp_path / "sqa-dark.png")
    assert plotting.main([str(path), "--plot", str(tmp_path / "again.png")]) == 0


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_wrong_attention_is_not_timed(
    passes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = sqa._sdpa

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * 1.001

    def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if passes == "forward":
            return honest(query, key, value) * 1.001
        return honest(query, WrongGradient.apply(key), value)

    monkeypatch.setattr(sqa, "_sdpa", wrong)
    arguments = ["--lengths", "20", "--variant", "SQA", "--pass", passes, "--backend", "torch SDPA", "--repeats", "3"]
    assert sqa.main(arguments) == 1
    assert "so it is not timed" in capsys.readouterr().out


def test_long_sequences_are_checked_in_places_with_everything_else_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqa, "_CHECKED_WHOLE", 100)
    monkeypatch.setattr(sqa, "_BLOCK", 8)
    monkeypatch.setattr(sqa, "_BLOCKS_CHECKED", 4)
    blocks = sqa.checked_queries(203)
    assert (blocks[0].start, blocks[-1].stop, len(blocks)) == (0, 203, 4)
    attention = sqa._Attention(sqa.VARIANTS["SQA"], 203, True, seed=0)
    expected = attention.expected()
    assert torch.allclose(attention.result(sqa._sdpa), expected, atol=1e-5)
    assert expected.numel() == 32 * 8 * 16 + 203 * (8 + 4 + 4) * 16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "1"], "lengths holds 1"),
        (["--repeats", "2"], "repeats is 2"),
        (["--threads", "9"], "threads is 9"),
    ],
)
def test_sqa_refuses_in_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sqa.main(arguments) == 2
    assert sentence in capsys.readouterr().err


# compare


def measured(**changes: Any) -> dict[str, Any]:
    row = {
        "name": "moe", "model": "any", "backend": "native", "dtype": "float32", "threads": 1, "shape": {"tokens": 1},
        "p20": 0.9, "p50": 1.0, "p80": 1.1, "floor": 0.5, "ratio": 2.0,
    }  # fmt: skip
    return {**row, **changes}


def result(*rows: dict[str, Any], name: str = "moe", cpu: str = "one") -> results.Results:
    limits = {"read_bandwidth_bytes_per_second": 1e9, "fma_flops_per_second": 1e9}
    return results.Results(name, {}, {"cpu": cpu}, limits, rows, {}, True)


def test_ratios_are_compared_and_times_are_shown() -> None:
    before = result(measured(), measured(backend="reference"))
    slower = measured(p20=1.2, p50=1.3, p80=1.4, ratio=2.6)
    said = comparing.report(before, result(slower, measured(backend="reference"), cpu="two"))
    assert "cpu: one -> two" in said
    assert "Ratios: 1 of 2 changed beyond noise" in said
    assert "30% worse" in said
    assert "over its floor: moe, any, native, float32, 1 thread, tokens 1" in said


def test_a_change_within_the_spread_is_noise() -> None:
    found = comparing.changes(result(measured()), result(measured(p20=1.0, p50=1.05, p80=1.15, ratio=2.1)))
    assert not any(change.is_beyond_noise for change in found)
    assert [round(change.worsening, 6) for change in found] == [0.05, 0.05]


@pytest.mark.parametrize(("ratio", "passes"), [(2.29, True), (2.31, False), (0.5, True)])
def test_check_fails_when_a_ratio_worsens_by_more_than_15_percent(ratio: float, passes: bool) -> None:
    passed, said = comparing.check(result(measured()), result(measured(ratio=ratio)))
    assert passed is passes
    assert f"{int(not passes)} of 1 stored ratios worsened" in said


def test_check_looks_at_ratios_of_the_moment_where_both_results_have_them() -> None:
    def paired(ratio: float, own: float) -> results.Results:
        spread = {"p20": own, "p50": own, "p80": own}
        return result(measured(ratio=ratio, paired_ratio=spread), measured(threads=2, ratio=ratio))

    # The row without one is checked as it is; of the other, only the time over the floor of its moment counts.
    passed, said = comparing.check(paired(2.0, 1.2), paired(2.1, 1.5))
    assert not passed
    assert "1 of 2 stored ratios worsened" in said
    assert "over the floor of its moment: moe, any, native, float32, 1 thread, tokens 1" in said
    assert comparing.check(paired(2.0, 1.2), paired(2.1, 1.3))[0]
    assert not comparing.check(paired(2.0, 1.2), paired(2.6, 1.2))[0]


def test_speed_against_gqa_worsens_downwards() -> None:
    def attention(seconds: float) -> results.Results:
        rows = [
            measured(name="sqa", model=model, p20=of, p50=of, p80=of, ratio=1.0)
            for model, of in (("GQA", 4.0), ("xSQA", seconds))
        ]
        return result(*rows, name="sqa")

    assert not comparing.check(attention(1.0), attention(1.2))[0]
    assert comparing.check(attention(1.0), attention(0.5))[0]
    label = "speed against GQA: sqa, xSQA, native, float32, 1 thread, tokens 1"
    assert comparing.quantities(attention(1.0))[label].middle == 4.0


def test_results_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="of moe and of sqa"):
        comparing.changes(result(measured()), result(measured(), name="sqa"))
    with pytest.raises(ValueError, match="no measurement in common"):
        comparing.changes(result(measured()), result(measured(threads=2)))
    bare = measured()
    del bare["floor"], bare["ratio"]
    with pytest.raises(ValueError, match="no ratio in common"):
        comparing.check(result(bare), result(bare))


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, ratio in zip(paths, (2.0, 2.4), strict=True):
        results.write_results(result(measured(ratio=ratio)), path)
    assert compare.main(paths) == 0
    assert compare.main([*paths, "--check"]) == 1
    assert "worsened by more than 15%" in capsys.readouterr().out
    assert compare.main([*paths, "--check", "--tolerance", "25"]) == 0
    assert compare.main([*paths, "--tolerance", "-1"]) == 2
    assert compare.main([paths[0], str(tmp_path / "none.json")]) == 2


def test_a_benchmark_checks_itself_against_an_earlier_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sqa.json"
    command = ["--lengths", "8", "--variant", "SQA", "--pass", "forward", "--backend", "torch SDPA", "--repeats", "3"]
    assert sqa.main([*command, "--json", str(path)]) == 0
    found = results.read_results(path)
    for factor, status in ((1e-6, 1), (1e6, 0)):
        earlier = [
            {**row, "paired_ratio": {name: factor * value for name, value in row["paired_ratio"].items()}}
            for row in found.rows
        ]
        results.write_results(dataclasses.replace(found, rows=earlier), path)
        assert sqa.main([*command, "--check", str(path)]) == status
    assert "stored ratios worsened" in capsys.readouterr().out


def test_rows_without_times_need_no_limits(tmp_path: Path) -> None:
    row = {"name": "drift", "backend": "native", "dtype": "float32", "shape": {}, "rms": [1.0]}
    counted = results.Results("drift", {}, {}, {}, [row])
    assert results.read_results(results.write_results(counted, tmp_path / "drift.json")).rows == [row]
    with pytest.raises(results.ResultsError, match="p50"):
        results.write_results(results.Results("drift", {}, {}, {}, [{**row, "p20": 1.0}]), tmp_path / "half.json")


# drift


SMALL = MemoryAttentionConfig(num_layers=2, embed_dim=16, att_heads=2, att_query_groups=1, stm_size=6)


class Noise:
    """A conversation of random states."""

    def encoded(self, number: int) -> Tensor:
        return torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("gate", drift.GATES)
def test_drift_of_every_gate(gate: str) -> None:
    network = drift._network(SMALL, drift.GATES[gate], 0)
    recorded = drift.drift(network, Noise(), drift.Settings(turns=12))  # type: ignore[arg-type]
    assert recorded["turns"] == list(range(1, 13))
    assert recorded["first_not_finite"] is None
    assert max(recorded["difference"]) < 1e-4
    assert (recorded["saturated"][0] is None) == (gate in ("add", "replace"))
    assert drift._row(gate, network, recorded, drift.Settings(turns=12))["kind"] == gate


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_openings_are_those_of_a_static_gate(activation: str) -> None:
    network = drift._network(SMALL, {**drift.GATES[f"static, {activation}"], "residual_gate_init": 0.7}, 0)
    openings = drift.gate_openings(network, Noise().encoded(0), torch.randn(2, 1, 6, 16))
    assert openings is not None
    value = getattr(torch, activation)(torch.tensor(0.7))
    assert torch.allclose(openings, value.expand(2, 1, 6), atol=1e-5)


def wrong_updates(monkeypatch: pytest.MonkeyPatch, factor: Callable[[], float]) -> None:
    """Memory attention in float32 whose result is multiplied by what `factor` gives."""
    honest = RxTMemoryAttention.forward

    def forward(self: RxTMemoryAttention, encoded: Tensor, *rest: Any) -> Tensor:
        return honest(self, encoded, *rest) * (factor() if encoded.dtype is torch.float32 else 1.0)

    monkeypatch.setattr(RxTMemoryAttention, "forward", forward)


def test_a_memory_that_overflows_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    wrong_updates(monkeypatch, lambda: 1.0 if next(calls) < 8 else float("inf"))
    network = drift._network(SMALL, drift.GATES["add"], 0)
    recorded = drift.drift(network, Noise(), drift.Settings(turns=12))  # type: ignore[arg-type]
    assert recorded["first_not_finite"] == 8
    assert recorded["turns"] == list(range(1, 8))
    assert "turn 8" in drift._table([drift._row("add", network, recorded, drift.Settings(turns=12))])


def test_drift_measures_saves_draws_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "drift.json"
    command = ["--turns", "4", "--threads", "1", "--json", str(path)]
    assert drift.main([*command, "--gate", "shipped model"]) == 0, capsys.readouterr()
    assert drift.main([*command, "--gate", "shipped model", "add", "--resume", "--plot", str(tmp_path / "drift")]) == 0
    assert "shipped model (linear, sigmoid)" in capsys.readouterr().out
    found = results.read_results(path, name="drift")
    assert [row["gate"] for row in found.rows] == ["shipped model", "add"]
    assert is_png(tmp_path / "drift.png")
    assert is_png(tmp_path / "drift-dark.png")
    assert drift.main([*command, "--resume", "--seed", "1"]) == 2
    assert "seed = 0" in capsys.readouterr().err


def test_a_wrong_update_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_updates(monkeypatch, lambda: 1.001)
    assert drift.main(["--turns", "4", "--threads", "1", "--gate", "shipped model"]) == 1
    assert "refused: shipped model: the first update differs from its definition" in capsys.readouterr().out


# gpu_static


def compiled(**changes: Any) -> dict[str, Any]:
    kernel = {
        "kernel": "_sqa_fwd_kernel", "target": "sm_90", "failure": None, "spilled": 0, "problems": [], "registers": 80,
        "occupancy": 0.5, "shared": 1024, "wide_share": 1.0, "matrix_instructions": {"HGMMA": 4},
    }  # fmt: skip
    return {**kernel, **changes}


def aot_report(*kernels: dict[str, Any]) -> dict[str, Any]:
    launch = {"case": "norm/1/decode", "target": "sm_90", "bound_microseconds": 2.0, "limit": "bytes"}
    return {"triton": "3", "torch": "2", "kernels": kernels, "launches": [launch]}


def test_compiled_kernels_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, path = tmp_path / "aot.json", tmp_path / "gpu_static.json"
    report.write_text(json.dumps(aot_report(compiled(), compiled(registers=120), compiled(target="sm_80"))))
    arguments = ["--report", str(report), "--json", str(path), "--plot", str(tmp_path / "gpu.png")]
    assert gpu_static.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "never run or timed on a GPU" in printed
    found = results.read_results(path, name="gpu_static")
    of_h100 = next(row for row in found.rows if row["target"] == "sm_90")
    assert of_h100["registers"] == {"least": 80, "median": 100, "most": 120}
    assert of_h100["shape"] == {"variants": 2}
    assert not any("p50" in row for row in found.rows), "nothing was timed"
    assert is_png(tmp_path / "gpu.png")
    assert is_png(tmp_path / "gpu-dark.png")


@pytest.mark.parametrize("changes", [{"spilled": 3}, {"problems": ["a narrow load"]}])
def test_a_bad_kernel_shows_in_the_exit_status(changes: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    report.write_text(json.dumps(aot_report(compiled(), compiled(**changes))))
    assert gpu_static.main(["--report", str(report)]) == 1


def test_the_saved_report_is_read() -> None:
    assert gpu_static.main([]) == 0


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_other_reports_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert gpu_static.main(["--report", str(tmp_path / "x.json")]) == 2
    assert gpu_static.main(["--report", str(tmp_path / "none.json")]) == 2
    assert "make test-aot" in capsys.readouterr().err


# all


@pytest.fixture
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that take no time; the names of those that ran."""
    ran: list[str] = []

    def instead(step: everything.Step, folder: Path) -> tuple[int, str]:
        ran.append(step.name)
        if step.name == "drift" and ran.count("drift") == 1:
            raise KeyboardInterrupt
        for name in ("decode.png", "decode-dark.png") if step.name == "decode" else ():
            (folder / name).touch()
        return int(step.name == "moe"), f"table of {step.name}"

    monkeypatch.setattr(everything, "_run", instead)
    return ran


def test_all_is_interrupted_and_resumed(quick_steps: list[str], tmp_path: Path) -> None:
    path = tmp_path / "REPORT.md"
    assert everything.main(["--output", str(path)]) == 130
    assert "Not run: drift" in path.read_text()
    assert everything.main(["--output", str(path), "--resume"]) == 1, "moe ended badly"
    assert [name for name in quick_steps if quick_steps.count(name) > 1] == ["drift", "drift"]
    text = path.read_text()
    assert "| [moe](#moe) |" in text
    assert "with status 1" in text
    assert 'srcset="short/decode-dark.png"' in text
    assert "table of gpu_static" in text
    assert "Not run" not in text
    assert everything.main(["--output", str(path), "--resume", "--only", "sqa"]) == 1
    assert quick_steps[-1] != "sqa", "it was done"


def test_every_benchmark_is_in_the_report_and_its_options_are_known() -> None:
    assert {step.name for step in everything.STEPS} == set(BENCHMARKS)
    assert sum(step.seconds for step in everything.STEPS) < 600
    for step in everything.STEPS:
        module = importlib.import_module(f"rxt_benchmarks.{step.name}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert parser.parse_args(step.command(Path("x"))[3:]) is not None


def test_a_benchmark_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "REPORT.md"
    assert everything.main(["--output", str(path), "--only", "gpu_static"]) == 0
    assert "never run or timed on a GPU" in path.read_text()
    assert is_png(tmp_path / "short" / "gpu_static.png")
