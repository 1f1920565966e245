"""Memory updates in the background: the same memory, later; nobody sees the one before, and nothing is lost."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ANSWER,
    EOS,
    alpha,
    beta,
    count_updates,
    fails_when_called,
    favour_end,
    messages,
    refusal,
    right_padded,
)

from rxt_kernels import use_backend
from rxt_kernels.dispatch import preferred_backend
from rxt_model import MemoryUpdateError, RxTAlpha, RxTBeta
from rxt_model.background import BackgroundTask

Model = RxTAlpha | RxTBeta
PROMPT = messages([5])[0]
CPU = torch.device("cpu")
PATIENCE = 60.0


def start(model: Model, **options: Any) -> Iterator[int]:
    defaults = {"temperature": 0.0, "max_seq_len": 16, "async_memory": True}
    return model.interact(torch.tensor([PROMPT]), **{**defaults, **options})


class Gate:
    """Holds every memory update of a model back until it is opened."""

    def __init__(self, model: Model) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        model.memory_attention.register_forward_pre_hook(self._hold)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return self  # a copy of the model is held back as well

    def _hold(self, *_: Any) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE), "the gate was never opened"


@contextmanager
def update_under_way(model: Model) -> Iterator[Gate]:
    """After an interaction whose update has begun and cannot end until the block does."""
    gate = Gate(model)
    list(start(model))
    assert gate.reached.wait(PATIENCE)
    try:
        yield gate
    finally:
        gate.opened.set()


def in_another_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call something elsewhere; what it returns or raises comes into the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def run_program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of its own that knows the helpers of these tests."""
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", head + text, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parent.parent
    )


# -- the same, later ------------------------------------------------------------------------------------------------------


def test_the_stream_ends_before_the_update() -> None:
    model = alpha()
    before = model.export_stm_state()
    with update_under_way(model) as gate:
        assert torch.equal(model.stm.state, before)
        assert model.stm.batch_size == 1, "the number of conversations is known without waiting"
        stream = start(model)  # arguments are checked without waiting
        assert not gate.opened.is_set()
    assert model.turns == 1
    assert not torch.equal(model.stm.memory, before)
    assert list(stream)[-2:] == [-1, -2]
    assert model.turns == 2


def test_what_is_yielded_is_what_is_yielded_without() -> None:
    model = alpha()
    yielded = []
    with_gate = Gate(model)
    for token in start(model):
        yielded.append(token)
        if token == -1:
            assert with_gate.reached.wait(PATIENCE), "the update begins before -1"
    assert yielded == list(start(alpha(), async_memory=False))
    with_gate.opened.set()
    model.finish_memory_update()
    model.finish_memory_update()  # nothing to wait for


@pytest.mark.parametrize("make", [alpha, beta])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_answers_and_memory_are_those_of_the_synchronous_update(
    make: Callable[[], Model], mode: Callable[[], Any]
) -> None:
    here, there = make(), make()
    for turn in range(3):
        options = {"temperature": 0.9, "seed": turn, "max_seq_len": 20}
        with mode():
            assert list(start(there, **options)) == list(start(here, async_memory=False, **options))
    assert here.turns == there.turns == 3
    assert torch.equal(here.export_stm_state(), there.export_stm_state())
    memory = there.stm.memory
    assert not memory.is_inference()
    assert not memory.requires_grad


@pytest.mark.parametrize("streamed", [True, False])
def test_batches(streamed: bool) -> None:
    prompts = right_padded(messages([2, 7]))
    options: dict[str, Any] = {"seed": 5, "max_seq_len": 20}
    here, there = alpha(), alpha()
    for model in (here, there):
        favour_end(model, 3.0)
        model.set_batch_mode(True, batch_size=2)
    for _ in range(2):
        answers = []
        for model, wanted in ((here, False), (there, True)):
            if streamed:
                answers.append(torch.stack(list(model.batch_interact(**prompts, **options, async_memory=wanted))))
            else:
                answers.append(model.batch_interactions(**prompts, **options, async_memory=wanted)[0])
        assert torch.equal(*answers)
    assert here.turns == there.turns == 2
    assert torch.equal(here.stm.memory, there.stm.memory)


def test_batched_answers_come_back_before_the_update() -> None:
    model = alpha()
    model.set_batch_mode(True, batch_size=2)
    gate = Gate(model)
    ids, _ = model.batch_interactions(torch.tensor(messages([4, 4])), max_seq_len=14, async_memory=True)
    assert ids.shape == (2, 14)
    assert not gate.opened.is_set()
    gate.opened.set()
    assert model.turns == 1


def test_the_next_turn_waits_and_reads_the_new_memory() -> None:
    model, expected = alpha(), alpha()
    events: list[str] = []
    model.memory_attention.register_forward_hook(lambda *_: events.append("written"))
    model.decoder.model.layers[0].register_forward_pre_hook(lambda *_: events.append("read"))
    with update_under_way(model) as gate:
        events.clear()
        thread, outcome = in_another_thread(lambda: list(start(model, seed=1)))
        time.sleep(0.05)
        assert not events
        assert thread.is_alive()
        gate.opened.set()
        thread.join(PATIENCE)
    assert events[:2] == ["written", "read"]
    list(start(expected, async_memory=False))
    assert outcome == [list(start(expected, seed=1, async_memory=False))]


# -- whoever needs the memory, or the weights, waits ----------------------------------------------------------------------


def save_conversation(model: Model, directory: Path) -> None:
    assert model.save_conversation(directory / "talk.st")
    assert alpha().load_conversation(directory / "talk.st").turns == 1


WAITING: dict[str, Callable[[Model, Path], Any]] = {
    "finish_memory_update": lambda model, _: model.finish_memory_update(),
    "export_stm_state": lambda model, _: model.export_stm_state(),
    "load_stm_state": lambda model, _: model.load_stm_state(torch.zeros(2, 1, 8, 32)),
    "reset_stm": lambda model, _: model.reset_stm(seed=1),
    "init_stm_state": lambda model, _: model.init_stm_state(torch.tensor([PROMPT])),
    "init_model": lambda model, _: model.init_model("the cat"),
    "batch mode": lambda model, _: model.set_batch_mode(True, batch_size=2),
    "no batch mode": lambda model, _: model.set_batch_mode(False),
    "save_conversation": save_conversation,
    "turns": lambda model, _: model.turns,
    "set turns": lambda model, _: setattr(model, "turns", 7),
    "memory": lambda model, _: model.stm.memory,
    "decoder's memory": lambda model, _: model.decoder.stm.memory,
    "memory attention's memory": lambda model, _: model.memory_attention.stm.memory,
    "stm.export": lambda model, _: model.stm.export(),
    "stm.reset": lambda model, _: model.stm.reset(seed=2),
    "stm.average": lambda model, _: model.stm.average(),
    "stm.to": lambda model, _: model.stm.double(),
    "project_memory": lambda model, _: model.decoder.project_memory(),
    "forward": lambda model, _: model(torch.tensor([PROMPT])),
    "forward with gradients": lambda model, _: model(torch.tensor([PROMPT]), None, torch.zeros(2, 1, 8, 32)),
    "to": lambda model, _: model.to(torch.float64),
    "decoder.to": lambda model, _: model.decoder.to(torch.bfloat16),
    "encoder.to": lambda model, _: model.encoder.to(torch.bfloat16),
    "memory_attention.to": lambda model, _: model.memory_attention.to(torch.bfloat16),
    "encoder.train": lambda model, _: model.encoder.train(),
    "encoder.load_state_dict": lambda model, _: model.encoder.load_state_dict(alpha(1).encoder.state_dict()),
    "deepcopy of the encoder": lambda model, _: copy.deepcopy(model.encoder),
    "train": lambda model, _: model.train(),
    "eval": lambda model, _: model.eval(),
    "state_dict": lambda model, _: model.state_dict(),
    "load_state_dict": lambda model, _: model.load_state_dict(alpha(1).state_dict()),
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "deepcopy of a part": lambda model, _: copy.deepcopy(model.decoder),
    "pickle": lambda model, _: pickle.dumps(model.stm),
    "batch_interact": lambda model, _: next(model.batch_interact(torch.tensor([PROMPT]), max_seq_len=12)),
}


@pytest.mark.parametrize("name", WAITING)
def test_whoever_needs_memory_or_weights_waits(name: str, tmp_path: Path) -> None:
    model = alpha()
    with update_under_way(model) as gate:
        update = model.stm._update
        assert update is not None
        thread, outcome = in_another_thread(lambda: (WAITING[name](model, tmp_path), update._thread.is_alive()))
        thread.join(0.03)
        assert thread.is_alive(), outcome
        gate.opened.set()
        thread.join(PATIENCE)
    assert isinstance(outcome[0], tuple), outcome
    assert not outcome[0][1], "it came back before the update had ended"


def test_replacing_the_memory_replaces_the_updated_one() -> None:
    model = alpha()
    state = torch.ones(2, 1, 8, 32)
    with update_under_way(model) as gate:
        threading.Timer(0.05, gate.opened.set).start()
        model.load_stm_state(state)
    assert torch.equal(model.export_stm_state(), state)
    assert model.turns == 1, "as after an update that was waited for before"


def test_copies_hold_the_updated_memory_and_talk_on_their_own() -> None:
    model = alpha()
    list(start(model))
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model.stm))
    assert torch.equal(loaded.memory, model.stm.memory)
    assert torch.equal(twin.stm.memory, model.stm.memory)
    assert list(start(twin)) == list(start(model))
    assert twin.turns == model.turns == 2
    # A copy waits for its own updates and for no others.
    with update_under_way(twin) as gate:
        waiting = [in_another_thread(part.state_dict)[0] for part in (twin, twin.encoder)]
        assert model.state_dict()
        assert model.encoder.state_dict()
        assert copy.deepcopy(model.encoder).state_dict()
        time.sleep(0.03)
        assert all(thread.is_alive() for thread in waiting)
        gate.opened.set()
        for thread in waiting:
            thread.join(PATIENCE)


# -- streams that end early -----------------------------------------------------------------------------------------------


def close(stream: Iterator[int]) -> None:
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def drop(stream: Iterator[int]) -> None:
    for number, _ in enumerate(stream):
        if number == 2:
            break


def stop_at_the_end_token(stream: Iterator[int]) -> None:
    for token in stream:
        if token == EOS:
            break


def stop_at_the_update(stream: Iterator[int]) -> None:
    for token in stream:
        if token == -1:
            break


def throw(stream: Iterator[int]) -> None:
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [list, close, drop, stop_at_the_end_token, stop_at_the_update, throw])
@pytest.mark.parametrize("end_bias", [0.0, 50.0])
def test_one_update_however_reading_ends(stop: Callable[[Iterator[int]], None], end_bias: float) -> None:
    models = alpha(), alpha()
    for model, wanted in zip(models, (True, False), strict=True):
        favour_end(model, end_bias)
        updates = count_updates(model)
        stream = start(model, async_memory=wanted)
        stop(stream)
        del stream
        assert model.turns == 1
        assert len(updates) == 1
        assert updates[0][0].tolist()[: len(PROMPT) + 1] == [*PROMPT, ANSWER]
    assert torch.equal(models[0].stm.memory, models[1].stm.memory)


def test_closing_does_not_wait_and_an_open_answer_is_settled() -> None:
    model = alpha()
    gate = Gate(model)
    close(start(model))
    assert gate.reached.wait(PATIENCE)
    gate.opened.set()
    stream = start(model)
    next(stream)
    model.export_stm_state()
    assert model.turns == 2
    with refusal(RuntimeError, "another interaction"):
        next(stream)
    assert model.turns == 2


def test_an_answer_that_is_dropped_before_its_update_is_not_written() -> None:
    model = alpha()
    updates = count_updates(model)
    stream = start(model)
    next(stream)
    model.reset_stm("zeros")
    with suppress(RuntimeError):
        next(stream)
    assert not updates
    assert model.turns == 0


# -- updates that fail ----------------------------------------------------------------------------------------------------


def break_update(model: Model, error: BaseException) -> None:
    """Make the next update fail, and no other."""
    forward = model.memory_attention.forward

    def fail(*_arguments: Any) -> Any:
        model.memory_attention.forward = forward  # type: ignore[method-assign]
        raise error

    model.memory_attention.forward = fail  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, RuntimeError("broken")) for name in WAITING),
        *(("batch_interact", error) for error in (KeyboardInterrupt(), SystemExit(3), MemoryError())),
    ],
)
def test_a_failed_update_is_told_by_the_next_call_and_changes_nothing(
    name: str, error: BaseException, tmp_path: Path
) -> None:
    model = alpha()
    before = model.export_stm_state()
    break_update(model, error)
    assert list(start(model))[-2:] == [-1, -2]
    with refusal(MemoryUpdateError, type(error).__name__, "as it was before"):
        WAITING[name](model, tmp_path)
    assert torch.equal(model.export_stm_state(), before), "said once, and the call that was told did nothing"
    assert model.turns == 0
    assert list(start(model))[-1] == -2
    assert model.turns == 1


def test_the_cause_is_kept() -> None:
    model = alpha()
    error = RuntimeError("broken")
    break_update(model, error)
    list(start(model))
    with pytest.raises(MemoryUpdateError) as caught:
        model.finish_memory_update()
    assert caught.value.__cause__ is error
    assert "RuntimeError: broken" in str(caught.value)


def test_weights_that_make_the_memory_infinite_are_reported() -> None:
    model = alpha()
    before = model.export_stm_state()
    with torch.no_grad():
        model.memory_attention.model.attention_layers[0].out_proj.bias.fill_(float("inf"))
    list(start(model))
    with refusal(MemoryUpdateError, "NaN or infinite"):
        model.export_stm_state()
    assert torch.equal(model.export_stm_state(), before)


def test_a_failure_that_nobody_waited_for_is_logged_when_the_model_is_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = alpha()
    break_update(model, RuntimeError("broken"))
    list(start(model))
    update = model.stm._update
    assert update is not None
    update._thread.join()
    known = weakref.ref(model)
    del model, update
    gc.collect()
    assert known() is None
    assert "memory update failed" in caplog.text
    assert "RuntimeError: broken" in caplog.text


def test_a_failure_that_was_told_is_not_logged_as_well(caplog: pytest.LogCaptureFixture) -> None:
    model = alpha()
    break_update(model, RuntimeError("broken"))
    list(start(model))
    with pytest.raises(MemoryUpdateError):
        model.finish_memory_update()
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
    assert not caplog.records


@pytest.mark.parametrize("wanted", ["yes", 1, None])
def test_other_values_are_refused(wanted: Any) -> None:
    model = alpha()
    with refusal(TypeError, "async_memory", repr(wanted)):
        start(model, async_memory=wanted)


# -- the exit -------------------------------------------------------------------------------------------------------------

SLOW_UPDATE = """
import atexit, threading, time
from pathlib import Path
import torch
from helpers import alpha, messages
model, message = alpha(), torch.tensor(messages([5]))
written = Path(sys.argv[1])
def slowly(*_):
    time.sleep(0.5)
def note(memory):
    load(memory)
    written.write_text(f"{model._turns + 1} {threading.current_thread().name}")
model.memory_attention.register_forward_pre_hook(slowly)
load, model.stm.load = model.stm.load, note
"""

TALK = "list(model.interact(message, max_seq_len=12, async_memory=True))"
ENDINGS = {
    "end": ("", "1 memory update"),
    "SystemExit in the middle": (f"{TALK.replace('list', 'next')}; raise SystemExit", "2 memory update"),
    "error": ("raise ValueError('the end')", "1 memory update"),
    "a last word": (f"atexit.register(lambda: {TALK})", "2 MainThread"),
    "another thread": (f"threading.Thread(target=lambda: [time.sleep(1), {TALK}]).start()", "2 memory update"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_exit_finishes_the_update(ending: str, tmp_path: Path) -> None:
    last_lines, written = ENDINGS[ending]
    program = f"{SLOW_UPDATE}{TALK}\nassert not written.exists()\n{last_lines}"
    done = run_program(program, tmp_path / "written")
    assert done.returncode == (1 if ending == "error" else 0), done.stderr
    assert ("ValueError: the end" in done.stderr) == (ending == "error")
    assert (tmp_path / "written").read_text() == written


def test_an_answer_that_is_open_at_the_exit_keeps_nobody_waiting(tmp_path: Path) -> None:
    talk = "stream = model.interact(message, max_seq_len=12, async_memory=True)\nnext(stream)\n"
    done = run_program(SLOW_UPDATE + talk, tmp_path / "written")
    assert done.returncode == 0, done.stderr


def test_an_exit_tells_of_a_failed_update(tmp_path: Path) -> None:
    program = SLOW_UPDATE + (
        "def fail(*_): raise RuntimeError('broken')\n"
        "model.memory_attention.register_forward_pre_hook(fail)\n"
        "list(model.interact(message, max_seq_len=12, async_memory=True))\n"
    )
    done = run_program(program, tmp_path / "written")
    assert done.returncode == 0
    assert "memory update failed in the background" in done.stderr
    assert "RuntimeError: broken" in done.stderr
    assert not (tmp_path / "written").exists()


# -- threads --------------------------------------------------------------------------------------------------------------


def surroundings() -> tuple[Any, ...]:
    return (
        preferred_backend(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_num_threads(),
    )


def test_the_thread_computes_under_the_callers_settings() -> None:
    seen: list[Any] = []
    blocks: list[Callable[[], Any]] = [
        torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: use_backend("reference"),
        lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.autocast("cpu", torch.float16),
    ]  # fmt: skip
    for block in blocks:
        with block():
            task = BackgroundTask(lambda: seen.append(surroundings()), CPU, name="test")
            assert task.wait() is None
            assert seen.pop() == surroundings()


def test_a_model_is_updated_under_the_callers_settings() -> None:
    model = alpha()
    seen: list[Any] = []
    model.memory_attention.register_forward_pre_hook(lambda *_: seen.append(surroundings()))
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        expected = surroundings()
        list(start(model))
        list(start(model, async_memory=False))
        model.finish_memory_update()
    assert seen[0] == seen[1]
    assert seen[0][0] == expected[0] == "reference"
    assert seen[0][1] is False, "a memory has no history"
    assert seen[0][3:] == expected[3:]


def test_openmp_is_given_as_many_threads_as_the_caller_has() -> None:
    """A new thread starts with OpenMP's default, which kernels that do not ask torch would take."""
    program = """
import ctypes, torch
from pathlib import Path
from rxt_model.background import BackgroundTask
libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line]
if not libraries: sys.exit("skipped")
openmp = ctypes.CDLL(libraries[0])
seen = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    BackgroundTask(lambda: seen.append(openmp.omp_get_max_threads()), torch.device("cpu"), name="test").wait()
print(seen)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("libraries are looked up as Linux lists them")
    done = run_program(program)
    if "skipped" in done.stderr:
        pytest.skip("this torch has no libgomp")
    assert done.stdout.strip() == "[1, 2, 3]", done.stderr


def test_two_models_in_two_threads() -> None:
    def talk(model: Model, wanted: bool) -> list[Any]:
        tokens = [
            list(start(model, seed=turn, temperature=1.0, max_seq_len=24, async_memory=wanted)) for turn in range(6)
        ]
        return [tokens, model.export_stm_state(), model.turns]

    expected = [talk(model, False) for model in (alpha(), beta())]
    threads = [in_another_thread(lambda model=model: talk(model, True)) for model in (alpha(), beta())]
    for (thread, outcome), wanted in zip(threads, expected, strict=True):
        thread.join(PATIENCE)
        tokens, memory, turns = outcome[0]
        assert tokens == wanted[0]
        assert torch.equal(memory, wanted[1])
        assert turns == 6


def test_where_no_thread_can_be_started_the_update_happens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = alpha(), alpha()
    list(start(expected, async_memory=False))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails_when_called(RuntimeError("can't start new thread")))
        list(start(model))
        assert torch.equal(model.stm.state, expected.stm.memory)
    assert model.turns == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_does_the_work_itself() -> None:
    release, done = threading.Event(), threading.Event()

    def work() -> None:
        assert release.wait(PATIENCE)
        done.set()

    task = BackgroundTask(work, CPU, name="test")
    child = os.fork()
    if child == 0:  # pragma: no cover  # the other process
        release.set()
        os._exit(0 if task.wait() is None and done.is_set() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not done.is_set()
    release.set()
    assert task.wait() is None


def test_several_threads_may_wait_and_one_is_told() -> None:
    model = alpha()
    gate = Gate(model)
    break_update(model, RuntimeError("broken"))
    list(start(model))
    waiting = [in_another_thread(model.finish_memory_update) for _ in range(4)]
    gate.opened.set()
    for thread, _ in waiting:
        thread.join(PATIENCE)
    assert sorted(type(outcome[0]).__name__ for _, outcome in waiting) == ["MemoryUpdateError", *["NoneType"] * 3]


def test_a_model_that_is_forgotten_is_freed_after_its_update() -> None:
    model = alpha()
    with update_under_way(model) as gate:
        update = model.stm._update
        assert update is not None
        thread, known = update._thread, weakref.ref(model)
        del model, update
        gc.collect()
        assert known() is not None, "the update needs it"
        gate.opened.set()
        thread.join(PATIENCE)
    del gate
    gc.collect()
    assert known() is None


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_a_compiled_model_waits() -> None:
    model = alpha()
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        compiled(ids)
        with update_under_way(model) as gate:
            threading.Timer(0.05, gate.opened.set).start()
            logits = compiled(ids)
        assert model.turns == 1
        torch.testing.assert_close(logits, model(ids))
