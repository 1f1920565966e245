"""Benchmarks of native kernels: floors are the arithmetic of the published shapes, a wrong result is never timed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ALPHA_TOKENS
from rxt_benchmarks import (
    contenders,
    decode,
    environment,
    limits,
    measuring,
    moe,
    plotting,
    prefill,
    ratio_plot,
    results,
    running,
    train,
    update,
    upstream,
)
from rxt_benchmarks.costs import RxTCosts, Work, mixture_of_experts_work
from rxt_benchmarks.limits import Limits, Machine, floor
from rxt_benchmarks.measuring import Absent, Case, System, Task
from small_models import alpha
from torch import Tensor

from rxt_kernels import native_runtime
from rxt_model import RxTAlpha
from rxt_model.presets import preset
from tests.upstream.install import upstream_directory
from tests.upstream.runner import why_absent

LIMITS = Limits(3.2e10, 2.32e11, 4.67e11, "native")
BENCHMARKS = (decode, prefill, update, moe, train)
ROW = (
    "name",
    "model",
    "backend",
    "dtype",
    "threads",
    "shape",
    "p20",
    "p50",
    "p80",
    "floor",
    "ratio",
    "paired_ratio",
    "bound",
    "limits",
)


def costs(name: str) -> RxTCosts:
    configs = preset(name).configs
    return RxTCosts(configs["decoder"], configs["encoder"], configs["memory_attention"])


# floors


def test_floors_are_those_of_the_published_shapes() -> None:
    """What was known before anything was built: 32.6 M weights a token, 30.5 and 50.7 GFLOP, 66 without attention."""
    beta, plus = costs("rxt-beta-micro"), costs("rxt-alpha-micro-plus")
    assert beta.decode_weights() == pytest.approx(32.6e6, rel=5e-3)
    assert beta.prefill(512, 1024, 14 * 42, 4, 4).flops == pytest.approx(30.5e9, rel=0.03)
    assert beta.memory_update(1024) == pytest.approx(50.7e9, rel=5e-3)
    assert plus.training_step(8, 256) == pytest.approx(66e9, rel=0.12)
    one = beta.decode_step(1, 0, 0, 14 * 4, 4, 4)
    assert one.bytes == 4 * beta.decode_weights()
    assert floor(one, "float32", LIMITS).seconds == pytest.approx(4.1e-3, rel=0.01)
    half = beta.decode_step(1, 0, 0, 14 * 4, 2, 2)
    assert floor(half, "bfloat16", LIMITS).seconds == pytest.approx(2.05e-3, rel=0.01)


def test_a_step_reads_more_for_more_rows_slots_and_context() -> None:
    beta = costs("rxt-beta-micro")
    one = beta.decode_step(1, 100, 1024, 56, 4, 4)
    assert beta.decode_step(1, 100, 8192, 56, 4, 4).bytes - one.bytes == 14 * 2 * 7168 * 64 * 4
    assert beta.decode_step(1, 101, 1024, 56, 4, 4).bytes - one.bytes == 14 * 2 * 64 * 4
    assert beta.decode_step(1, 100, 1024, 57, 4, 4).bytes - one.bytes == 3 * 256 * 512 * 4
    eight = beta.decode_step(8, 100, 1024, 56, 4, 4)
    assert eight.flops == 8 * one.flops
    assert eight.bytes - 4 * beta.decode_weights(56) == 8 * (one.bytes - 4 * beta.decode_weights(56))


def test_a_prefill_is_an_answer_of_one_token_whose_memory_was_projected_before() -> None:
    """Answers are held to what torch counts in test_benchmarks.py."""
    beta = costs("rxt-beta-micro")
    projected = 14 * 1024 * 2 * 2 * 256 * 64
    assert beta.prefill(7, 1024, 56, 4, 4).flops == beta.answer(7, 1) - projected
    more = beta.prefill(7, 1030, 56, 4, 4)
    assert more.flops - beta.prefill(7, 1024, 56, 4, 4).flops == 14 * 7 * 6 * 4 * 128
    assert more.bytes == beta.decode_step(1, 0, 1030, 56, 4, 4).bytes


def test_the_floor_is_the_longer_of_reading_and_computing() -> None:
    assert floor(Work(32, 1), "float32", LIMITS) == (1e-9, "read_bandwidth")
    assert floor(Work(1, 232), "float32", LIMITS) == (1e-9, "fma")
    assert floor(Work(1, 467), "int8", LIMITS) == (1e-9, "bfloat16")
    widened = LIMITS._replace(bfloat16=1e9)
    assert floor(Work(1, 232), "bfloat16", widened) == (1e-9, "fma"), "bfloat16 can always be widened"
    config = preset("rxt-beta-micro").configs["decoder"]
    assert mixture_of_experts_work(config, 1, 4, 4).bytes == 4 * (42 * 256 + 4 * 3 * 256 * 512)
    assert mixture_of_experts_work(config, 64, 42, 2).flops == 64 * 2 * (42 * 256 + 4 * 3 * 256 * 512)


@pytest.mark.parametrize("is_native", [False, True])
def test_limits_are_measured_and_only_rise(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_MATRIX", 64)
    if not is_native:
        monkeypatch.setattr(native_runtime, "available", lambda: False)
    elif not native_runtime.available():
        pytest.skip(native_runtime.unavailable() or "")
    machine = Machine(1)
    with pytest.raises(RuntimeError, match="call sample first"):
        _ = machine.limits
    machine.sample()
    first = machine.limits
    assert first.source == ("native" if is_native else "torch")
    assert min(first[:3]) > 0
    machine.sample()
    assert all(new >= old for new, old in zip(machine.limits[:3], first[:3], strict=True))


@pytest.mark.usefixtures("every_instruction_set")
def test_native_limits_refuse_in_words() -> None:
    extension = native_runtime.extension
    assert extension.measure_fma_rate(1) > 1e8
    assert extension.measure_bfloat16_rate(1) > 1e8
    assert extension.measure_read_bandwidth(4100, 2) > 0
    for call in (lambda: extension.measure_fma_rate(0), lambda: extension.measure_read_bandwidth(8, 5000)):
        with pytest.raises(ValueError, match="threads is"):
            call()
    with pytest.raises(ValueError, match="bytes is 6"):
        extension.measure_read_bandwidth(6, 1)


# measuring


class KnownMachine(Machine):
    """A machine whose limits are known."""

    def __init__(self, threads: int) -> None:
        self.samples = 0

    def sample(self) -> Limits:
        """Slower every time, as a machine that others use more and more."""
        self.samples += 1
        return LIMITS._replace(read_bandwidth=LIMITS.read_bandwidth / self.samples)

    @property
    def limits(self) -> Limits:
        return LIMITS


EXPECTED = torch.tensor([1.0, 2.0, 4.0])


def system(
    backend: str,
    result: Callable[[], Tensor],
    dtype: str = "float32",
    seconds: float = 1.0,
    log: list[str] | None = None,
) -> System:
    def run() -> list[float]:
        if log is not None:
            log.append(backend)
        return [seconds]

    return System(backend, dtype, lambda: Task(result, run))


def case(*systems: System, **changes: Any) -> Case:
    return Case("decode", "any", 1, {"batch": 1}, EXPECTED, lambda dtype: Work(int(1.6e10), 1), systems, **changes)


def raises(error: Exception) -> Any:
    raise error


def test_a_wrong_result_is_not_timed() -> None:
    log: list[str] = []
    wrong = system("native", lambda: EXPECTED + torch.tensor([0.0, 0.0, 1e-3]), log=log)
    right = system("reference", lambda: EXPECTED)
    found = measuring.measure_case(case(right, wrong), KnownMachine(1), 3)
    assert [row["backend"] for row in found.rows] == ["reference"]
    assert not log
    (refused,) = found.refused
    assert refused["backend"] == "native"
    assert "differs from the reference by 0.00025 (granted is 0.0001), so it is not timed" in refused["reason"]


@pytest.mark.parametrize(
    "result",
    [lambda: EXPECTED * float("nan"), lambda: EXPECTED[:2], lambda: raises(RuntimeError("no\nmore"))],
    ids=["NaN", "another shape", "an error"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_fails_is_refused_and_the_others_go_on(result: Callable[[], Tensor], dtype: str) -> None:
    found = measuring.measure_case(
        case(system("native", result, dtype), system("reference", lambda: EXPECTED)), KnownMachine(1), 3
    )
    assert len(found.refused) == len(found.rows) == 1
    assert "\n" not in found.refused[0]["reason"]


def test_what_is_not_here_is_absent() -> None:
    absent = System("native", "float32", lambda: raises(Absent("it was not built.")))
    found = measuring.measure_case(case(system("reference", lambda: EXPECTED), absent), KnownMachine(1), 3)
    assert [one["reason"] for one in found.absent] == ["it was not built."]
    assert not found.refused


def test_half_precision_is_granted_twice_what_eager_torch_is_off_by() -> None:
    def off(backend: str, share: float) -> System:
        return system(backend, lambda: EXPECTED * (1 + share), "bfloat16")

    eager = off("reference", 0.01)
    good, bad = off("native", 0.027), off("torch.compile", 0.03)
    found = measuring.measure_case(case(eager, good, bad), KnownMachine(1), 3)
    assert [row["backend"] for row in found.rows] == ["reference", "native"]
    assert measuring.granted("bfloat16", "native", None) == 0.05
    # Where eager torch is no measure any more, it is refused, and nobody is measured by it.
    found = measuring.measure_case(case(off("reference", 0.3), off("native", 0.06)), KnownMachine(1), 3)
    assert [one["backend"] for one in found.refused] == ["reference", "native"]
    assert measuring.granted("int8", "native engine", 0.01) == 0.1


def test_eager_torch_is_asked_where_it_is_not_timed_in_half_precision() -> None:
    asked: list[str] = []

    def eager(dtype: str) -> Tensor:
        asked.append(dtype)
        return EXPECTED * 1.04

    systems = [
        system("reference", lambda: EXPECTED),
        System("reference", "bfloat16", lambda: raises(Absent("it takes too long."))),
        *(system("native", lambda: EXPECTED * 1.08, dtype) for dtype in ("float32", "bfloat16")),
        system("torch.compile", lambda: EXPECTED * 1.09, "bfloat16"),
    ]
    found = measuring.measure_case(replace(case(*systems), eager=eager), KnownMachine(1), 3)
    assert asked == ["bfloat16"]
    assert [(one["backend"], one["dtype"]) for one in found.rows[1:]] == [("native", "bfloat16")]
    assert [one["backend"] for one in found.refused] == ["native", "torch.compile"]


def test_rounds_are_interleaved_in_rotating_order_and_rows_say_everything() -> None:
    log: list[str] = []
    systems = [system(name, lambda: EXPECTED, seconds=at + 1.0, log=log) for at, name in enumerate("abc")]
    machine = KnownMachine(1)
    found = measuring.measure_case(case(*systems, weights=lambda dtype: int(8e9)), machine, 3)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"  # the first three are warm-up
    assert machine.samples == 3 * (1 + 3)  # before the first of a round and after each
    row = found.rows[1]
    assert set(ROW) <= set(row)
    assert (row["p20"], row["p50"], row["p80"], row["floor"], row["ratio"]) == (2.0, 2.0, 2.0, 0.5, 4.0)
    # System b was timed after samples 2, 5 and 11 of a machine that does its n-th part in sample n.
    assert row["paired_ratio"] == {"p20": 0.5382, "p50": 0.8, "p80": 1.52}
    assert (row["bound"], row["weights_floor"], row["weights_ratio"]) == ("read_bandwidth", 0.25, 8.0)


def test_time_limit_still_measures_three_rounds() -> None:
    found = measuring.measure_case(case(system("reference", lambda: EXPECTED)), KnownMachine(1), 9, stop_at=0.0)
    assert found.rows[0]["samples"] == 3
    assert not found.complete


def test_short_work_is_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: 0.001 * next(clock))
    done: list[int] = []
    run = measuring.timed(lambda: done.append(1), seconds=0.005)  # every look at the clock takes a millisecond
    before = len(done)
    assert run() == [pytest.approx(0.001 / 5)]
    assert len(done) - before == 5


# the commands, on tiny shapes


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model in the place of every preset, limits that take no time, no upstream."""
    model = alpha()
    configs = {
        "decoder": model.decoder.config,
        "encoder": model.encoder.config,
        "memory_attention": model.memory_attention.config,
    }
    monkeypatch.setattr(contenders, "build", lambda name: alpha())
    for module in (contenders, moe):
        monkeypatch.setattr(module, "preset", lambda name: SimpleNamespace(configs=configs))
    monkeypatch.setattr(running, "Machine", KnownMachine)
    monkeypatch.setattr(decode, "PROMPT", 6)
    monkeypatch.setattr(prefill, "DEFAULT_TOKENS", 9)
    monkeypatch.setattr(update, "DEFAULT_TOKENS", 9)
    monkeypatch.setattr(environment, "cores", lambda: 1)
    monkeypatch.setattr(running, "cores", lambda: 1)
    monkeypatch.setenv("RXT_UPSTREAM_DIR", str(tmp_path / "nothing"))


COMMAND = ["--short", "--repeats", "3", "--model", "rxt-alpha-micro", "--threads", "1"]
SMALL = {
    "decode": ["--batch", "1", "3", "--slots", "4", "9"],
    "prefill": [],
    "update": [],
    "moe": ["--tokens", "1", "5"],
    "train": ["--batch", "2", "--tokens", "6"],
}


@pytest.mark.parametrize("module", BENCHMARKS, ids=lambda module: module.NAME)
def test_command_measures_saves_and_draws(
    module: ModuleType, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    arguments = [*COMMAND, *SMALL[module.NAME], "--json", str(path), "--plot", str(tmp_path / "bars.png")]
    assert module.main(arguments) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    found = results.read_results(path, name=module.NAME)
    assert found.complete
    assert not found.summary["refused"]
    sizes = {json.dumps(row["shape"]) for row in found.rows}
    assert len(sizes) == {"decode": 4, "moe": 2}.get(module.NAME, 1)
    assert {row["backend"] for row in found.rows} >= {"reference"}
    for row in found.rows:
        assert set(ROW) <= set(row)
        assert row["ratio"] == pytest.approx(row["p50"] / row["floor"], rel=1e-2, abs=1e-4)
    assert "p50/floor" in printed
    absent = {(one["backend"], one["dtype"]) for one in found.summary["absent"]}
    measured = {(row["backend"], row["dtype"]) for row in found.rows}
    assert ("native", "float32") in absent | measured
    if module is not moe:
        assert ("upstream 0.3.92", "float32") in absent
    for drawn in ("bars.png", "bars-dark.png"):
        assert (tmp_path / drawn).read_bytes().startswith(b"\x89PNG")
    assert plotting.main([str(path), "--plot", str(tmp_path / "again.png")]) == 0


def test_rows_can_be_added_to_a_file(tiny: None, tmp_path: Path) -> None:
    path = str(tmp_path / "moe.json")
    assert moe.main([*COMMAND, "--tokens", "1", "--json", path]) == 0
    first = results.read_results(path)
    assert moe.main([*COMMAND, "--tokens", "5", "--json", path, "--add", "--backend", "padded bmm"]) == 0
    both = results.read_results(path)
    assert both.rows[: len(first.rows)] == first.rows
    assert {row["shape"]["tokens"] for row in both.rows} == {1, 5}
    assert {row["backend"] for row in both.rows if row["shape"]["tokens"] == 5} == {"reference", "padded bmm"}


def test_a_red_check_shows_in_the_exit_status(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = moe.padded
    monkeypatch.setattr(moe, "padded", lambda layer, top_k: honest(layer, top_k) * 1.01)
    path = tmp_path / "moe.json"
    assert moe.main([*COMMAND, "--tokens", "5", "--json", str(path), "--dtype", "float32"]) == 1
    assert "refused: padded bmm float32: its result differs" in capsys.readouterr().out
    found = results.read_results(path)
    assert [one["backend"] for one in found.summary["refused"]] == ["padded bmm"]
    assert "padded bmm" not in {row["backend"] for row in found.rows}


def test_an_interrupted_run_keeps_what_it_measured(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, cases = running.measure_case, itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> measuring.Measured:
        if next(cases) == 1:
            raise KeyboardInterrupt
        return honest(*arguments, **options)

    monkeypatch.setattr(running, "measure_case", interrupted)
    path = tmp_path / "moe.json"
    assert moe.main([*COMMAND, "--tokens", "1", "5", "--json", str(path)]) == 130
    found = results.read_results(path)
    assert not found.complete
    assert {row["shape"]["tokens"] for row in found.rows} == {1}


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (decode, ["--model", "sqat-m-sqa"], "model is 'sqat-m-sqa'"),
        (decode, ["--batch", "0"], "batch is 0"),
        (decode, ["--repeats", "2"], "repeats is 2"),
        (prefill, ["--tokens", "0"], "tokens is 0"),
        (update, ["--threads", "99"], "threads is 99"),
        (moe, ["--time-limit", "0"], "time limit is 0"),
        (train, ["--tokens", "1"], "tokens is 1"),
        (train, ["--add"], "--json"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(
    tiny: None, module: ModuleType, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert not printed.out


def test_options_choose_who_is_measured() -> None:
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    chosen = running.options_of(
        parser.parse_args(["--dtype", "bfloat16", "--backend", "native engine", "upstream", "--threads", "1"])
    )
    assert chosen.wants("reference", "float32"), "everything is compared with it"
    assert chosen.wants("native engine", "bfloat16")
    assert not chosen.wants("native engine", "float32")
    assert not chosen.wants("native", "bfloat16")
    assert not chosen.wants("upstream 0.3.92", "float32")


# who is compared


def test_padded_and_grouped_products_are_the_layer_also_with_an_empty_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    config = alpha().decoder.config
    for tokens in (1, 2, 11):
        layer = moe.make_layers(config, tokens, generator)[0]
        expected = moe.by_operation(layer, 2, "reference")
        assert torch.allclose(moe.padded(layer, 2), expected, atol=1e-5)
        assert torch.allclose(moe.grouped(layer, 2), expected, atol=1e-5)


def test_distinct_experts_are_those_of_every_layer() -> None:
    models = contenders_of_tiny()
    tokens, memory = models.tokens(2, 5), models.memory(2, 4)
    logits, chosen = contenders.definition(models.full.decoder, tokens, memory, 3)
    assert logits.shape == (2, 2, models.full.decoder.config.vocab_size)
    assert [layer.shape for layer in chosen] == [(2, 5, 2)] * 2
    assert 4 <= contenders.distinct_experts(chosen) <= 6


def contenders_of_tiny() -> contenders.Models:
    models = contenders.Models.__new__(contenders.Models)
    models.full, models.generator = alpha().eval(), torch.Generator().manual_seed(0)
    models._copies = {torch.float32: models.full}
    return models


def test_every_way_of_decoding_gives_the_same_logits() -> None:
    models = contenders_of_tiny()
    tokens, memory = models.tokens(2, 9), models.memory(2, 4)
    decoders = [contenders.module_decoder(models, memory, "reference", "float32", 9)]
    for dtype in ("float32", "bfloat16", "int8"):
        with contextlib.suppress(Absent):  # as long as this build has no such engine
            decoders.append(contenders.native_decoder(models, memory, dtype, 9))
    for one in decoders:
        found = [one.prefill(tokens[:, :6]).clone(), *(one.step(tokens[:, at]).clone() for at in (6, 7))]
        expected, _ = contenders.definition(models.full.decoder, tokens[:, :8], memory, 5)
        assert measuring.difference(torch.stack(found), expected, "bfloat16") < 0.1


def test_upstream_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RXT_UPSTREAM_DIR", str(tmp_path))
    models = contenders_of_tiny()
    systems = upstream.upstream_systems(models, "decode", models.tokens(1, 4), models.memory(1, 4))
    assert [one.backend for one in systems] == ["upstream 0.3.92", "upstream 0.3.92 stacked"]
    with pytest.raises(Absent, match="make upstream"):
        systems[0].make()


@pytest.mark.upstream
@pytest.mark.parametrize("work", ["decode", "prefill", "update", "train"])
@pytest.mark.parametrize("version", upstream.VERSIONS)
def test_upstream_is_measured_where_it_is_installed(version: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := why_absent(version)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("RXT_UPSTREAM_DIR", str(upstream_directory()))
    models = contenders_of_tiny()
    # The interlayer variant, which it has by default, is none that 0.3.92 can build.
    models.full = tiny_gated()
    tokens, memory = models.tokens(1, 9), models.memory(1, 4)
    known = None
    if work == "train":
        known = train._Expected(*train._Training(models, tokens, memory, "reference", "float32").result())
    systems = upstream.upstream_systems(models, work, tokens, memory, expected=known and known.norms)
    systems = [one for one in systems if version in one.backend]
    if (work, version) == ("decode", "0.2.31"):
        assert not systems
        return
    if work == "update":
        expected = models.full.memory_attention(models.full.encoder(tokens), None, memory)
    else:
        first = {"decode": 4, "prefill": 8, "train": 0}[work]
        expected = contenders.definition(models.full.decoder, tokens, memory, first)[0]
        expected = expected[0] if work == "prefill" else expected
    for one in systems:
        task = one.make()
        wanted = expected if task.expected is None else task.expected
        assert measuring.difference(task.result(), wanted.detach(), "float32") < 1e-4
        assert min(task.run()) > 0


def tiny_gated() -> RxTAlpha:
    model = alpha()
    configs = model.decoder.config, model.encoder.config, model.memory_attention.config
    return RxTAlpha(*configs, ALPHA_TOKENS, "gated-self-interlayer").eval()


def test_bars_need_ratios(tmp_path: Path) -> None:
    row = {"name": "x", "backend": "reference", "dtype": "float32", "shape": {}, "p20": 1.0, "p50": 2.0, "p80": 3.0}
    found = results.Results("scaling", {}, {}, {}, [row])
    with pytest.raises(ValueError, match="no ratios"):
        ratio_plot.plot_ratios(found, tmp_path / "bars.png")
